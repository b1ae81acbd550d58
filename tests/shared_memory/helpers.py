"""Files that a peer would share, of pages of either size, and what a test asks of the process around them."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vhost_user.mapping import MAP_NORESERVE, PAGE_SIZE, Mapping
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import MIB, ByteCount, HostOffset

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


NewFile = Callable[[int], OwnedFd]

SMALL = Pages(PAGE_SIZE)
