"""A regular file that a zone's memory is, and that a snapshot only names: by what it is known again.

By inode and size, by where in it the memory begins, and by the inode's generation, which file systems on disks give
anew to each file (FS_IOC_GETVERSION, ioctl_iflags(2)): the number of a file that was removed is soon another's. Inodes
of the same number are on every file system. So the path must be the same, or where front ends bring the file, whose
path may be another to each of them, the device or the path: device numbers are others after the next boot. Not by
times: whoever has the file populated changes them.
"""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

from vhost_user.errors import UsageError
from virtio_mem.hostmem.backed import BackedMemory
from virtio_mem.hostmem.backing import SharedFile
from virtio_mem.snapshot.manifest import PartState

_FS_IOC_GETVERSION = 0x80087601
"""_IOR('v', 1, long); what comes is an int all the same."""


def own_file(file: Path | None, memory: BackedMemory) -> Path | None:
    """`file`, where the content of memory is in it: a regular one, and shared."""
    return file if isinstance(memory.backing, SharedFile) and file is not None and file.is_file() else None


def named(path: Path, memory: BackedMemory) -> PartState:
    """What a snapshot says of memory whose file this is."""
    fd = memory.backing.fd
    about = os.fstat(fd)
    return PartState(
        memory.size, None, str(path), about.st_ino, about.st_size, about.st_dev, _generation(fd), memory.file_offset
    )


def require_file(state: PartState, path: Path, memory: BackedMemory, *, renamed: bool = False) -> None:
    """UsageError unless the file of `memory`, at `path`, is the one that was there when the snapshot was taken; with
    `renamed` it may be at another path of the same device."""
    now = named(path, memory)
    same_place = state.path == now.path or (renamed and state.device == now.device)
    if not same_place or _identity(state) != _identity(now):
        limit = f"is {_describe(now)} now"
        raise UsageError(
            "file", _describe(state), limit, "put the file back that was there when the snapshot was taken"
        )


def _identity(state: PartState) -> tuple[int | None, ...]:
    return state.inode, state.file_size, state.generation, state.file_offset


def _describe(state: PartState) -> str:
    device = "unknown" if state.device is None else f"{os.major(state.device)}:{os.minor(state.device)}"
    generation = "" if state.generation is None else f" generation {state.generation}"
    inode = f"inode {state.inode}{generation} on device {device}"
    return f"{inode}, {state.file_size} bytes, from {state.file_offset} on, at {state.path}"


def _generation(fd: int) -> int | None:
    """None where the file system has none, as those in memory."""
    try:
        return int.from_bytes(fcntl.ioctl(fd, _FS_IOC_GETVERSION, bytes(8))[:4], sys.byteorder)
    except OSError:
        return None
