"""All that the kit has against one target, as the command has it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import pytest

from tests.conformance.bare import Bare
from tests.conformance.small import on_small_blocks
from tests.conformance.test_machine import SMALL
from tests.conformance.wrong import FAULTS
from vhost_user.errors import UsageError
from virtio_mem.conformance import explore, kit, trial
from virtio_mem.conformance.check import Check
from virtio_mem.conformance.kit import Profile, Progress, Run, Verdict
from virtio_mem.conformance.target import Capability, Chain, Subject, Target, TargetFailure, Used, Wish
from virtio_mem.conformance.targets.in_process import InProcess, Made
from virtio_mem.conformance.targets.ours import OurSubject, OurTarget
from virtio_mem.conformance.trial import MACHINE, Effort, Trial, open_database
from virtio_mem.protocol import RequestType


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less of everything."""

    def chosen(profile: Profile, only: Sequence[str] = ()) -> list[Check]:
        return [check for check in on_small_blocks(kit.chosen_checks(profile, only)) if only or "needs" in check.name]

    monkeypatch.setattr(trial, "chosen_checks", chosen)
    for profile in Profile:
        monkeypatch.setitem(trial.EFFORTS, profile, Effort(5, 20, 60.0))


class Small(OurTarget):
    """A region that the machine goes through quickly."""

    def start(self, wish: Wish) -> Subject:
        return super().start(SMALL)


def test_our_device_is_judged_by_the_machine_as_well() -> None:
    steps: list[Progress] = []
    with Small("anonymous") as target:
        judgement = Trial(seed=4, progress=steps.append).hold(target)
    assert not judgement.of(Verdict.VIOLATED)
    assert not judgement.failures
    assert judgement.missing, "no check was run"
    assert judgement.seed == 4
    assert judgement.calls > 20
    assert [step.done for step in steps if step.step == MACHINE][:3] == [1, 2, 3]


def test_what_the_machine_finds_is_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    with FAULTS["error-beyond-the-target"].target() as target:
        start = target.start
        monkeypatch.setattr(target, "start", lambda _: start(SMALL))
        monkeypatch.setattr(explore, "MOST_ROUNDS", 2)
        judgement = Trial(seed=1).hold(target)
    assert judgement.status == 1
    (found,) = judgement.verdicts["DEP-NACK-2"].violations
    assert (found.source, found.was) == (MACHINE, "ERROR")
    assert found.lines[-1].endswith(" -> ERROR")


class Sleeps(OurSubject):
    """Answers no PLUG, and counts those that it was asked."""

    asked = 0

    def submit(self, chains: Sequence[Chain]) -> list[Used]:
        if chains[0].request[0] == RequestType.PLUG:
            Sleeps.asked += 1
            raise TargetFailure("nothing within 10 s", silent=True)
        return super().submit(chains)


class SleepingTarget(Small):
    def _made(self, made: Made) -> InProcess:
        return Sleeps(made)


@pytest.mark.long
def test_a_silence_that_the_machine_found_is_not_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "chosen_checks", lambda *_: [])
    asked: list[int] = []
    shorten = kit.shorten_evidence

    def counted(target: Target, run: Run, stopped: Callable[[], bool]) -> None:
        asked.append(Sleeps.asked)
        shorten(target, run, stopped)
        asked.append(Sleeps.asked)

    monkeypatch.setattr(trial, "shorten_evidence", counted)
    with SleepingTarget("anonymous") as target:
        judgement = Trial(seed=1).hold(target)
    notes = [one.note for each in judgement.of(Verdict.VIOLATED) for one in each.violations]
    assert set(notes) == {"not shortened: the device did not answer in time"}
    assert asked[0] == asked[1] > 0


def test_with_clauses_named_only_their_checks_are_run() -> None:
    with OurTarget("anonymous") as target:
        judgement = Trial(only=["MEM-PLUG-3"]).hold(target)
    assert judgement.status == 0
    assert judgement.verdicts["MEM-PLUG-3"].verdict is Verdict.HOLDS
    assert MACHINE not in {one.source for each in judgement.verdicts.values() for one in each.evidence}


def test_soak_goes_on_until_it_is_interrupted() -> None:
    seen: set[int] = set()
    told = 0

    def stop(progress: Progress) -> None:
        nonlocal told
        told += 1
        seen.add(progress.done)
        if told > 12:
            raise KeyboardInterrupt

    with Small("anonymous") as target:
        judgement = Trial(Profile.SOAK, progress=stop).hold(target)
    assert not judgement.of(Verdict.VIOLATED)
    assert max(seen) == 5
    assert judgement.calls > 100, "the rounds before the last one count"


@pytest.mark.parametrize("moves", [0, 10, 40])
def test_soak_goes_on_until_it_is_stopped(moves: int) -> None:
    looks = count()
    with Small("anonymous") as target:
        judgement = Trial(Profile.SOAK, stopped=lambda: next(looks) > moves).hold(target)
    assert not judgement.of(Verdict.VIOLATED)
    assert judgement.failures == ()


def test_soak_ends_with_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with FAULTS["error-beyond-the-target"].target() as target:
        start = target.start
        monkeypatch.setattr(target, "start", lambda _: start(SMALL))
        judgement = Trial(Profile.SOAK, seed=4).hold(target)
    assert judgement.status == 1


def test_workers_need_devices_of_their_own() -> None:
    with Bare("vhost-user", Capability(0)) as target, pytest.raises(UsageError, match="vhost-user can't: RESTART"):
        Trial(Profile.SOAK, workers=2).hold(target)


def test_an_interruption_ends_the_other_profiles() -> None:
    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with Small("anonymous") as target, pytest.raises(KeyboardInterrupt):
        Trial(progress=stop).hold(target)


class Gone(OurTarget):
    """A target that is not there any more."""

    def start(self, wish: Wish) -> Subject:
        raise TargetFailure("nothing there")


def test_a_target_that_is_gone_is_not_judged() -> None:
    with Gone("anonymous") as target:
        judgement = Trial().hold(target)
    assert judgement.status == 2
    assert judgement.failures == (f"{MACHINE}: nothing there",)


def test_a_clause_that_there_is_not() -> None:
    with OurTarget("anonymous") as target, pytest.raises(UsageError, match="clause=MEM-PLUG-99"):
        Trial(only=["MEM-PLUG-99"]).hold(target)


def test_without_hypothesis_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "virtio_mem.conformance.explore", None)
    with OurTarget("anonymous") as target, pytest.raises(UsageError, match=r"pip install hypothesis$"):
        Trial().hold(target)


def test_databases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_database(None) is None
    database = open_database(str(tmp_path / "failures"))
    assert database is not None
    database.save(b"key", b"value")
    assert list(database.fetch(b"key")) == [b"value"]
    with pytest.raises(UsageError, match=r"begins with redis://, rediss://, unix://"):
        open_database("reddis://localhost")  # no name of a directory
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(UsageError, match="redis"):
        open_database("redis://localhost")
