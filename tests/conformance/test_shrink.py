"""What does not matter to a violation is left out of its sequence, for each one that is reported."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import pytest

from tests.conformance.bare import Bare
from tests.conformance.test_kit import Sleepy, Stage
from tests.conformance.test_machine import SMALL
from tests.conformance.wrong import FAULTS
from virtio_mem.conformance import kit, pytest_items
from virtio_mem.conformance.check import FINE, WISH
from virtio_mem.conformance.explore import explore
from virtio_mem.conformance.kit import Evidence, Profile, Run, Verdict, chosen_checks, run_checks, shorten_evidence
from virtio_mem.conformance.replay import replay, script_of
from virtio_mem.conformance.shrink import Shorter, shortened
from virtio_mem.conformance.target import Capability, Chain, Subject, Target, TargetFailure, Used, Wish
from virtio_mem.conformance.targets.in_process import ADDR, InProcess, Made
from virtio_mem.conformance.targets.ours import OurSubject, OurTarget
from virtio_mem.conformance.trial import Trial
from virtio_mem.conformance.words import wish_words
from virtio_mem.protocol import Request, RequestType

IDLE = ("pause on", "pause on", "plug 9 1", "pause off", "notices", "advance 2", "device_reset", "begin", "pause off")
"""Moves, a refusal and looks that matter to nothing behind them."""


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is time enough to shorten all, however busy the machine is."""
    monkeypatch.setattr(kit, "_SHORTEN_SECONDS", 60.0)
    monkeypatch.setattr(kit, "_SHORTEN_ONE_SECONDS", 60.0)


def session_of(target: Target, *calls: str, wish: Wish = SMALL) -> list[str]:
    again = replay(target, script_of([wish_words(wish), "begin", *calls]))
    return [wish_words(wish), *(f"{one.step.call} -> {one.now}" for one in again.replayed)]


def shorter(target: Target, clause: str, calls: Sequence[str], seconds: float = 60.0) -> Shorter:
    return shortened(target, clause, session_of(target, *calls), seconds=seconds)


def calls_of(lines: Sequence[str]) -> list[str]:
    return [line.partition(" -> ")[0] for line in lines[1:]]


def test_idle_moves_are_left_out() -> None:
    with FAULTS["error-beyond-the-target"].target() as target:
        found = shorter(target, "DEP-NACK-2", [*IDLE, "plug 0 4", *IDLE, "plug 4 16"])
    assert calls_of(found.lines) == ["begin", "plug 0 4", "plug 4 16"]
    assert (found.was, found.should, found.note) == ("ERROR", "NACK: it would go beyond the target", "")


def test_what_the_violation_takes_stays() -> None:
    with FAULTS["system-reset-does-nothing"].target() as target:
        found = shorter(
            target, "MEM-OP-11", ["target 131072", *IDLE, "plug 0 1", *IDLE, "system_reset", "begin", "config"]
        )
    assert calls_of(found.lines) == ["begin", "plug 0 1", "system_reset", "begin", "config"]


def test_a_device_that_is_wrong_in_another_way_too_is_judged_by_its_answers() -> None:
    """The referee sees first that STATE of 512 blocks is an ERROR, which is another clause."""
    with FAULTS["number-of-one-byte"].target() as target:
        lines = session_of(target, "state 0 64", "plug 0 1", "plug 1 1", "unplug 0 2", "plug 0 256", wish=FINE)
        assert lines[-1] == "plug 0 256 -> ERROR"
        found = shortened(target, "MEM-PLUG-8", lines, seconds=60.0)
    assert calls_of(found.lines) == ["begin", "plug 0 256"]
    assert (found.was, found.note) == ("ERROR", "")


class Dies(OurSubject):
    """Ends when it is paused with two blocks plugged, and by a PLUG of block 6 while it has no other."""

    def submit(self, chains: Sequence[Chain]) -> list[Used]:
        type_, addr, _ = Request.decode(chains[0].request)
        if (type_, addr - ADDR) == (RequestType.PLUG, 6 * SMALL.block_size) and not self.service.device.plugged_size:
            raise TargetFailure("gone in another way")
        return super().submit(chains)

    def pause(self, paused: bool) -> None:
        if self.service.device.plugged_size == 2 * SMALL.block_size:
            raise TargetFailure("gone")
        super().pause(paused)


class DyingTarget(OurTarget):
    def _made(self, made: Made) -> InProcess:
        return Dies(made)


def test_a_device_that_dies_is_found_by_that_whatever_the_clause() -> None:
    with DyingTarget("anonymous") as target:
        found = shorter(target, "DEP-BUSY-1", ["pause on", "pause off", "plug 5 1", *IDLE[4:8], "plug 3 1", "pause on"])
    assert calls_of(found.lines) == ["begin", "plug 5 1", "plug 3 1", "pause on"]


def test_a_device_that_dies_in_another_way_too_is_found_by_the_way_that_it_died_in() -> None:
    calls = ["plug 5 1", *IDLE[4:8], "plug 6 1", "pause on"]
    with DyingTarget("anonymous") as target:
        found = shorter(target, "DEP-BUSY-1", calls)
    assert calls_of(found.lines) == ["begin", "plug 5 1", "plug 6 1", "pause on"]
    assert found.was == "gone"


def test_a_sequence_that_the_referee_has_no_eye_for_stays() -> None:
    with OurTarget("anonymous") as target:
        lines = session_of(target, "plug 0 1", "target 65536", "plug 1 1")
        assert shortened(target, "DEP-DRIVER-1", lines, seconds=60.0) == Shorter(tuple(lines))
        lines = session_of(target, "begin", "advance 1", "same 0 1 7")
        assert shortened(target, "MEM-OP-4", lines, seconds=60.0).lines[-1] == lines[-1]


