"""A machine's memory as a back end gets it, boot RAM and hotplugged blocks; and a queue in it, with a driver."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.peers.processes import LATE
from vhost_user.frontend import Frontend, SharedRegion
from vhost_user.units import ByteCount, GuestAddress, HostOffset
from vhost_user.vring import DriverQueue, PackedDriver, PackedLayout, SplitDriver, SplitLayout
from vhost_user.vring.driver import Buffers
from virtio_mem.config import VmMemoryConfig
from virtio_mem.manager import MemoryManager
from virtio_mem.protocol import Request, RequestType, ResponseType

OPTIONS = (
    "--memory size=0,hotplug_method=virtio-mem"
    " --memory-zone id=mem0,size=64M,shared=on,hotplug_size=1G"
    " --numa guest_numa_id=0,memory_zones=mem0"
)

VERSION_1 = 1 << 32
RING_PACKED = 1 << 34
EVENT_IDX = 1 << 29


class Machine:
    """64 MiB of boot RAM from address 0 on, and a virtio-mem device for 1 GiB more."""

    def __init__(self, manager: MemoryManager) -> None:
        self.manager = manager
        self.memory = manager.guest_memory
        service = manager.zones["mem0"].service
        assert service is not None
        self._service = service
        self.block_size = service.device.geometry.block_size

    def boot(self) -> list[SharedRegion]:
        """Boot RAM, to be shared."""
        return [
            SharedRegion(part.addr, part.size, part.fd, part.offset)
            for part in self.manager.shared_parts()
            if not part.hotplug
        ]

    def block(self, index: int) -> SharedRegion:
        """One hotpluggable block, to be shared."""
        (part,) = (part for part in self.manager.shared_parts() if part.hotplug)
        start = index * self.block_size
        offset = HostOffset(part.offset + start)
        return SharedRegion(GuestAddress(part.addr + start), ByteCount(self.block_size), part.fd, offset)

    def plug(self, *indices: int) -> list[SharedRegion]:
        """Plug blocks, as the guest's driver would; they are to be shared then."""
        self._service.resize(self._service.device.plugged_size + len(indices) * self.block_size)
        blocks = [self.block(index) for index in indices]
        for block in blocks:
            response = self._service.request(Request(RequestType.PLUG, block.guest_address, 1))
            assert response.type is ResponseType.ACK, response
        return blocks


@contextmanager
def machine(options: str = OPTIONS) -> Iterator[Machine]:
    with MemoryManager(VmMemoryConfig.parse(options)) as manager:
        yield Machine(manager)


class Queue:
    """Ring `index` of a front end, at `address`: started, or not with `start=False`."""

    def __init__(
        self, frontend: Frontend, machine: Machine, index: int, address: int, size: int = 128, *, start: bool = True
    ) -> None:
        self.frontend = frontend
        self.memory = machine.memory
        event_idx = bool(frontend.features & EVENT_IDX)
        self.driver: DriverQueue
        self.layout: SplitLayout | PackedLayout
        if frontend.features & RING_PACKED:
            self.layout = packed = PackedLayout.place(size, GuestAddress(address))
            self.driver = PackedDriver(self.memory, packed, event_idx=event_idx)
        else:
            self.layout = split = SplitLayout.place(size, GuestAddress(address))
            self.driver = SplitDriver(self.memory, split, event_idx=event_idx)
        self.vring = frontend.vring(index)
        if start:
            self.vring.start(self.layout)

    def submit(self, readable: Buffers = (), writable: Buffers = ()) -> int:
        """Make a chain available, and kick if that is asked for; its token."""
        token = self.driver.add(readable, writable)
        self.kick()
        return token

    def kick(self) -> None:
        if self.driver.needs_kick():
            self.vring.kick.signal()

    def wait(self) -> tuple[int, int]:
        """The next used chain: its token and the bytes written. AssertionError if none comes."""
        while (used := self.driver.get_used()) is None:
            if not self.driver.enable_interrupts():
                assert self.vring.wait(LATE), f"no answer from the device; {self.frontend.connected=}"
        return used

    def request(self, readable: Buffers = (), writable: Buffers = ()) -> int:
        """One chain there and back; the bytes written."""
        token = self.submit(readable, writable)
        used, written = self.wait()
        assert used == token
        return written
