"""`pytest --virtio-mem-profile=soak`, in one process and in many, until it is told to end or something is found."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from tests import counts
from tests.conformance.soaks import SECOND_IS_WRONG, SHIM, Soak, all_at_once, one, soak

ROOT = Path(__file__).resolve().parents[2]
PYTEST = [
    *(sys.executable, "-m", "pytest", "-p", "virtio_mem.conformance.pytest_plugin", "-p", "no:cacheprovider"),
    *("-p", "no:schemathesis", "-v", "--virtio-mem-profile=soak"),
]
INT, TERM = signal.SIGINT, signal.SIGTERM

Start = Callable[..., Soak]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    numbers = count()
    with ExitStack() as stack:

        def run(*options: str, program: str = SHIM) -> Soak:
            def command(target: str) -> list[str]:
                return [*PYTEST, f"--virtio-mem-target={target}", *options]

            directory = tmp_path / str(next(numbers))
            return stack.enter_context(soak(directory, command, program, {"PYTHONPATH": str(ROOT)}))

        yield run


ENDINGS = [(2, INT, all_at_once), (2, TERM, one), (0, TERM, one), (2, TERM, all_at_once)]


@pytest.mark.long
def test_a_signal_ends_it_with_what_was_found(start: Start) -> None:
    for workers, number, tell in ENDINGS[: counts.PYTEST_SOAK_ENDINGS]:
        running = start("-k", "MEM-STATE or machine", *(("-n", str(workers)) if workers else ()))
        wait_for_machines(running, max(1, workers))
        tell(running, number)
        assert running.ends() == 0
        assert " failed" not in running.output
        by = re.findall(r"^\[(gw\d)\].* PASSED .*::machine", running.output, re.MULTILINE)
        assert len(set(by)) == workers, "each has one"


def wait_for_machines(running: Soak, number: int) -> None:
    """Until so many processes explore."""
    running.wait_for(lambda moves: len(moves) == number and moves[0] > 1200)  # the checks make half


@pytest.mark.long
def test_what_one_finds_ends_all(start: Start) -> None:
    for seed in range(counts.SOAKS_THAT_FIND):
        running = start("-n", "2", "-k", "machine", f"--virtio-mem-seed={seed}", program=SECOND_IS_WRONG)
        assert running.ends() == 1
        assert "1 failed, 1 passed" in running.output
        assert "is violated, as machine found" in running.output
        assert re.search(r"plug \d+ 11 -> BUSY", running.output)


def test_clauses_that_come_after_the_end_are_not_judged(start: Start) -> None:
    running = start()
    running.wait_for(any)
    one(running, INT)
    assert running.ends() == 1
    assert "not judged: the soak was stopped before" in running.output


def test_a_number_of_machines_is_not_for_a_soak(start: Start) -> None:
    running = start("--virtio-mem-machines=3")
    assert running.ends() == pytest.ExitCode.USAGE_ERROR
    assert "--virtio-mem-machines: with the profile soak each worker has one" in running.output
