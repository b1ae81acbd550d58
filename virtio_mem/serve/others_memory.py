"""Memory that other processes use, and this one only takes of the host and gives back.

It is not mapped here again: a zone of 63 TiB has room once in 47 bits of addresses, and that is where rings are served.
To touch a page besides is to have it count as resident here, so that the OOM killer, if it came, would choose this
process; and to take the page table entry away again costs an eighth of what populating does. Where a file is memory,
zeros are written to it instead, which takes a third less time than touching its pages. Only holes are written: what is
there keeps its contents.

Unlike a touch, a write can lose what others write, and make a file longer. So it goes by pieces of 2 MiB, and the holes
and the length of the file are asked for just before each. What is not promised is the moment between: what others write
to a hole then is lost, and a file that is truncated then may get its length back as far as this piece, with zeros. The
first is unplugged memory, which has no content, and to which no driver may write. After the second a PLUG is granted
only where the file holds all of the range.

Nothing else closes that moment. fallocate(2) makes no file longer, but what it gets is not zeroed before it is touched,
is a hole to SEEK_DATA and so to every count, and stays behind the end of a file that was truncated. A write by a
mapping is the touch that this is to spare. Seals are the front end's to set.

Huge pages can't be written, and a file on a disk would be slower: those are touched where rings are served, and the
entries dropped. No new mapping is made for that: of a file that was sealed meanwhile there might be none.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from vhost_user import _native
from vhost_user.errors import HostError, PeerError
from vhost_user.mapping import Mapping, map_part
from vhost_user.units import ByteCount, GuestAddress, HostOffset, align_up
from virtio_mem.hostmem.backed import ZEROS, BackedMemory
from virtio_mem.hostmem.backing import Backing, Memfd, SharedFile
from virtio_mem.hostmem.files import write_at
from virtio_mem.hostmem.memory import MADV_POPULATE_WRITE

if TYPE_CHECKING:
    from vhost_user.memory import Region

_UNWRITABLE = (errno.EPERM, errno.EFBIG)
"""Of a file that can be touched all the same: sealed against further writers, or longer than RLIMIT_FSIZE."""


class OthersMemory(BackedMemory):
    """A BackedMemory whose pages others map. `regions` are what is mapped here of it, by guest address, and it begins
    at `addr`; they may be replaced. None are needed where nothing is populated."""

    allocating = "allocating memory"

    def __init__(self, backing: Backing, size: ByteCount, addr: GuestAddress, regions: Sequence[Region] = ()) -> None:
        super().__init__(backing, size)
        self.addr = addr
        self.regions = regions
        self._closed = False
        self._writer: int | None = None
        """To write the file by, -1 where that is not the way, None until something is populated."""

    def _allocate(self, offset: HostOffset, size: ByteCount) -> None:
        if self._writer is None:
            self._writer = _writer(self.backing)
        if self._writer >= 0:
            try:
                self._fill(self._writer, offset, size)
            except OSError as error:
                if error.errno not in _UNWRITABLE:
                    raise
            else:
                return
        for mapping, start, length in self._mapped(offset, size):
            _touch(mapping, start, length, self.page_size)

    def _fill(self, fd: int, offset: HostOffset, size: ByteCount) -> None:
        """Fill the holes of a range, piece by piece; see above. OSError where the file can't hold all of it."""
        end = offset + size
        for start in range(offset, end, len(ZEROS)):
            piece = ByteCount(min(len(ZEROS), end - start))
            if os.fstat(fd).st_size < self.backing.offset + start + piece:
                raise _truncated()
            for hole, length in self._holes(HostOffset(start), piece):
                write_at(fd, memoryview(ZEROS)[:length], self.backing.offset + hole)
        if self.backing.held(offset, size) != size:
            raise _truncated()

    def _mapped(self, offset: HostOffset, size: ByteCount) -> list[tuple[Mapping, HostOffset, ByteCount]]:
        """Where a range is mapped, region by region. OSError unless all of it is."""
        first, end = self.addr + offset, self.addr + offset + size
        parts = []
        for region in self.regions:
            start, stop = max(first, region.guest_address), min(end, region.end)
            if start < stop:
                inside = HostOffset(region.offset + start - region.guest_address)
                parts.append((region.mapping, inside, ByteCount(stop - start)))
        if sum(length for _, _, length in parts) != size:
            raise _TheirsError(errno.EFAULT, "share all of it")
        return parts

    def _way_out(self, offset: HostOffset, size: ByteCount, error: OSError) -> str:
        return str(error.strerror) if isinstance(error, _TheirsError) else super()._way_out(offset, size, error)

    def write(self, offset: HostOffset, data: bytes) -> None:
        """As of BackedMemory, by a mapping for this alone: where rings are served, all would be lost with the file."""
        try:
            mapping, inside = map_part(self.backing.fd, self.backing.offset + offset, len(data))
        except PeerError as error:
            raise HostError(error.field, error.value, error.limit, "don't truncate it") from error
        with mapping:
            with mapping.view(inside, ByteCount(len(data))) as view:
                view[:] = data
            if mapping.dead:
                raise HostError(
                    "memory", f"{offset:#x}+{len(data):#x}", "was gone when it was written to", "share it anew"
                )

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._closed

    def close(self) -> None:
        """Close the file. Closing twice is allowed."""
        self._closed = True
        self.regions = ()
        self.backing.close()
        if self._writer is not None and self._writer >= 0:
            os.close(self._writer)
        self._writer = -1


class _TheirsError(OSError):
    """What those whose memory it is have done to it; in the place of a text it has what they are to do."""


def _truncated() -> OSError:
    return _TheirsError(errno.EFAULT, "don't truncate its file, and share it anew")


def _touch(mapping: Mapping, offset: HostOffset, size: ByteCount, page_size: ByteCount) -> None:
    """Have the host allocate the pages, none of them mapped here. Where regions adjoin within a page, both have it."""
    start = HostOffset(offset // page_size * page_size)
    size = ByteCount(align_up(offset + size, page_size) - start)
    with mapping.view(start, size):  # nobody unmaps it meanwhile
        if mapping.dead:
            raise _truncated()
        try:
            _native.madvise(mapping.address + start, size, MADV_POPULATE_WRITE)
        finally:
            with suppress(OSError):
                _native.madvise(mapping.address + start, size, mmap.MADV_DONTNEED)  # of a shared one: frees nothing


def _writer(backing: Backing) -> int:
    """A descriptor to write the file by where that is the way, else -1. Not a duplicate: with O_APPEND, which whoever
    shares a description can set at any time, pwrite(2) appends. O_NONBLOCK: whoever has a lease on the file would have
    open(2) wait for 45 s, fcntl(2)."""
    if not (isinstance(backing, Memfd) or (isinstance(backing, SharedFile) and backing.in_memory)):
        return -1
    try:
        return os.open(f"/proc/self/fd/{backing.fd}", os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return -1
