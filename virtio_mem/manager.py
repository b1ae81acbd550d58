"""A machine's memory as a whole: from its options to zones, devices, and a guest-physical address space.

The manager makes what the options ask for or nothing at all, places it, and gives each hotpluggable zone a virtio-mem
device in service. It has no transport: who embeds it puts each zone's `service` behind one.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from itertools import count
from typing import Any

from vhost_user.errors import FieldError, UsageError
from vhost_user.frontend import Frontend
from vhost_user.mapping import PAGE_SIZE
from vhost_user.memory import GuestMemory, Region
from vhost_user.units import ByteCount, format_size
from virtio_mem.config import HotplugMethod, VmMemoryConfig, ZonePlan
from virtio_mem.device import VirtioMemDevice
from virtio_mem.geometry import Geometry, UsableRegion, default_block_size, require_policy, require_whole
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.layout import Layout, ZoneSize, lay_out
from virtio_mem.managed_zone import ManagedZone, SharedPart
from virtio_mem.service import DeviceService
from virtio_mem.sharing import HotplugSharing, MemoryShare, require_shareable
from virtio_mem.sharing.check import require_known
from virtio_mem.targets import hotplugged_part
from virtio_mem.zone import Zone

log = logging.getLogger(__name__)

_OPTION_OF = {"region_size": "hotplug_size", "requested_size": "hotplugged_size"}
"""A device's sizes, by the option that sets them."""


