"""A slot of memory that a daemon is given, and that is taken from it: ADD_MEM_REG and REM_MEM_REG, both acknowledged.

Our front end in this process asks our back end in another one. What it is set against is the least that can do it:
two processes in C, a message of the same length with a descriptor, an mmap, an answer; a message, a munmap, an answer.
Our front end asks once more behind either, so that it knows that the back end is there still: an acknowledgement that
is followed by the end of the connection is none. So a round has four questions and not two. What each of our sides
costs is seen where the other one is in C (peers.c), and asks the same four.

All run on one processor: who asks waits for the answer anyway, and where the scheduler chooses, a pair of processes is
fast at one time and slow at another.
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
from vhost_user.backend import Server
from vhost_user.connection import Connection
from vhost_user.frontend import Frontend, SharedRegion
from vhost_user.units import GIB, MIB, ByteCount, GuestAddress, HostOffset

SLOT_SIZE = ByteCount(64 * MIB)


def rows(*, quick: bool, rounds: int = 200) -> Iterator[Row]:
    """The table's lines: with no other slot there, and with many; and with one side in C."""
    pairs = 10 if quick else 20
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        directory = Path(stack.enter_context(TemporaryDirectory()))
        floor, peers = Floor(directory), Peers(directory)
        fd = stack.enter_context(memory(512 * SLOT_SIZE))

        def against_floor(ours: Callable[[], float]) -> list[tuple[float, float]]:
            ours(), floor.slots(fd, SLOT_SIZE, rounds)
            return in_turn(pairs, ours, lambda: 1e6 * statistics.median(floor.slots(fd, SLOT_SIZE, rounds)))

        what = "ADD_MEM_REG and REM_MEM_REG beside {} slots, with acknowledgements"
        with front_end(back_end()) as frontend:
            for others in (0, 400):
                frontend.regions.share(slot(fd, number) for number in range(len(frontend.regions), others))
                found = against_floor(lambda: round_trips(frontend, fd, rounds))
                yield ratio_row(what.format(others), "fd, mmap, munmap in C", "us", found, 1.3)
        with front_end(peers.back_end()) as frontend:
            found = against_floor(lambda: round_trips(frontend, fd, rounds))
            yield plain_row("the same beside 0 slots, a back end in C", "fd, mmap, munmap in C", "us", found)
        for back, side in ((back_end, "a front end in C"), (peers.back_end, "both in C")):
            found = against_floor(partial(asked_by, peers, back, fd, rounds))
            yield plain_row(f"the same beside 0 slots, {side}", "fd, mmap, munmap in C", "us", found)


@contextmanager
def back_end() -> Iterator[socket.socket]:
    """The front end's end of a connection to a back end of ours, which is a process of its own."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _serve(theirs)
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


def _serve(sock: socket.socket) -> None:
    """Never returns."""
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


def asked_by(peers: Peers, back: Callable[[], AbstractContextManager[socket.socket]], fd: int, rounds: int) -> float:
    """As `round_trips`, of a front end in C and a back end that is new."""
    with back() as sock:
        return 1e6 * statistics.median(peers.front_end(sock, fd, 0, SLOT_SIZE, rounds))
