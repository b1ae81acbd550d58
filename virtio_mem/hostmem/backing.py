"""The kinds of memory that a zone can have, and what each of them can and can't do.

                    shared  given back by             what the host holds, from
    anonymous       no      madvise(MADV_DONTNEED)    /proc/self/pagemap
    memfd           yes     punching a hole           SEEK_DATA
    hugetlb         yes     punching a hole           userfaultfd, or st_blocks for a whole file
    shared file     yes     punching a hole           SEEK_DATA
    private file    no      madvise(MADV_DONTNEED)    /proc/self/pagemap

The table is the point of the module: MADV_DONTNEED on shared memory returns success and frees nothing, because the
pages belong to the file; punching a hole into a private file mapping would free the user's data and keep our copies.
A private mapping counts this process's pages; a file counts everybody's.

Punching frees the bytes of the user's own file where the zone is `shared=on`: to share a file is to let the guest's
memory be the file. With `shared=off` the file is opened for reading only, so nothing can change it.
"""

from __future__ import annotations

import errno
import mmap
import os
from abc import ABC, abstractmethod
from typing import ClassVar

from vhost_user import _native
from vhost_user.errors import HostError
from vhost_user.mapping import PAGE_SIZE
from vhost_user.units import ByteCount, HostAddress, HostOffset
from virtio_mem.hostmem import facts, files, headroom
from virtio_mem.hostmem.files import Place

MOST_PIECES = 1 << 16
"""Of data in a file that are counted for somebody who only wants to know: a tenth of a second. A guest that touches
every second page makes twice as many of each GiB."""


class Backing(ABC):
    """One kind of memory and the file behind it, -1 if none; `offset` is where in the file the memory begins, in bytes.

    `no_merge`, `no_thp`, `no_reserve` and `no_bind` say why the kind can't be merged by KSM, have transparent huge
    pages, be reserved, or be bound to a NUMA node; empty where it can. Offsets passed to the methods count from
    `address`, where whoever maps the memory says that it is, and are whole pages.
    """

    kind: ClassVar[str]
    shared: ClassVar[bool]
    has_shared_zero_page: ClassVar[bool] = False
    """Whether reading untouched memory costs nothing, because the kernel shows the same page of zeros everywhere."""
    counts_zero_pages: bool = False
    """Whether `held` was seen to take that page for memory, as it must before Linux 6.7."""
    no_merge: ClassVar[str] = ""
    no_reserve: str = ""
    no_bind: str = ""

    def __init__(self, fd: int = -1, offset: HostOffset = HostOffset(0), page_size: int = PAGE_SIZE) -> None:
        self.fd = fd
        self.offset = offset
        self.page_size = ByteCount(page_size)
        self.address = HostAddress(0)

    @property
    @abstractmethod
    def no_thp(self) -> str:
        """As above; the host's settings have a say."""

    @abstractmethod
    def release(self, offset: HostOffset, size: ByteCount) -> bool:
        """Give a range back to the host; OSError where the kernel refuses.

        Whether it is known that nothing of it is held any more, so that `held` need not be asked.
        """

    @abstractmethod
    def held(self, offset: HostOffset, size: ByteCount) -> ByteCount:
        """Bytes that the host holds for a range; HostError where the kernel will not tell."""

    def held_at_least(self, offset: HostOffset, size: ByteCount) -> tuple[ByteCount, bool]:
        """See `BackedMemory.held_at_least`."""
        return self.held(offset, size), False

    def require_headroom(self, size: int, node: int | None) -> None:
        """Raise HostError unless `size` more bytes can be populated."""
        headroom.require(size + headroom.margin(size), headroom.memory_limits(node), "populate")

    def close(self) -> None:
        """Close the file, once."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Anonymous(Backing):
    """Private anonymous memory."""

    kind = "anonymous"
    shared = False
    has_shared_zero_page = True

    @property
    def no_thp(self) -> str:
        """The setting for anonymous memory decides."""
        if facts.thp_mode() == "never":
            return "/sys/kernel/mm/transparent_hugepage/enabled is never"
        return ""

    def release(self, offset: HostOffset, size: ByteCount) -> bool:
        """Drop the pages."""
        _native.madvise(self.address + offset, size, mmap.MADV_DONTNEED)
        return False

    def held(self, offset: HostOffset, size: ByteCount) -> ByteCount:
        """Count this process's pages, in memory and in swap; before Linux 6.7 also those that were read only."""
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
                return ByteCount(self._count(pagemap.fileno(), HostAddress(self.address + offset), size))
        except OSError as error:
            raise HostError.from_os_error("held", f"{offset:#x}+{size:#x}", "pagemap", error) from error

    def _count(self, pagemap: int, address: HostAddress, size: ByteCount) -> int:
        try:
            return _native.private_held(pagemap, address, size, scan=True)
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise
        self.counts_zero_pages = self.has_shared_zero_page
        return _native.private_held(pagemap, address, size, scan=False)


