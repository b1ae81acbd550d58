"""A guest in this process: memory, a device behind virtio-mmio, and a driver that is called instead of interrupted."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

from tests.device.helpers import make_device
from tests.device.test_service import Script, ScriptedMemory
from vhost_user.mapping import Mapping
from vhost_user.memory import GuestMemory, Region
from vhost_user.units import MIB, ByteCount, GuestAddress
from virtio_mem.device import VirtioMemDevice
from virtio_mem.guest.virtio_mmio import WANTED, MmioDevice
from virtio_mem.mmio import MmioTransport
from virtio_mem.protocol import Feature
from virtio_mem.service import DeviceService

RAM_SIZE = 4 * MIB
RING = GuestAddress(1 * MIB)


@contextmanager
def guest_ram() -> Iterator[GuestMemory]:
    """4 MiB of guest memory at address 0."""
    with Mapping(ByteCount(RAM_SIZE), mmap.MAP_PRIVATE) as mapping:
        memory = GuestMemory([Region(GuestAddress(0), ByteCount(RAM_SIZE), mapping)])
        try:
            yield memory
        finally:
            memory.replace(())


class Rig:
    """A device behind its transport; kicks are served at once, interrupts are counted."""

    def __init__(self, memory: GuestMemory, device: VirtioMemDevice | None = None) -> None:
        self.memory = memory
        self.device = device or make_device()
        self.script = Script()
        self.service = DeviceService(self.device, ScriptedMemory(self.script))
        self.interrupts = 0
        self.transport = MmioTransport(self.service, memory, interrupt=self._interrupt, notified=self.serve)

    def _interrupt(self) -> None:
        self.interrupts += 1

    def serve(self) -> None:
        while self.transport.process():
            pass

    def take_interrupts(self) -> int:
        count, self.interrupts = self.interrupts, 0
        return count

    def driver(self, features: Feature = WANTED) -> MmioDevice:
        """Bring the device up, at the driver's hands."""
        return MmioDevice(self.transport, self.memory, RING, kick=self.serve, wait=self._never, features=features)

    @staticmethod
    def _never() -> None:
        raise AssertionError("a request was not answered by the time the kick was served")