class MemoryManager:
    """All the memory of one machine. Close it, or use it as a context manager.

    `block_size` in bytes overrides each device's default; `usable_region` is the policy of all devices. With
    `shareable` a zone that no daemon could be given is refused. Raises ConfigError or UsageError for options that can't
    be met, HostError where this host can't; then nothing is left open.
    """

    def __init__(
        self,
        config: VmMemoryConfig,
        *,
        block_size: int | None = None,
        usable_region: UsableRegion = UsableRegion.REQUESTED_PLUS_SLACK,
        shareable: bool = False,
    ) -> None:
        if not isinstance(config, VmMemoryConfig):
            limit = "has to be a VmMemoryConfig"
            raise UsageError("config", type(config).__name__, limit, "make one by VmMemoryConfig.parse")
        if block_size is not None:
            require_whole("block_size", block_size)
        require_policy(usable_region)
        if shareable:
            require_shareable(config)
        self.config = config
        self.block_size = block_size
        self.usable_region = usable_region
        self._shares: list[MemoryShare] = []
        self._sharing = threading.Lock()
        self._numbers = count(1)
        self._closed = False
        for warning in config.warnings:
            log.warning("%s", warning)
        with ExitStack() as undo:
            plans = config.zone_plans()
            zones = [undo.enter_context(_zone(plan)) for plan in plans]
            _check_files(zones)
            block_sizes = [_block_size(zone, block_size) for zone in zones]
            self.layout = lay_out(map(_zone_size, plans, zones, block_sizes))
            self.zones = {
                plan.spec.id: _managed(plan, zone, self.layout, size, usable_region)
                for plan, zone, size in zip(plans, zones, block_sizes, strict=True)
            }
            self.guest_memory = GuestMemory(_regions(self.zones.values()))
            undo.pop_all()

    # Resizing.

    def resize(self, size: int) -> None:
        """Let the machine have `size` bytes in all: boot memory, and the rest by virtio-mem.

        Refused with user-defined zones, as in Cloud Hypervisor: they are resized one by one. Raises UsageError, and
        changes nothing, for a size below boot memory, above what can be plugged, or between two blocks.
        """
        if self.config.user_zones:
            limit = "a machine with --memory-zone has no size of its own to set"
            raise UsageError("resize", size, limit, "resize its zones by resize_zone")
        (zone,) = self.zones.values()
        self._resize(zone, size, "resize")

    def resize_zone(self, zone_id: str, size: int) -> None:
        """Let zone `zone_id` have `size` bytes in all, boot memory included. The size that it has already is fine.

        Raises UsageError, and changes nothing, as `resize` does, and for a zone that doesn't exist.
        """
        if zone_id not in self.zones:
            raise UsageError("zone", zone_id, f"has to be one of {', '.join(self.zones)}", "name a zone that there is")
        self._resize(self.zones[zone_id], size, f"zone {zone_id} size")

    def _resize(self, zone: ManagedZone, size: int, field: str) -> None:
        self._require_open()
        spec, service = zone.plan.spec, zone.service
        block_size = service.device.geometry.block_size if service else None
        plugged = hotplugged_part(
            field, size, boot_size=spec.size, hotplug_size=spec.hotplug_size, block_size=block_size
        )
        if service is not None:
            service.resize(plugged)

    # In service.

    def poll(self, now: float) -> None:
        """To be called about once a second; see `DeviceService.poll`."""
        for zone in self.zones.values():
            if zone.service:
                zone.service.poll(now)

    def system_reset(self) -> bool:
        """The machine is reset: unplug everything. False where the host refused to, for one zone or more. A machine
        with transports resets those, and they their devices."""
        done = [zone.service.system_reset() for zone in self.zones.values() if zone.service]
        return all(done)

    def pause(self) -> None:
        """Have every device answer BUSY to what would change a block, until `resume()`."""
        for zone in self.zones.values():
            if zone.service:
                zone.service.pause()

    def resume(self) -> None:
        """Have every device serve again."""
        for zone in self.zones.values():
            if zone.service:
                zone.service.resume()

    def shared_parts(self) -> list[SharedPart]:
        """What other processes can map, by ascending guest address. Private zones have none."""
        parts = [part for zone in self.zones.values() for part in zone.shared_parts()]
        return sorted(parts, key=lambda part: part.addr)

    # Daemons.

    def share(
        self,
        frontend: Frontend,
        *,
        zones: Collection[str] | None = None,
        hotplug: HotplugSharing = HotplugSharing.PLUGGED,
        name: str = "",
    ) -> MemoryShare:
        """Share the zones of these names, or all, with the daemon at `frontend`, until the share is closed.

        `name` is what the daemon is called in errors and in `info()`. A daemon that was gone has what is plugged again
        after `frontend.reconnect()`. Raises as `MemoryShare` does, and UsageError for a zone that doesn't exist.
        """
        self._require_open()
        require_known(zones, self.zones)
        chosen = [zone for zone_id, zone in self.zones.items() if zones is None or zone_id in zones]
        share = MemoryShare(frontend, chosen, hotplug=hotplug, name=name or f"{next(self._numbers)}")
        with self._sharing:
            late = self._closed
            if not late:
                self._shares = [*self.shares, share]
        if late:  # closed by another thread: nobody else would take it back
            share.close()
            self._require_open()
        return share

    @property
    def shares(self) -> list[MemoryShare]:
        """The daemons that have memory, or are to get it when they come back."""
        return [share for share in self._shares if not share.closed]

    # Information.

    def info(self) -> dict[str, Any]:
        """All that there is to know, as plain data: options, zones, devices, bytes held by the host, daemons."""
        return {
            "options": str(self.config),
            "warnings": list(self.config.warnings),
            "size": sum(zone.size for zone in self.zones.values()),
            "zones": {zone_id: _zone_info(zone) for zone_id, zone in self.zones.items()},
            "numa_distances": self.config.distance_matrix(),
            "daemons": [share.info() for share in self.shares],
        }

    def close(self) -> None:
        """Take everything back from daemons, then unmap and close it. Guests are told BUSY from then on.

        Raises BufferError while a view of guest memory lives: what it shows stays, all else is closed, and closing can
        be repeated.
        """
        with self._sharing:
            self._closed = True
        for zone in self.zones.values():
            if zone.service:
                zone.service.close()
        for share in self.shares:
            share.close()
        self.guest_memory.replace(())
        refusal = None
        for zone in self.zones.values():
            try:
                zone.zone.close()
            except BufferError as error:
                refusal = error
        if refusal is not None:
            raise refusal

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError("manager", "closed", "has to be open", "make another one")

    def __enter__(self) -> MemoryManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _zone(plan: ZonePlan) -> Zone:
    try:
        return Zone(plan.spec)
    except FieldError as error:
        error.locate(f"zone {plan.spec.id}")
        raise


