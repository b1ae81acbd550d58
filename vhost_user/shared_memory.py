"""The memory of a front end, as its back end has it: regions mapped from the descriptors that came along.

Everything about a region was chosen by the front end: its two addresses, its size, the file and the place in it. All of
it is checked before anything is mapped, and mapped before anything is changed; so a table is replaced at once, as a
whole, or not at all. A descriptor that is handed in is consumed, whatever comes of it: a mapping needs none, and 509 of
them would be half of the usual limit.

The front end knows its memory by user addresses, the guest by guest addresses. Rings are told to the back end by user
address, once, and translated to guest addresses then; all else that a ring holds are guest addresses already. Under
GPA_ADDRESSES the two are the same (M14).

Memory that goes away while it is used. A copy or a ring call that is under way holds the table that it began with, and
a device may hold views for as long as it likes. Both keep the mapping under them: a region that is removed can't be
touched by its address any more, and is unmapped now, or by the last of those to let go. The front end can't make that
grow without bound: nothing is added while as many mappings linger as there may be regions.

Addresses are all that a region of a sparse file costs, and the process has 128 TiB of them. So one front end may share
seven eighths of what the others of this process leave: each of them finds some, however many there are.

Memory that the front end takes away by truncating its file: mappings are guarded (see mapping.py), so that costs a
region, and not the process. After each event a server asks for the `dead_region()`, and closes the connection.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

from vhost_user.errors import HostError, PeerError, UsageError
from vhost_user.mapping import map_part
from vhost_user.memory import GuestMemory, Region, RegionFile
from vhost_user.message import MemoryRegion
from vhost_user.owned_fd import OwnedFd, ReceivedFd, close_all
from vhost_user.units import U64_MAX, GuestAddress, HostAddress, HostOffset, UserAddress

MAX_REGIONS = 509
"""As many as libvhost-user and rust-vmm's back ends take: KVM's 512 memory slots, less the three that it kept to itself
on x86-64 when front ends came to rely on the number."""

MAX_KEPT_FILES = 16
"""Regions whose files are kept open for the device that asked; those beyond go without."""


ADDRESS_SPACE = 1 << 47
"""Bytes that a process can map, on x86-64 and arm64, unless it asks for more."""

_FEW = 1 << 36
"""So many may everybody take without a look at the others."""

_space = threading.Lock()
_all: WeakSet[SharedMemory] = WeakSet()
"""Those that may have taken some of it."""


class UserSpan(NamedTuple):
    """The front end's addresses of a region: from `user` to `end`."""

    user: int
    end: int
    region: Region


_guest_of: Callable[[Region], GuestAddress] = attrgetter("guest_address")
_user_of: Callable[[UserSpan], int] = attrgetter("user")


