"""The kit's end of a guest-request ring in memory that this process has: chains laid out as a check wants them.

Buffers don't touch each other, so what is written past the end of one lands in no other, and is noticed; so is what is
written to one that the device may only read. They are used anew for each kick: all of the last one's have come back
then, or the device was given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from vhost_user.errors import PeerError, UsageError
from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress, align_up
from vhost_user.vring import PackedDriver, PackedLayout, SplitDriver, SplitLayout
from vhost_user.vring.driver import DESCRIPTOR, INDIRECT, WRITE, Element
from virtio_mem.conformance.target import FILL, Asks, Chain, Odd, TargetFailure, Used
from virtio_mem.protocol import Feature

_NAMED = 2
"""RING_EVENT_FLAGS_DESC: a packed ring's driver wants a notification for the descriptor that it names."""

_LENGTH_AT = 8
"""Where a packed ring's descriptor has its length."""

_GAP = 16
"""Bytes between two buffers, at least; they begin at multiples of 8, as a driver's would."""


class Piece(NamedTuple):
    """A descriptor's buffer: guest address and length."""

    address: GuestAddress
    length: int


class _OddSplit(SplitDriver):
    """Sets in a chain's descriptors what `odd` says."""

    odd = Odd(0)
    flagged = True

    def _make_available(self, elements: list[Element]) -> int:
        return super()._make_available(_written(elements, self.odd))


class _OddPacked(PackedDriver):
    """The same, and in indirect tables too. A used descriptor may lack its write flag; `flagged` says of the last one
    whether it did."""

    odd = Odd(0)
    flagged = True

    def _peek_used(self) -> tuple[int, int] | None:
        used = super()._peek_used()
        self.flagged = True
        if used is None or used[1]:
            return used
        token, _ = used
        length = self._memory.load32(GuestAddress(self._slot(self._next_used) + _LENGTH_AT))
        posted = self._posted.get(token)
        self.flagged = not (posted is not None and 0 < length <= posted.writable)
        return used if self.flagged else (token, length)

    def _make_available(self, elements: list[Element]) -> int:
        return super()._make_available(_written(elements, self.odd))

    def _indirect(self, elements: list[Element]) -> bytes:
        id_ = 0xDEAD if self.odd & Odd.IDS else 0
        more = 0xFFFF & ~(WRITE | INDIRECT) if self.odd & Odd.FLAGS else 0
        return b"".join(DESCRIPTOR.pack(address, length, id_, flags | more) for address, length, flags in elements)


def _written(elements: list[Element], odd: Odd) -> list[Element]:
    more = WRITE if odd & Odd.WRITE else 0
    return [each._replace(flags=each.flags | more) if each.flags & INDIRECT else each for each in elements]


