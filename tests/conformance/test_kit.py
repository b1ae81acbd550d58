"""How evidence becomes verdicts, and what becomes of a target that dies, doesn't start, or can't do enough."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from tests.conformance.test_session import Parrot
from vhost_user.errors import UsageError
from virtio_mem.conformance.check import (
    NOTHING,
    WISH,
    Check,
    CheckFunction,
    NotOffered,
    Unsuitable,
    all_checks,
    checks_of,
    expect,
)
from virtio_mem.conformance.kit import (
    Judgement,
    Profile,
    Progress,
    Verdict,
    chosen_checks,
    judge,
    judgement_of,
    run_checks,
    shorten_evidence,
)
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability, Chain, Subject, Target, TargetFailure, Used, Wish
from virtio_mem.conformance.targets.ours import OurTarget

A, B = "MEM-PLUG-3", "MEM-PLUG-4"
EVERYTHING = ~Capability(0)


class Stage(Target):
    """A target of parrots, the first `good` of which start."""

    name, kind, version = "stage", "stage", "1"

    def __init__(self, good: int = 100, capabilities: Capability = EVERYTHING) -> None:
        self.good = good
        self.capabilities = capabilities
        self.subjects: list[Parrot] = []

    def start(self, wish: Wish) -> Subject:
        if len(self.subjects) >= self.good:
            raise TargetFailure("no more of them")
        self.subjects.append(Parrot())
        return self.subjects[-1]

    def close(self) -> None:
        pass


def make(run: CheckFunction, *clauses: str, needs: Capability = NOTHING, wish: Wish = WISH) -> Check:
    return Check(run.__name__, clauses, run, needs, (wish,), slow=False)


def holds(session: Session) -> None:
    session.begin()


def breaks_a(session: Session) -> None:
    session.begin()
    expect(A, holds=False, was="this", should="that")


def dies(session: Session) -> None:
    session.plug(0)


def can_not(session: Session) -> None:
    raise Unsuitable("too small")


def lacks(session: Session) -> None:
    raise NotOffered("THING")


def asks_for_too_much(session: Session) -> None:
    raise UsageError("chains", 99, "at most 8 descriptors")


def fails(session: Session) -> None:
    raise ZeroDivisionError("oops")


def judged(*checks: Check, target: Stage | None = None, expected: tuple[str, ...] = ()) -> Judgement:
    target = target or Stage()
    return judgement_of(target, run_checks(target, checks), Profile.QUICK, 7, 1.0, expected=expected)


def verdicts(judgement: Judgement) -> tuple[Verdict, Verdict]:
    return judgement.verdicts[A].verdict, judgement.verdicts[B].verdict


def test_a_clause_holds_where_a_check_ran_to_its_end() -> None:
    judgement = judged(make(holds, A), make(can_not, A))
    assert verdicts(judgement) == (Verdict.HOLDS, Verdict.NOT_TESTABLE)
    assert judgement.status == 0
    assert judgement.calls == 1
    assert (judgement.target, judgement.seed, judgement.version) == ("stage", 7, "1")


@pytest.mark.parametrize("order", [1, -1])
def test_one_violation_outweighs_what_holds(order: int) -> None:
    checks = [make(holds, A, B), make(breaks_a, A, B)][::order]
    judgement = judged(*checks)
    assert verdicts(judgement) == (Verdict.VIOLATED, Verdict.HOLDS)
    (violation,) = judgement.verdicts[A].violations
    assert (violation.source, violation.was, violation.should) == ("breaks_a", "this", "that")
    assert violation.lines[1:] == ("begin -> agreed 0x100000000",)
    assert judgement.status == 1


def test_a_check_that_breaks_one_clause_says_nothing_of_the_others() -> None:
    assert verdicts(judged(make(breaks_a, A, B))) == (Verdict.VIOLATED, Verdict.NOT_TESTABLE)


def test_a_device_that_dies_has_violated_what_has_no_verdict_yet() -> None:
    judgement = judged(make(holds, A), make(dies, A, B))
    assert verdicts(judgement) == (Verdict.HOLDS, Verdict.VIOLATED)
    assert judgement.verdicts[B].violations[0].lines[-1] == "plug 0 1 -> failure: gone"
    assert verdicts(judged(make(dies, A, B))) == (Verdict.VIOLATED, Verdict.VIOLATED)


def test_a_device_that_dies_is_never_without_a_violation() -> None:
    assert verdicts(judged(make(holds, A), make(dies, A)))[0] is Verdict.VIOLATED


def test_each_check_has_a_device_of_its_own() -> None:
    target = Stage()
    judged(make(holds, A), make(dies, A), make(holds, B), target=target)
    assert len(target.subjects) == 3


def test_what_can_not_be_shown_has_a_reason() -> None:
    judgement = judged(make(can_not, A), make(lacks, B))
    assert verdicts(judgement) == (Verdict.NOT_TESTABLE, Verdict.NOT_OFFERED)
    assert (judgement.verdicts[A].reason, judgement.verdicts[B].reason) == ("too small", "THING is not offered")
    several = judged(make(lacks, A), make(can_not, B), make(asks_for_too_much, B), make(asks_for_too_much, B))
    assert several.verdicts[B].reason == "chains=99: at most 8 descriptors; too small"
    too_much = judged(make(asks_for_too_much, A))
    assert too_much.verdicts[A].reason == "chains=99: at most 8 descriptors"
    assert too_much.failures == ()
    assert judgement.verdicts["FEAT-3"].reason.startswith("which selections a device turns down is its own choice")
    assert judgement.verdicts["MEM-PLUG-7"].reason == "a device may do so or not"


def test_a_check_that_needs_more_is_not_run() -> None:
    target = Stage(capabilities=Capability.TIME)
    judgement = judged(make(dies, A, needs=Capability.HELD | Capability.TIME), target=target)
    assert judgement.verdicts[A].reason == "stage can't: HELD"
    assert not target.subjects


def test_a_target_that_does_not_start_any_more_can_not_be_judged() -> None:
    judgement = judged(make(holds, A), make(holds, B), target=Stage(good=1))
    assert verdicts(judgement) == (Verdict.HOLDS, Verdict.NOT_TESTABLE)
    assert judgement.failures == ("holds: the target does not start: no more of them",)
    assert judgement.status == 2


def test_a_rare_device_need_not_be_had() -> None:
    rare = make(holds, A, wish=replace(WISH, region_size=0))
    judgement = judged(make(holds, B), rare, target=Stage(good=1))
    assert (judgement.failures, judgement.status) == ((), 0)
    assert judgement.verdicts[A].reason == "the target does not start: no more of them"


def test_a_clause_that_had_to_get_a_verdict_is_missed() -> None:
    judgement = judged(make(holds, A), make(can_not, B), expected=(A, B))
    assert (judgement.missing, judgement.status) == ((B,), 2)
    assert judged(make(breaks_a, A), expected=(A, B)).status == 1


def test_a_fault_of_the_kit_is_told_from_one_of_the_device(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.CRITICAL, "virtio_mem.conformance.kit"):
        judgement = judged(make(fails, A), make(breaks_a, B))
    assert judgement.failures == ("fails: ZeroDivisionError: oops", f"breaks_a is no check of {A}")
    assert judged(make(fails, A)).status == 2


class Sleepy(Parrot):
    """Lets its time go by whatever it is asked, if `asleep`."""

    def __init__(self, asleep: bool) -> None:
        super().__init__()
        self.asleep = asleep

    def submit(self, chains: Sequence[Chain]) -> list[Used]:
        if self.asleep:
            raise TargetFailure("nothing within 10 s", silent=True)
        return [Used(10, bytes(10)) for _ in chains]


class Bedroom(Stage):
    """Its devices sleep where `sleeps` says so of their number."""

    def __init__(self, sleeps: Callable[[int], bool]) -> None:
        super().__init__()
        self.sleeps = sleeps

    def start(self, wish: Wish) -> Subject:
        self.subjects.append(Sleepy(self.sleeps(len(self.subjects))))
        return self.subjects[-1]


def asks(session: Session) -> None:
    session.begin()
    session.unplug_all()


def test_a_device_that_answers_nothing_is_asked_no_more() -> None:
    target = Bedroom(lambda _: True)
    run = run_checks(target, [make(asks, A), *[make(asks, B)] * 50])
    assert len(target.subjects) == 2  # the check, and whether there is a sign of life
    shorten_evidence(target, run)
    assert len(target.subjects) == 2
    judgement = judgement_of(target, run, Profile.QUICK, 0, 0.0)
    assert verdicts(judgement) == (Verdict.VIOLATED, Verdict.NOT_TESTABLE)
    assert (judgement.status, judgement.failures) == (1, (judgement.verdicts[B].reason,))
    assert judgement.failures[0] == "not judged any more, since the device answers nothing: nothing within 10 s"
    run_checks(target, [make(asks, B)], run=run)
    assert len(target.subjects) == 2


def test_a_device_that_is_silent_once_is_judged_on() -> None:
    target = Bedroom(lambda number: number == 0)
    run = run_checks(target, [make(asks, A), make(asks, B)])
    shorten_evidence(target, run)
    assert len(target.subjects) == 3
    judgement = judgement_of(target, run, Profile.QUICK, 0, 0.0)
    assert verdicts(judgement) == (Verdict.VIOLATED, Verdict.HOLDS)
    assert judgement.failures == ()


def test_a_device_that_is_silent_again_and_again_is_given_up() -> None:
    target = Bedroom(lambda number: number % 2 == 0)
    judgement = judgement_of(target, run_checks(target, [make(asks, A)] * 50), Profile.QUICK, 0, 0.0)
    assert judgement.failures == ("not judged any more, since the device did not answer in time in 4 checks",)
    assert len(target.subjects) == 7


def test_progress_is_told() -> None:
    told: list[Progress] = []
    run_checks(Stage(), [make(breaks_a, A), make(holds, B)], told.append)
    assert told == [Progress(0, 2, "breaks_a", 0), Progress(1, 2, "holds", 1), Progress(2, 2, "", 1)]


def test_violations_begin_with_the_shortest() -> None:
    def late(session: Session) -> None:
        for _ in range(5):
            session.config()
        breaks_a(session)

    judgement = judged(make(late, A), make(breaks_a, A))
    assert [one.source for one in judgement.verdicts[A].violations] == ["breaks_a", "late"]


def test_one_clause_of_a_real_device() -> None:
    told: list[Progress] = []
    with OurTarget("anonymous") as target:
        judgement = judge(target, seed=3, only=["MEM-PLUG-4"], progress=told.append)
    assert (judgement.verdicts["MEM-PLUG-4"].verdict, judgement.verdicts["MEM-STATE-4"].verdict) == (
        Verdict.HOLDS,
        Verdict.NOT_TESTABLE,
    )
    assert (judgement.status, judgement.missing, judgement.kind, judgement.seed) == (0, (), "self", 3)
    assert judgement.calls > 20
    assert told[-1].done == told[-1].total


@pytest.mark.parametrize(("profile", "slow"), [(Profile.QUICK, 0), (Profile.FULL, 2), (Profile.SOAK, 2)])
def test_quick_leaves_slow_checks_out(profile: Profile, slow: int) -> None:
    assert bool(sum(check.slow for check in chosen_checks(profile))) == bool(slow)


def test_checks_can_be_chosen_by_clause() -> None:
    chosen = chosen_checks(Profile.QUICK, [A])
    assert chosen == list(checks_of(A))
    assert 0 < len(chosen) < len(all_checks())


def test_every_check_says_what_it_is() -> None:
    assert all(check.says.endswith((".", ")")) for check in all_checks())
    assert len({check.name for check in all_checks()}) == len(all_checks())
