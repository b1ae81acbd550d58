"""Guest memory behind an IOMMU: translations that a front end gives one by one and takes back at any time.

With VIRTIO_F_IOMMU_PLATFORM all that a ring holds are I/O virtual addresses. The front end answers a question for one
of them by an entry: so many bytes from this IOVA on are these bytes of its user addresses, to be read, written or both.
The entries are kept here as the guest memory that rings and chains see, whose guest addresses are the IOVAs.

An entry is confined to the regions that are shared. It keeps its user address, and where that lies in this process is
looked up again whenever the regions change; an entry that is no longer within them is forgotten, and asked for again.

Ranges. A new entry takes the place of what it overlaps, and of an old one only that part is lost; the same goes for an
invalidation. Neighbours that go on in each other, in both address spaces and with the same permission, become one: the
entries of an IOMMU are pages, and a ring's parts, which have to lie in one piece, are longer.

Bounds. The front end decides how many entries there are, so the oldest make room for new ones; what is still needed is
missed and asked for again. The C core's table costs as much to make as there are entries. So it is made when it is next
used, and entries that nothing uses cost their front end more than us.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from vhost_user import _native
from vhost_user.errors import PeerError
from vhost_user.mapping import Mapping
from vhost_user.memory import GuestMemory
from vhost_user.message import IotlbPermission
from vhost_user.shared_memory import SharedMemory
from vhost_user.units import U64_MAX, ByteCount, GuestAddress, HostOffset

MAX_PIECES = 2048
"""Pieces of memory that entries have at a time. An entry is one piece, unless it crosses from region to region. Linux's
vhost and DPDK keep as many entries."""

READ, WRITE = IotlbPermission.READ, IotlbPermission.WRITE


class Piece(NamedTuple):
    """A part of an entry that lies in one region: in this process from `offset` of `mapping` on."""

    iova: int
    size: int
    mapping: Mapping
    offset: int
    guest: int
    """The region's guest address for it, which only the dirty log knows it by."""


class Entry(NamedTuple):
    """`size` bytes from `iova` on are those at the front end's `user` address."""

    iova: int
    size: int
    user: int
    permission: IotlbPermission
    pieces: list[Piece]

    @property
    def end(self) -> int:
        """The IOVA behind the last byte."""
        return self.iova + self.size


