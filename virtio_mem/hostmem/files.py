"""The file descriptors that zones map: sealed memfds, huge page memfds, a user's file, an unnamed file in a directory.

Each function that opens returns a descriptor that the caller owns, or raises and leaves none open.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vhost_user import _native
from vhost_user.errors import HostError, UsageError
from vhost_user.mapping import PAGE_SIZE
from vhost_user.units import ByteCount, HostOffset, align_up, format_size
from virtio_mem.hostmem import facts

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

ST_BLOCKS_UNIT = 512
"""stat(2): st_blocks counts these, whatever the file system's block size."""

_MFD_HUGE_SHIFT = 26
"""memfd_create(2): the base-2 logarithm of the huge page size goes into the flags from this bit on."""

_NAME_LENGTH = 200
"""Bytes of a memfd's name that are kept; memfd_create(2) takes 249."""


class Place(NamedTuple):
    """What `file=` names: a directory or a regular file, and the file system that it is on.

    `options` are the file system's mount options; `block_size` is the page size of a hugetlbfs.
    """

    path: Path
    directory: bool
    fstype: str
    options: tuple[str, ...]
    block_size: ByteCount

    @property
    def in_memory(self) -> bool:
        """Whether the pages of the file system's files are memory and nothing else, so that none can be dropped."""
        return self.fstype in ("tmpfs", "devtmpfs", "ramfs")


@contextmanager
def _owned(fd: int) -> Iterator[int]:
    """Close `fd` if the block raises."""
    try:
        yield fd
    except BaseException:
        os.close(fd)
        raise


@contextmanager
def _refused(field: str, value: object, call: str, remedies: Mapping[int, str] | None = None) -> Iterator[None]:
    """Turn the kernel's refusal of `call` into a HostError, with the remedy that belongs to the error number."""
    try:
        yield
    except OSError as error:
        remedy = (remedies or {}).get(error.errno or 0, "")
        raise HostError.from_os_error(field, value, call, error, remedy) from error


def examine(path: Path) -> Place:
    """What `path` is, without opening it for real: to open a fifo or a device can block or set something off.

    Raises UsageError for what is missing, or neither a regular file nor a directory.
    """
    try:
        with _refused("file", path, "open", {errno.EACCES: "give access to the directories above it"}):
            fd = os.open(path, os.O_PATH)
    except HostError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise
        remedy = "create the file with its full size, or name a directory that exists"
        raise UsageError("file", path, "no such file or directory", remedy) from error
    try:
        with _refused("file", path, "stat"):
            mode, block_size = os.fstat(fd).st_mode, ByteCount(os.fstatvfs(fd).f_bsize)
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise UsageError("file", path, "neither a regular file nor a directory", "name one of these")
        mount = facts.mount_of(fd)
        fstype, options = (mount.fstype, mount.options) if mount else ("unknown", ())
        return Place(path, stat.S_ISDIR(mode), fstype, options, block_size)
    finally:
        os.close(fd)


def memfd(name: str, size: ByteCount, hugepage_size: ByteCount | None = None) -> int:
    """A memfd of `size` bytes that nobody can shrink or grow, of huge pages if `hugepage_size` says so.

    A file that shrinks under a mapping turns the next access into SIGBUS, and the descriptor goes to other processes.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if hugepage_size is not None:
        flags |= os.MFD_HUGETLB | (hugepage_size.bit_length() - 1) << _MFD_HUGE_SHIFT
    with _refused("size", format_size(size), "memfd_create"):
        fd = os.memfd_create(os.fsdecode(os.fsencode(name)[:_NAME_LENGTH]), flags)
    with _owned(fd):
        with _refused("size", format_size(size), "ftruncate"):
            os.ftruncate(fd, size)
        with _refused("size", format_size(size), "fcntl(F_ADD_SEALS)"):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
    return fd


def user_file(path: Path, size: ByteCount, *, shared: bool) -> int:
    """The user's regular file, which must hold `size` bytes. Opened for writing only if the zone is `shared`."""
    with _refused("file", path, "open", {errno.EACCES: "give read access, and with shared=on write access too"}):
        fd = os.open(path, os.O_RDWR if shared else os.O_RDONLY)
    with _owned(fd):
        with _refused("file", path, "stat"):
            found = os.fstat(fd).st_size
        if found < size:
            limit = f"has {format_size(found)}, and the zone's boot memory needs {format_size(size)}"
            raise UsageError("file", path, limit, f"truncate -s {size} {path}")
    return fd


def unnamed_file(directory: Path, size: ByteCount) -> int:
    """A file of `size` bytes in `directory` that has no name and can't be given one; it goes with its last user."""
    too_large = "the file system allows no file of this size: name a directory on another one"
    remedies = {
        errno.EOPNOTSUPP: "this file system has no unnamed files: name a regular file, or another directory",
        errno.EACCES: "give write access to the directory",
        errno.EFBIG: too_large,
        errno.EINVAL: too_large,
    }
    with _refused("file", directory, "open(O_TMPFILE)", remedies):
        fd = os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_EXCL, 0o600)
    with _owned(fd), _refused("file", directory, f"ftruncate to {format_size(size)}", remedies):
        os.ftruncate(fd, size)
    return fd


def punch_hole(fd: int, offset: HostOffset, size: ByteCount) -> None:
    """Give back the memory or disk space of a range of a file, which then reads as zeros. OSError if refused."""
    _native.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of it: where a file system fills up, a write ends early, and only the next one fails. OSError then."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def can_punch_holes(fd: int) -> bool:
    """Whether the file system can give back a part of a file. Asked beyond the end, where there is nothing to lose."""
    beyond = HostOffset(align_up(os.fstat(fd).st_size, PAGE_SIZE))
    try:
        punch_hole(fd, beyond, ByteCount(PAGE_SIZE))
    except OSError as error:
        return error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS)
    return True


def unallocated(fd: int) -> ByteCount:
    """Bytes by which a file can still grow without getting longer, by stat(2): what fallocate(2) got is there."""
    found = os.fstat(fd)
    return ByteCount(max(0, found.st_size - found.st_blocks * ST_BLOCKS_UNIT))


def next_data(fd: int, offset: int) -> int:
    """The first byte of a file from `offset` on that is data and not in a hole, as lseek(2) tells it; 2**64 where there
    is none. HostError where it doesn't tell."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return 1 << 64
        raise HostError.from_os_error("file", f"{offset:#x}", "lseek", error) from error


def data_size(fd: int, offset: HostOffset, size: ByteCount) -> ByteCount:
    """Bytes of a range of a file that are data and not holes, as lseek(2) tells it. HostError where it doesn't.

    Blocks that fallocate(2) got and nobody wrote are holes to SEEK_DATA. A user's file may have such; nothing here
    makes any, because populating writes.
    """
    return data_size_at_least(fd, offset, size, size)[0]


def data_size_at_least(fd: int, offset: HostOffset, size: ByteCount, most: int) -> tuple[ByteCount, bool]:
    """The same of the first `most` pieces of data, and whether there are more. A piece takes a microsecond or two."""
    held, position, end = 0, int(offset), offset + size
    for piece in itertools.count():
        try:
            data = os.lseek(fd, position, os.SEEK_DATA)
            if data >= end:
                break  # how far that goes on is of no interest, and a walk over all of it
            if piece == most:
                return ByteCount(held), True
            position = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise HostError.from_os_error("held", f"{offset:#x}+{size:#x}", "lseek", error) from error
        held += max(0, position - data)
        if position >= end:
            break
    return ByteCount(held), False
