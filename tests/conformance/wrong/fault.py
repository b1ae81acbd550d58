"""Faults: devices of ours that are wrong in one way each, and the clause by which the kit must find each of them.

    @fault("MEM-STATE-5", source="Cloud Hypervisor before 1dd588fa6")
    class StateBelowTheRegion(VirtioMemDevice):
        '''A STATE below the region is answered from whatever lies there.'''

What a fault is derived from says where it goes: a device, its map of blocks, its service, the memory under it, its
queue on a ring, its registers, or what stands in front of it all. A fault of the bytes on the wire is a function in the
place of `Parts.answer`. Those with a `source` are faults that somebody had.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from vhost_user.errors import HostError
from vhost_user.units import ByteCount, HostOffset
from virtio_mem.blocks import BlockMap
from virtio_mem.conformance.target import Capability, Target
from virtio_mem.conformance.targets.behind_ring import RingTarget, RingTransport
from virtio_mem.conformance.targets.in_process import Made, Parts
from virtio_mem.conformance.targets.ours import OurSubject, OurTarget
from virtio_mem.device import VirtioMemDevice
from virtio_mem.geometry import Geometry
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.region_memory import RegionMemory
from virtio_mem.request_queue import GuestRequestQueue
from virtio_mem.service import DeviceService

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Fault:
    """One wrong device. `clause` is violated by it; `says` in which way; `target` makes it, to be judged."""

    name: str
    clause: str
    says: str
    source: str
    target: Callable[[], Target]


FAULTS: dict[str, Fault] = {}
"""Every fault by its name, once the modules of this package are imported."""


def fault(clause: str, *, source: str = "", ring: str = "") -> Callable[[T], T]:
    """Register a class or a function as a fault that violates `clause`.

    With `ring` the device is behind one of that form, as it is without if the fault is one of a queue.
    """

    def register(wrong: T) -> T:
        name = re.sub(r"(?<=.)([A-Z])", r"-\1", wrong.__name__).replace("_", "-").lower()
        assert name not in FAULTS
        assert wrong.__doc__
        FAULTS[name] = Fault(name, clause, " ".join(wrong.__doc__.split()), source, partial(_target, wrong, name, ring))
        return wrong

    return register


def _target(wrong: Any, name: str, ring: str) -> Target:
    if isinstance(wrong, type) and issubclass(wrong, OurSubject):
        return _OtherSubject(wrong, name)
    parts = _parts(wrong)
    if ring or parts.make_queue is not GuestRequestQueue or parts.make_transport is not None:
        return RingTarget(ring or "split", parts=parts, name=name)
    return OurTarget(parts=parts, name=name)


class _OtherSubject(OurTarget):
    """Our device with something wrong in front of it."""

    def __init__(self, wrong: type[OurSubject], name: str) -> None:
        super().__init__(name=name)
        self._wrong = wrong
        if wrong.sleep is not OurSubject.sleep:
            self.capabilities |= Capability.SLEEP
        if wrong.boot_memory is not OurSubject.boot_memory:
            self.capabilities |= Capability.BOOT_MEMORY

    def _made(self, made: Made) -> OurSubject:
        return self._wrong(made)


def _parts(wrong: Any) -> Parts:
    if not isinstance(wrong, type):
        return Parts(answer=wrong)
    if issubclass(wrong, VirtioMemDevice):
        return Parts(make_device=lambda geometry, requested: wrong(geometry, requested_size=requested))
    if issubclass(wrong, BlockMap):
        return Parts(make_device=partial(_device_with, wrong))
    if issubclass(wrong, DeviceService):
        return Parts(make_service=lambda device, memory: wrong(device, memory, prefault=True))
    if issubclass(wrong, GuestRequestQueue):
        return Parts(make_queue=wrong)
    if issubclass(wrong, RingTransport):
        return Parts(make_transport=wrong)
    assert issubclass(wrong, WrongMemory)
    return Parts(make_memory=wrong)


def _device_with(blocks: type[BlockMap], geometry: Geometry, requested_size: int) -> VirtioMemDevice:
    device = VirtioMemDevice(geometry, requested_size=requested_size)
    device.blocks = blocks(geometry.nb_blocks)
    return device


class WrongMemory:
    """Region memory that passes everything on; a fault overrides what it does wrong."""

    def __init__(self, memory: RegionMemory) -> None:
        self.memory = memory

    @property
    def page_size(self) -> ByteCount:
        return self.memory.page_size

    def populate(self, offset: HostOffset, size: ByteCount) -> None:
        self.memory.populate(offset, size)

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        self.memory.discard(offset, size)

    def held(self, offset: HostOffset, size: ByteCount) -> ByteCount:
        return self.memory.held(offset, size)

    def held_at_least(self, offset: HostOffset, size: ByteCount) -> tuple[ByteCount, bool]:
        return self.memory.held_at_least(offset, size)

    def shortage(self, offset: HostOffset, size: ByteCount) -> HostError | None:
        return self.memory.shortage(offset, size)


def behind(memory: WrongMemory) -> HostMemory:
    """The memory behind the one that refuses when a check says so."""
    inner = vars(memory.memory)["_memory"]
    assert isinstance(inner, HostMemory)
    return inner
