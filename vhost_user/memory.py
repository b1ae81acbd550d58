"""Guest memory: which guest addresses there are, and where each of them lies in this process.

A table of regions, each a part of a mapping, sorted by guest address. A table never changes: adding, removing or
replacing regions makes a new one and puts it in place of the old one in a single step, while rings run. Every read,
write and ring call walks the one table that it found at its start. A table holds its mappings open, so a mapping that
was removed can be closed as soon as the last call that began before is done; until then `Mapping.close()` refuses.

Guest addresses come from the guest: nothing here follows one that it has not looked up, and what lies outside of every
region is the peer's violation, a `PeerError`. Ranges may cross from one region into the next where their guest
addresses touch, whatever lies between them in the host.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

from vhost_user import _native
from vhost_user.errors import PeerError, UsageError
from vhost_user.mapping import Mapping
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import U64_MAX, ByteCount, GuestAddress, HostOffset, UserAddress

Bytes = bytes | bytearray | memoryview


class RegionFile(NamedTuple):
    """The file that a region lies in, and where in it, in bytes."""

    fd: OwnedFd
    offset: HostOffset


@dataclass(frozen=True)
class Region:
    """`size` bytes of guest memory from `guest_address` on: those of `mapping` from `offset` on.

    `user_address` is where the vhost-user front end has them, where there is one. `file` is there where a device asked
    for it (`Device.keeps_file`), and is closed when the region goes. Raises UsageError for a region that
    is empty, wraps past 2**64 or reaches beyond its mapping.
    """

    guest_address: GuestAddress
    size: ByteCount
    mapping: Mapping
    offset: HostOffset = HostOffset(0)
    user_address: UserAddress | None = None
    file: RegionFile | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise UsageError("size", self.size, "has to be at least one byte, in a region")
        for what, address in (("guest_address", self.guest_address), ("user_address", self.user_address or 0)):
            if address < 0 or address + self.size - 1 > U64_MAX:
                raise UsageError(what, f"{address:#x}+{self.size:#x}", "has to end at 2**64 or before")
        if self.offset < 0 or self.offset + self.size > self.mapping.size:
            raise UsageError(
                "offset", f"{self.offset}+{self.size}", f"has to lie within the mapping's {self.mapping.size} bytes"
            )

    @property
    def end(self) -> int:
        """The guest address behind the last byte: 2**64 at most."""
        return self.guest_address + self.size

    def __str__(self) -> str:
        return f"{self.guest_address:#x}-{self.end - 1:#x}"


_ROW = _native.REGION.size

_guest_address: Callable[[Region], GuestAddress] = attrgetter("guest_address")


class _Pinned(NamedTuple):
    """The regions of a table by guest address, a view of each that keeps its mapping open, and rows for the C core."""

    regions: tuple[Region, ...]
    views: tuple[memoryview, ...]
    rows: bytes


_NOTHING = _Pinned((), (), b"")


def _pin(region: Region) -> tuple[memoryview, bytes]:
    """The view and the row."""
    host = region.mapping.address + region.offset
    view = region.mapping.view(region.offset, region.size)
    return view, _native.REGION.pack(region.guest_address, region.size, host, 0)


def _spliced(pinned: _Pinned, start: int, end: int, *new: Region) -> _Pinned:
    """`pinned` with `new` in the place of those from `start` to `end`."""
    regions, views, rows = pinned
    new_views, new_rows = zip(*map(_pin, new), strict=True) if new else ((), ())
    return _Pinned(
        regions[:start] + new + regions[end:],
        views[:start] + new_views + views[end:],
        rows[: start * _ROW] + b"".join(new_rows) + rows[end * _ROW :],
    )


def _require_apart(below: Region, above: Region) -> None:
    if below.end > above.guest_address:
        raise UsageError("guest_address", above, f"overlaps the region {below}", "remove that one first")


class GuestMemory:
    """The regions of one guest, and access to them by guest address. Any thread may call anything at any time."""

    translated = False
    """Whether an IOMMU is in between (iotlb.py): what can't be found may only be not known yet."""

    def __init__(self, regions: Iterable[Region] = ()) -> None:
        _native.install_guard()
        self._lock = threading.Lock()
        self._install(regions)

    def _install(self, regions: Iterable[Region]) -> None:
        ordered = sorted(regions, key=_guest_address)
        for below, above in pairwise(ordered):
            _require_apart(below, above)
        self._put(_spliced(_NOTHING, 0, 0, *ordered))

    def _put(self, pinned: _Pinned) -> None:
        """Let these be the regions, none of them above another. What was pinned before stays so."""
        self._table = _native.MemoryTable(pinned.rows, pinned.views)
        self._pinned = pinned

    @property
    def table(self) -> _native.MemoryTable:
        """The present table, for the C core."""
        return self._table

    def physical(self, address: GuestAddress, size: int) -> list[tuple[GuestAddress, int]]:
        """Where a range lies in the guest's physical memory, as a dirty log knows it: address and size of each part."""
        return [(address, size)]

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions of the present table, by guest address."""
        return self._pinned.regions

    def replace(self, regions: Iterable[Region]) -> None:
        """Let these be all regions, in a single step. Raises UsageError where two overlap; then nothing changed."""
        with self._lock:
            self._install(regions)

    def add(self, region: Region) -> None:
        """Let there be one more region. Raises UsageError where it overlaps another; then nothing changed."""
        with self._lock:
            pinned = self._pinned
            at = bisect_right(pinned.regions, region.guest_address, key=_guest_address)
            if at:
                _require_apart(pinned.regions[at - 1], region)
            if at < len(pinned.regions):
                _require_apart(region, pinned.regions[at])
            self._put(_spliced(pinned, at, at, region))

    def remove(self, region: Region) -> None:
        """Let there be one region less. Raises UsageError where it is not in the table. Its mapping stays open."""
        with self._lock:
            pinned = self._pinned
            at = bisect_left(pinned.regions, region.guest_address, key=_guest_address)
            if pinned.regions[at : at + 1] != (region,):
                raise UsageError("region", region, "has to be a region of this guest memory")
            self._put(_spliced(pinned, at, at + 1))

    def read(self, address: GuestAddress, size: int) -> bytes:
        """A copy of `size` bytes.

        Raises PeerError where a part of them lies in no region or has no memory of the host behind it, UsageError for
        a size below 0.
        """
        _check_size(size)
        try:
            return _native.memory_read(self.table, address, size)
        except (OSError, OverflowError):
            raise _outside(address, size) from None

    def write(self, address: GuestAddress, data: Bytes) -> None:
        """Copy `data` to guest memory. Raises PeerError where a part lies in no region; then nothing is written.

        It does so too where the host has no memory behind a region: then what comes before may be written.
        """
        data = as_bytes(data)
        try:
            _native.memory_write(self.table, address, data)
        except (OSError, OverflowError):
            raise _outside(address, len(data)) from None

    def views(self, address: GuestAddress, size: int) -> list[memoryview]:
        """The memory itself, one view for each region that the range touches, in order.

        Raises PeerError where a part of it lies in no region, UsageError for a size below 0.

        The guest may change what they show at any moment. While one lives, its mapping can't be closed.
        """
        _check_size(size)
        pinned, views, start, left = self._pinned, [], int(address), size
        regions = pinned.regions
        at = bisect_right(regions, address, key=_guest_address) - 1
        while left:
            if not (0 <= at < len(regions) and regions[at].guest_address <= start < regions[at].end):
                raise _outside(address, size)
            region, pin = regions[at], pinned.views[at]
            here, offset = min(left, region.end - start), start - region.guest_address
            views.append(pin[offset : offset + here])
            at, start, left = at + 1, start + here, left - here
        return views

    def contiguous(self, address: GuestAddress, size: int, alignment: int = 1) -> bool:
        """Whether a range lies in one region, and starts at a multiple of `alignment` in guest and host memory."""
        try:
            return _native.memory_contiguous(self.table, address, size, alignment)
        except OverflowError:
            return False

    def load16(self, address: GuestAddress) -> int:
        """A little-endian integer, loaded whole and with acquire order. Raises PeerError unless it is aligned."""
        try:
            return _native.load16(self.table, address)
        except (OSError, OverflowError):
            raise _outside(address, 2) from None

    def load32(self, address: GuestAddress) -> int:
        """A little-endian integer, loaded whole and with acquire order. Raises PeerError unless it is aligned."""
        try:
            return _native.load32(self.table, address)
        except (OSError, OverflowError):
            raise _outside(address, 4) from None

    def store16(self, address: GuestAddress, value: int) -> None:
        """Store a little-endian integer whole, with release order. Raises PeerError unless it is aligned."""
        assert 0 <= value < 2**16
        try:
            _native.store16(self.table, address, value)
        except (OSError, OverflowError):
            raise _outside(address, 2) from None

    def store32(self, address: GuestAddress, value: int) -> None:
        """Store a little-endian integer whole, with release order. Raises PeerError unless it is aligned."""
        assert 0 <= value < 2**32
        try:
            _native.store32(self.table, address, value)
        except (OSError, OverflowError):
            raise _outside(address, 4) from None


def as_bytes(data: Bytes) -> Bytes:
    """`data` such that its length counts bytes, without a copy."""
    return data if type(data) is bytes else memoryview(data).cast("B")


def _check_size(size: int) -> None:
    if size < 0:
        raise UsageError("size", size, "has to be 0 bytes or more", "give the number of bytes behind the address")


def _outside(address: int, size: int) -> PeerError:
    return PeerError(
        "guest address", f"{address:#x}+{size:#x}", "has to lie in guest memory, and to be aligned if an index"
    )
