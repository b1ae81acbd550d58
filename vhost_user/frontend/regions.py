"""Guest memory as a front end shares it: regions of files, and which of them its back end has.

Two ways to tell. With CONFIGURE_MEM_SLOTS each region comes and goes by a message of its own; without, the whole table
is sent anew, which holds eight regions at most. Either way a region counts as shared when the back end said so, and as
gone when it said so *and* proved by another round trip that it is still there, or is not there any more at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from vhost_user.errors import Disconnected, HostError, UsageError
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
    def wire(self) -> MemoryRegion:
        """As messages have it."""
        user = UserAddress(self.guest_address) if self.user_address is None else self.user_address
        return MemoryRegion(self.guest_address, self.size, user, self.offset)

    @property
    def end(self) -> int:
        """The guest address behind the last byte."""
        return self.guest_address + self.size

    def __str__(self) -> str:
        return f"{self.guest_address:#x}-{self.end - 1:#x}"


class SharedRegions:
    """What one back end has. `slots` is how many regions it can have at one time."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._shared: tuple[SharedRegion, ...] = ()
        self.slots = MAX_REGIONS

    def __iter__(self) -> Iterator[SharedRegion]:
        return iter(self._shared)

    def __len__(self) -> int:
        return len(self._shared)

    def learn_slots(self) -> None:
        """Ask the back end how many regions it takes, where it says."""
        self.slots = MAX_REGIONS
        if self.by_region:
            self.slots = self._requests.ask(FrontendRequest.GET_MAX_MEM_SLOTS, U64).value

    @property
    def by_region(self) -> bool:
        """Whether regions come and go one by one, rather than by whole tables."""
        return ProtocolFeature.CONFIGURE_MEM_SLOTS in self._requests.acked

    def share(self, regions: Iterable[SharedRegion]) -> None:
        """Share `regions` beyond those that are shared already.

        Raises UsageError where they overlap, HostError where the back end has not so many slots, Refused where it
        takes one of them not; then those that were shared before are shared, and no other.
        """
        new = tuple(regions)
        self._check(new)
        if not self.by_region:
            self._send_table((*self._shared, *new))
            return
        added: list[SharedRegion] = []
        try:
            for region in new:
                self.add(region)
                added.append(region)
        except Exception:
            for region in reversed(added):
                if self._requests.connected:
                    self.remove(region)
            raise

    def add(self, region: SharedRegion) -> None:
        """Share one region more; errors as in `share`."""
        with self._requests.lock:
            self._check((region,))
            if self.by_region:
                payload = SingleMemoryRegion(region.wire)
                self._requests.tell(FrontendRequest.ADD_MEM_REG, payload, [region.fd])
                self._shared += (region,)
                self._confirm()
            else:
                self._send_table((*self._shared, region))

    def remove(self, region: SharedRegion) -> None:
        """Share one region less: when this returns the back end has it no more, or is gone.

        Raises UsageError for a region that is not shared, and Refused, TimedOut or PeerError where the back end may
        have it still.
        """
        with self._requests.lock:
            if region not in self._shared:
                raise UsageError("region", region, "a region that is shared")
            left = tuple(other for other in self._shared if other != region)
            try:
                if self.by_region:
                    self._requests.tell(FrontendRequest.REM_MEM_REG, SingleMemoryRegion(region.wire))
                    self._confirm()
                else:
                    self._send_table(left)
            except Disconnected:
                self._shared = left  # whoever is gone maps nothing
                raise
            self._shared = left

    def _confirm(self) -> None:
        """An acknowledgement with 0 that is followed by the end of the connection was none."""
        self._requests.confirm()

    def _send_table(self, regions: tuple[SharedRegion, ...]) -> None:
        table = MemoryTable(tuple(region.wire for region in regions))
        self._requests.tell(FrontendRequest.SET_MEM_TABLE, table, [region.fd for region in regions])
        self._confirm()
        self._shared = regions

    def _check(self, new: tuple[SharedRegion, ...]) -> None:
        regions = (*self._shared, *new)
        if len(regions) > self.slots:
            remedy = "share fewer and larger regions"
            raise HostError("regions", len(regions), f"the back end takes {self.slots} at most", remedy)
        for below, above in pairwise(sorted(regions, key=lambda region: region.guest_address)):
            if below.end > above.guest_address:
                raise UsageError("guest_address", above, f"overlaps the region {below}", "remove that one first")
        by_user = sorted((region.wire for region in regions), key=lambda wire: wire.user_address)
        for lower, upper in pairwise(by_user):
            if lower.user_address + lower.size > upper.user_address:
                raise UsageError(
                    "user_address", f"{upper.user_address:#x}", "overlaps another region's", "choose another"
                )

    def to_user(self, address: int, size: int) -> UserAddress:
        """The user address of guest memory that lies in one shared region. UsageError where it doesn't."""
        for region in self._shared:
            if region.guest_address <= address and address + size <= region.end:
                return UserAddress(region.wire.user_address + address - region.guest_address)
        raise UsageError("guest address", f"{address:#x}+{size:#x}", "lies in one shared region", "share it first")

    def read(self, address: GuestAddress, size: int) -> bytes:
        """`size` bytes of guest memory that lies in one shared region, from its file. UsageError where it doesn't."""
        self.to_user(address, size)
        region = next(each for each in self._shared if each.guest_address <= address < each.end)
        return os.pread(region.fd, size, region.offset + address - region.guest_address)

    def forget(self) -> tuple[SharedRegion, ...]:
        """Take note that the back end has nothing any more; what it had."""
        shared, self._shared = self._shared, ()
        return shared