class Iotlb(GuestMemory):
    """The translations into `shared`. Filled by `update` and `invalidate` only. Any thread may call anything."""

    translated = True

    def __init__(self, shared: SharedMemory, max_pieces: int = MAX_PIECES) -> None:
        super().__init__()
        self.max_pieces = max_pieces
        self._shared = shared
        self._starts: list[int] = []
        self._entries: dict[int, Entry] = {}  # by IOVA, the oldest first
        self._pieces = 0
        self._stale = False

    def __len__(self) -> int:
        return len(self._starts)

    # What the front end says.

    def update(self, iova: int, size: int, user_address: int, permission: IotlbPermission) -> None:
        """Let `size` bytes from `iova` on be those at `user_address`, to be accessed as `permission` says.

        Raises PeerError for an entry without bytes, one that wraps, and one that is not within the regions that are
        shared; then nothing changed.
        """
        if size < 1 or iova + size - 1 > U64_MAX:
            raise PeerError("iova", f"{iova:#x}+{size:#x}", "has to be 1 byte or more, that end at 2**64 or before")
        with self._lock:
            new = self._resolve(iova, size, user_address, permission)
            if new is None:
                limit = "has to lie within the regions of the memory table"
                raise PeerError("user address", f"{user_address:#x}+{size:#x}", limit)
            self._cut(iova, size)
            if permission is not IotlbPermission.NO_ACCESS:
                self._insert(self._joined(new))
            self._make_room()
            self._changed()

    def invalidate(self, iova: int, size: int) -> None:
        """Forget what is known of `size` bytes from `iova` on; of all that follow, where `size` is 0 as that of 2**64
        bytes is on the wire. When this returns nothing can be reached by these addresses any more."""
        with self._lock:
            self._cut(iova, size or U64_MAX + 1 - iova)
            self._make_room()  # of one entry two may be left
            self._changed()

    def memory_changed(self) -> None:
        """The regions that are shared are others: entries that are not within them are forgotten."""
        with self._lock:
            if not self._entries:
                return
            before, self._entries = self._entries, {}
            self._starts, self._pieces = [], 0
            for entry in before.values():
                again = self._resolve(entry.iova, entry.size, entry.user, entry.permission)
                if again is not None:
                    self._insert(again)
                    self._make_room()  # it may be more pieces than before
            self._changed()

    def clear(self) -> None:
        """Forget everything."""
        self.invalidate(0, 0)

    # What rings and devices ask.

    @property
    def table(self) -> _native.MemoryTable:  # noqa: D102
        if self._stale:
            with self._lock:
                self._table = self._make_table()
                self._stale = False
        return self._table

    def lacks(self, address: int, size: int, access: int) -> int | None:
        """The first address of a range that may not be accessed so (bits of IotlbPermission), if there is one."""
        return _native.memory_lacks(self.table, address, size, access)

    def views(self, address: GuestAddress, size: int) -> list[memoryview]:  # noqa: D102
        with self._lock:
            parts = list(self._parts(address, size))
            if sum(length for _, _, length in parts) < size:
                raise PeerError("guest address", f"{address:#x}+{size:#x}", "needs a translation for each byte")
            return [
                piece.mapping.view(HostOffset(piece.offset + skip), ByteCount(length)) for piece, skip, length in parts
            ]

    def physical(self, address: GuestAddress, size: int) -> list[tuple[GuestAddress, int]]:  # noqa: D102
        with self._lock:
            return [(GuestAddress(piece.guest + skip), length) for piece, skip, length in self._parts(address, size)]

    # Inside, under the lock.

    def _resolve(self, iova: int, size: int, user: int, permission: IotlbPermission) -> Entry | None:
        """The entry, or None where it is not within the regions."""
        pieces, at = [], 0
        spans = self._shared.user_spans
        index = bisect_right(spans, user, key=lambda span: span.user) - 1
        while at < size:
            if not 0 <= index < len(spans) or not spans[index].user <= user + at < spans[index].end:
                return None
            span, skip = spans[index], user + at - spans[index].user
            here, region = min(size - at, span.end - user - at), span.region
            pieces.append(Piece(iova + at, here, region.mapping, region.offset + skip, region.guest_address + skip))
            at, index = at + here, index + 1
        return Entry(iova, size, user, permission, pieces)

    def _joined(self, new: Entry) -> Entry:
        """`new` with the neighbours that go on in it, which are taken out."""
        start, end, shift = new.iova, new.end, new.user - new.iova
        at = bisect_left(self._starts, new.iova)
        for other in [self._entries[other_start] for other_start in self._starts[max(at - 1, 0) : at + 1]]:
            touches = other.end == new.iova or other.iova == new.end
            if touches and (other.user - other.iova, other.permission) == (shift, new.permission):
                self._forget(other.iova)
                start, end = min(start, other.iova), max(end, other.end)
        if (start, end) == (new.iova, new.end):
            return new
        return self._resolve(start, end - start, start + shift, new.permission) or new

    def _cut(self, iova: int, size: int) -> None:
        end = iova + size
        at = max(bisect_right(self._starts, iova) - 1, 0)
        touched = self._starts[at : bisect_left(self._starts, end)]
        for entry in [self._entries[start] for start in touched]:
            if entry.end <= iova:
                continue
            self._forget(entry.iova)
            for start, stop in ((entry.iova, iova), (end, entry.end)):
                if start < stop:
                    rest = self._resolve(start, stop - start, entry.user + start - entry.iova, entry.permission)
                    if rest is not None:
                        self._insert(rest)

    def _make_room(self) -> None:
        while self._pieces > self.max_pieces and len(self._entries) > 1:
            self._forget(next(iter(self._entries)))

    def _insert(self, entry: Entry) -> None:
        self._starts.insert(bisect_left(self._starts, entry.iova), entry.iova)
        self._entries[entry.iova] = entry
        self._pieces += len(entry.pieces)

    def _forget(self, start: int) -> None:
        del self._starts[bisect_left(self._starts, start)]
        self._pieces -= len(self._entries.pop(start).pieces)

    def _changed(self) -> None:
        """No table holds a mapping, until one is used; a call that is under way has its own."""
        self._table = _native.MemoryTable(b"", None)
        self._stale = bool(self._starts)

    def _make_table(self) -> _native.MemoryTable:
        rows: list[tuple[int, int, int, int]] = []
        for start in self._starts:
            entry = self._entries[start]
            denied = int(IotlbPermission.READ_WRITE & ~entry.permission)
            rows += [(piece.iova, piece.size, piece.mapping.address + piece.offset, denied) for piece in entry.pieces]
        mappings = {piece.mapping for entry in self._entries.values() for piece in entry.pieces}
        packed = b"".join([_native.REGION.pack(*row) for row in rows])
        return _native.MemoryTable(packed, [mapping.view() for mapping in mappings])

    def _parts(self, address: int, size: int) -> Iterator[tuple[Piece, int, int]]:
        """The pieces from `address` on, up to the first gap: each with where the range begins in it, and how long."""
        at = max(bisect_right(self._starts, address) - 1, 0)
        end = address + size
        for start in self._starts[at : bisect_left(self._starts, end)]:
            for piece in self._entries[start].pieces:
                skip = address - piece.iova
                if 0 <= skip < piece.size and address < end:
                    here = min(piece.size - skip, end - address)
                    yield piece, skip, here
                    address += here
