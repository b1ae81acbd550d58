"""What can't be kept for want of descriptors is let go of, and the supervisor is told by an OSError, as it expects."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import socket

import pytest

from tests.supervisor.rig import fork
from tests.supervisor.test_ledger import MemoryStore
from vhost_user.backend.loop import EventLoop
from vhost_user.supervisor.ledger import Ledger


def refuse(*_: object) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


CALLS = pytest.mark.parametrize(("module", "call"), [(os, "dup"), (os, "memfd_create"), (mmap, "mmap")])


@CALLS
def test_a_front_end_is_let_go_of(module: object, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(MemoryStore({}))
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(module, call, refuse)
    with theirs, pytest.raises(OSError, match="Too many open files"):
        ledger.wire(b"session/1/", "device0", ours)
    assert ours.fileno() == -1
    ledger.close()


@CALLS
def test_a_worker_is_ended(module: object, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, loop = Ledger(MemoryStore({})), EventLoop()
    pids: list[int] = []

    def start(_: socket.socket) -> int:
        pids.append(fork(signal.pause))
        return pids[0]

    monkeypatch.setattr(module, call, refuse)
    with pytest.raises(OSError, match="Too many open files"):
        ledger.worker(loop, start, lambda _: None, lambda _: None)
    with pytest.raises(ChildProcessError):
        os.waitpid(pids[0], os.WNOHANG)
    ledger.close()
    loop.close()
