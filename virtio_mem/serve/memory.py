"""The memory behind a served device: the part of a front end's memory that the zone's guest addresses are.

The front end has the memory and shares it as regions of files. What a device does to its memory it does to the file:
a hole is punched into it, its pages are populated, its data is counted. That reaches every process that maps it. The
zone must lie in one region, or in regions that adjoin in guest addresses and in one file. A region that can't be mapped
to be written never gets here: the back end refuses it. A private mapping of the front end can't be seen from outside:
what is given back of the file then, the front end keeps as its copies.

Whatever is missing (no front end, no such region, the wrong kind of file, a file that was truncated) is a HostError:
the driver is told BUSY, and asked to try again when memory comes. With no front end `discard` is done, as a system
reset has to be: what it is asked for is given back when the same memory comes again, before anything can be plugged;
unless this process was replaced meanwhile.

What a process populates is charged to its memory cgroup: to the one that this service runs in, not the front end's. So
it looks at the headroom of its own cgroup first (hostmem/headroom.py), and then has the host allocate the pages without
keeping them mapped here (others_memory.py).
Huge pages are populated always, since the front end, guest and all, would be killed where the pool has none. Whether
the pool's reserved pages are the front end's own, nobody can tell from outside: so they count as free here, and where
they are another's, populating fails.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vhost_user.errors import FieldError, HostError
from vhost_user.mapping import PAGE_SIZE, page_size_of
from vhost_user.units import ByteCount, GuestAddress, HostOffset, format_size
from virtio_mem.hostmem import facts, headroom
from virtio_mem.hostmem.backing import Backing, Hugetlb, Memfd, SharedFile
from virtio_mem.hostmem.files import Place, can_punch_holes
from virtio_mem.serve.others_memory import OthersMemory

if TYPE_CHECKING:
    from vhost_user.memory import Region


log = logging.getLogger(__name__)


class Extent(NamedTuple):
    """A part of a file, by which it is known again: device and inode, and the first byte."""

    device: int
    inode: int
    offset: int


class FrontendMemory:
    """What a DeviceService needs of the `size` bytes from guest address `addr` on.

    `attach` and `detach` follow what the front end shares; any thread that holds the service's lock may call them, and
    whatever else changes memory. `held` may be called at any time.
    """

    def __init__(self, addr: GuestAddress, size: ByteCount, block_size: ByteCount, *, prefault: bool) -> None:
        self.addr = addr
        self.size = size
        self.connected = False
        self._block_size = block_size
        self._prefault = prefault
        self._memory: OthersMemory | None = None
        self._extent: Extent | None = None
        self._left: Extent | None = None
        """Where the memory was of the front end that is gone."""
        self._owed: set[tuple[HostOffset, ByteCount]] = set()
        """What is to be given back of it."""
        self._why_missing = _NOBODY
        self._replacing = threading.Lock()

    # What the front end shares.

    def overlaps(self, start: int, size: int) -> bool:
        """Whether a range of guest addresses has a part of the zone."""
        return start < self.addr + self.size and self.addr < start + size

    def attach(self, regions: Sequence[Region]) -> bool:
        """The front end shares these now. Whether the zone's memory is there, and is not what it was."""
        self.connected = True
        regions = [region for region in regions if self.overlaps(region.guest_address, region.size)]
        try:
            region, offset = self._locate(regions)
            assert region.file is not None
            extent = _extent(region.file.fd.fileno(), offset)
            if self._memory is not None and extent == self._extent:
                self._memory.regions = regions
                return False
            memory = self._adopt(region.file.fd.fileno(), offset, regions)
        except FieldError as error:
            self.refuse(str(error))
            return False
        self._replace(memory, extent)
        self._give_back(extent)
        return True

    def detach(self) -> None:
        """The front end is gone."""
        self.connected = False
        if self._extent is not None:
            self._left, self._owed = self._extent, set()
        self.refuse(_NOBODY)

    def refuse(self, why: str) -> None:
        """Be without memory, for this reason, until the front end shares another."""
        self._replace(None, None)
        self._why_missing = why

    def _locate(self, regions: Sequence[Region]) -> tuple[Region, HostOffset]:
        """The region that the zone begins in, of those that have a part of it, and where in its file. HostError unless
        all of it is there."""
        first: Region | None = None
        start, reached, where = HostOffset(0), int(self.addr), (0, 0, 0)
        for region in regions:  # by guest address
            if region.file is None:
                raise HostError("file", region, "was not kept: too many regions lie in the zone")
            if region.guest_address > reached:
                break
            inside = max(0, self.addr - region.guest_address)
            here = _extent(region.file.fd.fileno(), HostOffset(region.file.offset + inside))
            if first is None:
                first, start = region, HostOffset(here.offset)
            elif here != where:
                raise HostError("region", region, "has to adjoin the one before it in one file", _SHARE)
            reached = region.end
            where = Extent(here.device, here.inode, here.offset + region.size - inside)
        if first is None or reached < self.addr + self.size:
            limit = f"of the zone's {self._range} the front end shares {max(0, reached - self.addr):#x} bytes"
            raise HostError("regions", len(regions), limit, _SHARE)
        return first, start

    def again(self) -> OthersMemory:
        """The memory once more, by its file, which stays whatever the front end does, and is the caller's to close.

        HostError where it is not there, or not with all of its file.
        """
        backing = self.require(HostOffset(0), self.size).backing
        return self._adopt(backing.fd, backing.offset)

    def _adopt(self, fd: int, offset: HostOffset, regions: Sequence[Region] = ()) -> OthersMemory:
        page_size = page_size_of(fd)
        if page_size > self._block_size or offset % page_size:
            limit = f"has to be whole pages of {format_size(page_size)}, and so has a block"
            remedy = f"give the zone a block_size of {format_size(page_size)} or more, and an addr that is a multiple"
            raise HostError("mmap_offset", f"{offset:#x}", limit, remedy)
        try:
            own = os.dup(fd)
        except OSError as error:
            raise HostError.from_os_error("fd", fd, "dup", error, "raise the limit, ulimit -n") from error
        try:
            backing = backing_of(own, offset, page_size)
            if isinstance(backing, SharedFile) and not can_punch_holes(own):
                raise HostError("file", f"fd {fd}", "its file system can't give back a part of a file")
            return OthersMemory(backing, self.size, self.addr, regions)
        except BaseException:
            os.close(own)
            raise

    def _replace(self, memory: OthersMemory | None, extent: Extent | None) -> None:
        with self._replacing:
            before, self._memory, self._extent = self._memory, memory, extent
            if before is not None:
                before.close()

    # What the service asks.

    @property
    def page_size(self) -> ByteCount:
        """That of the smallest pages, until the front end shares others."""
        return ByteCount(PAGE_SIZE) if self._memory is None else self._memory.page_size

    @property
    def populates(self) -> bool:
        """Whether a PLUG is to populate: where the zone was asked to, and always where memory is of huge pages."""
        return self._prefault or (self._memory is not None and isinstance(self._memory.backing, Hugetlb))

    @property
    def place(self) -> tuple[int, HostOffset] | None:
        """The file's descriptor, and where in it the memory begins; None where there is no memory."""
        return None if self._memory is None else (self._memory.backing.fd, self._memory.backing.offset)

    def require(self, offset: HostOffset, size: ByteCount) -> OthersMemory:
        """The memory, if the front end shares it and its file still has the range; else HostError."""
        if self._memory is None:
            raise HostError("memory", self._range, self._why_missing)
        backing = self._memory.backing
        length = os.fstat(backing.fd).st_size
        if backing.offset + offset + size > length:
            raise HostError("file", f"{length:#x} bytes", f"has to have {offset:#x}+{size:#x} of the zone", _CUT)
        return self._memory

    def populate(self, offset: HostOffset, size: ByteCount) -> None:
        """Make the host allocate a range. HostError, and nothing of it held that was not before, where it can't."""
        self.require(offset, size).populate(offset, size)

    def discard(self, offset: HostOffset, size: ByteCount) -> bool:
        """Give a range back to the host, later where no front end is there. See `BackedMemory.discard`."""
        if not self.connected:
            self._owed.add((offset, size))
            return False
        return self.require(offset, size).discard(offset, size)

    def _give_back(self, extent: Extent) -> None:
        """Memory came. What was not given back of it, since nobody shared it, is given back now."""
        owed = self._owed if extent == self._left else set()
        self._left, self._owed = None, set()
        for offset, size in owed:
            try:
                self.discard(offset, size)
            except HostError as error:
                log.warning("%d bytes at %#x are not given back: %s", size, self.addr + offset, error)

    def held(self, offset: HostOffset, size: ByteCount) -> ByteCount:
        """Bytes that the host holds for a range, whoever touched them. HostError where nobody can tell."""
        with self._replacing:
            return self.require(offset, size).held(offset, size)

    def held_at_least(self, offset: HostOffset, size: ByteCount) -> tuple[ByteCount, bool]:
        """The same in a bounded time: what it holds, and whether there is more."""
        with self._replacing:
            return self.require(offset, size).held_at_least(offset, size)

    def shortage(self, offset: HostOffset, size: ByteCount) -> HostError | None:
        """Why a range could not be plugged now, or None where nothing is known to stand against it."""
        try:
            return self.require(offset, size).shortage(offset, size)
        except HostError as error:
            return error

    @property
    def _range(self) -> str:
        return f"{self.addr:#x}+{self.size:#x}"


