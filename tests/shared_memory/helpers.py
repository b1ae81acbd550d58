"""Files that a peer would share, of pages of either size, and what a test asks of the process around them."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.leaks import mapped_files, open_files
from vhost_user.mapping import MAP_NORESERVE, PAGE_SIZE, Mapping
from vhost_user.message import MemoryRegion
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import MIB, ByteCount, GuestAddress, HostOffset, UserAddress

HUGE = 2 * MIB
HUGE_PAGES = 8
"""How many huge pages a test has."""


@dataclass(frozen=True)
class Pages:
    """A size of pages."""

    size: int

    def file(self, pages: int) -> OwnedFd:
        """A memfd of this many pages. None of them is taken from the host until it is touched."""
        flags = os.MFD_CLOEXEC | (os.MFD_HUGETLB | os.MFD_HUGE_2MB if self.size == HUGE else 0)
        fd = OwnedFd(os.memfd_create("peer", flags))
        os.ftruncate(fd.fileno(), pages * self.size)
        return fd


USER = 0x7F0000000000
"""What the regions of these tests have more in user addresses than in guest addresses, where nothing else is said."""


def region(guest: int, size: int, offset: int = 0, *, user: int | None = None) -> MemoryRegion:
    user = USER + guest if user is None else user
    return MemoryRegion(GuestAddress(guest), ByteCount(size), UserAddress(user), HostOffset(offset))


class Held:
    """What this process holds open and mapped at the moment of making."""

    def __init__(self) -> None:
        self._files, self._mapped, self._mappings = open_files(), mapped_files(), mappings()

    def check(self, tries: int) -> None:
        """It is the same after this many tries of something: the allocator may have made one mapping or two."""
        assert open_files() == self._files
        assert mapped_files() == self._mapped
        assert mappings() < self._mappings + tries / 2


def guarded(fd: OwnedFd, size: int, offset: int = 0) -> Mapping:
    flags = mmap.MAP_SHARED | MAP_NORESERVE
    return Mapping(ByteCount(size), flags, fd.fileno(), HostOffset(offset), guarded=True)


def mappings() -> int:
    """How many mappings this process has."""
    return len(Path("/proc/self/maps").read_text().splitlines())


def run(program: str) -> subprocess.CompletedProcess[str]:
    """A program of Python in a process of its own."""
    done = [sys.executable, "-c", program]
    return subprocess.run(done, capture_output=True, text=True, check=False, timeout=60)


SMALL = Pages(PAGE_SIZE)
