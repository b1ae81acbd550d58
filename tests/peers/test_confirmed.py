"""Daemons that find a message about memory and the question behind it in their socket at the same time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.peers.drivers.machine import VERSION_1, machine
from tests.peers.processes import LATE, Peer
from vhost_user.connection import Connection, Received
from vhost_user.frontend import Frontend

pytestmark = pytest.mark.needs_peers


@contextmanager
def stopped(peer: Peer) -> Iterator[None]:
    peer.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        peer.process.send_signal(signal.SIGCONT)


def told_while_stopped(peer: Peer, monkeypatch: pytest.MonkeyPatch, tell: Callable[[], None]) -> None:
    """Have all of a message and its question sent before the daemon sees any of it."""
    sent, real = threading.Event(), Connection.receive_beside

    def receive_beside(connection: Connection, watched: dict[int, object], deadline: float) -> Received | None:
        sent.set()
        return real(connection, watched, deadline)

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "receive_beside", receive_beside)
        thread = threading.Thread(target=tell)
        with stopped(peer):
            thread.start()
            assert sent.wait(LATE)
        thread.join()


@pytest.mark.parametrize("daemon", ["storage_daemon", "virtiofs", "passt_daemon", "dpdk_daemon"])
def test_both_are_answered_in_order(
    daemon: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = request.getfixturevalue(daemon)
    with machine() as guest, Frontend.connect(str(peer.socket), features=VERSION_1, timeout=LATE) as frontend:
        boot, (block,) = guest.boot(), guest.plug(3)
        told_while_stopped(peer, monkeypatch, lambda: frontend.regions.share(boot))
        told_while_stopped(peer, monkeypatch, lambda: frontend.regions.add(block))
        assert block in frontend.regions
        told_while_stopped(peer, monkeypatch, lambda: frontend.regions.remove(block))
        assert list(frontend.regions) == boot
        frontend.requests.confirm()
