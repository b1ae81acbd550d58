"""All that the kit has, against one target: the checks, the drivers among them, and then the state machine.

With the profile soak the machine goes on with new seeds until it is interrupted; what was found by then is the
judgement. Clauses that a check has found violated are passed over by the machine, which looks for others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from vhost_user.errors import FieldError, UsageError
from virtio_mem.conformance.check import Unsuitable
from virtio_mem.conformance.clauses import device_clauses, expected_clauses
from virtio_mem.conformance.kit import (
    Evidence,
    Judgement,
    Profile,
    Progress,
    Run,
    Verdict,
    chosen_checks,
    judgement_of,
    run_checks,
    shorten_evidence,
)
from virtio_mem.conformance.target import Target, TargetFailure

if TYPE_CHECKING:
    from hypothesis.database import ExampleDatabase

    from virtio_mem.conformance.explore import Exploration

MACHINE = "machine"
"""The source of evidence that the state machine has."""


class Effort(NamedTuple):
    """Of the state machine: sequences in a round, moves in a sequence, and seconds after which it ends."""

    sequences: int
    steps: int
    seconds: float


EFFORTS = {
    Profile.QUICK: Effort(25, 30, 10.0),
    Profile.FULL: Effort(500, 50, 600.0),
    Profile.SOAK: Effort(500, 50, float("inf")),
}
"""A profile's. Quick has to be done in half a minute, checks included."""


@dataclass(frozen=True)
class Trial:
    """What is asked for. `only` are ids of clauses: then their checks are run, and the machine is not."""

    profile: Profile = Profile.QUICK
    seed: int = 0
    only: Sequence[str] = ()
    database: str | None = None
    """Where the machine keeps what went wrong, to begin with it the next time: a directory, or redis://HOST."""
    progress: Callable[[Progress], None] = lambda _: None

    def hold(self, target: Target) -> Judgement:
        """Judge `target`. UsageError for a clause that there is not, and where hypothesis is not installed."""
        if unknown := sorted(set(self.only) - device_clauses().keys()):
            raise UsageError("clause", unknown[0], "the id of a clause on devices", "see spec-notes/")
        machine = None if self.only else _Machine(self)  # at once: what it lacks should not be known at the end
        began = time.monotonic()
        run = Run()
        with suppress(KeyboardInterrupt) if self.profile is Profile.SOAK else nullcontext():
            run_checks(target, chosen_checks(self.profile, self.only), self.progress, run)
            if machine is not None and not run.failures:
                machine.go(target, run)
        shorten_evidence(target, run)
        expected = () if self.only else expected_clauses(target.kind, target.capabilities)
        return judgement_of(target, run, self.profile, self.seed, time.monotonic() - began, expected=expected)

    def explore(self, target: Target, run: Run) -> None:
        """The state machine alone: its evidence and failures go to `run`."""
        _Machine(self).go(target, run)


class _Machine:
    """The state machine, as a source of evidence."""

    def __init__(self, trial: Trial) -> None:
        try:
            from virtio_mem.conformance.explore import explore  # noqa: PLC0415 - an extra, and a second
        except ImportError as error:
            way_out = "pip install 'virtio-mem[conformance]'"
            raise UsageError("conformance", "the state machine", f"needs hypothesis: {error}", way_out) from error
        self.explore = explore
        self.trial = trial
        self.database = open_database(trial.database)
        self._sequences = 0

    def go(self, target: Target, run: Run) -> None:
        """Run it once, or with the profile soak until it is interrupted."""
        effort = EFFORTS[self.trial.profile]
        seeds = count(self.trial.seed) if self.trial.profile is Profile.SOAK else [self.trial.seed]
        for seed in seeds:
            known = set(run.violated)
            self._sequences = 0

            def watch(exploration: Exploration, known: set[str] = known) -> None:
                self._told(exploration, run, effort, len(known))

            try:
                exploration = self.explore(
                    target,
                    sequences=effort.sequences,
                    steps=effort.steps,
                    seconds=effort.seconds,
                    seed_=seed,
                    pass_over=known,
                    database=self.database,
                    progress=watch,
                )
            except (TargetFailure, FieldError, Unsuitable) as error:
                run.failures.append(f"{MACHINE}: {error}")
                return
            run.calls += exploration.moves

    def _told(self, exploration: Exploration, run: Run, effort: Effort, known: int) -> None:
        """Take over what was found as soon as it is: an interruption must not lose it."""
        run.evidence = [one for one in run.evidence if one.source != MACHINE or one.clause not in exploration.found]
        run.evidence += [
            Evidence(found.clause, MACHINE, Verdict.VIOLATED, found.was, found.should, found.lines)
            for found in exploration.found.values()
        ]
        done = min(exploration.sequences, effort.sequences)
        self.trial.progress(Progress(done, effort.sequences, MACHINE, known + len(exploration.found)))


def open_database(where: str | None) -> ExampleDatabase | None:
    """The database of a directory or of a Redis server. UsageError where its library is missing."""
    if where is None:
        return None
    if not where.startswith("redis://"):
        from hypothesis.database import DirectoryBasedExampleDatabase  # noqa: PLC0415 - an extra

        return DirectoryBasedExampleDatabase(where)
    try:
        from hypothesis.extra.redis import RedisExampleDatabase  # noqa: PLC0415 - an extra

        redis = import_module("redis")
    except ImportError as error:
        raise UsageError("database", where, f"needs the redis package: {error}", "pip install redis") from error
    return RedisExampleDatabase(redis.Redis.from_url(where))
