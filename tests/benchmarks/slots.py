"""A slot of memory that a daemon is given, and that is taken from it: ADD_MEM_REG and REM_MEM_REG, both acknowledged.

Our front end in this process asks our back end in another one. What it is set against is the least that can do it:
two processes in C, a message of the same length with a descriptor, an mmap, an answer; a message, a munmap, an answer.
Our front end asks once more after either, so that it knows that the back end is there still: an acknowledgement that is
followed by the end of the connection is none. So a round has four questions and not two. All run on one processor: who
asks waits for the answer anyway, and where the scheduler chooses, a pair of processes is fast at one time and slow at
another.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.backend.devices import Echo
from tests.backend.rig import SPLIT
from tests.benchmarks.floor import Floor
from tests.benchmarks.measure import Row, in_turn, ratio_row
from vhost_user.backend import Server
from vhost_user.connection import Connection
from vhost_user.frontend import Frontend, SharedRegion
from vhost_user.units import GIB, MIB, ByteCount, GuestAddress, HostOffset

SLOT_SIZE = ByteCount(64 * MIB)


def rows(*, quick: bool, rounds: int = 200) -> Iterator[Row]:
    """The table's lines: with no other slot there, and with many."""
    pairs = 10 if quick else 20
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        floor = Floor(Path(stack.enter_context(TemporaryDirectory())))
        frontend, fd = stack.enter_context(daemon()), stack.enter_context(memory(512 * SLOT_SIZE))
        for others in (0, 400):
            frontend.regions.share(slot(fd, number) for number in range(len(frontend.regions), others))
            what = f"ADD_MEM_REG and REM_MEM_REG beside {others} slots, with acknowledgements"
            round_trips(frontend, fd, rounds), floor.slots(fd, SLOT_SIZE, rounds)
            found = in_turn(
                pairs,
                lambda: round_trips(frontend, fd, rounds),
                lambda: 1e6 * statistics.median(floor.slots(fd, SLOT_SIZE, rounds)),
            )
            yield ratio_row(what, "fd, mmap, munmap in C", "us", found, 1.3)


@contextmanager
def daemon() -> Iterator[Frontend]:
    """A front end whose back end is a process of its own."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _serve(theirs)
    theirs.close()
    try:
        with Frontend(Connection(ours), features=SPLIT) as frontend:
            yield frontend
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


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