class SharedMemory:
    """The regions that one front end shares, `max_regions` of them at most.

    `guest_memory` is the same object as long as this one lives: rings keep it while tables change. Any thread may call
    anything at any time. A region that is refused, with PeerError where it is the front end's fault and HostError where
    it is the host's, leaves everything as it was, but for the descriptors, which are closed.
    """

    def __init__(
        self,
        max_regions: int = MAX_REGIONS,
        *,
        gpa_addresses: bool = False,
        keeps_file: Callable[[MemoryRegion], bool] = lambda _: False,
    ) -> None:
        self.guest_memory = GuestMemory()
        self.max_regions = max_regions
        self.gpa_addresses = gpa_addresses
        """Whether GPA_ADDRESSES was negotiated: user addresses of regions and rings are guest addresses."""
        self._keeps_file = keeps_file
        self._lock = threading.Lock()
        self._size = 0
        """Bytes of all regions."""
        self._lingering: WeakKeyDictionary[object, int] = WeakKeyDictionary()
        """Of mappings that views hold, their bytes; under `_space`, as others look at it."""
        self._spans: tuple[bool, list[UserSpan]] | None = None
        with _space:
            _all.add(self)

    def replace(self, regions_with_fds: Sequence[tuple[MemoryRegion, OwnedFd]]) -> None:
        """Let these be all regions, in a single step (SET_MEM_TABLE)."""
        try:
            with self._lock, ExitStack() as undo:
                self._check([region for region, _ in regions_with_fds])
                before, size = self._size, sum(region.size for region, _ in regions_with_fds)
                self._take(before + size)
                undo.callback(self._take, before)
                mapped: list[Region] = []
                for region, fd in regions_with_fds:
                    mapped.append(self._map(region, fd, mapped))
                    undo.callback(_unmap, mapped[-1])
                self._install(mapped)
                undo.pop_all()
                self._take(size)
        finally:
            close_all(fd for _, fd in regions_with_fds)

    def add(self, region: MemoryRegion, fd: OwnedFd) -> None:
        """Let there be one more region (ADD_MEM_REG)."""
        with fd, self._lock:
            present, spans = self.guest_memory.regions, self.user_spans
            self._check_count(len(present) + 1)
            self._check_one(region)
            _check_beside(region, present, spans)
            self._take(self._size + region.size)
            try:
                added = self._map(region, fd, present)
                try:
                    self.guest_memory.add(added)
                except BaseException:
                    _unmap(added)
                    raise
            except BaseException:
                self._take(self._size - region.size)
                raise
            insort(spans, self._user_span(added), key=_user_of)

    def remove(self, region: MemoryRegion) -> None:
        """Let there be one region less (REM_MEM_REG): the one with these addresses and this size (M10)."""
        with self._lock:
            found, spans = self._find(region), self.user_spans
            self.guest_memory.remove(found)
            del spans[bisect_left(spans, self._user_address(found), key=_user_of)]
            self._let_go(found)
            self._take(self._size - found.size)

    def clear(self) -> None:
        """Let there be no region."""
        with self._lock:
            self._install([])
            self._take(0)

    def close(self) -> None:
        """Unmap everything, now or when the last view lets go; closing twice is allowed."""
        self.clear()

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def lingering(self) -> int:
        """How many mappings of removed regions there are still: somebody holds views of them."""
        return len(self._lingering)

    def dead_region(self) -> Region | None:
        """A region whose memory an access found missing, if there is one."""
        return next((region for region in self.guest_memory.regions if region.mapping.dead), None)

    def host_address(self, region: MemoryRegion) -> HostAddress:
        """Where a region begins in this process, as postcopy tells it to the front end (P3).

        Raises PeerError where there is no such region.
        """
        found = self._find(region)
        return HostAddress(found.mapping.address + found.offset)

    def to_guest(self, user_address: UserAddress, size: int) -> GuestAddress:
        """The guest address of `size` bytes at the front end's `user_address`.

        Raises PeerError unless they lie in one region, or in regions that adjoin in user and in guest addresses;
        UsageError for a size below 1.
        """
        if size < 1:
            raise UsageError("size", size, "has to be 1 byte or more, to be translated")
        spans = [(span.user, span.end, span.region.guest_address) for span in self.user_spans]
        at = bisect_right([start for start, _, _ in spans], user_address) - 1
        if at >= 0:
            start, end, guest = spans[at]
            for next_start, next_end, next_guest in spans[at + 1 :]:
                if user_address + size <= end or (next_start, next_guest) != (end, guest + end - start):
                    break
                end = next_end
            if user_address + size <= end:
                return GuestAddress(guest + user_address - start)
        limit = "has to lie in one region of the memory table, or in such as adjoin in both address spaces"
        raise PeerError("user address", _range(user_address, size), limit)

    @property
    def user_spans(self) -> list[UserSpan]:
        """Where the front end has the regions, lowest first: at their guest addresses under GPA_ADDRESSES."""
        if self._spans is None or self._spans[0] is not self.gpa_addresses:
            spans = sorted(map(self._user_span, self.guest_memory.regions), key=lambda span: span.user)
            self._spans = self.gpa_addresses, spans
        return self._spans[1]

    def _user_address(self, region: Region) -> int:
        user: int | None = region.guest_address if self.gpa_addresses else region.user_address
        assert user is not None
        return user

    def _user_span(self, region: Region) -> UserSpan:
        user = self._user_address(region)
        return UserSpan(user, user + region.size, region)

    def _check(self, new: Sequence[MemoryRegion]) -> None:
        self._check_count(len(new))
        for region in new:
            self._check_one(region)
        for field in ("guest_address", "user_address"):  # M1, M2
            spans = sorted((getattr(region, field), region.size) for region in new)
            for (start, size), (above, above_size) in pairwise(spans):
                if start + size > above:
                    raise _overlap(field, above, above_size, start, size)

    def _check_count(self, count: int) -> None:
        if count > self.max_regions:
            raise PeerError("regions", count, f"have to be at most {self.max_regions} at a time", "remove others first")
        if len(self._lingering) > self.max_regions:
            limit = f"views may hold at most {self.max_regions} mappings of regions that were removed"
            raise HostError("regions", len(self._lingering), limit, "let go of the views that the device holds")

    def _take(self, size: int) -> None:
        """Have so many bytes of the address space. HostError where others would be left too few."""
        if size <= self._size or (size <= _FEW and not self._lingering):
            self._size = size
            return
        with _space:
            others = sum(each._size + _bytes(each._lingering) for each in _all if each is not self)
            most = (ADDRESS_SPACE - others) * 7 // 8 - _bytes(self._lingering)
            if size > most:
                limit = f"has to be at most {most} in all regions of one front end, beside what others share"
                raise HostError("size", size, limit, "share less, or serve it in a process of its own")
            self._size = size

    def _check_one(self, region: MemoryRegion) -> None:
        if region.size <= 0:
            raise PeerError("size", region.size, "has to be at least one byte, in a region")
        for field, start in (
            ("guest_address", region.guest_address),
            ("user_address", region.user_address),
            ("mmap_offset", region.mmap_offset),
        ):
            if not 0 <= start <= U64_MAX - (region.size - 1):
                raise PeerError(field, _range(start, region.size), "has to end at 2**64 or before")
        if self.gpa_addresses and int(region.user_address) != int(region.guest_address):
            limit = f"has to be the guest address, {region.guest_address:#x}, under GPA_ADDRESSES"
            raise PeerError("user_address", f"{region.user_address:#x}", limit)

    def _map(self, region: MemoryRegion, fd: OwnedFd, others: Sequence[Region]) -> Region:
        """The region, mapped; and with its file, which is taken over, where the device wants it and may have it."""
        mapping, offset = map_part(fd.fileno(), region.mmap_offset, region.size)
        try:
            file = None
            if self._keeps_file(region) and sum(other.file is not None for other in others) < MAX_KEPT_FILES:
                file = RegionFile(ReceivedFd(fd.take()), HostOffset(region.mmap_offset))
            return Region(region.guest_address, region.size, mapping, offset, region.user_address, file)
        except BaseException:
            mapping.close()
            raise

    def _find(self, wanted: MemoryRegion) -> Region:
        regions = self.guest_memory.regions
        at = bisect_left(regions, wanted.guest_address, key=_guest_of)
        for region in regions[at : at + 1]:
            found = region.guest_address, region.user_address, region.size
            if found == (wanted.guest_address, wanted.user_address, wanted.size):
                return region
        value = f"{_range(wanted.guest_address, wanted.size)} at user address {wanted.user_address:#x}"
        raise PeerError("region", value, "has to be a region of the memory table")

    def _install(self, regions: Sequence[Region]) -> None:
        before = self.guest_memory.regions
        self.guest_memory.replace(regions)
        self._spans = None  # it holds mappings
        stay = {id(region) for region in regions}
        for region in before:
            if id(region) not in stay:
                self._let_go(region)

    def _let_go(self, region: Region) -> None:
        try:
            region.mapping.close()
        except BufferError:
            with _space:
                self._lingering[region.mapping.lifeline] = region.size
        if region.file is not None:
            region.file.fd.close()