def test_no_time_leaves_it_as_it_is_and_says_so() -> None:
    with FAULTS["error-beyond-the-target"].target() as target:
        lines = session_of(target, *IDLE, "plug 0 20")
        for found in (
            shortened(target, "DEP-NACK-2", lines, seconds=0.0),
            shortened(target, "DEP-NACK-2", lines, seconds=60.0, stopped=lambda: True),
        ):
            assert found == Shorter(tuple(lines), note="not shortened to the end: there was no more time")
        looks = count()
        some = shortened(target, "DEP-NACK-2", lines, seconds=60.0, stopped=lambda: next(looks) > 30)
        assert 3 <= len(some.lines) < len(lines)
        assert some.note


@pytest.mark.parametrize(
    ("clause", "last"), [("MEM-PLUG-6", "plug 3 1 -> NACK"), ("DEP-DRIVER-1", "same 0 1 7 -> yes")]
)
@pytest.mark.parametrize("moves", [5, 40, 60, 70, 90])
def test_time_that_is_up_ends_an_attempt_too(clause: str, last: str, moves: int) -> None:
    """A slow device can take longer for one attempt than there is for all of them, whoever judges it."""
    calls = [call for block in range(15) for call in (f"plug {block} 1 -> ACK", f"state {block} 1 -> ACK PLUGGED")]
    lines = [wish_words(SMALL), "begin -> agreed 0x0", *calls, last]
    looks = count()
    with OurTarget("anonymous") as target:
        found = shortened(target, clause, lines, seconds=60.0, stopped=lambda: next(looks) >= moves)
    assert found == Shorter(tuple(lines), note="not shortened to the end: there was no more time")
    assert next(looks) == moves + 1


def test_a_device_that_can_not_be_had_anew_is_left_as_it_is() -> None:
    with Bare("vhost-user", Capability(0)) as target:
        lines = [wish_words(SMALL), "begin -> agreed 0x0", "plug 0 1 -> NACK"]
        note = "not shortened: vhost-user can't: RESTART"
        assert shortened(target, "DEP-NACK-2", lines, seconds=60.0) == Shorter(tuple(lines), note=note)


class Bedroom(Stage):
    def start(self, wish: Wish) -> Subject:
        self.subjects.append(Sleepy(asleep=True))
        return self.subjects[-1]


def test_a_device_that_is_silent_is_not_waited_for_again_and_again() -> None:
    target = Bedroom()
    lines = [
        wish_words(WISH),
        "begin -> agreed 0x0",
        *["plug 0 1 -> ACK"] * 9,
        "plug 1 1 -> failure: nothing within 10 s",
    ]
    run = Run([Evidence("MEM-PLUG-8", "x", Verdict.VIOLATED, "x", "y", tuple(lines))], silences=[tuple(lines)])
    shorten_evidence(target, run)
    assert target.subjects == []
    assert run.evidence[0].note == "not shortened: the device did not answer in time"


class Naps(OurSubject):
    """Lets its time go by where a PLUG names two blocks; `naps` is how often it did."""

    naps = 0

    def submit(self, chains: Sequence[Chain]) -> list[Used]:
        if Request.decode(chains[0].request)[::2] == (RequestType.PLUG, 2):
            Naps.naps += 1
            raise TargetFailure("nothing within 10 s", silent=True)
        return super().submit(chains)


class NappingTarget(OurTarget):
    def _made(self, made: Made) -> InProcess:
        return Naps(made)


def test_a_silence_on_the_way_ends_it() -> None:
    """The moves that are tried are judged request by request, so the silence comes as a violation of a clause."""
    lines = [wish_words(SMALL), "begin -> agreed 0x0", "plug 2 2 -> ACK", "unplug 2 1 -> NACK"]
    with NappingTarget("anonymous") as target:
        assert shortened(target, "MEM-UNPLUG-8", lines, seconds=60.0).lines == tuple(lines)
    assert Naps.naps == 1


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("name", ["unplug-counts-in-eight-bits", "last-of-many-is-not-looked-at"])
def test_what_a_check_shows_is_short_too(name: str) -> None:
    fault = FAULTS[name]
    with fault.target() as target:
        run = run_checks(target, [one for one in chosen_checks(Profile.QUICK) if one.name == "many.many_small_blocks"])
        shorten_evidence(target, run)
    (one,) = [one for one in run.evidence if one.clause == fault.clause and one.verdict is Verdict.VIOLATED]
    assert len(one.lines) <= 5
    assert one.note == ""


@pytest.mark.long
@pytest.mark.usefixtures("patient")
def test_what_a_test_of_pytest_shows_is_short_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest_items, "parse_target", lambda name: FAULTS[name].target())
    bench = pytest_items.Bench("unplug-counts-in-eight-bits", Trial())
    violations = bench.judged("MEM-UNPLUG-9").verdicts["MEM-UNPLUG-9"].violations[:1]
    (short,) = bench.shortened(violations)
    bench.close()
    assert len(short.lines) == 5


@pytest.mark.long
@pytest.mark.usefixtures("patient")
def test_what_the_machine_saw_in_passing_is_short_too() -> None:
    with FAULTS["nothing-is-given-back"].target() as target:
        found = explore(target, sequences=60, seed_=1, wish=SMALL, rounds=1).found.values()
        run = Run([Evidence(one.clause, "machine", Verdict.VIOLATED, one.was, one.should, one.lines) for one in found])
        shorten_evidence(target, run)
    assert len(run.evidence) > 1
    assert {one.clause: len(one.lines) for one in run.evidence if len(one.lines) > 7 or one.note} == {}
