"""One queue's area, as far as both formats agree: its head, its entries, and what a queue asks of it.

Stores. What a killed process leaves behind is what its stores made, in the order of the program; so the order of the
stores is the protocol, and each must happen whole. Each is an assignment to an item of a `memoryview` that is cast to
the field's own type, which is one aligned store of the processor. All integers are in the host's byte order.

Trust. The front end holds the memory and may change it at any time. It is copied once, when a queue takes it over,
and the copy is checked; from then on it is only written, and what has to be remembered is remembered here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import ClassVar, NamedTuple, TypeVar

from vhost_user import _native
from vhost_user.errors import PeerError, UsageError
from vhost_user.memory import GuestMemory
from vhost_user.units import align_up
from vhost_user.vring.layout import Layout

ALIGNMENT = 64
"""Areas are multiples of this many bytes, so that no two queues share a cache line. The document names no alignment."""

VERSION = 1
"""Of an area that is in use; 0 is one that was never."""

U64 = 2**64

# The words of both heads, as indices of 16 bits.
_VERSION, _DESC_NUM = 4, 5


Position = tuple[int, bool]
"""A free-running index and False (split), or a slot of the ring and its wrap counter (packed)."""

Positions = tuple[Position, Position]

LayoutT = TypeVar("LayoutT", bound=Layout)


class Shape(NamedTuple):
    """Bytes of an area's head, and of each entry behind it."""

    head: int
    entry: int

    def size(self, entries: int) -> int:
        """Bytes of an area with this many entries."""
        return align_up(self.head + self.entry * entries, ALIGNMENT)


class Retake(NamedTuple):
    """A chain to be taken again: its entry, and what its format needs to know of it."""

    entry: int
    descriptors: bytes = b""


class InflightArea(ABC):
    """The area in `view`, for a ring of at most `entries` descriptors. One queue at a time may use it.

    A chain's entry is the number under which the area keeps it. `retakes` are the chains that were in flight when the
    area was taken over, in the order in which they were first taken; the queue removes each that it has taken again.
    """

    shape: ClassVar[Shape]
    told: _native.Inflight
    """What the area says too, as long as nobody else writes it; by it the C core notes the chains of a batch."""

    def __init__(self, view: memoryview, entries: int) -> None:
        assert len(view) == self.shape.size(entries)
        self.entries = entries
        self.retakes: deque[Retake] = deque()
        self._u8 = view
        self._u16, self._u32, self._u64 = view.cast("H"), view.cast("I"), view.cast("Q")

    @abstractmethod
    def take_over(self, memory: GuestMemory, layout: Layout, avail: Position, used: Position) -> Positions:
        """Have the area be that of the ring at `layout`; the positions where that goes on, available and used.

        `avail` and `used` are what a new area is begun with. Raises PeerError for an area that can't be this ring's,
        UsageError for one of the other format; then nothing changed.
        """

    @abstractmethod
    def reload(self, ring: _native.Ring, table: _native.MemoryTable, retake: Retake) -> int:
        """Have the C core take a chain again; what `Ring.take` says of it."""

    @abstractmethod
    def taken(self, ring: _native.Ring, chain_id: int, slots: int) -> int:
        """Note the chain that was just taken from the ring; its entry."""

    @abstractmethod
    def giving(self, entry: int) -> None:
        """Note that a chain is about to go back to the driver."""

    @abstractmethod
    def given(self, entry: int) -> None:
        """Note that it went back."""

    @abstractmethod
    def kept(self) -> None:
        """Note that the chain that was about to go back did not."""

    def close(self) -> None:
        """Let go of the memory; no queue uses the area any more."""
        self.told.close()
        for view in (self._u64, self._u32, self._u16, self._u8):
            view.release()

    def _check_layout(self, layout: Layout, kind: type[LayoutT]) -> LayoutT:
        """The layout, if it is one that the area can be for."""
        if not isinstance(layout, kind):
            raise UsageError("inflight", type(self).__name__, f"has to be an area for a {type(layout).__name__}")
        if layout.size > self.entries:
            raise PeerError(
                "inflight queue_size", self.entries, f"has to be the {layout.size} entries of the ring or more"
            )
        return layout

    def _copy(self) -> memoryview | None:
        """All of the area, its head checked; or None where it was never used."""
        copy = memoryview(self._u8.tobytes())
        words = copy[: self.shape.head].cast("H")
        if words[_VERSION] == 0:
            return None
        if words[_VERSION] != VERSION:
            raise PeerError("inflight version", words[_VERSION], f"has to be 0 or {VERSION}", "share a new buffer")
        if features := copy[:8].cast("Q")[0]:
            raise PeerError(
                "inflight features", f"{features:#x}", "has to be 0: none are defined", "share a new buffer"
            )
        if words[_DESC_NUM] != self.entries:
            raise PeerError(
                "inflight desc_num", words[_DESC_NUM], f"has to be the queue size of the buffer, {self.entries}"
            )
        return copy

    def _clear(self) -> None:
        """Zeros everywhere, the version first: whoever is stopped in here begins anew."""
        self._u16[_VERSION] = 0
        self._u8[:] = bytes(len(self._u8))
        self._u16[_DESC_NUM] = self.entries

    def _publish(self) -> None:
        """The area is in use from here on."""
        self._u16[_VERSION] = VERSION

    def _count(self) -> int:
        """The value of the document's global counter, which then goes up by 1."""
        value = self.told.counter
        self.told.counter = (value + 1) % U64
        return value

    def _retake(self, found: list[tuple[int, Retake]]) -> None:
        """These, with their counters, are to be taken again; new ones count on from there."""
        found.sort()
        self.retakes = deque(retake for _, retake in found)
        self.told.counter = (found[-1][0] + 1) % U64 if found else 0


def corrupt(field: str, value: object, limit: str) -> PeerError:
    """What to raise for an area that no back end can have left behind."""
    return PeerError(f"inflight {field}", value, limit, "share a new buffer")
