"""One contiguous part of a zone's host memory by its backing, mapped in this process or not.

`populate` is for those who would rather be told now that there is no memory than be killed later: touching a huge page
that the pool doesn't have is a SIGBUS, touching a small page that a memory cgroup doesn't have is the OOM killer. It
looks at the headroom first (see headroom.py), and whatever happens leaves nothing populated that was not before.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import ClassVar

from vhost_user.errors import HostError, UsageError
from vhost_user.units import MIB, ByteCount, HostOffset
from virtio_mem.hostmem import facts, files, headroom
from virtio_mem.hostmem.backing import Backing, Hugetlb

ZEROS = bytes(2 * MIB)
"""Never written to, so it is made of the kernel's page of zeros, and holds no memory."""


class BackedMemory(ABC):
    """`size` bytes of `backing`, which is closed with this. Offsets are from the start of the part.

    `node` is the NUMA node that its pages must come from.
    """

    allocating: ClassVar[str] = "MADV_POPULATE_WRITE"
    """What errors call it."""

    def __init__(self, backing: Backing, size: ByteCount, *, node: int | None = None) -> None:
        self.backing = backing
        self.size = size
        self._node = node

    @property
    def page_size(self) -> ByteCount:
        """The unit in which memory comes and goes, in bytes."""
        return self.backing.page_size

    @property
    def file_offset(self) -> HostOffset:
        """Where in the file this memory begins, in bytes."""
        return self.backing.offset

    def held(self, offset: HostOffset = HostOffset(0), size: ByteCount | None = None) -> ByteCount:
        """Bytes that the host holds for a range, by its own counters. HostError where the kernel will not tell.

        For shared memory whoever touched it, in swap or not; for private memory what this process touched. Of a file it
        is the data: blocks that fallocate(2) got count from when they are touched.
        """
        size = ByteCount(self.size - offset) if size is None else size
        self._check(offset, size)
        return self.backing.held(offset, size)

    def held_at_least(self, offset: HostOffset, size: ByteCount) -> tuple[ByteCount, bool]:
        """What the host holds for a range, and whether it holds more than that: of a file that is in very many pieces
        the first ones are counted only, since a walk over all takes seconds a terabyte at best and minutes at worst."""
        self._check(offset, size)
        return self.backing.held_at_least(offset, size)

    def discard(self, offset: HostOffset, size: ByteCount) -> bool:
        """Give a range back to the host; its contents are gone. HostError where the kernel refuses.

        On a shared file this punches a hole into the file, on a private one the file stays as it is. Whether it is
        known that the host holds nothing of the range any more; else `held` tells.
        """
        self._check(offset, size)
        try:
            return self.backing.release(offset, size)
        except OSError as error:
            raise HostError.from_os_error("discard", f"{offset:#x}+{size:#x}", "giving back memory", error) from error

    def discard_verified(self, offset: HostOffset, size: ByteCount) -> ByteCount:
        """Discard, then ask the host: bytes that it holds for the range all the same, 0 if all is well."""
        return ByteCount(0) if self.discard(offset, size) else self.held(offset, size)

    def populate(self, offset: HostOffset, size: ByteCount) -> None:
        """Make the host allocate all of a range now, or raise HostError and leave allocated what was before.

        What is there already keeps its contents. Before Linux 6.7, private pages only read are taken to be there. What
        others write meanwhile to what is not there yet may be lost: a guest that writes to unplugged memory is promised
        nothing.
        """
        self._check(offset, size)
        try:
            holes = list(self._holes(offset, size))
        except HostError:
            if not isinstance(self.backing, Hugetlb):
                raise
            self.backing.require_headroom(size, self._node)
            self._populate_counting(offset, size)
            return
        if missing := self._missing(size, size - sum(length for _, length in holes)):
            self.backing.require_headroom(missing, self._node)
        self._populate(offset, size, holes)

    @abstractmethod
    def write(self, offset: HostOffset, data: bytes) -> None:
        """Have the memory there, which is populated, hold `data`. HostError where others have truncated its file."""

    def shortage(self, offset: HostOffset, size: ByteCount) -> HostError | None:
        """Why a range could not be populated now, or None where nothing is known to stand against it."""
        try:
            missing = self._missing(size, self.held(offset, size))
        except HostError:
            missing = size
        try:
            self.backing.require_headroom(missing, self._node)
        except HostError as error:
            return error
        return None

    def _missing(self, size: int, held: int) -> int:
        """What populating `size` bytes may take: all of it where the zero page passes for memory, which it isn't."""
        return size if self.backing.counts_zero_pages else size - held

    def _populate(self, offset: HostOffset, size: ByteCount, undo: Iterable[tuple[HostOffset, ByteCount]]) -> None:
        """Populate a range; if that fails, discard the ranges of `undo`."""
        try:
            self._allocate(offset, size)
        except OSError as error:
            for start, length in undo:
                self.discard(start, length)
            raise self._no_memory(offset, size, error) from error

    @abstractmethod
    def _allocate(self, offset: HostOffset, size: ByteCount) -> None:
        """Have the host allocate what it lacks of a range. OSError where it can't; it may have allocated some."""

    def _populate_counting(self, offset: HostOffset, size: ByteCount) -> None:
        """Populate page by page where userfaultfd is forbidden: a huge page is new if the file has grown."""
        new: list[tuple[HostOffset, ByteCount]] = []
        for page in range(offset, offset + size, self.page_size):
            before = os.fstat(self.backing.fd).st_blocks
            self._populate(HostOffset(page), self.page_size, new)
            if os.fstat(self.backing.fd).st_blocks > before:
                new.append((HostOffset(page), self.page_size))

    def _holes(self, offset: HostOffset, size: ByteCount) -> Iterator[tuple[HostOffset, ByteCount]]:
        """The ranges of a range that are not populated, found by halving it until each part is of one kind.

        The usual range, just plugged, has nothing and costs one question.
        """
        held = self.backing.held(offset, size)
        if held == 0:
            yield offset, size
        elif held < size:
            half = ByteCount(size // self.page_size // 2 * self.page_size)
            yield from self._holes(offset, half)
            yield from self._holes(HostOffset(offset + half), ByteCount(size - half))

    def _no_memory(self, offset: HostOffset, size: ByteCount, error: OSError) -> HostError:
        """Why populating failed, and what can be done about it."""
        remedy = self._way_out(offset, size, error)
        return HostError.from_os_error("populate", f"{offset:#x}+{size:#x}", self.allocating, error, remedy)

    def _way_out(self, offset: HostOffset, size: ByteCount, error: OSError) -> str:
        """With the state of the pool where it is one of huge pages. EFAULT is whatever would be a SIGBUS at a touch,
        madvise(2): beyond a file's end, on a full file system, from an empty pool."""
        fd = self.backing.fd
        if fd >= 0 and os.fstat(fd).st_size < self.backing.offset + offset + size:
            return "its file is shorter: don't truncate it"
        if isinstance(self.backing, Hugetlb):
            limit, way_out = facts.huge_pool(self.page_size, self._node).shortage(size // self.page_size)
            return f"{limit}; {way_out}"
        if error.errno == errno.EINVAL:
            return "MADV_POPULATE_WRITE needs Linux 5.14"
        if fd >= 0:
            growth = min(size, files.unallocated(fd))
            for room in headroom.file_limits(fd):
                if growth > room.available:
                    return room.remedy
        return "free memory on the host"

    def _check(self, offset: HostOffset, size: ByteCount) -> None:
        if self.closed:
            raise UsageError("memory", "closed", "has to be open", "make it anew")
        if offset < 0 or size <= 0 or offset + size > self.size or (offset | size) % self.page_size:
            limit = f"has to be whole pages of {self.page_size} bytes within the part's {self.size} bytes"
            raise UsageError("range", f"{offset:#x}+{size:#x}", limit)

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether `close()` was called."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it, and of the backing. Closing twice is allowed."""
