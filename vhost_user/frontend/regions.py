"""Guest memory as a front end shares it: regions of files, and which of them its back end has.

Two ways to tell. With CONFIGURE_MEM_SLOTS each region comes and goes by a message of its own; without, the whole table
is sent anew, which holds eight regions at most. Either way a region counts as shared when the back end said so, and as
gone when it said so, or is not there any more at all. Of what was added it has to prove by another round trip that it
is still there: some acknowledge what they refuse, and end the connection. Of what goes it has to only where it
acknowledges nothing, REPLY_ACK not being negotiated.

Several regions come or go together, or none of them does. What can't be put back as it was, because the back end
refuses that too, costs the connection: nobody would know what it has.

While no back end is there the list says what the next one is to get: `keep` and `drop` change it then, and
`Frontend.reconnect()` shares it.
"""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from stat import S_ISREG

from vhost_user.errors import Disconnected, FieldError, HostError, UsageError
from vhost_user.frontend.requests import Requests
from vhost_user.message import (
    MAX_REGIONS,
    U64,
    FrontendRequest,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    SingleMemoryRegion,
)
from vhost_user.units import ByteCount, GuestAddress, HostOffset, UserAddress

_OPPOSITE = {
    FrontendRequest.ADD_MEM_REG: FrontendRequest.REM_MEM_REG,
    FrontendRequest.REM_MEM_REG: FrontendRequest.ADD_MEM_REG,
}


@dataclass(frozen=True)
class SharedRegion:
    """`size` bytes at `guest_address`: those of the file `fd` from `offset` on. The descriptor stays the caller's, open
    for as long as the region is shared.

    `user_address` is what the protocol calls the region by besides; without one it is the guest address, which is as
    good as any.
    """

    guest_address: GuestAddress
    size: ByteCount
    fd: int
    offset: HostOffset = HostOffset(0)
    user_address: UserAddress | None = None

    @property
    def user(self) -> UserAddress:
        """The user address, given or not."""
        return UserAddress(self.guest_address) if self.user_address is None else self.user_address

    @cached_property
    def wire(self) -> MemoryRegion:
        """As messages have it."""
        return MemoryRegion(self.guest_address, self.size, self.user, self.offset)

    @cached_property
    def message(self) -> SingleMemoryRegion:
        """What adds it, and what removes it."""
        return SingleMemoryRegion(self.wire)

    @property
    def end(self) -> int:
        """The guest address behind the last byte."""
        return self.guest_address + self.size

    def __str__(self) -> str:
        return f"{self.guest_address:#x}-{self.end - 1:#x}"


class _Spans:
    """Regions in the order of one of their addresses, where they start, in which no two overlap. `field` is what errors
    call it. A search costs O(log n)."""

    def __init__(self, field: str, start_of: Callable[[SharedRegion], int]) -> None:
        self._field = field
        self._start_of = start_of
        self._starts: list[int] = []
        self._regions: dict[int, SharedRegion] = {}

    def __iter__(self) -> Iterator[SharedRegion]:
        return map(self._regions.__getitem__, self._starts)

    def __len__(self) -> int:
        return len(self._starts)

    def at(self, start: int) -> SharedRegion | None:
        """The one that starts there."""
        return self._regions.get(start)

    def add(self, region: SharedRegion) -> None:
        start = self._start_of(region)
        insort(self._starts, start)
        self._regions[start] = region

    def remove(self, region: SharedRegion) -> None:
        start = self._start_of(region)
        del self._starts[bisect_left(self._starts, start)]
        del self._regions[start]

    def overlapping(self, start: int, size: int) -> SharedRegion | None:
        """The last of those that have a byte in common with a range."""
        at = bisect_left(self._starts, start + size) - 1
        if at < 0:
            return None
        region = self._regions[self._starts[at]]
        return region if self._starts[at] + region.size > start else None

    def check_room(self, new: Iterable[SharedRegion]) -> None:
        """Raise UsageError where one of `new` overlaps another, or one of these."""
        last, end = None, 0
        for region in sorted(new, key=self._start_of):
            start = self._start_of(region)
            other = last if start < end else self.overlapping(start, region.size)
            if other is not None:
                limit = f"overlaps the region {other}"
                raise UsageError(self._field, f"{start:#x}", limit, "remove that one, or choose another")
            last, end = region, start + region.size