def _check_files(zones: Iterable[Zone]) -> None:
    """Two zones that share one file would be the same memory at two guest addresses."""
    owners: dict[tuple[int, int], str] = {}
    for zone in zones:
        if zone.spec.file is None or not zone.shared:
            continue
        for part in filter(None, (zone.boot, zone.hotplug)):
            file = os.fstat(part.backing.fd)
            owner = owners.setdefault((file.st_dev, file.st_ino), zone.spec.id)
            if owner != zone.spec.id:
                limit = f"is zone {owner}'s file too"
                raise UsageError(f"zone {zone.spec.id} file", zone.spec.file, limit, "give each shared zone its own")


def _block_size(zone: Zone, block_size: int | None) -> ByteCount:
    if block_size is not None and block_size < zone.page_size:
        limit = f"has to be at least the page size of zone {zone.spec.id}, {format_size(zone.page_size)}"
        raise UsageError("block_size", block_size, limit, "choose larger blocks or smaller pages")
    return default_block_size(zone.page_size) if block_size is None else ByteCount(block_size)


def _zone_size(plan: ZonePlan, zone: Zone, block_size: ByteCount) -> ZoneSize:
    spec = plan.spec
    return ZoneSize(spec.id, spec.size, spec.hotplug_size, zone.page_size, block_size)


def _managed(
    plan: ZonePlan, zone: Zone, layout: Layout, block_size: ByteCount, usable_region: UsableRegion
) -> ManagedZone:
    zone_id = plan.spec.id
    boot = tuple(placement for placement in layout.boot if placement.zone == zone_id)
    hotplug = next((placement for placement in layout.hotplug if placement.zone == zone_id), None)
    service = None
    if hotplug and zone.hotplug and plan.hotplug_method is HotplugMethod.VIRTIO_MEM:
        try:
            geometry = Geometry(
                addr=hotplug.addr,
                region_size=hotplug.size,
                block_size=block_size,
                node_id=plan.guest_numa_id,
                usable_region=usable_region,
            )
            service = _in_service(plan, zone.hotplug, geometry)
        except UsageError as error:
            error.field = _OPTION_OF.get(error.field, error.field)
            error.locate(f"zone {zone_id}")
            raise
    return ManagedZone(plan, zone, boot, hotplug, service)


def _in_service(plan: ZonePlan, memory: HostMemory, geometry: Geometry) -> DeviceService:
    """The zone's device. Huge pages are always populated by a PLUG: touching one that the pool lacks is a SIGBUS."""
    device = VirtioMemDevice(
        geometry, requested_size=plan.hotplugged_size, unplugged_inaccessible=not memory.has_shared_zero_page
    )
    service = DeviceService(device, memory, prefault=plan.spec.prefault or memory.page_size > PAGE_SIZE)
    service.name = f"zone {plan.spec.id}"
    return service


def _regions(zones: Iterable[ManagedZone]) -> list[Region]:
    return [
        Region(placement.addr, placement.size, memory.mapping, placement.offset)
        for zone in zones
        for placement, memory in zone.parts()
    ]


def _zone_info(zone: ManagedZone) -> dict[str, Any]:
    info = zone.zone.info()
    info["boot"] = [{"addr": part.addr, "size": part.size, "offset": part.offset} for part in zone.boot]
    info["guest_numa_id"] = zone.plan.guest_numa_id
    info["device"] = zone.service.info() if zone.service else None
    return info
