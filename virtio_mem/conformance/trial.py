"""All that the kit has, against one target: the checks, the drivers among them, and then the state machine.

With the profile soak the machine goes on with new seeds until it finds something, or is stopped; what was found by then
is the judgement. Clauses that a check has found violated are passed over by the machine, which looks for others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from vhost_user.errors import FieldError, HostError, UsageError
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
from virtio_mem.conformance.target import Capability, Target, TargetFailure

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

_REDIS = ("redis://", "rediss://", "unix://")
"""What a URL of Redis begins with."""

_REDIS_SECONDS = 10.0
"""What a server has to answer, which takes it a millisecond."""


@dataclass(frozen=True)
class Trial:
    """What is asked for. `only` are ids of clauses: then their checks are run, and the machine is not."""

    profile: Profile = Profile.QUICK
    seed: int = 0
    only: Sequence[str] = ()
    database: str | None = None
    """Where the machine keeps what went wrong, to begin with it the next time: a directory, or a URL of Redis."""
    workers: int = 1
    """Processes that a soak's machines run in, each with a target of its own, which is made from the target's name."""
    stride: int = 1
    """From one seed of a soak to its next one: so many share them."""
    progress: Callable[[Progress], None] = lambda _: None
    stopped: Callable[[], bool] = lambda: False
    """Whether a soak is to end. It is asked between two checks, and between two moves."""

    def hold(self, target: Target) -> Judgement:
        """Judge `target`. UsageError for a clause that there is not, for workers where there can be none, and where
        hypothesis is not installed; HostError for a database that can't be reached."""
        if unknown := sorted(set(self.only) - device_clauses().keys()):
            raise UsageError("clause", unknown[0], "has to be the id of a clause on devices", "see spec-notes/")
        if self.workers != 1:
            self._check_workers(target)
        machine = None if self.only else _Machine(self)  # at once: what it lacks should not be known at the end
        began = time.monotonic()
        run = Run()
        with suppress(KeyboardInterrupt) if self.profile is Profile.SOAK else nullcontext():
            run_checks(target, chosen_checks(self.profile, self.only), self._tell, run)
            if machine is not None and not run.failures:
                machine.go(target, run)
        shorten_evidence(target, run, self.stopped)
        expected = () if self.only else expected_clauses(target.kind, target.capabilities)
        return judgement_of(target, run, self.profile, self.seed, time.monotonic() - began, expected=expected)

    def explore(self, target: Target, run: Run) -> None:
        """The state machine alone: its evidence and failures go to `run`."""
        _Machine(self).go(target, run)

    def _check_workers(self, target: Target) -> None:
        if self.workers < 1 or self.profile is not Profile.SOAK:
            limit = "there is one at least, and more of them with the profile soak only"
            raise UsageError("workers", self.workers, limit, "leave it out, or add --profile soak")
        if lacking := target.lacks(Capability.RESTART):
            raise UsageError("workers", self.workers, f"each needs a device of its own: {lacking}", "leave it out")

    def _tell(self, progress: Progress) -> None:
        if self.stopped():
            raise KeyboardInterrupt
        self.progress(progress)


class _Machine:
    """The state machine, as a source of evidence."""

    def __init__(self, trial: Trial) -> None:
        try:
            from virtio_mem.conformance.explore import (  # noqa: PLC0415 - an extra, and a second
                MOST_ROUNDS,
                DatabaseFailure,
                explore,
            )
        except ImportError as error:
            way_out = "pip install hypothesis"
            raise UsageError("conformance", "the state machine", f"needs hypothesis: {error}", way_out) from error
        self._explore, self._most_rounds = explore, MOST_ROUNDS
        self._failures = (TargetFailure, FieldError, Unsuitable, DatabaseFailure)
        self.trial = trial
        self.database = open_database(trial.database)

    def go(self, target: Target, run: Run) -> None:
        """Run it once, or with the profile soak until it found something or is stopped."""
        if self.trial.workers > 1:
            from virtio_mem.conformance.workers import explore_together  # noqa: PLC0415 - for those who want many

            explore_together(self.trial, target.name, run)
            return
        soaks = self.trial.profile is Profile.SOAK
        for seed in count(self.trial.seed, self.trial.stride) if soaks else [self.trial.seed]:
            try:
                exploration = self._explored(target, run, seed)
            except self._failures as error:
                run.failures.append(f"{MACHINE}: {error}")
                return
            run.calls += exploration.moves
            if exploration.found or self.trial.stopped():
                return

    def _explored(self, target: Target, run: Run, seed: int) -> Exploration:
        effort, known = EFFORTS[self.trial.profile], set(run.violated)
        # A soak is over with the first violation; what lies behind it is for another one.
        rounds = 1 if self.trial.profile is Profile.SOAK else self._most_rounds
        return self._explore(
            target,
            sequences=effort.sequences,
            steps=effort.steps,
            seconds=effort.seconds,
            rounds=rounds,
            stopped=self.trial.stopped,
            seed_=seed,
            pass_over=known,
            database=self.database,
            progress=lambda exploration: self._told(exploration, run, effort, len(known)),
        )

    def _told(self, exploration: Exploration, run: Run, effort: Effort, known: int) -> None:
        """Take over what was found as soon as it is: an interruption must not lose it."""
        run.evidence = [one for one in run.evidence if one.source != MACHINE or one.clause not in exploration.found]
        run.evidence += [
            Evidence(found.clause, MACHINE, Verdict.VIOLATED, found.was, found.should, found.lines)
            for found in exploration.found.values()
        ]
        run.silences += [
            found.lines for found in exploration.found.values() if found.silent and found.lines not in run.silences
        ]
        done = min(exploration.sequences, effort.sequences)
        self.trial.progress(Progress(done, effort.sequences, MACHINE, known + len(exploration.found)))


def open_database(where: str | None) -> ExampleDatabase | None:
    """The database of a directory or of a Redis server. UsageError where its library is missing, and for a URL of
    another kind, HostError without a server."""
    if where is None:
        return None
    if "://" in where and not where.startswith(_REDIS):
        limit = f"has to be a directory, or a URL that begins with {', '.join(_REDIS)}"
        raise UsageError("database", where, limit, "name one of these")
    if not where.startswith(_REDIS):
        from hypothesis.database import DirectoryBasedExampleDatabase  # noqa: PLC0415 - an extra

        return DirectoryBasedExampleDatabase(where)
    try:
        from hypothesis.extra.redis import RedisExampleDatabase  # noqa: PLC0415 - an extra

        redis = import_module("redis")
    except ImportError as error:
        way_out = "pip install redis"
        raise UsageError("database", where, f"needs the redis package: {error}", way_out) from error
    try:
        client = redis.Redis.from_url(where, socket_timeout=_REDIS_SECONDS, socket_connect_timeout=_REDIS_SECONDS)
        client.ping()
    except (ValueError, redis.RedisError) as error:
        raise HostError("database", where, f"can't be reached: {error}", "name a Redis server that runs") from error
    return RedisExampleDatabase(client)
