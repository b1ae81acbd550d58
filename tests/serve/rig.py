"""A guest for devices in service, in this process or another one: its memory, the ring, and what it knows is plugged.

RAM for the ring and requests lies at 0; the zone's region, a memfd of its own, at ADDR. The guest writes a pattern into
each block that it plugs, and `check()` compares guest, device and host.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

from tests.backend.rig import FIRST_PACKED, RING_PACKED, SPLIT, Ram
from vhost_user import _native
from vhost_user.connection import Connection
from vhost_user.errors import PeerError
from vhost_user.frontend import Frontend, SharedRegion
from vhost_user.mapping import MAP_NORESERVE, Mapping
from vhost_user.units import GIB, MIB, ByteCount, GuestAddress, HostOffset
from vhost_user.vring import DriverQueue, PackedDriver, PackedLayout, SplitDriver, SplitLayout
from virtio_mem.hostmem.files import data_size
from virtio_mem.protocol import (
    CONFIG_SIZE,
    REQUEST_SIZE,
    RESPONSE_SIZE,
    ConfigSpace,
    Feature,
    Request,
    RequestType,
    Response,
    ResponseType,
)
from virtio_mem.serve.plan import ServedZone

ADDR = GuestAddress(4 * GIB)
BLOCK_SIZE = ByteCount(2 * MIB)
NB_BLOCKS = 16
RING_SIZE = 16
REQUESTS = 0x100000
FORMS = ("split", "packed")

UNPLUGGED_INACCESSIBLE = int(Feature.UNPLUGGED_INACCESSIBLE)


def zone(
    nb_blocks: int = NB_BLOCKS, *, hotplugged: int | None = None, prefault: bool = True, id_: str = "mem0"
) -> ServedZone:
    """A zone at ADDR; the target is all of it unless said otherwise, in blocks."""
    target = nb_blocks if hotplugged is None else hotplugged
    return ServedZone(
        id=id_,
        addr=ADDR,
        hotplug_size=ByteCount(nb_blocks * BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        hotplugged_size=ByteCount(target * BLOCK_SIZE),
        prefault=prefault,
    )


class Guest:
    """The guest of a device of `nb_blocks`. `plugged` is what it knows."""

    def __init__(self, form: str = "split", nb_blocks: int = NB_BLOCKS, fd: int | None = None) -> None:
        self.packed = form == "packed"
        self.nb_blocks = nb_blocks
        self.size = ByteCount(nb_blocks * BLOCK_SIZE)
        self.ram = Ram(user=None)
        self.fd = os.memfd_create("zone", os.MFD_CLOEXEC) if fd is None else fd
        os.ftruncate(self.fd, self.size)
        self.mapping = Mapping(self.size, mmap.MAP_SHARED | MAP_NORESERVE, self.fd)
        # A test elsewhere may have the host give memfds huge pages just now, and here each small one counts.
        _native.madvise(self.mapping.address, self.mapping.size, mmap.MADV_NOHUGEPAGE)
        self.plugged: dict[int, bytes] = {}
        self.unplugged = 0
        """How many blocks were unplugged so far."""
        self.layout: SplitLayout | PackedLayout
        self.driver: DriverQueue
        if self.packed:
            self.layout = PackedLayout.place(RING_SIZE, GuestAddress(0))
            self.driver = PackedDriver(self.ram.memory, self.layout, event_idx=True)
        else:
            self.layout = SplitLayout.place(RING_SIZE, GuestAddress(0))
            self.driver = SplitDriver(self.ram.memory, self.layout, event_idx=True)
        self._number = 0
        self._waiting: dict[int, GuestAddress] = {}

    @property
    def features(self) -> int:
        return (SPLIT | RING_PACKED if self.packed else SPLIT) | UNPLUGGED_INACCESSIBLE

    @property
    def regions(self) -> list[SharedRegion]:
        return [self.ram.region, SharedRegion(ADDR, self.size, self.fd)]

    def start(self, frontend: Frontend) -> None:
        frontend.regions.share(self.regions)
        frontend.vring(0).start(self.layout, FIRST_PACKED if self.packed else 0)

    # Requests.

    def send(self, request: Request, frontend: Frontend) -> None:
        at = REQUESTS + self._number % 64 * 64
        self._number += 1
        self.ram.memory.write(GuestAddress(at), request.encode())
        answer = GuestAddress(at + 32)
        token = self.driver.add([(at, REQUEST_SIZE)], [(answer, RESPONSE_SIZE)])
        self._waiting[token] = answer
        if self.driver.needs_kick():
            frontend.vring(0).kick.signal()

    def send_typed(self, frontend: Frontend, type_: RequestType, block: int = 0, nb_blocks: int = 1) -> None:
        self.send(request_for(type_, block, nb_blocks), frontend)

    def receive(self) -> Response | None:
        """The next answer, if there is one."""
        used = self.driver.get_used()
        if used is None:
            return None
        token, written = used
        answer = self._waiting.pop(token)
        if written != RESPONSE_SIZE:
            raise PeerError("used length", written, f"{RESPONSE_SIZE}")
        return Response.decode(self.ram.memory.read(answer, RESPONSE_SIZE))

    def wait(self, frontend: Frontend, timeout: float = 10.0) -> Response:
        while True:
            if (response := self.receive()) is not None:
                return response
            if not self.driver.enable_interrupts():
                assert frontend.vring(0).wait(timeout), "no call came"

    def ask(self, frontend: Frontend, type_: RequestType, block: int = 0, nb_blocks: int = 1) -> ResponseType:
        """Send a request and wait; what is granted is written to the guest's own books, and to its memory."""
        self.send_typed(frontend, type_, block, nb_blocks)
        return self.took(type_, block, nb_blocks, self.wait(frontend))

    def took(self, type_: RequestType, block: int, nb_blocks: int, response: Response) -> ResponseType:
        """Take an answer."""
        if response.type is not ResponseType.ACK:
            return response.type
        blocks = range(block, block + nb_blocks)
        if type_ is RequestType.PLUG:
            self.plugged |= {each: self._write(each) for each in blocks}
        elif type_ is RequestType.UNPLUG:
            for each in blocks:
                del self.plugged[each]
                self.unplugged += 1
        elif type_ is RequestType.UNPLUG_ALL:
            self.lost_all()
        return response.type

    def lost_all(self) -> None:
        """Every block was unplugged."""
        self.unplugged += len(self.plugged)
        self.plugged.clear()

    def _write(self, block: int) -> bytes:
        pattern = self._number.to_bytes(4, "little") + block.to_bytes(4, "little")
        for page in (0, BLOCK_SIZE - 4096):
            with self.mapping.view(HostOffset(block * BLOCK_SIZE + page), ByteCount(8)) as view:
                view[:] = pattern
        return pattern

    def config(self, frontend: Frontend) -> ConfigSpace:
        return ConfigSpace.decode(frontend.get_config(0, CONFIG_SIZE))

    def until_asleep(self, frontend: Frontend) -> None:
        """Until the back end looks at the ring only when it is kicked: kicks that came before the first answer are
        served before the second one is given."""
        for _ in range(2):
            self.config(frontend)

    # What must be so.

    def held(self, block: int, nb_blocks: int = 1) -> int:
        return data_size(self.fd, HostOffset(block * BLOCK_SIZE), ByteCount(nb_blocks * BLOCK_SIZE))

    def check(self, frontend: Frontend, *, prefault: bool = True) -> None:
        """The device says what the guest knows, its pattern is there, and the host holds no other block."""
        assert self.config(frontend).plugged_size == len(self.plugged) * BLOCK_SIZE
        for block in range(self.nb_blocks):
            if block not in self.plugged:
                assert self.held(block) == 0, f"block {block} is unplugged, and held"
                continue
            assert self.held(block) == (BLOCK_SIZE if prefault else 2 * 4096), f"block {block} is plugged"
            for page in (0, BLOCK_SIZE - 4096):
                with self.mapping.view(HostOffset(block * BLOCK_SIZE + page), ByteCount(8)) as view:
                    assert bytes(view) == self.plugged[block], f"block {block} has other bytes"

    def close(self) -> None:
        self.ram.close()
        self.mapping.close()
        os.close(self.fd)


def request_for(type_: RequestType, block: int = 0, nb_blocks: int = 1) -> Request:
    if type_ is RequestType.UNPLUG_ALL:
        return Request(type_)
    return Request(type_, GuestAddress(ADDR + block * BLOCK_SIZE), nb_blocks)


@contextmanager
def guest(form: str = "split", nb_blocks: int = NB_BLOCKS) -> Iterator[Guest]:
    made = Guest(form, nb_blocks)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def connected(connection: Connection, machine: Guest) -> Iterator[Frontend]:
    """A front end that has shared the guest's memory and started its ring."""
    with Frontend(connection, features=machine.features) as frontend:
        machine.start(frontend)
        yield frontend
