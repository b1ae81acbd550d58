"""A guest that sends numbered requests, and back ends that are stopped while they serve them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tests.rings.rig import RING, guest_memory
from vhost_user.chain import Chain
from vhost_user.inflight import InflightArea, InflightBuffer
from vhost_user.memory import GuestMemory
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import GuestAddress
from vhost_user.vring import (
    BatchedQueue,
    DeviceQueue,
    DriverQueue,
    PackedDriver,
    PackedLayout,
    PackedQueue,
    QueueFull,
    SplitDriver,
    SplitLayout,
    SplitQueue,
)

BUFFERS = 0x100000
"""Where the requests lie: for each 8 bytes to read, 8 to write, and an indirect table."""

PLACE = 256
TABLE = 128


class SharedBuffer(NamedTuple):
    """A buffer for one queue as the front end holds it."""

    form: str
    queue_size: int
    fd: OwnedFd
    mmap_size: int
    mmap_offset: int

    def open(self) -> InflightBuffer:
        """As a back end maps it."""
        packed = self.form == "packed"
        return InflightBuffer.open(self.fd, self.mmap_size, self.mmap_offset, 1, self.queue_size, packed=packed)


@contextmanager
def shared_buffer(form: str, queue_size: int) -> Iterator[SharedBuffer]:
    buffer = InflightBuffer.create(1, queue_size, packed=form == "packed")
    with buffer.fd:
        yield SharedBuffer(form, queue_size, *buffer)


@contextmanager
def shared_area(form: str, queue_size: int) -> Iterator[InflightArea]:
    """An area of its own, mapped."""
    with shared_buffer(form, queue_size) as shared:
        buffer = shared.open()
        try:
            yield buffer.queue(0)
        finally:
            buffer.close()


def layout_of(form: str, size: int) -> SplitLayout | PackedLayout:
    return SplitLayout.place(size, RING) if form == "split" else PackedLayout.place(size, RING)


def make_driver(memory: GuestMemory, layout: SplitLayout | PackedLayout, start: int = 0) -> DriverQueue:
    if isinstance(layout, SplitLayout):
        return SplitDriver(memory, layout, start=start)
    return PackedDriver(memory, layout)


def make_queue(
    memory: GuestMemory, layout: SplitLayout | PackedLayout, area: InflightArea | None, start: int = 0
) -> BatchedQueue:
    """`start` is where a new split ring begins."""
    if isinstance(layout, SplitLayout):
        return SplitQueue(memory, **vars(layout), indirect=True, inflight=area, next_avail=start, next_used=start)
    return PackedQueue(memory, **vars(layout), indirect=True, inflight=area)


class Guest:
    """Sends requests whose numbers rise, good and malformed ones, and takes the answers.

    `answered` counts how often each number came back; `open` has the others.
    """

    def __init__(self, memory: GuestMemory, driver: DriverQueue, rng: random.Random) -> None:
        self.memory, self.driver, self.rng = memory, driver, rng
        self.number = 0
        self.answered: Counter[int] = Counter()
        self.flying: dict[int, tuple[int, int, bool]] = {}
        self.places = list(range(2 * driver.size + 2))

    def send(self, *, malformed: bool = True) -> bool:
        """One more request, of one to all descriptors of the ring; False where there is no room."""
        place = self.places[-1]
        base = BUFFERS + PLACE * place
        good = not malformed or self.rng.random() < 0.8
        # The number in two pieces and the answer in one, where the ring is large enough.
        pieces = self.rng.choice([[(base, 8)], [(base, 3), (base + 3, 5)]])
        room = [(base + 8, 8)]
        indirect = self.rng.random() < 0.4 or len(pieces) + len(room) > self.driver.size
        if indirect and self.driver.size < len(pieces) + len(room):
            pieces, room = [(base, 8)], [(base + 8, 8)] if self.driver.size > 1 else []
        if not good:
            pieces[0] = (2**40, 8)
        self.memory.write(GuestAddress(base), self.number.to_bytes(8, "little") + bytes(8))
        table = GuestAddress(base + TABLE) if indirect else None
        try:
            token = self.driver.add(pieces, room, indirect_table=table)
        except QueueFull:
            return False
        self.places.pop()
        self.flying[token] = self.number, place, good and bool(room)
        self.number += 1
        return True

    def receive(self) -> int | None:
        """The number of a request that came back, once, with its answer; None where none did."""
        used = self.driver.get_used()
        if used is None:
            return None
        number, place, writable = self.flying.pop(used[0])
        base = BUFFERS + PLACE * place
        assert used[1] == (8 if writable else 0)
        if writable:
            assert self.memory.read(GuestAddress(base + 8), 8) == answer_to(number)
        self.places.append(place)
        self.answered[number] += 1
        assert self.answered[number] == 1
        return number

    def receive_all(self) -> None:
        while self.receive() is not None:
            pass


def answer_to(number: int) -> bytes:
    return number.to_bytes(8, "big")


def number_of(chain: Chain) -> int:
    return int.from_bytes(chain.read(), "little")


def answer(queue: DeviceQueue, chain: Chain) -> None:
    """Serve a chain."""
    data = answer_to(number_of(chain)) if chain.writable else b""
    chain.write(data)
    queue.push(chain, len(data))


def new_guest(form: str, size: int, rng: random.Random, start: int = 0) -> tuple[Guest, SplitLayout | PackedLayout]:
    """A guest whose split ring's indices begin at `start`."""
    memory, layout = guest_memory(), layout_of(form, size)
    return Guest(memory, make_driver(memory, layout, start), rng), layout
