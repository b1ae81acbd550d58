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
from vhost_user.vring import DriverQueue, PackedDriver, PackedLayout, SplitDriver, SplitLayout
from vhost_user.vring.driver import DESCRIPTOR
from virtio_mem.conformance.target import FILL, Chain, TargetFailure, Used
from virtio_mem.protocol import Feature

RING_SIZE = 64
"""Descriptors of the ring: what a check has in flight at one time."""

_GAP = 16
"""Bytes between two buffers, at least; they begin at multiples of 8, as a driver's would."""


class Piece(NamedTuple):
    """A descriptor's buffer: guest address and length."""

    address: GuestAddress
    length: int


class RingDriver:
    """A driver's queue, empty, with its buffers behind it: both in the `size` bytes at `start` of `memory`."""

    def __init__(self, memory: GuestMemory, start: GuestAddress, size: int, features: int, entries: int) -> None:
        negotiated = Feature(features)
        event_idx = Feature.EVENT_IDX in negotiated
        self.layout: SplitLayout | PackedLayout
        self.queue: DriverQueue
        if Feature.RING_PACKED in negotiated:
            self.layout = PackedLayout.place(entries, start)
            self.queue = PackedDriver(memory, self.layout, event_idx=event_idx)
        else:
            self.layout = SplitLayout.place(entries, start)
            self.queue = SplitDriver(memory, self.layout, event_idx=event_idx)
        self._memory = memory
        self._next = self._first = align_up(self.layout.end, 4096)
        self._end = start + size
        self._rooms: dict[int, list[Piece]] = {}
        self._tokens: list[int] = []
        self._used: dict[int, Used] = {}
        self._untouched: list[tuple[GuestAddress, bytes, str]] = []

    def offer(self, chains: Sequence[Chain]) -> bool:
        """Make all of `chains` available, and ask to be notified; whether the device wants a kick.

        UsageError where they are more than ring and buffers hold.
        """
        self._next, self._tokens, self._used, self._untouched = self._first, [], {}, []
        self.queue.enable_interrupts()
        for chain in chains:
            readable = self._pieces(chain.readable)
            room = self._pieces(chain.room)
            self._fill(readable, chain.request)
            for address, length in room:
                self._memory.write(address, FILL * (length + _GAP))
                behind = GuestAddress(address + length)
                self._untouched.append((behind, FILL * _GAP, "behind the room for an answer"))
            table = None
            if chain.indirect:
                (table, _) = self._piece((len(readable) + len(room)) * DESCRIPTOR.size)
            token = self.queue.add(readable, room, indirect_table=table)
            self._rooms[token] = room
            self._tokens.append(token)
        return self.queue.needs_kick()

    def collect(self) -> bool:
        """Take back what was used; whether all came back. TargetFailure for what can't have been used."""
        try:
            while (used := self.queue.get_used()) is not None:
                token, length = used
                pieces = self._rooms.pop(token)
                self._used[token] = Used(length, b"".join(self._memory.read(*piece) for piece in pieces))
        except PeerError as error:
            raise TargetFailure(f"the used ring is wrong: {error}") from error
        return not self._rooms

    @property
    def missing(self) -> str:
        """What has not come back, in words."""
        return f"{len(self._rooms)} of {len(self._tokens)} buffers did not come back"

    def results(self) -> list[Used]:
        """All that came back, in the order in which it was made available.

        TargetFailure where the device wrote to what is not its to write.
        """
        for address, data, what in self._untouched:
            if (now := self._memory.read(address, len(data))) != data:
                at = next(at for at, byte in enumerate(data) if now[at] != byte)
                raise TargetFailure(f"the device wrote {what}, at byte {at}")
        return [self._used[token] for token in self._tokens]

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
