"""One buffer that the driver made available, as a device sees it: bytes to read, then room to write.

How the driver cut it into descriptors is none of the device's business (the standard's clause "Message Framing"), so a
chain reads and writes by offset, over as many descriptors and regions as there are. It keeps guest addresses only and
looks them up in the table of the moment of the copy: memory that was removed since the chain was popped is an error,
never a wild access. The addresses are those that were checked; nothing is read from the ring again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhost_user import _native
from vhost_user.errors import PeerError, UsageError
from vhost_user.memory import Bytes, GuestMemory, as_bytes
from vhost_user.units import ByteCount, GuestAddress

if TYPE_CHECKING:
    from vhost_user.dirty_log import DirtyLog
    from vhost_user.vring.device import DeviceQueue


class Chain:
    """A chain between `pop()` and `push()`. The driver owns its memory before and after.

    `readable` and `writable` are the bytes of its two parts; at least one is not 0, and their sum is 4 GiB at most.
    `id` is the head's index (split ring) or the buffer's id (packed ring).
    """

    __slots__ = (
        "_memory",
        "_raw",
        "_readables",
        "_viewed",
        "entry",
        "id",
        "owner",
        "readable",
        "slots",
        "writable",
    )

    entry: int
    """Where the queue's inflight area keeps it, if it has one."""

    def __init__(self, owner: DeviceQueue, memory: GuestMemory, raw: bytes) -> None:
        self.owner: DeviceQueue | None = owner
        self._memory = memory
        self._raw = raw
        self._viewed = False
        self.id, self.slots, _, self._readables, _, self.readable, self.writable = _native.CHAIN.unpack_from(raw)

    def __repr__(self) -> str:
        return f"<Chain {self.id}: {self.readable} bytes to read, {self.writable} to write>"

    @property
    def visited(self) -> int:
        """How many descriptors were read to find it."""
        visited: int = _native.CHAIN.unpack_from(self._raw)[2]
        return visited

    @property
    def readable_ranges(self) -> list[tuple[GuestAddress, ByteCount]]:
        """Guest address and size of each piece that the device reads."""
        return self._ranges()[: self._readables]

    @property
    def writable_ranges(self) -> list[tuple[GuestAddress, ByteCount]]:
        """Guest address and size of each piece that the device writes."""
        return self._ranges()[self._readables :]

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """`size` bytes of the readable part from `offset` on: fewer where it ends before, all without `size`.

        The driver chooses how long the part is, up to 4 GiB: say what you want of it. Raises UsageError for an offset
        beyond the part, PeerError where its memory is gone.
        """
        rest = self.readable - offset
        if size is None or size > rest:
            size = rest
        if self.owner is None or not 0 <= offset <= offset + size <= self.readable:
            raise self._refusal(offset, size, self.readable)
        try:
            return _native.chain_read(self._memory.table, self._raw, offset, size)
        except OSError:
            raise self._gone() from None

    def write(self, data: Bytes, offset: int = 0) -> None:
        """Fill the writable part with `data` from `offset` on.

        Raises UsageError where there is no room for it, PeerError where memory is gone; either way nothing is written.
        PeerError too where the host has no memory behind a piece: then what comes before may be written.
        """
        data = as_bytes(data)
        if self.owner is None or not 0 <= offset <= offset + len(data) <= self.writable:
            raise self._refusal(offset, len(data), self.writable)
        try:
            _native.chain_write(self._memory.table, self._raw, offset, data)
        except OSError:
            raise self._gone() from None
        finally:
            if (log := self.owner.logging) is not None:
                self._mark(log, offset, len(data))

    def readable_views(self) -> list[memoryview]:
        """The readable part itself, one view for each piece and region; see `GuestMemory.views`."""
        return [view.toreadonly() for view in self._views(self.readable_ranges)]

    def writable_views(self) -> list[memoryview]:
        """The writable part itself, one view for each piece and region; see `GuestMemory.views`."""
        self._viewed = True
        return self._views(self.writable_ranges)

    def mark_views(self, log: DirtyLog) -> None:
        """For the queue: mark all of the writable part if there were views of it, as what they wrote isn't known."""
        if self._viewed:
            self._mark(log, 0, self.writable)

    def _mark(self, log: DirtyLog, offset: int, size: int) -> None:
        for address, length in self.writable_ranges:
            if here := min(length - offset, size) if offset < length else 0:
                for start, length_there in self._memory.physical(GuestAddress(address + offset), here):
                    log.mark(start, length_there)
            offset, size = max(offset - length, 0), size - here

    def _ranges(self) -> list[tuple[GuestAddress, ByteCount]]:
        return list(_native.SEGMENT.iter_unpack(self._raw[_native.CHAIN.size :]))

    def _views(self, ranges: list[tuple[GuestAddress, ByteCount]]) -> list[memoryview]:
        if self.owner is None:
            raise self._refusal(0, 0, 0)
        return [view for address, size in ranges for view in self._memory.views(address, size)]

    def _refusal(self, offset: int, size: int, part: int) -> UsageError:
        if self.owner is None:
            return UsageError("chain", self.id, "was pushed: its memory is the driver's", "use it before push()")
        return UsageError("range", f"{offset}+{size}", f"has to lie within the part's {part} bytes")

    def _gone(self) -> PeerError:
        return PeerError("chain", self.id, "its memory was removed after it was made available")
