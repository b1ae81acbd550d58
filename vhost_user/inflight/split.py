"""A split queue's area: which heads are in flight, and which of them the last used entries gave back.

To take a chain with head i:

    1. the queue moves next_avail                in its own memory: a new process finds the chain in the ring again
    2. desc[i].counter = the global counter      means nothing before step 3
    3. desc[i].inflight = 1                      from here on a new process takes it again, and not from the ring

To give it back:

    4. desc[i].next = last_batch_head            nobody follows it before step 5
    5. last_batch_head = i                       nobody looks at it while used_idx is the used ring's idx
    6. the used element, then the ring's idx     the driver has the chain; used_idx is behind by one, so a new process
                                                 clears what is in the list of one that begins at last_batch_head: i
    7. desc[i].inflight = 0                      as a new process would have it
    8. used_idx = the used ring's idx            all is as before step 1

Each chain goes back alone, a batch of one, malformed ones too. A process that is stopped before step 6 has perhaps done
what the chain asks for, and the next one does it again; the driver hears of it once. next_avail is not in the area: the
chains that were taken are those that were used, as the ring's idx counts them, and those that are in flight.

Areas that another back end left may have batches of more than one. A batch is at most what the ring has entries, so the
walk has an end.

Where many chains are taken and given back in one call, csrc/inflight.c makes the same stores, chain by chain.
"""

from __future__ import annotations

import struct

from vhost_user import _native
from vhost_user.inflight.area import InflightArea, Position, Positions, Retake, Shape, corrupt
from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress
from vhost_user.vring.device import check_in_flight
from vhost_user.vring.layout import Layout, SplitLayout

# The head's other words, as indices of 16 bits.
_LAST_BATCH_HEAD, _USED_IDX = 6, 7

_RING_IDX = 2  # where idx lies in the used ring

_ENTRY = struct.Struct("=B5xHQ")  # inflight, next, counter


class SplitInflight(InflightArea):
    """The area of a split queue. An entry is the index of a chain's head."""

    shape = Shape(16, _ENTRY.size)

    def __init__(self, view: memoryview, entries: int) -> None:
        self.told: _native.SplitInflight = _native.SplitInflight(view)
        super().__init__(view, entries)

    def take_over(
        self,
        memory: GuestMemory,
        layout: Layout,
        avail: Position,
        used: Position,  # noqa: ARG002
    ) -> Positions:
        """See `InflightArea`; where the ring's used entries end is what its idx says, whatever `used` is."""
        ring = self._check_layout(layout, SplitLayout)
        size, used_idx = ring.size, memory.load16(GuestAddress(ring.used + _RING_IDX))
        copy = self._copy()
        if copy is None:
            check_in_flight((avail[0] - used_idx) % 2**16, size)
            self._initialise(used_idx)
            return avail, (used_idx, False)
        head = copy[: self.shape.head].cast("H")
        entries = list(_ENTRY.iter_unpack(copy[16 : 16 + _ENTRY.size * self.entries]))
        batch = _batch(entries, head[_LAST_BATCH_HEAD], (used_idx - head[_USED_IDX]) % 2**16, size)
        found = [(entry[2], Retake(at)) for at, entry in enumerate(entries) if entry[0] and at not in batch]
        for at, (inflight, _, _) in enumerate(entries):
            if inflight > (at < size):
                raise corrupt(f"desc[{at}].inflight", inflight, f"0, or 1 for one of the ring's {size} descriptors")
        for at in batch:
            self._u8[self._at(at)] = 0
        self._u16[_USED_IDX] = used_idx
        self.told.used_idx, self.told.last_batch_head = used_idx, head[_LAST_BATCH_HEAD]
        self._retake(found)
        return ((used_idx + len(found)) % 2**16, False), (used_idx, False)

    def reload(self, ring: _native.Ring, table: _native.MemoryTable, retake: Retake) -> int:  # noqa: D102
        return ring.reload(table, retake.entry)

    def taken(self, ring: _native.Ring, chain_id: int, slots: int) -> int:  # noqa: ARG002, D102
        at = self._at(chain_id)
        self._u64[at // 8 + 1] = self._count()
        self._u8[at] = 1
        return chain_id

    def giving(self, entry: int) -> None:  # noqa: D102
        self._u16[self._at(entry) // 2 + 3] = self.told.last_batch_head
        self._u16[_LAST_BATCH_HEAD] = entry

    def given(self, entry: int) -> None:  # noqa: D102
        told = self.told
        told.last_batch_head = entry
        told.used_idx = used_idx = (told.used_idx + 1) % 2**16
        self._u8[self._at(entry)] = 0
        self._u16[_USED_IDX] = used_idx

    def kept(self) -> None:  # noqa: D102
        self._u16[_LAST_BATCH_HEAD] = self.told.last_batch_head

    def _at(self, entry: int) -> int:
        """Where an entry's bytes begin."""
        return self.shape.head + _ENTRY.size * entry

    def _initialise(self, used_idx: int) -> None:
        self._clear()
        self._u16[_USED_IDX] = used_idx
        self._publish()
        self.told.used_idx, self.told.last_batch_head = used_idx, 0
        self._retake([])


def _batch(entries: list[tuple[int, int, int]], head: int, length: int, size: int) -> set[int]:
    """The heads in the list that begins at `head`. A descriptor is used once in a batch, so no two are the same."""
    if length > size:
        limit = f"has to be at most the ring's {size} descriptors behind its idx"
        raise corrupt("used_idx", f"{length} behind", limit)
    found: set[int] = set()
    while len(found) < length:
        if head >= size or head in found:
            raise corrupt("last batch", head, f"{length} descriptors of the ring's {size}, each once")
        found.add(head)
        head = entries[head][1]
    return found
