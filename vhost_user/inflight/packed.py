"""A packed queue's area: copies of the ring's descriptors of each chain in flight, whose slots others may use by now.

Entries that no chain has are a list, linked by `next` from free_head on. It has no end of its own; here `next` of the
last one is the number of entries, as it is in DPDK's areas. A chain takes entries off its front, and its head's entry
stands for it. The words that begin with `old_` are the state that holds; the same words without it are a state that is
about to. To take a chain of n descriptors:

    1. the queue moves next_avail                in its own memory: a new process finds the chain in the ring again
    2. desc[old_free_head]: counter, num, inflight, last;
       addr, len, flags and id of each descriptor in its entry
                                                 the entries are still free: a new process clears their inflight
    3. free_head, past them                      means nothing before step 4
    4. old_free_head = free_head                 from here on a new process takes the chain again, from its entries

To give back the chain of entry e:

    5. desc[e.last].next = free_head             nobody looks behind the last one of a chain in flight
    6. free_head = e
    7. used_idx and used_wrap_counter, past the chain's slots
                                                 the state to be; old_* still holds, and a new process goes back to it
    8. the used descriptor, its flags last       the driver has the chain; a new process sees by the flags of the slot
                                                 at old_used_idx, which no longer say available, that it has to go on
    9. desc[e].inflight = 0                      as a new process would have it: e is on the list from free_head on
    10. old_free_head = free_head                as a new process would have it; the flags still say so
    11. old_used_idx, old_used_wrap_counter      all is as before step 1

The used index, its wrap counter and their `old_` twins lie in the same eight bytes, and steps 7 and 11 store them as
one. The document stores them one by one: a process stopped in between, at the end of a lap, would leave a position that
never was, the index of one lap with the counter of the other. And the document knows a state that is about to be by the
index alone: it would take back a chain that fills the whole ring and that the driver has seen used. Here the wrap
counters are compared too.

Where many chains are taken and given back in one call, csrc/inflight.c makes the same stores, chain by chain.

Each chain goes back alone, malformed ones too. A process that is stopped before step 8 has perhaps done what the chain
asks for, and the next one does it again; the driver hears of it once. The slots that were taken are those that were
used and those of the chains in flight, so next_avail is not in the area.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from vhost_user import _native
from vhost_user.inflight.area import InflightArea, Position, Positions, Retake, Shape, corrupt
from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress
from vhost_user.vring.device import check_in_flight, slots_between
from vhost_user.vring.layout import Layout, PackedLayout

# The head's other words, as indices of 16 bits; and the eight bytes with the used words, as an index of 64.
_FREE_HEAD, _OLD_FREE_HEAD, _USED = 6, 7, 2

_HEAD = struct.Struct(
    "=QHHHHHHBB"
)  # features, version, desc_num, free_head, old, used_idx, old, used_wrap_counter, old
_USED_WORDS = struct.Struct("=HHBB2x")
_WORD = struct.Struct("=Q")

_ENTRY = struct.Struct("=BxHHHQHHIQ")

# The ring's descriptors: their size, where the flags lie, and the two that say whose it is.
_DESCRIPTOR, _FLAGS = 16, 14
_AVAIL, _USED_FLAG = 1 << 7, 1 << 15


class _Entry(NamedTuple):
    inflight: int
    next: int
    last: int
    num: int
    counter: int
    id: int
    flags: int
    length: int
    address: int


class PackedInflight(InflightArea):
    """The area of a packed queue. An entry is that of a chain's first descriptor."""

    shape = Shape(32, _ENTRY.size)

    _size: int

    def __init__(self, view: memoryview, entries: int) -> None:
        # The free list here, from free_head on, is the old one.
        self.told: _native.PackedInflight = _native.PackedInflight(view, entries)
        super().__init__(view, entries)

    def take_over(  # noqa: D102
        self, memory: GuestMemory, layout: Layout, avail: Position, used: Position
    ) -> Positions:
        ring = self._check_layout(layout, PackedLayout)
        size = ring.size
        copy = self._copy()
        if copy is None:
            check_in_flight(slots_between(used, avail, size), size)
            self._initialise(size, used)
            return avail, used
        left = _Left(copy, self.shape, self.entries, size)
        done = left.done(lambda slot: memory.load16(GuestAddress(ring.desc + _DESCRIPTOR * slot + _FLAGS)))
        free_head, used = left.states[not done]
        free = left.free_entries(free_head)
        found = left.chains(set(free))
        self._size, self.told.used = size, used
        self._settle(free_head, done)
        for entry in free:
            if left.entries[entry].inflight:
                self._u8[self._at(entry)] = 0
        for at, found_there in enumerate(left.entries):
            self.told.next[at] = found_there.next
        for _, retake, num in found:
            self.told.last[retake.entry], self.told.num[retake.entry] = left.entries[retake.entry].last, num
        self._retake([(counter, retake) for counter, retake, _ in found])
        return self._moved(used, sum(num for _, _, num in found)), used

    def reload(self, ring: _native.Ring, table: _native.MemoryTable, retake: Retake) -> int:  # noqa: D102
        return ring.rebuild(table, retake.descriptors)

    def taken(self, ring: _native.Ring, chain_id: int, slots: int) -> int:  # noqa: ARG002, D102
        told = self.told
        head = last = entry = told.free_head
        at = self._at(head)
        self._u16[at // 2 + 3] = slots
        self._u64[at // 8 + 1] = self._count()
        self._u8[at] = 1
        for address, length, buffer_id, flags in _native.DESCRIPTOR.iter_unpack(ring.descriptors(slots)):
            last, where = entry, self._at(entry)
            self._u64[where // 8 + 3] = address
            self._u32[where // 4 + 5] = length
            self._u16[where // 2 + 9] = flags
            self._u16[where // 2 + 8] = buffer_id
            entry = told.next[entry]
        self._u16[at // 2 + 2] = last
        self._u16[_FREE_HEAD] = entry
        self._u16[_OLD_FREE_HEAD] = told.free_head = entry
        told.last[head], told.num[head] = last, slots
        return head

    def giving(self, entry: int) -> None:  # noqa: D102
        told = self.told
        self._u16[self._at(told.last[entry]) // 2 + 1] = told.free_head
        self._u16[_FREE_HEAD] = entry
        self._u64[_USED] = _used_word(self._moved(told.used, told.num[entry]), told.used)

    def given(self, entry: int) -> None:  # noqa: D102
        told = self.told
        told.next[told.last[entry]] = told.free_head
        told.free_head = entry
        told.used = used = self._moved(told.used, told.num[entry])
        self._u8[self._at(entry)] = 0
        self._u16[_OLD_FREE_HEAD] = entry
        self._u64[_USED] = _used_word(used, used)

    def kept(self) -> None:  # noqa: D102
        self._settle(self.told.free_head, done=False)

    def _at(self, entry: int) -> int:
        """Where an entry's bytes begin."""
        return self.shape.head + _ENTRY.size * entry

    def _moved(self, position: Position, slots: int) -> Position:
        slot, wrap = position
        laps, slot = divmod(slot + slots, self._size)
        return slot, wrap ^ bool(laps % 2)

    def _settle(self, free_head: int, done: bool) -> None:
        """Let the state that is about to be hold (`done`), or be forgotten. The used words last, in either case."""
        self._u16[_OLD_FREE_HEAD if done else _FREE_HEAD] = free_head
        self._u64[_USED] = _used_word(self.told.used, self.told.used)
        self.told.free_head = free_head

    def _initialise(self, size: int, used: Position) -> None:
        self._clear()
        for entry in range(self.entries):
            self.told.next[entry] = self._u16[self._at(entry) // 2 + 1] = entry + 1
        self._u64[_USED] = _used_word(used, used)
        self._publish()
        self._size, self.told.used, self.told.free_head = size, used, 0
        self._retake([])


class _Left:
    """A copy of an area that was left behind, for a ring of `size`; nothing in it is true before it is checked."""

    def __init__(self, copy: memoryview, shape: Shape, entries: int, size: int) -> None:
        _, _, _, *free_heads, used_idx, old_used_idx, used_wrap, old_used_wrap = _HEAD.unpack_from(copy)
        self._size = size
        end = shape.head + shape.entry * entries
        self.entries = [_Entry(*fields) for fields in _ENTRY.iter_unpack(copy[shape.head : end])]
        for field, value in zip(("free_head", "old_free_head"), free_heads, strict=True):
            if value > entries:
                raise corrupt(field, value, f"one of the {entries} entries, or their number for none")
        for field, value in (("used_idx", used_idx), ("old_used_idx", old_used_idx)):
            if value >= size:
                raise corrupt(field, value, f"a slot of the ring, 0 to {size - 1}")
        for field, value in (("used_wrap_counter", used_wrap), ("old_used_wrap_counter", old_used_wrap)):
            if value > 1:
                raise corrupt(field, value, "0 or 1")
        new, old = free_heads
        self.states: tuple[tuple[int, Position], tuple[int, Position]] = (
            (new, (used_idx, bool(used_wrap))),
            (old, (old_used_idx, bool(old_used_wrap))),
        )
        """Free head and used position: those that are about to be, and those that hold."""

    def done(self, load_flags: Callable[[int], int]) -> bool:
        """Whether the driver can see what the state about to be says: that slot is not available any more."""
        (_, used), (_, (slot, wrap)) = self.states
        if used == (slot, wrap):
            return False
        return load_flags(slot) & (_AVAIL | _USED_FLAG) != (_AVAIL if wrap else _USED_FLAG)

    def free_entries(self, head: int) -> list[int]:
        """The entries on the list from `head` on, each of them once."""
        found: dict[int, None] = {}
        while head != len(self.entries):
            if head > len(self.entries) or head in found:
                raise corrupt("free list", head, f"each of the {len(self.entries)} entries once at most")
            found[head] = None
            head = self.entries[head].next
        return list(found)

    def chains(self, gone: set[int]) -> list[tuple[int, Retake, int]]:
        """Counter, chain and number of slots of each one in flight: of entries that are neither free nor another's."""
        found, slots = [], 0
        for head, entry in enumerate(self.entries):
            if entry.inflight > 1:
                raise corrupt(f"desc[{head}].inflight", entry.inflight, "0 or 1")
            if entry.inflight and head not in gone:
                descriptors = self._descriptors(head, gone)
                slots += entry.num
                found.append((entry.counter, Retake(head, descriptors), entry.num))
        if len(gone) < len(self.entries) or slots > self._size:
            limit = (
                f"have to be all {len(self.entries)} entries, and chains of at most the ring's {self._size} descriptors"
            )
            raise corrupt("entries", f"{len(gone)} free or in flight, {slots} in chains", limit)
        return found

    def _descriptors(self, head: int, gone: set[int]) -> bytes:
        """The descriptors of the chain at `head`, whose entries are `gone` from here on."""
        num, at, last = self.entries[head].num, head, head
        parts = []
        for _ in range(num):
            if at >= len(self.entries) or at in gone:
                raise corrupt(f"desc[{head}]", f"{num} entries", "entries of this chain only")
            gone.add(at)
            entry, last = self.entries[at], at
            parts.append(_native.DESCRIPTOR.pack(entry.address, entry.length, entry.id, entry.flags))
            at = entry.next
        if not parts or last != self.entries[head].last:
            raise corrupt(f"desc[{head}].num, last", (num, self.entries[head].last), "the chain's length and end")
        return b"".join(parts)


def _used_word(used: Position, old: Position) -> int:
    """The eight bytes with the used index and wrap counter, and the old ones, as one integer in the host's order."""
    word: int = _WORD.unpack(_USED_WORDS.pack(used[0], old[0], used[1], old[1]))[0]
    return word
