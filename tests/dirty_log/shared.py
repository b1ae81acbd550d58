"""A log in a file, and what its bits say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from vhost_user.dirty_log import DirtyLog
from vhost_user.message import LOG_PAGE


@contextmanager
def log_file(size: int) -> Iterator[int]:
    """A file of `size` bytes."""
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def log_on(fd: int, size: int, offset: int = 0) -> Iterator[DirtyLog]:
    log = DirtyLog(fd, size, offset)
    try:
        yield log
    finally:
        log.close()


def pages(fd: int, size: int, offset: int = 0) -> set[int]:
    """The pages whose bits are set."""
    raw = os.pread(fd, size, offset)
    return {8 * at + bit for at, byte in enumerate(raw) if byte for bit in range(8) if byte >> bit & 1}


def touched(address: int, size: int) -> set[int]:
    """The pages of a range of one byte or more."""
    return set(range(address // LOG_PAGE, (address + size - 1) // LOG_PAGE + 1))


def clear(fd: int, size: int) -> None:
    """What a front end does when it has copied the pages."""
    os.pwrite(fd, bytes(size), 0)
