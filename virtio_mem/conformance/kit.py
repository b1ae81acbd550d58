"""The judge: runs the checks against a target, and says of each clause what came of it.

    with parse_target("self:memfd") as target:
        judgement = judge(target)
    judgement.status            # 0 all that is testable holds, 1 a violation, 2 no judgement
    judgement.verdicts["MEM-PLUG-3"].verdict

A clause holds only if at least one check that names it ran to its end and none violated it. A device that dies or hangs
in a check has violated each clause of that check that has no verdict yet; the next check has a new one, if there is one
to be had. Other judges (the property machine, the drivers) add evidence of their own: `judgement_of` counts all of it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import NamedTuple

from vhost_user.errors import FieldError, UsageError
from virtio_mem.conformance.check import WISH, Check, NotOffered, Unsuitable, Violation, all_checks
from virtio_mem.conformance.clauses import DeviceClause, device_clauses, expected_clauses
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.shrink import shortened
from virtio_mem.conformance.target import Target, TargetFailure, Wish, clear
from virtio_mem.installed import version

log = logging.getLogger(__name__)

NO_CHECK = "no check was run"
"""Why there is no verdict on a clause of which nothing has anything to say."""

_SHORTEN_SECONDS, _SHORTEN_ONE_SECONDS = 12.0, 3.0
"""What moves may be left out in: of all sequences together, and of each."""

_MOST_SILENCES = 4
"""Checks that a device may let its time go by in: at 10 seconds each there is better use for the time."""


class Profile(StrEnum):
    """How much is done: `quick` leaves the slow checks out; `soak` is `full` to the checks, and ends when stopped."""

    QUICK = "quick"
    FULL = "full"
    SOAK = "soak"


class Verdict(Enum):
    """What came of a clause."""

    HOLDS = "holds"
    VIOLATED = "violated"
    NOT_TESTABLE = "not testable here"
    NOT_OFFERED = "not offered"


class Evidence(NamedTuple):
    """What one source, a check or another judge, has to say of one clause.

    `was` and `should` belong to VIOLATED, with the session's `lines` that led there; `reason` to the last two verdicts.
    """

    clause: str
    source: str
    verdict: Verdict
    was: str = ""
    should: str = ""
    lines: tuple[str, ...] = ()
    reason: str = ""
    note: str = ""
    """Why the lines may not be the fewest; "" where nothing more could be left out."""


@dataclass(frozen=True)
class ClauseVerdict:
    """The verdict on a clause, and all evidence of it; `reason` says why there is none."""

    clause: DeviceClause
    verdict: Verdict
    evidence: tuple[Evidence, ...] = ()
    reason: str = ""

    @property
    def violations(self) -> list[Evidence]:
        """The evidence against the device, shortest sequence first."""
        found = [one for one in self.evidence if one.verdict is Verdict.VIOLATED]
        return sorted(found, key=lambda one: len(one.lines))


@dataclass(frozen=True)
class Judgement:
    """What came of a target. `verdicts` has every clause on a device, in the order of the notes.

    `missing` are clauses that had to get a verdict with this kind of target and have none; `failures` are those of the
    kit or of its surroundings, in words: either of them means that there is no judgement, unless there is a violation.
    """

    target: str
    kind: str
    version: str
    kit_version: str
    profile: Profile
    seed: int
    seconds: float
    calls: int
    verdicts: Mapping[str, ClauseVerdict]
    missing: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()

    def of(self, verdict: Verdict) -> list[ClauseVerdict]:
        """The clauses with this verdict."""
        return [one for one in self.verdicts.values() if one.verdict is verdict]

    @property
    def status(self) -> int:
        """The exit status of a program: 0 all that was testable holds, 1 a violation, 2 it could not be judged."""
        if self.of(Verdict.VIOLATED):
            return 1
        judged = self.of(Verdict.HOLDS) or self.of(Verdict.NOT_OFFERED)
        return 2 if self.missing or self.failures or not judged else 0


class Progress(NamedTuple):
    """Where a run is: `done` of `total` steps, the name of the one that comes next, and clauses violated so far."""

    done: int
    total: int
    step: str
    violated: int


@dataclass
class Run:
    """The course of a run: evidence and failures so far, and how many calls were made."""

    evidence: list[Evidence] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    calls: int = 0
    silences: list[tuple[str, ...]] = field(default_factory=list)
    """Sessions that ended since the device had let its time go by: each of them was waited for."""
    gone: str = ""
    """Why the target is not asked any more, in words; "" as long as it is."""

    @property
    def violated(self) -> set[str]:
        """Clauses against which there is evidence."""
        return {one.clause for one in self.evidence if one.verdict is Verdict.VIOLATED}

    def without(self, clauses: Iterable[str], source: str, reason: str, verdict: Verdict) -> None:
        """`source` can say nothing of `clauses`, for `reason`."""
        self.evidence += [Evidence(clause, source, verdict, reason=reason) for clause in clauses]


def judge(
    target: Target,
    profile: Profile = Profile.QUICK,
    seed: int = 0,
    *,
    only: Sequence[str] = (),
    progress: Callable[[Progress], None] = lambda _: None,
) -> Judgement:
    """Run the checks of `profile` against `target`, or those that can show a clause of `only`.

    Nothing that the target does is an exception here; with `only`, no clause is missed.
    """
    began = time.monotonic()
    run = run_checks(target, chosen_checks(profile, only), progress)
    shorten_evidence(target, run)
    seconds = time.monotonic() - began
    return judgement_of(
        target, run, profile, seed, seconds, expected=() if only else expected_clauses(target.kind, target.capabilities)
    )


def chosen_checks(profile: Profile, only: Sequence[str] = ()) -> list[Check]:
    """The checks of a profile, or those of all that can show a clause of `only`."""
    if only:
        return [check for check in all_checks() if set(only) & set(check.clauses)]
    return [check for check in all_checks() if profile is not Profile.QUICK or not check.slow]


def run_checks(
    target: Target,
    checks: Sequence[Check],
    progress: Callable[[Progress], None] = lambda _: None,
    run: Run | None = None,
) -> Run:
    """Run each check once for each of its wishes. Ends early where the target can't be started any more.

    Where a device let its time go by, it is looked whether one still answers at all. If not, or if it happened too
    often, the checks that are left are not run: each would wait as long.
    """
    run = run or Run()
    steps = [(check, wish) for check in checks for wish in check.wishes]
    for done, (check, wish) in enumerate(steps):
        progress(Progress(done, len(steps), check.name, len(run.violated)))
        silences = len(run.silences)
        if run.gone:
            run.without(check.clauses, check.name, run.gone, Verdict.NOT_TESTABLE)
        elif lacking := target.lacks(check.needs):
            run.without(check.clauses, check.name, lacking, Verdict.NOT_TESTABLE)
        elif not _run_check(target, check, wish, run):
            break
        elif len(run.silences) > silences:
            run.gone = _gone(target, run)
    if run.gone:
        run.failures.append(run.gone)
    progress(Progress(len(steps), len(steps), "", len(run.violated)))
    return run


def _gone(target: Target, run: Run) -> str:
    """Why there is no use in asking a target on that was silent; "" where there is."""
    if len(run.silences) >= _MOST_SILENCES:
        return f"not judged any more, since the device did not answer in time in {len(run.silences)} checks"
    try:
        subject = target.start(WISH)
        try:
            clear(subject)
        finally:
            subject.close()
    except (TargetFailure, FieldError) as failure:
        return f"not judged any more, since the device answers nothing: {failure}"
    return ""


def _run_check(target: Target, check: Check, wish: Wish, run: Run) -> bool:
    """Whether the target could be started. A device that only a rare wish asks for it need not have."""
    try:
        subject = target.start(wish)
    except (TargetFailure, FieldError) as failure:
        reason = f"the target does not start: {failure}"
        if wish == WISH:
            run.failures.append(f"{check.name}: {reason}")
        run.without(check.clauses, check.name, reason, Verdict.NOT_TESTABLE)
        return wish != WISH
    session = Session(subject, wish, target.capabilities)
    try:
        run.evidence += _evidence(check, session, run)
    finally:
        run.calls += len(session.lines) - 1
        with suppress(TargetFailure):
            subject.close()
    return True


def _evidence(check: Check, session: Session, run: Run) -> Iterator[Evidence]:
    """What a check on a device that has just been started says of its clauses."""
    try:
        check.run(session)
    except Violation as violation:
        if violation.clause not in check.clauses:
            run.failures.append(f"{check.name} is no check of {violation.clause}")
        yield _against(violation.clause, check, session, violation.was, violation.should)
    except TargetFailure as failure:
        if failure.silent:
            run.silences.append(tuple(session.lines))
        judged = {one.clause for one in run.evidence if _is_verdict(one)}
        for clause in [one for one in check.clauses if one not in judged] or check.clauses:
            yield _against(clause, check, session, failure.what, "a device that is there")
    except (Unsuitable, NotOffered, UsageError) as reason:
        yield from _unable(check, reason)
    except Exception as error:
        log.exception("the check %s failed", check.name)
        run.failures.append(f"{check.name}: {type(error).__name__}: {error}")
    else:
        yield from (Evidence(clause, check.name, Verdict.HOLDS) for clause in check.clauses)


def _against(clause: str, check: Check, session: Session, was: str, should: str) -> Evidence:
    return Evidence(clause, check.name, Verdict.VIOLATED, was, should, tuple(session.lines))


def _unable(check: Check, why: Unsuitable | NotOffered | UsageError) -> Iterator[Evidence]:
    """A UsageError is the adapter's: the check asks for more than this device's ring or region holds."""
    if isinstance(why, NotOffered):
        verdict, reason = Verdict.NOT_OFFERED, f"{why.feature} is not offered"
    else:
        verdict, reason = Verdict.NOT_TESTABLE, str(why)
    return (Evidence(clause, check.name, verdict, reason=reason) for clause in check.clauses)


def _is_verdict(evidence: Evidence) -> bool:
    return evidence.verdict in (Verdict.HOLDS, Verdict.VIOLATED)


def shorten_evidence(target: Target, run: Run, stopped: Callable[[], bool] = lambda: False) -> None:
    """Of each clause that was violated, the shortest sequence without what did not matter to it.

    Moves are left out for some seconds, and as long as it is not `stopped`. What may be longer than it need be has a
    note.
    """
    shortest: dict[str, int] = {}
    for number, one in enumerate(run.evidence):
        if one.verdict is Verdict.VIOLATED:
            best = run.evidence[shortest.setdefault(one.clause, number)]
            if len(one.lines) < len(best.lines):
                shortest[one.clause] = number
    end = time.monotonic() + _SHORTEN_SECONDS
    for number in shortest.values():
        one = run.evidence[number]
        if run.gone or one.lines in run.silences:  # who is silent is waited for at each attempt
            run.evidence[number] = one._replace(note="not shortened: the device did not answer in time")
            continue
        seconds = min(_SHORTEN_ONE_SECONDS, end - time.monotonic())
        found = shortened(target, one.clause, one.lines, seconds=seconds, stopped=stopped)
        run.evidence[number] = one._replace(**{name: value for name, value in found._asdict().items() if value})


def judgement_of(
    target: Target, run: Run, profile: Profile, seed: int, seconds: float, *, expected: Iterable[str] = ()
) -> Judgement:
    """Count the evidence. A clause of `expected` without a verdict is missing."""
    by_clause: dict[str, list[Evidence]] = {}
    for one in run.evidence:
        by_clause.setdefault(one.clause, []).append(one)
    verdicts = {id_: _verdict(clause, by_clause.get(id_, [])) for id_, clause in device_clauses().items()}
    return Judgement(
        target=target.name,
        kind=target.kind,
        version=target.version,
        kit_version=f"virtio-mem {version()}",
        profile=profile,
        seed=seed,
        seconds=seconds,
        calls=run.calls,
        verdicts=verdicts,
        missing=tuple(id_ for id_ in expected if verdicts[id_].verdict is Verdict.NOT_TESTABLE),
        failures=tuple(run.failures),
    )


def _verdict(clause: DeviceClause, evidence: Sequence[Evidence]) -> ClauseVerdict:
    """The gravest of what was said: a violation, then that it holds, then why nothing can be said."""
    for verdict in (Verdict.VIOLATED, Verdict.HOLDS, Verdict.NOT_OFFERED, Verdict.NOT_TESTABLE):
        found = [one for one in evidence if one.verdict is verdict]
        if found:
            reasons = Counter(one.reason for one in found if not _is_verdict(one))
            reason = "; ".join(reason for reason, _ in reasons.most_common())
            return ClauseVerdict(clause, verdict, tuple(evidence), reason)
    return ClauseVerdict(clause, Verdict.NOT_TESTABLE, reason=clause.beyond or NO_CHECK)