_NOBODY = "no front end is there to share it"
_SHARE = "have all of the zone be shared RAM of the VMM's (share=on), or give it another addr or hotplug_size"
_CUT = "don't truncate it"


def _extent(fd: int, offset: HostOffset) -> Extent:
    about = os.fstat(fd)
    return Extent(about.st_dev, about.st_ino, offset)


def backing_of(fd: int, offset: HostOffset, page_size: int) -> Backing:
    """What kind of memory a shared file is."""
    if page_size > PAGE_SIZE:
        return _FrontendHugetlb(fd, offset, ByteCount(page_size), reserved=False)
    mount = facts.mount_of(fd)
    if mount is None and _is_memfd(fd):
        return Memfd(fd, offset)
    fstype, options = (mount.fstype, mount.options) if mount else ("unknown", ())
    return SharedFile(fd, offset, Place(Path(f"/proc/self/fd/{fd}"), False, fstype, options, ByteCount(page_size)))


class _FrontendHugetlb(Hugetlb):
    """Huge pages that the front end may have reserved, or not: see above."""

    def require_headroom(self, size: int, node: int | None) -> None:
        """The pool must have the pages, reserved or not."""
        del node
        pool, pages = facts.huge_pool(self.page_size), size // self.page_size
        if pages > pool.free + max(0, pool.overcommit - pool.surplus):
            limit, remedy = pool.shortage(pages)
            raise HostError("populate", format_size(size), limit, remedy)
        headroom.require(size, headroom.huge_limits(self.page_size), "populate")


def _is_memfd(fd: int) -> bool:
    """Seals are for files in memory only, fcntl(2)."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True
