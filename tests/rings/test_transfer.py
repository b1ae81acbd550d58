"""Whatever chains a driver makes, in whatever batches, what is in them arrives, and so do the answers.

Both sides sleep between notifications: the device runs when it was kicked, the driver takes chains back when it was
interrupted. A notification too few leaves chains behind, and the test fails.
"""

from __future__ import annotations

from itertools import count
from typing import NamedTuple

from hypothesis import example, given
from hypothesis import strategies as st

from tests.rings.rig import BORDER, RING, Rig, guest_memory, make_rig
from vhost_user.units import GuestAddress
from vhost_user.vring import QueueFull, SplitDriver, SplitLayout, SplitQueue


class Request(NamedTuple):
    """What a driver sends, cut into pieces, the room that it leaves for an answer, and how it tells of both."""

    readable: list[bytes]
    writable: list[int]
    indirect: bool

    def cut_to(self, size: int) -> Request:
        """With so few pieces that a queue of `size` takes them."""
        readable = self.readable[:size]
        return Request(readable, self.writable[: size - len(readable)], self.indirect)

    @property
    def data(self) -> bytes:
        return b"".join(self.readable)


requests = st.builds(
    Request,
    st.lists(st.binary(min_size=1, max_size=20), max_size=4),
    st.lists(st.integers(1, 20), max_size=4),
    st.booleans(),
).filter(lambda request: request.readable or request.writable)


def answer(data: bytes, room: int, serial: int) -> bytes:
    """Something that depends on the request, sometimes shorter than the room for it."""
    return (data[::-1] + bytes([serial % 251]) * room)[: room - (serial % 3 if room > 2 else 0)]


class Guest:
    """The driver's side, with a memory that is handed out upwards from just below the border."""

    def __init__(self, rig: Rig, start: int) -> None:
        self.rig, self.free_address = rig, start
        self.sent: dict[int, tuple[int, Request, list[tuple[GuestAddress, int]]]] = {}
        self.serial = count()

    def allocate(self, size: int) -> GuestAddress:
        address, self.free_address = self.free_address, self.free_address + size
        return GuestAddress(address)

    def send(self, request: Request) -> bool:
        """False where the ring has no room for it now."""
        memory = self.rig.memory
        readable = [(self.allocate(len(piece)), len(piece)) for piece in request.readable]
        writable = [(self.allocate(room), room) for room in request.writable]
        for (address, _), piece in zip(readable, request.readable, strict=True):
            memory.write(address, piece)
        table = self.allocate(16 * (len(readable) + len(writable))) if request.indirect else None
        try:
            token = self.rig.driver.add(readable, writable, indirect_table=table)
        except QueueFull:
            return False
        self.sent[token] = next(self.serial), request, writable
        return True

    def collect(self) -> int:
        """Take back what was used and look at the answers; returns how many there were."""
        taken = 0
        while (used := self.rig.driver.get_used()) is not None:
            token, written = used
            serial, request, writable = self.sent.pop(token)
            data = b"".join(self.rig.memory.read(address, size) for address, size in writable)
            expected = answer(request.data, sum(request.writable), serial)
            assert written == len(expected)
            assert data == expected + bytes(len(data) - len(expected))
            taken += 1
        return taken


def serve(rig: Rig, serial: count[int], batch: int) -> bool:
    """The device from one kick to the next; returns whether it interrupted the driver."""
    interrupted, queue = False, rig.queue
    queue.disable_notifications()
    while True:
        for _ in range(batch):
            chain = queue.pop()
            if chain is None:
                break
            data = answer(chain.read(), chain.writable, next(serial))
            chain.write(data)
            queue.push(chain, len(data))
        interrupted |= queue.should_notify()
        if chain is None and not queue.enable_notifications():
            return interrupted


def transfer(rig: Rig, start: int, todo: list[Request], batches: list[int], device_batch: int) -> None:
    guest, serial = Guest(rig, start), count()
    waiting, sizes = iter([request.cut_to(rig.layout.size) for request in todo]), iter(batches)
    request, taken = next(waiting, None), 0
    assert not rig.queue.enable_notifications()
    while request is not None:
        assert not rig.driver.enable_interrupts()
        left = next(sizes, len(todo))
        while request is not None and left and guest.send(request):
            request, left = next(waiting, None), left - 1
        assert rig.driver.needs_kick()
        assert serve(rig, serial, device_batch)
        taken += guest.collect()
    assert taken == len(todo)
    assert guest.sent == {}
    assert rig.queue.malformed == {}


shapes = {
    "start": st.integers(BORDER - 400, BORDER),
    "todo": st.lists(requests, min_size=1, max_size=40),
    "batches": st.lists(st.integers(1, 5), max_size=20),
    "device_batch": st.integers(1, 10),
    "event_idx": st.booleans(),
}


@given(exponent=st.integers(0, 4), first=st.sampled_from([0, 65516, 65535]), **shapes)
@example(0, 65535, BORDER - 5, [Request([b"0123456789"], [], False)] * 3, [1], 1, True)
def test_split(
    exponent: int, first: int, start: int, todo: list[Request], batches: list[int], device_batch: int, event_idx: bool
) -> None:
    memory, layout = guest_memory(), SplitLayout.place(2**exponent, RING)
    driver = SplitDriver(memory, layout, event_idx=event_idx, start=first)
    queue = SplitQueue(memory, **vars(layout), event_idx=event_idx, indirect=True, next_avail=first, next_used=first)
    transfer(Rig(memory, layout, driver, queue), start, todo, batches, device_batch)


@given(size=st.integers(1, 17), **shapes)
def test_packed(
    size: int, start: int, todo: list[Request], batches: list[int], device_batch: int, event_idx: bool
) -> None:
    transfer(make_rig("packed", size, event_idx=event_idx), start, todo, batches, device_batch)
