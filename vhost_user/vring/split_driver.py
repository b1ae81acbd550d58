"""The driver's side of a split virtqueue."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress
from vhost_user.vring.driver import DESCRIPTOR, NEXT, DriverQueue, Element
from vhost_user.vring.errors import RingBroken
from vhost_user.vring.layout import SplitLayout

_NO_INTERRUPT = 1  # VIRTQ_AVAIL_F_NO_INTERRUPT
_NO_NOTIFY = 1  # VIRTQ_USED_F_NO_NOTIFY

_USED_ELEMENT = struct.Struct("<II")


class SplitDriver(DriverQueue):
    """The driver of the split ring at `layout`. Both indices begin at `start`: 0, but in tests of their end."""

    def __init__(self, memory: GuestMemory, layout: SplitLayout, *, event_idx: bool = False, start: int = 0) -> None:
        super().__init__(memory, layout, event_idx=event_idx)
        self._desc = layout.desc
        self._avail_flags = layout.avail
        self._avail_idx = GuestAddress(layout.avail + 2)
        self._avail_ring = layout.avail + 4
        self._used_event = GuestAddress(self._avail_ring + 2 * layout.size)
        self._used_flags = layout.used
        self._used_idx = GuestAddress(layout.used + 2)
        self._used_ring = layout.used + 4
        self._avail_event = GuestAddress(self._used_ring + 8 * layout.size)
        self._descriptors = list(range(layout.size))  # those that no chain takes
        self._taken: dict[int, list[int]] = {}
        self._next_avail = self._next_used = start
        memory.store16(self._avail_idx, start)
        memory.store16(self._used_idx, start)

    def _indirect(self, elements: list[Element]) -> bytes:
        return b"".join(_encode(elements, range(len(elements))))

    def _make_available(self, elements: list[Element]) -> int:
        taken = self._descriptors[-len(elements) :]
        for index, descriptor in zip(taken, _encode(elements, taken), strict=True):
            self._memory.write(GuestAddress(self._desc + DESCRIPTOR.size * index), descriptor)
        head = taken[0]
        self._memory.store16(GuestAddress(self._avail_ring + 2 * (self._next_avail % self.size)), head)
        self._next_avail = (self._next_avail + 1) % 2**16
        self._memory.store16(self._avail_idx, self._next_avail)
        del self._descriptors[-len(elements) :]
        self._taken[head] = taken
        self._unkicked += 1
        return head

    def _peek_used(self) -> tuple[int, int] | None:
        idx = self._memory.load16(self._used_idx)
        waiting = (idx - self._next_used) % 2**16
        if waiting > len(self._posted):
            limit = f"has to be at most the {len(self._posted)} chains in flight beyond {self._next_used}"
            raise RingBroken("used.idx", idx, limit, "reset the device")
        if not waiting:
            return None
        element = GuestAddress(self._used_ring + _USED_ELEMENT.size * (self._next_used % self.size))
        token, written = _USED_ELEMENT.unpack(self._memory.read(element, _USED_ELEMENT.size))
        return token, written

    def _take_back(self, token: int) -> None:
        self._descriptors += self._taken.pop(token)
        self._next_used = (self._next_used + 1) % 2**16

    def _wants_kick(self, moved: int) -> bool:
        if not self._event_idx:
            return not self._memory.load16(self._used_flags) & _NO_NOTIFY
        # How many chains were added after the one that avail_event names.
        since = (self._next_avail - self._memory.load16(self._avail_event) - 1) % 2**16
        return since < moved

    def _advise(self, *, enable: bool) -> None:
        # With the event index the flags stay 0, and a used_event left behind is the whole advice.
        if not self._event_idx:
            self._memory.store16(self._avail_flags, 0 if enable else _NO_INTERRUPT)
        elif enable:
            self._memory.store16(self._used_event, self._next_used)


def _encode(elements: list[Element], indices: Sequence[int]) -> Iterator[bytes]:
    """The descriptors of a chain whose elements are to lie at `indices` of their table."""
    last = len(elements) - 1
    for at, (address, length, flags) in enumerate(elements):
        if at < last:
            yield DESCRIPTOR.pack(address, length, flags | NEXT, indices[at + 1])
        else:
            yield DESCRIPTOR.pack(address, length, flags, 0)
