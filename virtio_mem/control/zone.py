"""One zone as its operator sees it, whoever made its memory and serves its device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vhost_user.errors import HostError, UsageError
from vhost_user.units import ByteCount, HostOffset
from virtio_mem.service import DeviceService
from virtio_mem.unplugged import held_unplugged


class UnknownZone(UsageError):  # noqa: N818
    """There is no zone of that name."""


def nothing() -> None:
    """What is done where nobody asked for more."""


def always() -> bool:
    """What is answered where nobody can know: yes."""
    return True


@dataclass(frozen=True, kw_only=True)
class ControlledZone:
    """One zone. Sizes are in bytes; `service` is None where the zone can't be resized.

    `notify` passes a configuration change notice on to the guest, if the device has one; any thread may call it.
    `connected` says whether a guest's front end is there, and must not wait. `options` are the zone's options, with the
    names and values of Cloud Hypervisor's MemoryZoneConfig.
    """

    id: str
    service: DeviceService | None
    boot_size: int = 0
    guest_numa_id: int | None = None
    notify: Callable[[], None] = nothing
    connected: Callable[[], bool] = always
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hotplug_size(self) -> int:
        """What the device can plug at most."""
        return self.service.device.geometry.region_size if self.service else 0

    @property
    def block_size(self) -> int | None:
        """The size of the device's blocks."""
        return self.service.device.geometry.block_size if self.service else None

    @property
    def target(self) -> int:
        """What the guest is asked to have."""
        return self.boot_size + (self.service.device.requested_size if self.service else 0)

    @property
    def size(self) -> int:
        """What the guest has: boot memory and what is plugged."""
        return self.boot_size + (self.service.device.plugged_size if self.service else 0)

    def held(self) -> tuple[int | None, bool]:
        """Bytes that the host holds for the hotplug region, None where it can't tell; and whether there are more, since
        not all were counted."""
        if self.service is None:
            return 0, False
        try:
            return self.service.memory.held_at_least(HostOffset(0), ByteCount(self.hotplug_size))
        except HostError:
            return None, False

    def held_unplugged(self) -> tuple[int | None, bool]:
        """What of that is for blocks that are not plugged, None where the host can't tell; and whether not all of them
        were looked at."""
        if self.service is None:
            return 0, False
        try:
            return held_unplugged(self.service)
        except HostError:
            return None, False
