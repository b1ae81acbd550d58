"""The system calls that Python lacks, and waking others without waiting for them."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from vhost_user._core import ffi, lib
from vhost_user._native.result import checked

_BITS_PER_WORD = 8 * ffi.sizeof("unsigned long")


def madvise(address: int, length: int, advice: int) -> None:
    """madvise(2) on any range."""
    checked(lib.vu_madvise(address, length, advice))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), with a mode."""
    checked(lib.vu_fallocate(fd, mode, offset, length))


def close_received(fd: int) -> None:
    """close(2), without waiting for what that waits for. OSError, EBADF, where it is closed already."""
    checked(lib.vu_close_received(fd))


def die_with_parent() -> None:
    """Has the kernel kill this process when the thread that started it ends; too late where that is over already."""
    checked(lib.vu_die_with_parent())


def mbind(address: int, length: int, mode: int, nodes: Iterable[int]) -> None:
    """mbind(2) of a range to host NUMA `nodes`."""
    mask = sum(1 << node for node in set(nodes))
    words = max(1, -(-mask.bit_length() // _BITS_PER_WORD))
    raw = mask.to_bytes(words * ffi.sizeof("unsigned long"), "little")
    checked(lib.vu_mbind(address, length, mode, ffi.from_buffer("unsigned long[]", raw), words))


def private_held(pagemap: int, address: int, length: int, *, scan: bool) -> int:
    """Bytes of private pages, present or swapped, that the host holds for a range of this process.

    With `scan` without the shared zero page, or ENOTTY before Linux 6.7; otherwise zero pages count as held.
    """
    return checked(lib.vu_private_held(pagemap, address, length, scan))


def hugetlb_held(fd: int, offset: int, length: int, page_size: int) -> int:
    """Bytes of huge pages that a hugetlb file holds in a range, whichever process touched them."""
    return checked(lib.vu_hugetlb_held(fd, offset, length, page_size))


def file_sizes(fd: int) -> tuple[int, int] | None:
    """The size of a regular file, and of the pages that a mapping of it has; None for anything else."""
    page_size = ffi.new("int64_t *")
    size = lib.vu_file_sizes(fd, page_size)
    return None if size == -errno.EINVAL else (checked(size), page_size[0])


def page_size(fd: int) -> int:
    """The size of the pages that a mapping of the file has: of its huge pages on a hugetlbfs."""
    return checked(lib.vu_page_size(fd))


def event_signal(fd: int) -> None:
    """Adds 1 to an eventfd, and never waits, whatever its flags; OSError with EINVAL where `fd` is none."""
    checked(lib.vu_event_signal(fd))


def event_take(fd: int) -> bool:
    """Takes what an eventfd or a pipe holds, and never waits; whether there was something. EPIPE at a pipe's end."""
    return bool(checked(lib.vu_event_take(fd)))