def _bytes(lingering: WeakKeyDictionary[object, int]) -> int:
    """Of a copy, as any thread may let go of a view at any moment."""
    return sum(lingering.copy().values())


def _check_beside(new: MemoryRegion, present: Sequence[Region], spans: Sequence[UserSpan]) -> None:
    """`SharedMemory._check` of one that comes to others, in O(log n)."""
    at = bisect_left(present, new.guest_address + new.size, key=_guest_of) - 1
    if at >= 0 and present[at].end > new.guest_address:
        other = present[at]
        raise _overlap("guest_address", new.guest_address, new.size, other.guest_address, other.size)
    at = bisect_left(spans, new.user_address + new.size, key=_user_of) - 1
    if at >= 0 and spans[at].end > new.user_address:
        raise _overlap("user_address", new.user_address, new.size, spans[at].user, spans[at].region.size)


def _unmap(region: Region) -> None:
    """Of a region that came to nothing."""
    region.mapping.close()
    if region.file is not None:
        region.file.fd.close()


def _overlap(field: str, start: int, size: int, other: int, other_size: int) -> PeerError:
    limit = f"overlaps the region at {_range(other, other_size)}"
    return PeerError(field, _range(start, size), limit, "remove that one first")


def _range(start: int, size: int) -> str:
    return f"{start:#x}+{size:#x}"
