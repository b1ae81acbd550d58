"""A zone of a machine, with its place in guest memory and its device; what of it another process can map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vhost_user.units import ByteCount, GuestAddress, HostOffset
from virtio_mem.config import ZonePlan
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.layout import Placement
from virtio_mem.service import DeviceService
from virtio_mem.zone import Zone


@dataclass(frozen=True)
class SharedPart:
    """Guest memory that another process can map: `size` bytes at `offset` of `fd` are at guest address `addr`."""

    zone: str
    addr: GuestAddress
    size: ByteCount
    fd: int
    offset: HostOffset
    hotplug: bool


@dataclass(frozen=True)
class ManagedZone:
    """A zone with all that the manager made for it; `service` is None where it can't be resized by virtio-mem."""

    plan: ZonePlan
    zone: Zone
    boot: tuple[Placement, ...]
    hotplug: Placement | None
    service: DeviceService | None

    @property
    def id(self) -> str:
        """The zone's identifier."""
        return self.plan.spec.id

    @property
    def size(self) -> ByteCount:
        """Bytes that the guest has of this zone: boot memory and what is plugged."""
        return ByteCount(self.plan.spec.size + (self.service.device.plugged_size if self.service else 0))

    def parts(self) -> Iterator[tuple[Placement, HostMemory]]:
        """Where each piece of the zone lies, and the host memory that it is a piece of."""
        for placement in self.boot:
            assert self.zone.boot is not None
            yield placement, self.zone.boot
        if self.service is not None:
            assert self.hotplug is not None and self.zone.hotplug is not None
            yield self.hotplug, self.zone.hotplug

    def shared_parts(self) -> Iterator[SharedPart]:
        """What other processes can map: nothing of a private zone."""
        for placement, memory in self.parts():
            fd = memory.shareable_fd
            if fd is not None:
                offset, hotplug = HostOffset(memory.file_offset + placement.offset), placement is self.hotplug
                yield SharedPart(self.id, placement.addr, placement.size, fd, offset, hotplug)