class RingDriver:
    """A driver's queue, empty, with its buffers behind it: both in the `size` bytes at `start` of `memory`."""

    def __init__(self, memory: GuestMemory, start: GuestAddress, size: int, features: int, entries: int) -> None:
        negotiated = Feature(features)
        self._event_idx = Feature.EVENT_IDX in negotiated
        self.layout: SplitLayout | PackedLayout
        self.queue: _OddSplit | _OddPacked
        if Feature.RING_PACKED in negotiated:
            self.layout = PackedLayout.place(entries, start)
            self.queue = _OddPacked(memory, self.layout, event_idx=self._event_idx)
        else:
            self.layout = SplitLayout.place(entries, start)
            self.queue = _OddSplit(memory, self.layout, event_idx=self._event_idx)
        self._memory = memory
        self._position = 0
        """Of the next entry to be used: used entries of a split ring so far, descriptors of a packed one."""
        self._next = self._first = align_up(self.layout.end, 4096)
        self._end = start + size
        self._rooms: dict[int, list[Piece]] = {}
        self._sizes: dict[int, int] = {}
        self._tokens: list[int] = []
        self._used: dict[int, Used] = {}
        self._untouched: list[tuple[GuestAddress, bytes, str]] = []

    def offer(self, chains: Sequence[Chain]) -> bool:
        """Make all of `chains` available, and ask to be notified; whether the device wants a kick.

        UsageError where they are more than ring and buffers hold.
        """
        self.put(chains, Asks(_NAMED if self._event_idx and isinstance(self.layout, PackedLayout) else 0))
        return self.queue.needs_kick()

    def put(self, chains: Sequence[Chain], asks: Asks) -> None:
        """Make all of `chains` available, with the driver's area as `asks` says. UsageError as `offer`."""
        self._next, self._tokens, self._used, self._untouched = self._first, [], {}, []
        self._write_asks(asks)
        for chain in chains:
            readable = self._pieces(chain.readable)
            room = self._pieces(chain.room)
            self._fill(readable, chain.request)
            for address, length in room:
                self._memory.write(address, bytes([chain.fill]) * length + FILL * _GAP)
                behind = GuestAddress(address + length)
                self._untouched.append((behind, FILL * _GAP, "behind the room for an answer"))
            table = None
            if (pieces := len(readable) + len(room)) > self.layout.size:
                raise UsageError("chain", f"{pieces} descriptors", f"at most the {self.layout.size} of the ring")
            if chain.indirect:
                (table, _) = self._piece(pieces * DESCRIPTOR.size)
            self.queue.odd = chain.odd
            token = self.queue.add(readable, room, indirect_table=table)
            self._rooms[token] = room
            self._sizes[token] = pieces if table is None else 1
            self._tokens.append(token)
        if isinstance(self.layout, SplitLayout) or not chains:
            # A packed ring's descriptors are the device's to write, but for those that it does not have.
            table_of_all = self.layout.areas["desc"]
            data = bytes(self._memory.read(table_of_all.address, table_of_all.size))
            self._untouched.append((table_of_all.address, data, "to descriptors that are not its to write"))

    def _write_asks(self, asks: Asks) -> None:
        position = self._position + asks.ahead
        if isinstance(self.layout, SplitLayout):
            self._memory.store16(GuestAddress(self.layout.avail + 4 + 2 * self.layout.size), position % 2**16)
            self._memory.store16(self.layout.avail, asks.flags)
        else:
            size = self.layout.size
            event = position % size | (1 - position // size % 2) << 15
            self._memory.store32(self.layout.driver, asks.flags << 16 | event)

    @property
    def device_flags(self) -> int:
        """What the device's area says of available buffer notifications."""
        if isinstance(self.layout, SplitLayout):
            return self._memory.load16(self.layout.used)
        return self._memory.load32(self.layout.device) >> 16 & 3

    def overrun(self) -> None:
        """Have the available index run ahead by more than the ring has entries. UsageError for a packed ring."""
        if not isinstance(self.layout, SplitLayout):
            raise UsageError("overrun", "a packed ring", "has no index that could run ahead")
        idx = GuestAddress(self.layout.avail + 2)
        self._memory.store16(idx, (self._memory.load16(idx) + self.layout.size + 1) % 2**16)

    def collect(self) -> bool:
        """Take back what was used; whether all came back. TargetFailure for what can't have been used."""
        try:
            while (used := self.queue.get_used()) is not None:
                token, length = used
                pieces = self._rooms.pop(token)
                self._position += 1 if isinstance(self.layout, SplitLayout) else self._sizes[token]
                room = b"".join(self._memory.read(*piece) for piece in pieces)
                self._used[token] = Used(length, room, self.queue.flagged)
        except PeerError as error:
            raise TargetFailure(f"the used ring is wrong: {error}") from error
        return not self._rooms

    @property
    def missing(self) -> str:
        """What has not come back, in words."""
        return f"{len(self._rooms)} of {len(self._tokens)} buffers did not come back"

    def results(self) -> list[Used]:
        """All, in the order in which it was made available. TargetFailure as `seen`."""
        return [used for used in self.seen() if used is not None]

    def seen(self) -> tuple[Used | None, ...]:
        """What came back, in the order in which it was made available, None for what did not yet.

        TargetFailure where the device wrote to what is not its to write.
        """
        for address, data, what in self._untouched:
            if (now := self._memory.read(address, len(data))) != data:
                at = next(at for at, byte in enumerate(data) if now[at] != byte)
                raise TargetFailure(f"the device wrote {what}, at byte {at}")
        return tuple(self._used.get(token) for token in self._tokens)

    def _pieces(self, lengths: Sequence[int]) -> list[Piece]:
        return [self._piece(length) for length in lengths]

    def _piece(self, length: int) -> Piece:
        piece = Piece(GuestAddress(self._next), length)
        self._next = align_up(self._next + length + _GAP, 8)
        if self._next > self._end:
            raise UsageError("chains", f"{length} bytes more", f"within {self._end - self._first} bytes of buffers")
        return piece

    def _fill(self, pieces: Sequence[Piece], request: bytes) -> None:
        for (address, length), end in zip(pieces, accumulate(length for _, length in pieces), strict=True):
            data = request[end - length : end].ljust(length, b"\0")
            self._memory.write(address, data)
            self._untouched.append((address, data, "to a buffer that it may only read"))


class CurrentRing:
    """The ring of the driver that there is. After a reset there is none; the old one lies where it was."""

    def __init__(self) -> None:
        self._now: RingDriver | None = None
        self._before: RingDriver | None = None

    @property
    def now(self) -> RingDriver:
        """UsageError where there is no driver."""
        if self._now is None:
            raise UsageError("request", "made", "begin comes first: there is no driver")
        return self._now

    def start(self, ring: RingDriver) -> None:
        """A driver begins with this one."""
        self._now = ring

    def end(self) -> None:
        """The device is reset."""
        self._before, self._now = self._now or self._before, None

    def or_before(self) -> RingDriver:
        """The ring, or the one before the reset, which is the driver's again then. UsageError where there was none."""
        self._now = self._now or self._before
        return self.now
