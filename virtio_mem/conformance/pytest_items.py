"""The tests that the plugin adds: one for each clause that a check of the kit names, and those of the state machine.

Each test runs those of its clause's checks that no test before it has run. So a run of all tests runs each check once,
a run of one test no more than it needs, and with pytest-xdist each worker has a target of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from vhost_user.errors import FieldError
from virtio_mem.conformance.kit import (
    Evidence,
    Judgement,
    Profile,
    Run,
    Verdict,
    chosen_checks,
    judgement_of,
    run_checks,
    shorten_evidence,
)
from virtio_mem.conformance.pytest_plugin import SOAK
from virtio_mem.conformance.report.diagram import with_pictures
from virtio_mem.conformance.target import Target, TargetFailure
from virtio_mem.conformance.targets.parse import parse_target
from virtio_mem.conformance.trial import MACHINE, Trial

if TYPE_CHECKING:
    from virtio_mem.conformance.pytest_soak import Soak

KEYWORD = "virtio-mem"
"""What `-k` finds all of these tests by."""


class Violated(Exception):  # noqa: N818 - what it says of a clause
    """A clause does not hold."""

    def __init__(self, evidence: list[Evidence]) -> None:
        super().__init__(evidence[0].clause)
        self.evidence = evidence


class Bench:
    """The target of a run, and what has been found about it so far."""

    def __init__(self, name: str, trial: Trial, soak: Soak | None = None) -> None:
        self.trial = trial
        self.soak = soak
        self._name = name
        self._target: Target | None = None
        self._lost = False
        self._done: set[str] = set()
        self._run = Run()

    @property
    def target(self) -> Target:
        """Opened when it is first needed. Where it can't be, the first test fails by it, and the others are skipped."""
        if self._target is None:
            if self._lost:
                pytest.skip("not judged: the target could not be opened, as another test says")
            self._lost = True
            self._target = parse_target(self._name)
            self._lost = False
        return self._target

    def judged(self, clause: str) -> Judgement:
        """What all checks of `clause` have to say."""
        checks = chosen_checks(self.trial.profile)
        left = [check for check in checks if clause in check.clauses and check.name not in self._done]
        self._done |= {check.name for check in left}
        self._run.failures.clear()
        run_checks(self.target, left, run=self._run)
        return judgement_of(self.target, self._run, self.trial.profile, self.trial.seed, 0.0)

    def explored(self, number: int) -> Run:
        """What the state machine has to say, the one of that number."""
        run = Run()
        replace(self.trial, seed=self.trial.seed + number).explore(self.target, run)
        shorten_evidence(self.target, run, self.trial.stopped)
        return run

    def shortened(self, evidence: list[Evidence]) -> list[Evidence]:
        """Without what does not matter to it."""
        run = Run(evidence, gone=self._run.gone, silences=self._run.silences)
        shorten_evidence(self.target, run, self.trial.stopped)
        return run.evidence

    @property
    def stopped(self) -> bool:
        """Whether a soak's end was asked for."""
        return self.soak is not None and self.soak.stop()

    def close(self) -> None:
        """Let the target go."""
        if self._target is not None:
            self._target.close()


def items_for(session: pytest.Session, name: str) -> Iterator[pytest.Item]:
    """The tests of a target."""
    option, soak = session.config.getoption, session.config.stash.get(SOAK, None)
    machines = option("--virtio-mem-machines") or 1
    trial = Trial(
        Profile(option("--virtio-mem-profile")), option("--virtio-mem-seed"), database=option("--virtio-mem-database")
    )
    if soak is not None:
        machines = soak.workers
        trial = replace(trial, stride=machines, stopped=soak.stop)
    bench = Bench(name, trial, soak)
    session.config.add_cleanup(bench.close)
    clauses = dict.fromkeys(clause for check in chosen_checks(bench.trial.profile) for clause in check.clauses)
    for clause in sorted(clauses):
        yield ClauseItem.of(session, clause, bench)
    for number in range(machines):
        yield MachineItem.of(session, f"{MACHINE}-{number}" if number else MACHINE, bench)


def machine_of(nodeid: str) -> int | None:
    """The number of the machine that is the test of that id, if it is one."""
    found = re.fullmatch(rf"{KEYWORD} .*::{MACHINE}(?:-(\d+))?", nodeid, re.DOTALL)
    return int(found[1] or 0) if found else None


class KitItem(pytest.Item):
    """A test of this plugin."""

    bench: Bench

    @classmethod
    def of(cls, session: pytest.Session, name: str, bench: Bench) -> KitItem:
        """One with its bench."""
        item: KitItem = cls.from_parent(session, name=name, nodeid=f"{KEYWORD} {bench._name}::{name}")
        item.bench = bench
        item.extra_keyword_matches.add(KEYWORD)
        return item

    def runtest(self) -> None:
        """A target that is not there is an error of the test's, and no violation."""
        try:
            self.judge()
        except (TargetFailure, FieldError) as error:
            pytest.fail(f"not judged: {error}", pytrace=False)

    def judge(self) -> None:
        """Violated where the target does not hold, pytest's own exceptions where it can't be said."""
        raise NotImplementedError

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """A violation is told in the kit's own words."""
        if not isinstance(excinfo.value, Violated):
            return super().repr_failure(excinfo, style)
        return "\n".join(line for one in excinfo.value.evidence for line in _words(one))

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """What stands over a failure."""
        return self.path, None, self.name


class ClauseItem(KitItem):
    """Whether one clause holds."""

    def judge(self) -> None:
        """Run what can show it."""
        if self.bench.stopped:
            pytest.fail("not judged: the soak was stopped before", pytrace=False)
        judgement = self.bench.judged(self.name)
        one = judgement.verdicts[self.name]
        if one.verdict is Verdict.VIOLATED:
            raise Violated(self.bench.shortened(one.violations[:1]))
        if judgement.failures:
            pytest.fail("\n".join(judgement.failures), pytrace=False)
        if one.verdict is not Verdict.HOLDS:
            pytest.skip(f"{one.verdict.value}: {one.reason}")


class MachineItem(KitItem):
    """Whether the target stands any sequence of moves."""

    def judge(self) -> None:
        """Run the state machine, with the seed that its name says."""
        run = self.bench.explored(machine_of(self.nodeid) or 0)
        if self.bench.soak is not None and (run.evidence or run.failures):
            self.bench.soak.stop.ask()  # the other workers' have no other end
        if run.evidence:
            raise Violated(run.evidence)
        if run.failures:
            pytest.fail("\n".join(run.failures), pytrace=False)


def _words(evidence: Evidence) -> Iterator[str]:
    yield f"{evidence.clause} is violated, as {evidence.source} found"
    yield f"  was: {evidence.was}"
    yield f"  should be: {evidence.should}"
    if evidence.note:
        yield f"  {evidence.note}"
    yield from (f"    {line}" for line in with_pictures(evidence.lines))
