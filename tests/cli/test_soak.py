"""`virtio-mem conformance --profile soak` until it is told to end, by real signals, with nothing of it left behind."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests import counts
from tests.cli.rig import command
from tests.conformance.soaks import MOVES_OF_CHECKS, SECOND_IS_WRONG, SHIM, WRONG, Soak, all_at_once, marked, one, soak
from tests.peers.processes import LATE, wait_until
from virtio_mem.conformance.explore import explore
from virtio_mem.conformance.targets.parse import parse_target
from virtio_mem.conformance.trial import open_database

INT, TERM = signal.SIGINT, signal.SIGTERM

Start = Callable[..., Soak]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    numbers = count()
    with ExitStack() as stack:

        def run(*options: str, program: str = SHIM, seed: int = 1) -> Soak:
            directory = tmp_path / str(next(numbers))
            more = ["--profile", "soak", "--seed", str(seed), "--report", str(directory / "report.json"), *options]
            return stack.enter_context(soak(directory, lambda target: command("conformance", target, *more), program))

        yield run


def wait_for_workers(running: Soak, number: int) -> None:
    """Until so many processes beside the first one explore, or that does."""
    most = 50 if number else MOVES_OF_CHECKS
    running.wait_for(lambda moves: len(moves) == number + 1 and moves[0] > most)


def judgement(running: Soak) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((running.directory / "report.json").read_text())
    return report


ENDINGS = [(0, TERM, one), (2, INT, all_at_once), (0, INT, one), (2, TERM, all_at_once), (2, TERM, one), (2, INT, one)]


@pytest.mark.parametrize(("workers", "number", "tell"), ENDINGS[: counts.SOAK_ENDINGS])
def test_a_signal_ends_it_with_what_was_found(
    start: Start, workers: int, number: signal.Signals, tell: Callable[[Soak, signal.Signals], None]
) -> None:
    running = start(*(("--workers", str(workers)) if workers else ()))
    wait_for_workers(running, workers)
    tell(running, number)
    status, report = running.ends(), judgement(running)
    assert (status, report["counts"]["violated"], report["missing"], report["failures"]) == (0, 0, [], [])


@pytest.mark.long
def test_what_one_finds_ends_all(start: Start) -> None:
    for seed in range(counts.SOAKS_THAT_FIND):
        running = start("--workers", "2", program=SECOND_IS_WRONG, seed=seed)
        status, report = running.ends(), judgement(running)
        assert (status, report["failures"]) == (1, [])
        assert {one["source"] for clause in report["clauses"] for one in clause["violations"]} == {"machine"}


@pytest.mark.long
def test_what_was_found_is_kept(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypothesis.core.global_force_seed", None)
    for seed in range(counts.SOAKS_THAT_FIND):
        running = start("--database", f"failing-{seed}", program=WRONG, seed=seed)
        status, report = running.ends(), judgement(running)
        assert (status, report["failures"]) == (1, [])
        (found,) = (clause["violations"][0] for clause in report["clauses"] if clause["id"] == "DEP-BUSY-4")
        assert any(re.fullmatch(r"plug \d+ 11 -> BUSY", line) for line in found["lines"])
        database = open_database(str(running.directory / f"failing-{seed}"))
        with parse_target(running.target) as target:
            again = explore(target, sequences=1, steps=50, rounds=1, database=database)
        assert "DEP-BUSY-4" in again.found


BEGIN = 'if do == "begin":\n'
HANGS = SHIM.replace(BEGIN, f'{BEGIN}        note("request")\n        import time; time.sleep(600)\n')


@pytest.mark.long
@pytest.mark.parametrize(("profile", "numbers"), [("soak", [INT, TERM]), ("quick", [TERM])])
def test_a_signal_that_does_not_wait_for_the_device(start: Start, profile: str, numbers: list[signal.Signals]) -> None:
    """Of a soak the second one; the others have nothing to tell before their end."""
    running = start("--profile", profile, program=HANGS)
    wait_until(lambda: any(running.moves), "the device hangs")
    for number in numbers:
        one(running, number)
    assert running.process.wait(LATE) == 128 + TERM
    wait_until(lambda: not marked(running.mark), "its device has ended, too")
    assert list(running.temporary.iterdir()) == []


def test_a_worker_that_is_killed_is_no_judgement(start: Start) -> None:
    running = start("--workers", "2")
    wait_for_workers(running, 2)
    os.kill(next(pid for pid, line in marked(running.mark).items() if b"spawn_main" in line), signal.SIGKILL)
    status, report = running.ends(), judgement(running)
    assert status == 2
    assert [re.sub(r"\d", "N", failure) for failure in report["failures"]] == [
        "worker N was ended by SIGKILL, and did not tell what it found"
    ]


def test_workers_end_when_nobody_listens(start: Start) -> None:
    running = start("--workers", "2")
    wait_for_workers(running, 2)
    running.process.kill()
    wait_until(lambda: not marked(running.mark), "they have ended")
