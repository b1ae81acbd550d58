"""What one daemon gets of a machine's memory, from the moment it is given until it is taken back.

with MemoryManager(config, shareable=True) as manager, Frontend.connect(path, features=...) as frontend:
    share = manager.share(frontend)
    print(share.plan)
    ...                                       # start rings; plug and unplug
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

from vhost_user.frontend import Frontend, SharedRegion
from vhost_user.frontend.plan import HotplugRegion, SlotPlan, plan_slots
from vhost_user.units import ByteCount
from virtio_mem.managed_zone import ManagedZone, SharedPart
from virtio_mem.service import DeviceService
from virtio_mem.sharing.check import require_shared
from virtio_mem.sharing.daemon import Daemon
from virtio_mem.sharing.slots import PluggedSlots, region_of

MOST_REGIONS = 4096
"""Regions that a daemon gets at most, whatever it says it takes. Each costs a round trip, some 100 microseconds, when
everything is unplugged, and the guest waits for all of them."""


class HotplugSharing(Enum):
    """How much of a hotplug region a daemon has."""

    PLUGGED = "plugged"
    """The slots that have a plugged block."""

    WHOLE = "whole"
    """All of it, always: one region, and no protection of what is unplugged."""


@dataclass(frozen=True)
class _SharedZone:
    """A zone as the daemon has it; `slots` follow its device, and are None where the region is shared whole."""

    zone: ManagedZone
    always: tuple[SharedRegion, ...]
    whole: SharedPart | None
    slots: PluggedSlots | None

    def regions(self) -> list[SharedRegion]:
        return [*self.always, *(self.slots.regions() if self.slots else ())]

    def info(self) -> dict[str, int]:
        """Bytes of boot memory and of the hotplug region that are shared, and how many of the latter are unplugged."""
        slots = self.slots.regions() if self.slots else []
        hotplug = sum(region.size for region in slots) + (self.whole.size if self.whole else 0)
        plugged = self.zone.service.device.plugged_size if self.zone.service else 0
        slot_size = self.slots.slot_size if self.slots else 0
        return {
            "boot": sum(region.size for region in self.always) - (self.whole.size if self.whole else 0),
            "hotplug": hotplug,
            "slot_size": self.whole.size if self.whole else slot_size,
            "slots": len(slots) + (self.whole is not None),
            "shared_unplugged": hotplug - plugged,
        }


class MemoryShare:
    """Shares `zones` with the daemon at `frontend`; `MemoryManager.share()` makes one. `close()` takes all of it back.

    `plan` says how large slots are. Raises UsageError for a private zone, where the daemon takes too few regions even
    for whole ones, and where it has other memory at the same addresses; Refused and its like where the daemon won't
    have it. Nothing is shared then.
    """

    def __init__(self, frontend: Frontend, zones: Sequence[ManagedZone], *, hotplug: HotplugSharing, name: str) -> None:
        require_shared(zones)
        self.name = name
        self.frontend = frontend
        self.hotplug = hotplug
        self.closed = False
        self._daemon = Daemon(frontend, name)
        self.plan = self._plan(zones)
        services = [zone.service for zone in zones if zone.service]
        with _locked(services):
            self._zones = [self._shared(zone) for zone in zones]
            frontend.regions.share(self._regions())
            for service, slots in self._followed():
                service.listeners.append(slots)

    def _plan(self, zones: Sequence[ManagedZone]) -> SlotPlan:
        regions = self.frontend.regions
        free = min(regions.slots - len(regions), MOST_REGIONS)
        hotplug = [
            HotplugRegion(zone.id, geometry.region_size, geometry.block_size)
            for zone in zones
            if zone.service
            for geometry in (zone.service.device.geometry,)
        ]
        boot = sum(len(zone.boot) for zone in zones)
        return plan_slots(free, boot, hotplug, whole=self.hotplug is HotplugSharing.WHOLE)

    def _shared(self, zone: ManagedZone) -> _SharedZone:
        parts = list(zone.shared_parts())
        hotplug = next((part for part in parts if part.hotplug), None)
        always = tuple(region_of(part) for part in parts if not part.hotplug)
        if hotplug is None or zone.service is None:
            return _SharedZone(zone, always, None, None)
        if self.hotplug is HotplugSharing.WHOLE:
            return _SharedZone(zone, (*always, region_of(hotplug)), hotplug, None)
        slots = PluggedSlots(self._daemon, hotplug, zone.service.device, self.plan.slot_size(zone.id))
        return _SharedZone(zone, always, None, slots)

    def _regions(self) -> list[SharedRegion]:
        return [region for shared in self._zones for region in shared.regions()]

    def _followed(self) -> Iterator[tuple[DeviceService, PluggedSlots]]:
        for shared in self._zones:
            if shared.zone.service and shared.slots:
                yield shared.zone.service, shared.slots

    @property
    def connected(self) -> bool:
        """Whether the daemon is there, as far as can be seen without asking it."""
        return self._daemon.connected

    @property
    def lingering(self) -> bool:
        """Whether the daemon gave no answer and has not closed its end: no slot that it has can be unplugged then."""
        return self._daemon.lingering

    def info(self) -> dict[str, Any]:
        """What the daemon has, as plain data; sizes in bytes. One that is gone has nothing."""
        with _locked([shared.zone.service for shared in self._zones if shared.zone.service]):
            connected, lingering = self.connected, self.lingering
            there = connected or lingering
            zones = {shared.zone.id: shared.info() for shared in self._zones if there}
            return {
                "name": self.name,
                "connected": connected,
                "lingering": lingering,
                "sharing": self.hotplug.value,
                "plan": str(self.plan),
                "regions": len(self.frontend.regions) if there else 0,
                "max_regions": self.frontend.regions.slots,
                "shared": ByteCount(sum(zone["boot"] + zone["hotplug"] for zone in zones.values())),
                "shared_unplugged": ByteCount(sum(zone["shared_unplugged"] for zone in zones.values())),
                "zones": zones,
            }

    def close(self) -> None:
        """Take everything back; closing twice is allowed. Stop the rings first.

        A daemon that won't give it back, or whose rings run in it, loses the connection.
        """
        with _locked([shared.zone.service for shared in self._zones if shared.zone.service]):
            if self.closed:
                return
            self.closed = True
            for service, slots in self._followed():
                service.listeners.remove(slots)
            self._daemon.take_for_good(self._regions())


@contextmanager
def _locked(services: Sequence[DeviceService]) -> Iterator[None]:
    """No request is served meanwhile. Always in the order of the zones, so that two who do this never block."""
    with ExitStack() as locks:
        for service in services:
            locks.enter_context(service.lock)
        yield