def _require_file(region: SharedRegion) -> None:
    """UsageError where the region is not in the file that it says. How far memory reaches is known of regular files."""
    fd, begins, ends = region.fd, region.offset, region.offset + region.size
    try:
        if not isinstance(fd, int) or isinstance(fd, bool):
            raise UsageError("fd", repr(fd), "has to be the number of an open file", "give its fileno()")
        about = os.fstat(fd)
    except (OSError, OverflowError) as error:
        raise UsageError("fd", fd, "has to be the number of an open file", "open it, and keep it open") from error
    if region.size <= 0:
        raise UsageError("size", region.size, "has to be 1 or more")
    if begins < 0 or (S_ISREG(about.st_mode) and ends > about.st_size):
        limit = f"has to lie in the file, which has {about.st_size} bytes"
        raise UsageError("region", f"{begins}+{region.size}", limit, "give another offset or size, or extend the file")


class SharedRegions:
    """What one back end has. `slots` is how many regions it can have at one time."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._by_guest = _Spans("guest_address", attrgetter("guest_address"))
        self._by_user = _Spans("user_address", attrgetter("user"))
        self.slots = MAX_REGIONS
        self.by_region = False
        """Whether regions come and go one by one, rather than by whole tables."""
        self.prepare: Callable[[GuestAddress], None] = lambda _: None
        """Called before memory is shared whose last address is this: for a dirty log that has to reach so far."""

    def __iter__(self) -> Iterator[SharedRegion]:
        return iter(tuple(self._by_guest))

    def __len__(self) -> int:
        return len(self._by_guest)

    def __contains__(self, region: SharedRegion) -> bool:
        found = self._by_guest.at(region.guest_address)
        return found is region or found == region

    def learn_slots(self) -> None:
        """Ask the back end how many regions it takes, where it takes them one by one."""
        self.slots = MAX_REGIONS
        self.by_region = ProtocolFeature.CONFIGURE_MEM_SLOTS in self._requests.acked
        if self.by_region:
            self.slots = self._requests.ask(FrontendRequest.GET_MAX_MEM_SLOTS, U64).value

    # With a back end.

    def share(self, regions: Iterable[SharedRegion]) -> None:
        """Share `regions` beyond those that are shared already: all of them, or none.

        Raises UsageError where they overlap or are not in their file, HostError where the back end has not so many
        slots, and what `tell` does, such as Refused where it takes one of them not; then those that were shared before
        are shared, and no other.
        """
        with self._requests.lock:
            new = tuple(regions)
            self._check_count(len(self) + len(new))
            for region in new:
                _require_file(region)
            self._by_guest.check_room(new)
            self._by_user.check_room(new)
            if new:
                self.prepare(GuestAddress(max([region.end for region in new]) - 1))
                self._tell(FrontendRequest.ADD_MEM_REG, new)
                self.keep(new)

    def unshare(self, regions: Iterable[SharedRegion]) -> None:
        """Share `regions` no more: when this returns the back end has none of them, or all that it had if it raises.

        Raises UsageError for a region that is not shared, Refused, TimedOut or PeerError where the back end may have
        some still, and Disconnected where it is gone, and with it all that it had: the list is the shorter one then.
        """
        with self._requests.lock:
            old = tuple(regions)
            if len(old) > 1:
                old = tuple(dict.fromkeys(old))
            for region in old:
                if region not in self:
                    raise UsageError("region", region, "has to be a region that is shared")
            try:
                if old:
                    self._tell(FrontendRequest.REM_MEM_REG, old)
            except Disconnected:
                self.drop(old)
                raise
            self.drop(old)

    def add(self, region: SharedRegion) -> None:
        """Share one region more; errors as in `share`."""
        self.share((region,))

    def remove(self, region: SharedRegion) -> None:
        """Share one region less; errors as in `unshare`."""
        self.unshare((region,))

    def share_again(self) -> None:
        """Share all that is listed with a back end that has nothing yet. Raises as `share`; the list stays as it is."""
        with self._requests.lock:
            self._check_count(len(self))
            if regions := tuple(self):
                self._tell(FrontendRequest.ADD_MEM_REG, regions)

    def _tell(self, request: FrontendRequest, regions: Sequence[SharedRegion]) -> None:
        """Tell the back end what comes, as ADD_MEM_REG would, or goes, as REM_MEM_REG would. If it raises, it has what
        it had, or is gone, or was given up."""
        if self._requests.postcopy:
            raise HostError("regions", len(self), "none may come or go while pages are to come", "end postcopy first")
        if self.by_region:
            self._tell_each(request, regions)
            return
        table = dict.fromkeys(self)
        for region in regions:
            if request is FrontendRequest.ADD_MEM_REG:
                table[region] = None
            else:
                del table[region]
        payload = MemoryTable(tuple([region.wire for region in table]))
        self._requests.tell(FrontendRequest.SET_MEM_TABLE, payload, [region.fd for region in table])
        self._requests.confirm()

    def _tell_each(self, request: FrontendRequest, regions: Sequence[SharedRegion]) -> None:
        told = 0
        try:
            for region in regions:
                self._tell_one(request, region)
                told += 1
            if request is FrontendRequest.ADD_MEM_REG or not self._requests.acknowledged:
                # An acknowledgement with 0 that is followed by the end of the connection was none.
                self._requests.confirm()
        except BaseException:
            if told and self._requests.connected:
                self._undo(request, regions[:told])
            raise

    def _undo(self, request: FrontendRequest, regions: Sequence[SharedRegion]) -> None:
        try:
            for region in reversed(regions):
                self._tell_one(_OPPOSITE[request], region)
            self._requests.confirm()
        except FieldError:
            self._requests.give_up()

    def _tell_one(self, request: FrontendRequest, region: SharedRegion) -> None:
        fds = (region.fd,) if request is FrontendRequest.ADD_MEM_REG else ()
        self._requests.tell(request, region.message, fds)

    # Without one.

    def keep(self, regions: Iterable[SharedRegion]) -> None:
        """List `regions`, which overlap no other, telling nobody: for a back end that is gone."""
        with self._requests.lock:
            for region in regions:
                self._by_guest.add(region)
                self._by_user.add(region)

    def drop(self, regions: Iterable[SharedRegion]) -> None:
        """List `regions` no more, telling nobody."""
        with self._requests.lock:
            for region in regions:
                self._by_guest.remove(region)
                self._by_user.remove(region)

    # Questions.

    def _check_count(self, count: int) -> None:
        if count > self.slots:
            remedy = "share fewer and larger regions"
            raise HostError("regions", count, f"has to be at most {self.slots}, as the back end takes no more", remedy)

    def _region_of(self, address: int, size: int) -> SharedRegion:
        region = self._by_guest.overlapping(address, size)
        if region is None or address < region.guest_address or address + size > region.end:
            raise UsageError(
                "guest address", f"{address:#x}+{size:#x}", "has to lie in one shared region", "share it first"
            )
        return region

    def to_user(self, address: int, size: int) -> UserAddress:
        """The user address of guest memory that lies in one shared region. UsageError where it doesn't."""
        region = self._region_of(address, size)
        return UserAddress(region.user + address - region.guest_address)

    def read(self, address: GuestAddress, size: int) -> bytes:
        """`size` bytes of guest memory that lies in one shared region, from its file. UsageError where it doesn't."""
        region = self._region_of(address, size)
        return os.pread(region.fd, size, region.offset + address - region.guest_address)
