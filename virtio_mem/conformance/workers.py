"""A soak in several processes: each has a target and seeds of its own, and the first that finds something ends all.

The machine is as fast as one processor, and a target keeps another one busy at most. Workers share nothing but the
database. Each tells how far it is, and at its end what it found; it is told to stop by a message, or by the end of
this process. Signals that ask for an end may come to all of them at once, as from a terminal or a service manager.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from vhost_user.errors import FieldError
from vhost_user.signal_name import signal_name
from virtio_mem.conformance.kit import Evidence, Progress, Run
from virtio_mem.conformance.stop import SIGNALS, Stop, asked_by_signals
from virtio_mem.conformance.target import TargetFailure
from virtio_mem.conformance.targets.parse import parse_target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtio_mem.conformance.trial import Trial

_TELL_SECONDS = 0.2
"""How often a worker tells how far it is."""

_LOOK_SECONDS = 0.2
"""How often this process looks whether it is to end."""

_END_SECONDS = 5.0
"""What a worker that is ended by a signal has to let its device go."""


@dataclass
class _Worker:
    """A process, and the end of the pipe to it. `sequences` is how many it has told of."""

    number: int
    process: BaseProcess
    pipe: Connection
    sequences: int = 0
    violated: int = 0

    def stop(self) -> None:
        """Ask it to."""
        with suppress(OSError):  # it has ended by itself
            self.pipe.send(None)


def explore_together(trial: Trial, target: str, run: Run) -> None:
    """The machine in `trial.workers` processes, each with the target of that name, until one finds something, fails or
    dies, or the trial is stopped; evidence and failures go to `run`."""
    workers: list[_Worker] = []
    try:
        workers += (_started(trial, target, run, number) for number in range(trial.workers))
        _listen(workers, trial, run)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(_END_SECONDS)
            worker.process.kill()
            worker.process.join()
            worker.process.close()
            worker.pipe.close()


def _started(trial: Trial, target: str, run: Run, number: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    share = replace(
        trial,
        seed=trial.seed + number,
        stride=trial.workers,
        workers=1,
        progress=_nothing,
        stopped=_never,
    )
    process = context.Process(target=_work, args=(theirs, target, share, list(run.evidence)), name=f"soak-{number}")
    with _held(signal.SIG_BLOCK), theirs:  # until it knows what to do with one
        process.start()
    return _Worker(number, process, ours)


def _listen(workers: Sequence[_Worker], trial: Trial, run: Run) -> None:
    """Until all have ended."""
    running = {worker.pipe: worker for worker in workers}
    asked = False
    while running:
        for pipe in wait(list(running), _LOOK_SECONDS):
            assert isinstance(pipe, Connection)
            worker = running[pipe]
            try:
                said = pipe.recv()
            except EOFError:
                said = _death(worker)
            if isinstance(said, Progress):
                worker.sequences, worker.violated = said.done, said.violated
                _tell(workers, trial, said)
                continue
            del running[pipe]
            _take(said, run)
            asked |= _stop(running)
        if not asked and trial.stopped():
            asked = _stop(running)


def _stop(running: dict[Connection, _Worker]) -> bool:
    for worker in running.values():
        worker.stop()
    return True


def _tell(workers: Sequence[_Worker], trial: Trial, said: Progress) -> None:
    done = sum(worker.sequences for worker in workers)
    trial.progress(Progress(done, done, said.step, max(worker.violated for worker in workers)))


def _death(worker: _Worker) -> Run:
    """What is known of a worker that has ended and told nothing."""
    worker.process.join()
    status = worker.process.exitcode or 0
    how = f"was ended by {signal_name(-status)}" if status < 0 else f"ended with status {status}"
    return Run(failures=[f"worker {worker.number} {how}, and did not tell what it found"])


def _take(found: Run, run: Run) -> None:
    """Of several sequences to one violation all are evidence."""
    run.evidence += [one for one in found.evidence if one not in run.evidence]
    run.failures += [one for one in found.failures if one not in run.failures]
    run.silences += found.silences
    run.calls += found.calls


# In the worker.


def _nothing(_: Progress) -> None:
    pass


def _never() -> bool:
    return False


def _work(pipe: Connection, name: str, trial: Trial, known: list[Evidence]) -> None:
    """Explore until something is found or somebody says that it is enough, and say what came of it."""
    stop = Stop()
    with asked_by_signals(stop.ask), _held(signal.SIG_UNBLOCK):
        run = Run(evidence=known)
        told = _Told(pipe)
        try:
            with parse_target(name) as target:
                # A message, or the end of who would send one.
                trial = replace(trial, progress=told, stopped=lambda: stop() or pipe.poll())
                trial.explore(target, run)
        except (TargetFailure, FieldError) as error:
            run.failures.append(str(error))
        with suppress(OSError):
            pipe.send(run)


class _Told:
    """Tells sequences, of which a round has some hundred, over all rounds."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._before = self._last = 0
        self._told = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if progress.done < self._last:
            self._before += self._last
        self._last = progress.done
        now = time.monotonic()
        if now - self._told >= _TELL_SECONDS:
            self._told = now
            with suppress(OSError):
                self._pipe.send(progress._replace(done=self._before + self._last))


@contextmanager
def _held(how: int) -> Iterator[None]:
    """The mask of SIGNALS is changed for a while. A process begins with that of who starts it."""
    before = signal.pthread_sigmask(how, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
