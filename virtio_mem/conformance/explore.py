"""Runs the state machine against a target, as long as it is told to, and collects what was violated.

A clause that was found to be violated, and shrunk, is passed over from then on: a sequence ends where it is violated
again. So what lies behind it is found as well, round by round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.database import ExampleDatabase
from hypothesis.errors import Flaky
from hypothesis.stateful import run_state_machine_as_test

from virtio_mem.conformance.check import WISH, Unsuitable, Violation
from virtio_mem.conformance.machine import DeviceMachine, Over
from virtio_mem.conformance.referee import essential
from virtio_mem.conformance.target import Target, Wish

MOST_ROUNDS = 20
"""A device that violates more than so many clauses is looked at again when these are mended."""

_ROUNDS_IN_VAIN = 2
"""Rounds that find nothing, one after the other, after which what is left is not looked for."""


class Found(NamedTuple):
    """A clause that the device violated, and the lines that show it."""

    clause: str
    was: str
    should: str
    lines: tuple[str, ...]
    silent: bool = False
    """It let its time go by, which took that time."""


Progress = Callable[["Exploration"], None]


class DatabaseFailure(Exception):  # noqa: N818 - as TargetFailure
    """What failing sequences are kept in can't be reached any more."""


@dataclass
class Exploration:
    """What has become of it so far: sequences and moves that were run, and what was found by clause."""

    target: Target
    wish: Wish = WISH
    deadline: float = float("inf")
    stopped: Callable[[], bool] = lambda: False
    progress: Progress | None = None
    sequences: int = 0
    moves: int = 0
    found: dict[str, Found] = field(default_factory=dict)
    passed_over: frozenset[str] = frozenset()
    last: str | None = None
    """The clause that was violated last."""

    @property
    def is_over(self) -> bool:
        """Whether its time is up, or its end was asked for."""
        return self.stopped() or time.monotonic() >= self.deadline

    def violated(self, violation: Violation, lines: list[str], *, silent: bool = False) -> None:
        """Keep the shortest way to each violation; of several, the last, which is the simplest."""
        found = Found(violation.clause, violation.was, violation.should, tuple(essential(lines)), silent)
        before, self.last = self.found.get(found.clause), found.clause
        if before is None or len(found.lines) <= len(before.lines):
            self.found[found.clause] = found

    def sequence_ended(self) -> None:
        """One more."""
        self.sequences += 1
        if self.progress is not None:
            self.progress(self)


class _Kept(ExampleDatabase):
    """A database in which what fails while some clauses are passed over is kept apart.

    Elsewhere it would be found not to fail, and be thrown away; as would be all that is tried when time is up, so
    nothing is thrown away from then on. DatabaseFailure where it can't be reached.
    """

    def __init__(self, database: ExampleDatabase, exploration: Exploration) -> None:
        super().__init__()
        self._database = database
        self._exploration = exploration
        self._suffix = " ".join(sorted(exploration.passed_over)).encode()

    def fetch(self, key: bytes) -> Iterable[bytes]:
        with _reached():
            return list(self._database.fetch(key + self._suffix))

    def save(self, key: bytes, value: bytes) -> None:
        with _reached():
            self._database.save(key + self._suffix, value)

    def delete(self, key: bytes, value: bytes) -> None:
        if not self._exploration.is_over:
            with _reached():
                self._database.delete(key + self._suffix, value)


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each kind of database has its own
        raise DatabaseFailure(f"{type(error).__name__}: {error}") from error


def explore(
    target: Target,
    *,
    sequences: int,
    steps: int = 30,
    seconds: float = float("inf"),
    stopped: Callable[[], bool] = lambda: False,
    seed_: int = 0,
    wish: Wish = WISH,
    pass_over: Iterable[str] = (),
    database: ExampleDatabase | None = None,
    progress: Progress | None = None,
    rounds: int = MOST_ROUNDS,
) -> Exploration:
    """Run `sequences` sequences of up to `steps` moves, in `rounds` of which each ends with the first violation.

    It ends after `seconds`, or once `stopped`, even in the middle of shrinking; what is shortest by then counts.
    TargetFailure where no device can be started, Unsuitable where it can't be judged in this way, DatabaseFailure where
    `database` can't be reached.
    """
    deadline = time.monotonic() + seconds
    exploration = Exploration(target, wish, deadline, stopped, progress, passed_over=frozenset(pass_over))
    in_vain = 0
    for number in range(rounds):
        violated = _round(exploration, sequences, steps, seed_ + number, database)
        if violated is not None:
            exploration.passed_over |= {violated}
        in_vain = in_vain + 1 if violated is None else 0
        # What was seen in passing only, while something else was shrunk, is worth another seed.
        left = exploration.found.keys() - exploration.passed_over
        if exploration.is_over or in_vain > (_ROUNDS_IN_VAIN if left else 0):
            break
    return exploration


def _round(
    exploration: Exploration, sequences: int, steps: int, seed_: int, database: ExampleDatabase | None
) -> str | None:
    """The clause that was found to be violated, if any. Unsuitable where a device began in a way, and not again."""
    exploration.last = None
    machine = seed(seed_)(type("DeviceMachine", (DeviceMachine,), {"lab": exploration}))
    manner = settings(
        max_examples=sequences,
        stateful_step_count=steps,
        database=database and _Kept(database, exploration),
        deadline=None,
        derandomize=False,
        phases=(Phase.reuse, Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        print_blob=False,
    )
    try:
        run_state_machine_as_test(machine, settings=manner)
    except Violation as violation:
        return violation.clause
    except Over:
        return exploration.last
    except Flaky:
        # The device did it once and not again, or time ran out meanwhile. It did it.
        if exploration.last is None and not exploration.is_over:
            raise Unsuitable("a device could not be begun with, and the next one like it could") from None
        return exploration.last
    return None
