"""Any sequence of moves: our devices stand it, wrong ones don't, and what is found is short and can be run again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis.database import DirectoryBasedExampleDatabase, InMemoryExampleDatabase

from tests import counts
from tests.conformance.bare import Bare
from tests.conformance.wrong import FAULTS
from virtio_mem.conformance.check import Unsuitable
from virtio_mem.conformance.explore import DatabaseFailure, Exploration, explore
from virtio_mem.conformance.referee import Referee, essential
from virtio_mem.conformance.replay import replay, script_of
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability, Chain, Subject, Target, TargetFailure, Used, Wish
from virtio_mem.conformance.targets.behind_ring import RingTarget
from virtio_mem.conformance.targets.in_process import InProcess, Made
from virtio_mem.conformance.targets.ours import OurSubject, OurTarget
from virtio_mem.protocol import RequestType

SMALL = Wish(region_size=64 << 16, block_size=1 << 16, requested_size=16 << 16)


def explored(target: Target, seed: int, sequences: int = counts.MACHINE_SEQUENCES) -> Exploration:
    with target:
        return explore(target, sequences=sequences, seed_=seed, wish=SMALL, rounds=1)


@pytest.mark.parametrize("make", [OurTarget, RingTarget, lambda: RingTarget("packed")])
def test_our_device_stands_it(make: type[OurTarget | RingTarget], pytestconfig: pytest.Config) -> None:
    exploration = explored(make(), int(pytestconfig.option.hypothesis_seed))
    assert not exploration.found
    assert exploration.sequences >= counts.MACHINE_SEQUENCES
    assert exploration.moves > exploration.sequences


@pytest.mark.parametrize("capabilities", [Capability(0), Capability.RESTART | Capability.WISH])
def test_a_target_that_can_do_little_is_explored_all_the_same(capabilities: Capability) -> None:
    with Bare("vhost-user", capabilities, requested_size=1 << 21) as target:
        exploration = explore(target, sequences=5, seed_=3, wish=SMALL)
    assert not exploration.found
    assert exploration.moves


WRONG = [
    ("error-beyond-the-target", "DEP-NACK-2", 4),
    ("system-reset-does-nothing", "MEM-OP-11", 7),
    ("device-reset-unplugs", "MEM-INIT-2", 7),
    ("unplug-twice", "MEM-UNPLUG-6", 5),
    ("target-before-alignment", "MEM-PLUG-3", 4),
    ("no-target", "DEP-NACK-2", 4),
    ("nothing-is-given-back", "DEP-HOST-3", 7),
    ("usable-shrinks-with-the-target", "MEM-CONF-16", 5),
]
"""Devices that are wrong in one way, the clause that goes first, and how many lines at most it takes to show it."""


@pytest.mark.parametrize(("name", "clause", "lines"), WRONG[: counts.MACHINE_FAULTS])
def test_a_wrong_device_is_found_and_shrunk(name: str, clause: str, lines: int) -> None:
    with FAULTS[name].target() as target:
        exploration = explore(target, sequences=60, seed_=1, wish=SMALL, rounds=1)
        assert clause in exploration.found
        found = exploration.found[clause]
        assert len(found.lines) <= lines, found.lines
        again = replay(target, script_of(found.lines))
        assert not again.failure
        assert not again.differences
    if not clause.startswith("DEP-HOST"):  # what a host holds is not compared
        with OurTarget() as ours:
            assert replay(ours, script_of(found.lines)).differences


def test_what_is_passed_over_is_not_found() -> None:
    rules = ["DEP-NACK-1", "DEP-NACK-2", "DEP-ORDER-1"]
    with FAULTS["error-beyond-the-target"].target() as target:
        exploration = explore(target, sequences=8, seed_=1, wish=SMALL, pass_over=rules)
    assert not exploration.found


def test_the_same_seed_finds_the_same() -> None:
    one, two = (explored(FAULTS["error-beyond-the-target"].target(), 5, 10) for _ in range(2))
    assert one.found == two.found
    assert one.found


@pytest.mark.long
def test_more_is_found_behind_a_failure_and_a_database_brings_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With --hypothesis-seed, which this suite always sets, Hypothesis uses no database at all.
    monkeypatch.setattr("hypothesis.core.global_force_seed", None)
    database = DirectoryBasedExampleDatabase(tmp_path)
    with FAULTS["nothing-is-given-back"].target() as target:
        first = explore(target, sequences=60, seed_=1, wish=SMALL, database=database, rounds=2)
        assert len(first.passed_over) == 2
        assert "DEP-HOST-3" in first.passed_over <= first.found.keys()
        again = explore(target, sequences=1, seed_=2, wish=SMALL, database=database, rounds=1)
    assert "DEP-HOST-3" in again.found


@pytest.mark.long
def test_what_is_stopped_is_not_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that was cut off shows nothing."""
    monkeypatch.setattr("hypothesis.core.global_force_seed", None)
    database = DirectoryBasedExampleDatabase(tmp_path)
    with FAULTS["nothing-is-given-back"].target() as target:
        explore(target, sequences=60, seed_=1, wish=SMALL, database=database, rounds=1)
        kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert kept
        looks = count()
        stopped = explore(target, sequences=9, wish=SMALL, database=database, stopped=lambda: next(looks) > 2)
    assert (stopped.found, stopped.sequences, stopped.moves) == ({}, 1, 2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept


class Lost(InMemoryExampleDatabase):
    """A database whose server is gone once it is asked to keep something."""

    def save(self, key: bytes, value: bytes) -> None:
        raise OSError("connection refused")


def test_a_database_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypothesis.core.global_force_seed", None)
    with (
        FAULTS["no-target"].target() as target,
        pytest.raises(DatabaseFailure, match="OSError: connection refused"),
    ):
        explore(target, sequences=60, seed_=1, wish=SMALL, database=Lost())


def test_time_that_is_up_ends_it() -> None:
    with OurTarget("anonymous") as target:
        exploration = explore(target, sequences=10, seconds=0, wish=SMALL)
    assert (exploration.sequences, exploration.moves) == (0, 0)


def test_time_that_is_up_ends_a_sequence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a daemon one sequence can take longer than all of them may."""
    ticks = count()
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)))
    monkeypatch.setattr("virtio_mem.conformance.explore.time", clock)
    with OurTarget("anonymous") as target:
        exploration = explore(target, sequences=20, steps=30, seconds=25, wish=SMALL)
    assert 0 < exploration.moves <= 25


class Hangs(OurSubject):
    """Answers no request but UNPLUG ALL, and all of `clock` goes by meanwhile."""

    clock: SimpleNamespace

    def submit(self, chains: Sequence[Chain]) -> list[Used]:
        if chains[0].request[0] != RequestType.UNPLUG_ALL:
            self.clock.monotonic = lambda: 100.0
            raise TargetFailure("nothing within 10 s", silent=True)
        return super().submit(chains)


class HangingTarget(OurTarget):
    def _made(self, made: Made) -> InProcess:
        return Hangs(made)


def test_a_device_that_takes_all_the_time_that_is_left_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program has as long for an answer as the profile quick has for all sequences."""
    clock = Hangs.clock = SimpleNamespace(monotonic=lambda: 0.0)
    monkeypatch.setattr("virtio_mem.conformance.explore.time", clock)
    with HangingTarget("anonymous") as target:
        exploration = explore(target, sequences=20, seconds=10, seed_=1, wish=SMALL)
    (found,) = exploration.found.values()
    assert found.lines[-1].endswith("failure: nothing within 10 s")
    assert found.silent


def test_progress_is_told() -> None:
    told: list[int] = []
    with OurTarget("anonymous") as target:
        exploration = explore(target, sequences=3, wish=SMALL, progress=lambda one: told.append(one.sequences))
    assert told == list(range(1, exploration.sequences + 1))


class Gone(OurTarget):
    """A target of which no device can be had."""

    def start(self, wish: Wish) -> Subject:
        raise TargetFailure("nothing there")


def test_a_target_that_does_not_start_is_not_judged() -> None:
    with Gone("anonymous") as target, pytest.raises(TargetFailure, match="nothing there"):
        explore(target, sequences=3, wish=SMALL)


class GoneOnce(OurTarget):
    starts = 0

    def start(self, wish: Wish) -> Subject:
        self.starts += 1
        if self.starts == 1:
            raise TargetFailure("nothing there yet")
        return super().start(wish)


def test_a_target_that_did_not_start_once_is_not_judged_either() -> None:
    """What can't be repeated is no reason to have judged nothing, and to say nothing of it."""
    with GoneOnce("anonymous") as target, pytest.raises(Unsuitable, match="the next one like it"):
        explore(target, sequences=3, wish=SMALL)


def test_a_device_in_use_is_not_judged() -> None:
    with OurTarget("anonymous") as target:
        session = Session(target.start(SMALL), SMALL)
        session.begin()
        session.plug(0, 1)
        with pytest.raises(Unsuitable, match="plugged already"):
            Referee(session)
        session.subject.close()


def test_one_notice_after_busy_is_enough() -> None:
    """At a notice that comes too early a driver tries again; the referee's doesn't, and is owed nothing more."""
    with OurTarget("anonymous") as target:
        referee = Referee(Session(target.start(SMALL), SMALL))
        referee.hinder(refuses=True)
        referee.ask(RequestType.PLUG, referee.session.addr(0), 1)
        referee.hinder(paused=False)
        referee.hinder(refuses=False)
        assert [line for line in referee.session.lines if line.startswith("notices -> 1")] == ["notices -> 1"]
        referee.session.subject.close()


def test_questions_before_the_last_move_are_left_out() -> None:
    lines = ["wish x", "begin -> a", "config -> b", "plug 0 1 -> ACK", "notices -> 0", "state 0 1 -> ACK PLUGGED"]
    more = ["target 8 -> done", "config -> c", "notices -> 0", "held 0 4 -> 9"]
    assert essential(lines + more) == [lines[0], lines[1], lines[3], more[0], more[3]]
    assert essential(lines + more[:3]) == [lines[0], lines[1], lines[3], lines[4], more[0], more[2]]
    assert essential([]) == []
