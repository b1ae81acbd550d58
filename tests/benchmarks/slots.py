"""A slot of memory that a daemon is given, and that is taken from it: ADD_MEM_REG and REM_MEM_REG, both acknowledged.

Our front end in this process asks our back end in another one. What it is set against is the least that can do it:
two processes in C, a message of the same length with a descriptor, an mmap, an answer; a message, a munmap, an answer.
Our front end asks once more behind what is added, so that it knows that the back end is there still: an acknowledgement
that is followed by the end of the connection is none. So a round has three questions and not two. What each of our
sides costs is seen where the other one is in C (peers.c), and asks the same three.

Who asks has one processor, and who answers has another one, as a VMM and its daemon have; or they share one. Where the
scheduler chooses, a pair of processes is fast at one time and slow at another. On two, being woken is most of what the
limit takes; ours look for a message before they sleep, and mostly needn't be. What a limit takes that looks for as long
is a row of its own.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.backend.devices import Echo
from tests.backend.rig import SPLIT
from tests.benchmarks.floor import Floor
from tests.benchmarks.measure import Row, in_turn, plain_row, ratio_row
from tests.benchmarks.peers import Peers
from tests.benchmarks.processors import on_processor
from vhost_user import awake
from vhost_user.awake import LONGEST_LOOK
from vhost_user.backend import Server
from vhost_user.connection import Connection
from vhost_user.frontend import Frontend, SharedRegion
from vhost_user.units import GIB, MIB, ByteCount, GuestAddress, HostOffset

SLOT_SIZE = ByteCount(64 * MIB)

Connected = Callable[[], AbstractContextManager[socket.socket]]
"""Makes a back end, and a connection to it."""

_FLOOR = "fd, mmap, munmap in C"


def rows(*, quick: bool, rounds: int = 200) -> Iterator[Row]:
    """The table's lines: with no other slot there, and with many; with one side in C; and on a single processor."""
    processors = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        stack.enter_context(on_processor(processors[0]))
        directory = Path(stack.enter_context(TemporaryDirectory()))
        fd = stack.enter_context(memory(512 * SLOT_SIZE))
        bench = _Bench(directory, fd, processors[-1], pairs=5 if quick else 20, rounds=rounds)
        yield from bench.beside(0, 400)
        yield from bench.with_a_side_in_c()
        yield bench.against_one_that_looks()
        bench.answers = processors[0]
        yield bench.on_one_processor()


class _Bench:
    """Who asks, on the processor that this process has, and who answers, on another; against C on the same ones."""

    def __init__(self, directory: Path, fd: int, answers: int, *, pairs: int, rounds: int) -> None:
        self._floor, self._peers = Floor(directory), Peers(directory)
        self._fd, self._pairs, self._rounds = fd, pairs, rounds
        self.answers = answers
        """The processor of who answers."""

    @contextmanager
    def _started(self, back: Connected) -> Iterator[socket.socket]:
        """What answers, on its processor."""
        with ExitStack() as stack:
            with on_processor(self.answers):
                sock = stack.enter_context(back())
            yield sock

    def _against_floor(self, ours: Callable[[], float], look: int = 0) -> list[tuple[float, float]]:
        def theirs() -> float:
            return 1e6 * statistics.median(self._floor.slots(self._fd, SLOT_SIZE, self._rounds, self.answers, look))

        ours(), theirs()
        return in_turn(self._pairs, ours, theirs)

    def _rounds_of(self, frontend: Frontend, look: int = 0) -> list[tuple[float, float]]:
        return self._against_floor(lambda: round_trips(frontend, self._fd, self._rounds), look)

    def beside(self, *counts: int) -> Iterator[Row]:
        """Both sides ours, with so many slots there already."""
        with front_end(self._started(back_end)) as frontend:
            for others in counts:
                frontend.regions.share(slot(self._fd, number) for number in range(len(frontend.regions), others))
                what = f"ADD_MEM_REG and REM_MEM_REG beside {others} slots, with acknowledgements"
                yield ratio_row(what, _FLOOR, "us", self._rounds_of(frontend), 1.3)

    def with_a_side_in_c(self) -> Iterator[Row]:
        """What our front end has of it, and our back end, and neither."""
        with front_end(self._started(self._peers.back_end)) as frontend:
            yield plain_row("the same beside 0 slots, a back end in C", _FLOOR, "us", self._rounds_of(frontend))
        for back, side in ((back_end, "a front end in C"), (self._peers.back_end, "both in C")):
            found = self._against_floor(partial(self._asked_by_c, back))
            yield plain_row(f"the same beside 0 slots, {side}", _FLOOR, "us", found)

    def _asked_by_c(self, back: Connected) -> float:
        """As `round_trips`, of a front end in C and a back end that is new."""
        with self._started(back) as sock:
            return 1e6 * statistics.median(self._peers.front_end(sock, self._fd, 0, SLOT_SIZE, self._rounds))

    def against_one_that_looks(self) -> Row:
        """Both sides ours, and no slot besides; and C that looks for as long."""
        with front_end(self._started(back_end)) as frontend:
            found = self._rounds_of(frontend, LONGEST_LOOK)
        return plain_row("the same beside 0 slots", f"{_FLOOR}, which looks, too", "us", found)

    def on_one_processor(self) -> Row:
        """Both sides ours, and no slot besides."""
        with front_end(self._started(partial(back_end, looks=False))) as frontend:
            found = self._rounds_of(frontend)
        return ratio_row("the same beside 0 slots, both sides on one processor", _FLOOR, "us", found, 1.3)


@contextmanager
def back_end(*, looks: bool = True) -> Iterator[socket.socket]:
    """The front end's end of a connection to a back end of ours, which is a process of its own. One that was started on
    a single processor never looks for what is about to come."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _serve(theirs, looks)
    theirs.close()
    try:
        with ours:
            yield ours
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextmanager
def front_end(connected: AbstractContextManager[socket.socket]) -> Iterator[Frontend]:
    """A front end of ours."""
    with connected as sock, Frontend(Connection(sock), features=SPLIT) as frontend:
        yield frontend


def _serve(sock: socket.socket, looks: bool) -> None:
    """Never returns."""
    while not looks and awake.looking.acquire(blocking=False):
        pass
    try:
        with Server() as server:
            server.serve(sock, Echo())
            server.run()
    finally:
        os._exit(1)


@contextmanager
def memory(size: int) -> Iterator[int]:
    """A memfd that holds nothing."""
    fd = os.memfd_create("slots", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def slot(fd: int, number: int) -> SharedRegion:
    """A slot of the file's."""
    at = number * SLOT_SIZE
    return SharedRegion(GuestAddress(4 * GIB + at), SLOT_SIZE, fd, HostOffset(at))


def round_trips(frontend: Frontend, fd: int, rounds: int) -> float:
    """Microseconds in which the slot behind all others comes and goes; the median."""
    region, took = slot(fd, len(frontend.regions)), []
    for _ in range(rounds):
        start = time.perf_counter()
        frontend.regions.add(region)
        frontend.regions.remove(region)
        took.append(time.perf_counter() - start)
    return 1e6 * statistics.median(took)
