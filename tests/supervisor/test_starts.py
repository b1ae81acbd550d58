"""How workers are started: what a forked one finds is what a command finds, and only the first one is forked."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from vhost_user.supervisor.packets import ENVIRONMENT, SIGNALS
from vhost_user.supervisor.process import Start, fork_first, spawn

CONTROL = 3
FOUND = [[True] * len(SIGNALS), sorted(SIGNALS), str(CONTROL)]


def tell() -> int:
    fds = [number for number in range(1 << 10) if Path(f"/proc/self/fd/{number}").is_symlink()]
    defaults = [signal.getsignal(number) in {signal.SIG_DFL, signal.default_int_handler} for number in SIGNALS]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with socket.socket(fileno=CONTROL) as control:
        control.send(json.dumps([fds, defaults, sorted(blocked), os.environ[ENVIRONMENT]]).encode())
    return 7


class Litter:
    """Garbage of the supervisor's, which closes what has the number that was its own."""

    def __init__(self) -> None:
        self.itself = self
        self.pid = os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.pid:
            os.close(CONTROL)


def collect_and_tell() -> int:
    gc.collect()
    return tell()


def fail() -> int:
    raise RuntimeError("no device")


TELL = spawn([sys.executable, "-c", "import sys; from tests.supervisor.test_starts import tell; sys.exit(tell())"])


def told(start: Start) -> list[object]:
    """The descriptors that a worker has, and what else it finds; it ends with its status."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            pid = start(theirs)
        assert pid != os.getpid()
        said = ours.recv(1 << 12)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    found: list[object] = json.loads(said)
    return found


def test_what_a_worker_finds() -> None:
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        (fds, *found), spawned = (told(start) for start in (fork_first(tell, TELL), TELL))
        assert found == FOUND
        assert [spawned[0], *spawned[2:]] == [fds, *FOUND[1:]]  # what measures coverage has a handler of its own there
        assert isinstance(fds, list)
        assert {0, 1, 2, CONTROL, write} <= set(fds)
        assert read not in fds
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)


def test_garbage_of_the_supervisors_closes_nothing_of_the_workers() -> None:
    gc.disable()
    try:
        Litter()
        told(fork_first(collect_and_tell, TELL))
    finally:
        gc.enable()


def test_only_the_first_is_forked() -> None:
    def other(_: socket.socket) -> int:
        others.append(1)
        return 0

    others: list[int] = []
    start = fork_first(tell, other)
    told(start)
    assert not others
    with socket.socket() as control:
        assert [start(control), start(control)] == [0, 0]
    assert len(others) == 2


def test_a_process_with_more_threads_is_not_forked() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with socket.socket() as control:
            assert fork_first(fail, lambda _: 5)(control) == 5
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(("returned", "status"), [(None, os.EX_SOFTWARE), (0, 0), (256 + 5, 5), (1 << 40, 0)])
def test_one_that_returns_ends(returned: Any, status: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        pid = fork_first(lambda: returned, TELL)(theirs)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status


def test_one_that_fails_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        pid = fork_first(fail, TELL)(theirs)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == os.EX_SOFTWARE
    assert "RuntimeError: no device" in capfd.readouterr().err
