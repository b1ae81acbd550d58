"""The seam to the C core: the only Python file that imports `ffi` and `lib`.

Lengths are checked by the callers, return codes here: a negated errno becomes an OSError. Every call releases the
GIL while it is in C, so a long populate or discard holds up no other thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from vhost_user._core import ffi, lib

_BITS_PER_WORD = 8 * ffi.sizeof("unsigned long")


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def address_of(buffer: object) -> int:
    """Where a writable buffer lies in this process; the buffer is not kept alive."""
    with ffi.from_buffer(buffer, require_writable=True) as pointer:
        return int(ffi.cast("uintptr_t", pointer))


def map_fixed(address: int, length: int, prot: int, flags: int, fd: int, offset: int) -> None:
    """mmap(2) with MAP_FIXED, over addresses that the caller owns."""
    _checked(lib.vu_map_fixed(address, length, prot, flags, fd, offset))


def madvise(address: int, length: int, advice: int) -> None:
    """madvise(2) on any range."""
    _checked(lib.vu_madvise(address, length, advice))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), with a mode."""
    _checked(lib.vu_fallocate(fd, mode, offset, length))


def mbind(address: int, length: int, mode: int, nodes: Iterable[int]) -> None:
    """mbind(2) of a range to host NUMA `nodes`."""
    mask = sum(1 << node for node in set(nodes))
    words = max(1, -(-mask.bit_length() // _BITS_PER_WORD))
    raw = mask.to_bytes(words * ffi.sizeof("unsigned long"), "little")
    _checked(lib.vu_mbind(address, length, mode, ffi.from_buffer("unsigned long[]", raw), words))


def private_held(pagemap: int, address: int, length: int) -> int:
    """Bytes of private pages, present or swapped, that the host holds for a range of this process."""
    return _checked(lib.vu_private_held(pagemap, address, length))


def hugetlb_held(fd: int, offset: int, length: int, page_size: int) -> int:
    """Bytes of huge pages that a hugetlb file holds in a range, whichever process touched them."""
    return _checked(lib.vu_hugetlb_held(fd, offset, length, page_size))
