"""Zones to test, on files and huge pages that exist for the length of a test."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import host
from tests.zones.helpers import Maker, on_tmpfs
from vhost_user import _native
from vhost_user.errors import HostError
from vhost_user.mapping import PAGE_SIZE
from vhost_user.units import ByteCount
from virtio_mem.hostmem import files


def _suits(directory: Path) -> bool:
    """Whether a directory is on a disk, and its file system does all that a zone can want."""
    if not directory.is_dir() or on_tmpfs(directory):
        return False
    try:
        fd = files.unnamed_file(directory, ByteCount(PAGE_SIZE))
    except HostError:
        return False
    try:
        return files.can_punch_holes(fd)
    finally:
        os.close(fd)


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    for parent in (tmp_path_factory.getbasetemp(), Path("/var/tmp"), Path(__file__).parent):
        if _suits(parent):
            directory = Path(tempfile.mkdtemp(dir=parent))
            yield directory
            shutil.rmtree(directory)
            return
    pytest.skip("no directory on a disk whose file system has unnamed files and holes")


@pytest.fixture(scope="session")
def tmpfs() -> Iterator[Path]:
    if not on_tmpfs(Path("/dev/shm")):
        pytest.skip("/dev/shm is no tmpfs")
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def make(disk: Path, tmpfs: Path, hugepages: Callable[[int, int], host.HugePagePool]) -> Iterator[Maker]:
    with ExitStack() as stack:
        stack.callback(_empty, disk)
        stack.callback(_empty, tmpfs)
        yield Maker(disk, tmpfs, hugepages, stack)


@pytest.fixture
def before_pagemap_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is older than 6.7."""
    real = _native.private_held

    def without_scan(pagemap: int, address: int, length: int, *, scan: bool) -> int:
        if scan:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        return real(pagemap, address, length, scan=False)

    monkeypatch.setattr(_native, "private_held", without_scan)


def _empty(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()
