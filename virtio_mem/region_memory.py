"""What a device in service needs of the host memory behind its region, whoever made it."""

from __future__ import annotations

from typing import Protocol

from vhost_user.errors import HostError
from vhost_user.units import ByteCount, HostOffset


class RegionMemory(Protocol):
    """Memory that can be populated, discarded and counted; ranges are in bytes from the start of the region."""

    @property
    def page_size(self) -> ByteCount:
        """The unit in which memory comes and goes, in bytes."""

    def populate(self, offset: HostOffset, size: ByteCount) -> None:
        """Make the host allocate the range. HostError, and nothing of the range held, where it can't."""

    def discard(self, offset: HostOffset, size: ByteCount) -> bool | None:
        """Give the range back to the host. HostError, and the range as it was, where that fails.

        True where it is known that the host holds nothing of it any more; else `held` is asked."""

    def held(self, offset: HostOffset, size: ByteCount) -> ByteCount:
        """Bytes that the host holds for the range, by its own counters. HostError where they can't tell."""

    def held_at_least(self, offset: HostOffset, size: ByteCount) -> tuple[ByteCount, bool]:
        """The same in a bounded time: what it holds, and whether there is more."""

    def shortage(self, offset: HostOffset, size: ByteCount) -> HostError | None:
        """Why the range could not be populated now, or None where nothing is known to stand against it."""
