"""What is found in a guest's memory, without a guest."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.peers.guest import _AT_ONCE, kernel_logs

BEGINS = b"\1\0\0\0\0\0\0\0Linux version 7.3.4 (somebody) #1 SMP\n\xff\2\0\0\0\0\0\0\0Command line: quiet\0\0\3\0"


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 4 * _AT_ONCE)
    yield fd
    os.close(fd)


def logs(most: int = 1000) -> str:
    return "\n".join(kernel_logs(os.getpid(), most))


def test_a_memory_without_a_log(memory: int) -> None:
    os.pwrite(memory, b"Linux version 7.3.4 (somebody)\n[    0.000000] Command line: quiet", 0)  # what dmesg printed
    assert logs() == "no kernel's log was found"
    assert list(kernel_logs(2**22, 1)) == ["no kernel's log was found"]  # no such process


@pytest.mark.parametrize("at", [0, 3 * _AT_ONCE, _AT_ONCE - len(BEGINS) // 2], ids=["begin", "hole", "two pieces"])
def test_a_log_is_found_wherever_it_is(at: int, memory: int) -> None:
    os.pwrite(memory, bytes(_AT_ONCE + 4096) if at < _AT_ONCE else b"\0", 0)
    os.pwrite(memory, BEGINS + b"a second record\0\4\0", at)
    again = os.dup(memory)
    try:
        found = logs()
    finally:
        os.close(again)
    assert found.count("kernel's log at") == 1
    assert found.startswith(f"kernel's log at {at + 8:#x}:\nLinux version 7.3.4")
    assert found.endswith("Command line: quiet\na second record")
    assert logs(3).endswith(":\nord")


def test_holes_stay_holes(memory: int) -> None:
    os.pwrite(memory, BEGINS, 3 * _AT_ONCE)
    before = os.fstat(memory).st_blocks
    assert "Linux version" in logs()
    assert os.fstat(memory).st_blocks == before
