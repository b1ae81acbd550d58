"""Memory that other processes use, and this one only takes of the host and gives back.

To touch a page is to map it: the page would count as resident here, so that the OOM killer, if it came, would choose
this process; and to take the page table entry away again costs an eighth of what populating does. Where a file is
memory, zeros are written to it instead, which takes a third less time than touching its pages. Only holes are written:
what is there keeps its contents.

Huge pages can't be written, and a file on a disk would be slower: those are touched, and the entries dropped.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable
from contextlib import suppress

from vhost_user import _native
from vhost_user.units import MIB, ByteCount, HostOffset
from virtio_mem.hostmem.backing import Backing, Memfd, SharedFile
from virtio_mem.hostmem.memory import HostMemory

_ZEROS = bytes(2 * MIB)
"""Never written to, so it is made of the kernel's page of zeros, and holds no memory."""

_UNWRITABLE = (errno.EPERM, errno.EFBIG)
"""Of a file that can be touched all the same: sealed against further writers, or longer than RLIMIT_FSIZE."""


class OthersMemory(HostMemory):
    """A HostMemory whose pages others map."""

    allocating = "allocating memory"

    def __init__(self, backing: Backing, size: ByteCount, *, guarded: bool = False) -> None:
        super().__init__(backing, size, guarded=guarded)
        self._writer = _writer(backing)

    def _allocate(self, offset: HostOffset, size: ByteCount, holes: Iterable[tuple[HostOffset, ByteCount]]) -> None:
        if self._writer >= 0:
            try:
                for start, length in holes:
                    _write_zeros(self._writer, self.backing.offset + start, length)
            except OSError as error:
                if error.errno not in _UNWRITABLE:
                    raise
            else:
                return
        super()._allocate(offset, size, holes)
        with suppress(OSError):
            _native.madvise(self.address + offset, size, mmap.MADV_DONTNEED)  # of a shared mapping: frees nothing

    def close(self) -> None:
        """As that of HostMemory."""
        super().close()
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1


def _writer(backing: Backing) -> int:
    """A descriptor to write the file by where that is the way, else -1. Not a duplicate: with O_APPEND, which whoever
    shares a description can set at any time, pwrite(2) appends."""
    if not (isinstance(backing, Memfd) or (isinstance(backing, SharedFile) and backing.in_memory)):
        return -1
    try:
        return os.open(f"/proc/self/fd/{backing.fd}", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _write_zeros(fd: int, start: int, size: int) -> None:
    """OSError where the file can't hold them all; it may hold some then."""
    zeros = memoryview(_ZEROS)
    done = 0
    while done < size:
        done += os.pwrite(fd, zeros[: size - done], start + done)
