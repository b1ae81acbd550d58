"""A guest's memory with a ring in it, a driver and a device at its ends, and pens to write rings by hand."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from typing import NamedTuple

from vhost_user.chain import Chain
from vhost_user.mapping import Mapping
from vhost_user.memory import GuestMemory, Region
from vhost_user.units import ByteCount, GuestAddress
from vhost_user.vring import (
    DeviceQueue,
    DriverQueue,
    PackedDriver,
    PackedLayout,
    PackedQueue,
    SplitDriver,
    SplitLayout,
    SplitQueue,
)

FORMATS = ("split", "packed")

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15

RING = GuestAddress(0x10000)
"""Where rings lie: in the lowest region."""

BORDER = GuestAddress(0x200000)
"""Where one region ends and the next begins, in another mapping."""

END = GuestAddress(0x300000)
"""Behind the last byte that is contiguous with BORDER; nothing is here."""

ISLAND = GuestAddress(0x40000000)
"""One page far from everything else."""


def anonymous(size: int) -> Mapping:
    return Mapping(ByteCount(size), mmap.MAP_SHARED)


def guest_memory() -> GuestMemory:
    return GuestMemory(
        [
            Region(ISLAND, ByteCount(4096), anonymous(4096)),
            Region(BORDER, ByteCount(END - BORDER), anonymous(END - BORDER)),
            Region(GuestAddress(0), ByteCount(BORDER), anonymous(BORDER)),
        ]
    )


def make_queue(
    form: str, size: int, memory: GuestMemory, *, event_idx: bool, indirect: bool
) -> tuple[SplitLayout | PackedLayout, DeviceQueue]:
    if form == "split":
        split = SplitLayout.place(size, RING)
        return split, SplitQueue(memory, **vars(split), event_idx=event_idx, indirect=indirect)
    packed = PackedLayout.place(size, RING)
    return packed, PackedQueue(memory, **vars(packed), event_idx=event_idx, indirect=indirect)


def pop(queue: DeviceQueue) -> Chain:
    """The next chain; there is one."""
    chain = queue.pop()
    assert chain is not None
    return chain


class Rig(NamedTuple):
    """A driver and a device on one ring."""

    memory: GuestMemory
    layout: SplitLayout | PackedLayout
    driver: DriverQueue
    queue: DeviceQueue


def make_rig(
    form: str, size: int, *, event_idx: bool = False, indirect: bool = True, memory: GuestMemory | None = None
) -> Rig:
    memory = memory or guest_memory()
    layout, queue = make_queue(form, size, memory, event_idx=event_idx, indirect=indirect)
    driver = (
        SplitDriver(memory, layout, event_idx=event_idx)
        if isinstance(layout, SplitLayout)
        else PackedDriver(memory, layout, event_idx=event_idx)
    )
    return Rig(memory, layout, driver, queue)


class Raw(NamedTuple):
    """A descriptor as a test means it. `next` is used by split rings only; None means the one that follows."""

    address: int
    length: int
    flags: int = 0
    next: int | None = None


class SplitPen:
    """Writes whatever it is told into a split ring; nothing is checked."""

    def __init__(self, memory: GuestMemory, layout: SplitLayout) -> None:
        self.memory, self.layout = memory, layout
        self.next_avail = self.next_used = 0

    @staticmethod
    def table(descriptors: Sequence[Raw], first: int = 0) -> bytes:
        return b"".join(
            struct.pack("<QIHH", raw.address, raw.length, raw.flags, first + at + 1 if raw.next is None else raw.next)
            for at, raw in enumerate(descriptors)
        )

    def offer(self, descriptors: Sequence[Raw], head: int = 0) -> int:
        """Write descriptors into the table from `head` on, and make them available; returns the id to come back."""
        self.memory.write(GuestAddress(self.layout.desc + 16 * head), self.table(descriptors, head))
        self.offer_head(head)
        return head

    def offer_head(self, head: int) -> None:
        slot = self.next_avail % self.layout.size
        self.memory.store16(GuestAddress(self.layout.avail + 4 + 2 * slot), head)
        self.next_avail = (self.next_avail + 1) % 2**16
        self.set_avail_idx(self.next_avail)

    def set_avail_idx(self, idx: int) -> None:
        self.memory.store16(GuestAddress(self.layout.avail + 2), idx)

    def used(self) -> list[tuple[int, int]]:
        """Id and length of what was used since the last call."""
        idx = self.memory.load16(GuestAddress(self.layout.used + 2))
        found: list[tuple[int, int]] = []
        while self.next_used != idx:
            element = GuestAddress(self.layout.used + 4 + 8 * (self.next_used % self.layout.size))
            found.append(struct.unpack("<II", self.memory.read(element, 8)))
            self.next_used = (self.next_used + 1) % 2**16
        return found


class PackedPen:
    """Writes whatever it is told into a packed ring; nothing is checked."""

    def __init__(self, memory: GuestMemory, layout: PackedLayout) -> None:
        self.memory, self.layout = memory, layout
        self.position = self.used_position = 0
        self.slots: dict[int, int] = {}

    @staticmethod
    def table(descriptors: Sequence[Raw]) -> bytes:
        return b"".join(struct.pack("<QIHH", raw.address, raw.length, 0, raw.flags) for raw in descriptors)

    def offer(self, descriptors: Sequence[Raw], buffer_id: int = 0) -> int:
        """Write descriptors into the next slots, as available, the first one last."""
        size = self.layout.size
        for at, raw in reversed(list(enumerate(descriptors))):
            position = self.position + at
            flags = raw.flags ^ (AVAIL if position // size % 2 == 0 else USED)
            where = GuestAddress(self.layout.desc + 16 * (position % size))
            self.memory.write(where, struct.pack("<QIH", raw.address, raw.length, buffer_id))
            self.memory.store16(GuestAddress(where + 14), flags)
        self.position += len(descriptors)
        self.slots[buffer_id] = len(descriptors)
        return buffer_id

    def used(self) -> list[tuple[int, int]]:
        """Id and length of what was used since the last call."""
        size = self.layout.size
        found: list[tuple[int, int]] = []
        while True:
            where = self.layout.desc + 16 * (self.used_position % size)
            length, buffer_id, flags = struct.unpack("<IHH", self.memory.read(GuestAddress(where + 8), 8))
            if flags & (AVAIL | USED) != (AVAIL | USED if self.used_position // size % 2 == 0 else 0):
                return found
            found.append((buffer_id, length if flags & WRITE else 0))
            self.used_position += self.slots.get(buffer_id, 1)


class Bench(NamedTuple):
    """A device on a ring that a test writes by hand."""

    memory: GuestMemory
    layout: SplitLayout | PackedLayout
    pen: SplitPen | PackedPen
    queue: DeviceQueue


def make_bench(form: str, size: int, *, event_idx: bool = False, indirect: bool = True) -> Bench:
    memory = guest_memory()
    layout, queue = make_queue(form, size, memory, event_idx=event_idx, indirect=indirect)
    pen = SplitPen(memory, layout) if isinstance(layout, SplitLayout) else PackedPen(memory, layout)
    return Bench(memory, layout, pen, queue)