class PrivateFile(Anonymous):
    """A file mapped copy-on-write: what is written goes to private copies, which are what is counted and given back.

    The file's own pages aren't counted. On a disk they are page cache, which the kernel drops when it needs the room;
    in an unnamed file, which is the zone's own, `release` drops them at once. On a tmpfs they are memory that stays:
    to touch a hole of a sparse file allocates the file's page as well as the copy, so the headroom is for both, and
    `release` leaves that page in the user's file, where nothing is ever punched.
    """

    kind = "private file"
    has_shared_zero_page = False
    no_thp = "private copies of a file's pages are small pages"

    def __init__(self, fd: int, offset: HostOffset, place: Place) -> None:
        super().__init__(fd, offset)
        self._own = place.directory
        self._in_memory = place.in_memory

    def release(self, offset: HostOffset, size: ByteCount) -> bool:
        """Drop the copies, and the pages of a file of our own."""
        super().release(offset, size)
        if self._own:
            files.punch_hole(self.fd, HostOffset(self.offset + offset), size)
        return False

    def require_headroom(self, size: int, node: int | None) -> None:
        """Where files are memory, the file's holes are filled as well."""
        growth = min(size, files.unallocated(self.fd)) if self._in_memory else 0
        headroom.require(growth, headroom.file_limits(self.fd), "populate")
        super().require_headroom(size + growth, node)


class _Shared(Backing):
    """What the shared kinds have in common: the file is the memory."""

    shared = True
    no_merge = "KSM merges private memory only"
    no_reserve = "shared memory is counted when it is touched, never before"

    def release(self, offset: HostOffset, size: ByteCount) -> bool:
        """Punch a hole, which also takes the pages out of every mapping."""
        files.punch_hole(self.fd, HostOffset(self.offset + offset), size)
        return False

    def held(self, offset: HostOffset, size: ByteCount) -> ByteCount:
        """Walk the file's data; what fallocate(2) got and nobody touched isn't in it."""
        return files.data_size(self.fd, HostOffset(self.offset + offset), size)

    def held_at_least(self, offset: HostOffset, size: ByteCount) -> tuple[ByteCount, bool]:
        """As much of that as takes a bounded time."""
        return files.data_size_at_least(self.fd, HostOffset(self.offset + offset), size, MOST_PIECES)


class Memfd(_Shared):
    """A memfd of ordinary pages."""

    kind = "memfd"

    @property
    def no_thp(self) -> str:
        """The setting for shared memory decides."""
        mode = facts.shmem_thp_mode()
        return f"/sys/kernel/mm/transparent_hugepage/shmem_enabled is {mode}" if mode in ("never", "deny") else ""


class SharedFile(_Shared):
    """A regular file, the user's or an unnamed one: memory on a tmpfs, elsewhere disk space behind a page cache."""

    kind = "shared file"

    def __init__(self, fd: int, offset: HostOffset, place: Place) -> None:
        super().__init__(fd, offset)
        self._place = place
        self._tmpfs = place.fstype == "tmpfs"
        if not self._tmpfs:
            self.no_bind = f"the page cache of a file on {place.fstype} ignores the policy"

    @property
    def in_memory(self) -> bool:
        """Whether the file's pages are memory and nothing else."""
        return self._place.in_memory

    @property
    def no_thp(self) -> str:
        """A tmpfs's own mount option decides, unless the setting for shared memory overrules it."""
        if not self._tmpfs:
            return f"the page cache of a file on {self._place.fstype} is not advised"
        allowed = any(f"huge={mode}" in self._place.options for mode in ("always", "within_size", "advise"))
        overruled = facts.shmem_thp_mode()
        if overruled == "force" or (allowed and overruled != "deny"):
            return ""
        return "the tmpfs of the file is mounted without huge=advise"

    def require_headroom(self, size: int, node: int | None) -> None:
        """The file system must have the room, less what fallocate(2) got; where files are memory, so must the host."""
        growth = min(size, files.unallocated(self.fd))
        headroom.require(growth, headroom.file_limits(self.fd), "populate")
        if self.in_memory:
            super().require_headroom(growth, node)


class Hugetlb(_Shared):
    """Huge pages from the kernel's pool, as a memfd or as a file on a hugetlbfs."""

    kind = "hugetlb"
    no_thp = "the pages are huge pages already"
    no_reserve = ""

    def __init__(self, fd: int, offset: HostOffset, page_size: ByteCount, *, reserved: bool) -> None:
        super().__init__(fd, offset, page_size)
        self.reserved = reserved

    def release(self, offset: HostOffset, size: ByteCount) -> bool:
        """Punch a hole. Where the file has lost as many pages as the range has, all of those are gone.

        (One that somebody touched anew at that moment could only hide behind one that somebody else took out of the
        same file just then; to ask userfaultfd about each page takes as long as to give them back.)
        """
        before = os.fstat(self.fd).st_blocks
        super().release(offset, size)
        return (before - os.fstat(self.fd).st_blocks) * files.ST_BLOCKS_UNIT == size

    def held_at_least(self, offset: HostOffset, size: ByteCount) -> tuple[ByteCount, bool]:
        """All of it: there are few huge pages, and the C core counts them."""
        return self.held(offset, size), False

    def held(self, offset: HostOffset, size: ByteCount) -> ByteCount:
        """Ask userfaultfd about each page, or, cheaper, the file about the whole."""
        start = self.offset + offset
        whole = os.fstat(self.fd)
        if start == 0 and size == whole.st_size:
            return ByteCount(whole.st_blocks * files.ST_BLOCKS_UNIT)
        try:
            return ByteCount(_native.hugetlb_held(self.fd, start, size, self.page_size))
        except OSError as error:
            remedy = "allow userfaultfd (Linux 5.13), or ask for all of the memory at once"
            raise HostError.from_os_error("held", f"{offset:#x}+{size:#x}", "userfaultfd", error, remedy) from error

    def require_headroom(self, size: int, node: int | None) -> None:
        """The pool must have the pages, unless the mapping reserved them."""
        if not self.reserved:
            headroom.require_huge_pages(size, self.page_size, node, "populate")
