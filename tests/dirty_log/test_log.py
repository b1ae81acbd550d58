"""The log by itself: which bits are set, what is refused, and what becomes of a log that can't be written."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import counts
from tests.dirty_log.shared import log_file, log_on, pages, touched
from tests.host import HugePagePool
from vhost_user.dirty_log import DirtyLog
from vhost_user.errors import HostError, PeerError
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import MIB

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "vhost_user" / "csrc"

SIZE = 64
"""Of a log for 2 MiB."""


@pytest.mark.parametrize(
    ("address", "size", "expected"),
    [
        # By hand: page = address / 0x1000; byte page / 8, bit page % 8.
        (0, 1, {0: 0x01}),
        (0xFFF, 1, {0: 0x01}),
        (0xFFF, 2, {0: 0x03}),
        (0x1000, 0x1000, {0: 0x02}),
        (0x5000, 0x1001, {0: 0x60}),
        (0x7FFF, 2, {0: 0x80, 1: 0x01}),
        (0x7000, 0xA000, {0: 0x80, 1: 0xFF, 2: 0x01}),
        (0x1FF000, 0x1000, {63: 0x80}),
        (0x1000, 0, {}),
    ],
)
def test_bits_are_where_the_document_says(address: int, size: int, expected: dict[int, int]) -> None:
    with log_file(4096) as fd, log_on(fd, SIZE) as log:
        log.mark(address, size)
        assert dict(enumerate(os.pread(fd, SIZE, 0))) == dict.fromkeys(range(SIZE), 0) | expected
        assert log.out_of_range == 0
        assert os.pread(fd, 4096, SIZE) == bytes(4096 - SIZE)


RANGES = st.lists(st.tuples(st.integers(0, 3 * MIB), st.integers(1, 200_000)), max_size=20)


@given(ranges=RANGES, offset=st.integers(0, 5000))
def test_marks_add_up_to_what_was_touched(ranges: list[tuple[int, int]], offset: int) -> None:
    with log_file(8192) as fd, log_on(fd, SIZE, offset) as log:
        for address, size in ranges:
            log.mark(address, size)
        expected = set[int]().union(*(touched(*each) for each in ranges))
        assert pages(fd, SIZE, offset) == {page for page in expected if page < 8 * SIZE}
        assert log.out_of_range == sum(max(touched(*each)) >= 8 * SIZE for each in ranges)
        rest = os.pread(fd, offset, 0) + os.pread(fd, 8192, offset + SIZE)
        assert rest == bytes(8192 - SIZE)


def test_what_the_log_does_not_cover_is_counted() -> None:
    with log_file(4096) as fd, log_on(fd, SIZE) as log:
        log.mark(0x1FF000, 0x1001)
        assert pages(fd, SIZE) == {511}
        for address in (0x200000, 2**64 - 1, 2**64 - 4096, 2**65):
            log.mark(address, 4096)
        assert log.out_of_range == 5
        assert pages(fd, 4096) == {511}


def test_a_closed_log_is_not_touched() -> None:
    with log_file(4096) as fd:
        with log_on(fd, SIZE) as log:
            log.mark(0, 1)
        log.close()
        log.mark(0x1000, 1)
        assert pages(fd, SIZE) == {0}
        assert log.out_of_range == 1
        assert not log.dead


def test_the_descriptor_is_not_needed_afterwards() -> None:
    fd = OwnedFd(os.memfd_create("log", os.MFD_CLOEXEC))
    os.ftruncate(fd.fileno(), 4096)
    log = DirtyLog(fd, SIZE, 0)
    with fd.duplicate() as other:
        fd.close()
        log.mark(0x3000, 1)
        assert pages(other.fileno(), SIZE) == {3}
    log.close()


@pytest.mark.parametrize(
    ("size", "offset", "field"),
    [
        (0, 0, "log size"),
        (8193, 0, "log mmap_offset"),
        (1, 8192, "log mmap_offset"),
        (8192, 1, "log mmap_offset"),
        (2**64 - 1, 0, "log mmap_offset"),
        (1, 2**64 - 1, "log mmap_offset"),
        (2**64 - 1, 2**64 - 1, "log mmap_offset"),
        (2**64 - 4096, 8192, "log mmap_offset"),
    ],
)
def test_a_part_that_is_not_in_the_file_is_refused(size: int, offset: int, field: str) -> None:
    with log_file(8192) as fd, pytest.raises(PeerError) as refusal:
        DirtyLog(fd, size, offset)
    assert refusal.value.field == field
    assert str(size if field == "log size" else f"{offset:#x}+{size:#x}") in str(refusal.value)


def test_the_last_byte_of_the_file_is_good() -> None:
    with log_file(5001) as fd, log_on(fd, 1, 5000) as log:
        log.mark(0x7000, 1)
        assert pages(fd, 1, 5000) == {7}


@contextmanager
def read_only() -> Iterator[int]:
    with log_file(4096) as fd:
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        try:
            yield again
        finally:
            os.close(again)


@contextmanager
def pipe() -> Iterator[int]:
    ends = os.pipe()
    try:
        yield ends[1]
    finally:
        for end in ends:
            os.close(end)


@contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "make",
    [read_only, pipe, lambda: opened("/proc/self", os.O_RDONLY), lambda: opened("/dev/null", os.O_RDWR)],
    ids=["read only", "pipe", "directory", "device"],
)
def test_a_descriptor_of_no_such_file_is_refused(make: Callable[[], AbstractContextManager[int]]) -> None:
    with make() as fd, pytest.raises(PeerError, match="log "):
        DirtyLog(fd, SIZE, 0)


def test_a_directory_with_a_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with opened(str(tmp_path), os.O_RDONLY) as fd:
        assert os.fstat(fd).st_size
        with pytest.raises(PeerError, match=r"log fd=.*a file: a memfd"):
            DirtyLog(fd, 1, 0)


def test_a_number_that_is_no_descriptor() -> None:
    with pytest.raises(HostError, match="fstat"):
        DirtyLog(999_999, SIZE, 0)


def test_a_log_larger_than_the_address_space() -> None:
    with log_file(1 << 62) as fd, pytest.raises(HostError):
        DirtyLog(fd, 1 << 62, 0)


def test_a_truncated_log_is_dead_and_the_process_lives() -> None:
    with log_file(8192) as fd, log_on(fd, 8192) as log:
        log.mark(0, 1)
        assert not log.dead
        os.ftruncate(fd, 0)
        for _ in range(3):
            log.mark(0x5000, 0x10000)
        assert log.dead


@pytest.mark.needs_hugetlb
def test_a_log_of_huge_pages(hugepages: Callable[[int, int], HugePagePool]) -> None:
    hugepages(2 * MIB, 2)
    fd = os.memfd_create("log", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    try:
        os.ftruncate(fd, 4 * MIB)
        offset = 2 * MIB - 8
        with log_on(fd, SIZE, offset) as log:
            log.mark(63 * 4096, 2 * 4096)
        assert pages(fd, SIZE, offset) == {63, 64}
    finally:
        os.close(fd)


def test_two_processes_lose_no_bit_of_a_byte(tmp_path: Path) -> None:
    """Without the atomic OR they lose a bit in 2 to 20 percent of the bytes, on two processors of x86-64."""
    program = tmp_path / "log_race"
    sources = [HERE / "log_race.c", *(CSRC / name for name in ("log.c", "guard.c"))]
    subprocess.run(["cc", "-std=gnu11", "-O2", "-I", CSRC, "-o", program, *sources], check=True)
    ran = subprocess.run([program, str(counts.DIRTY_LOG_ROUNDS)], capture_output=True, text=True, check=True)
    assert ran.stdout == "0\n"
