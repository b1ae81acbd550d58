"""A message that is about to come is looked for before anybody sleeps; and not for longer than was said."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from tests.backend.devices import Echo
from vhost_user.backend import Server
from vhost_user.connection import LONGEST_LOOK, Connection, Received
from vhost_user.errors import Disconnected
from vhost_user.message import FrontendRequest, encode_message

QUESTION = encode_message(FrontendRequest.GET_FEATURES, b"")
AGES = 10**12
"""Nanoseconds: a quarter of an hour."""


def test_what_comes_meanwhile_is_received_in_one_call() -> None:
    ours, theirs = socket.socketpair()
    with Connection(ours) as connection, theirs:
        sender = threading.Timer(0.01, theirs.sendall, [QUESTION])
        sender.start()
        received = connection.receive_now(AGES)
        sender.join()
        assert received is not None
        assert received.header.request == FrontendRequest.GET_FEATURES


def test_a_look_ends_with_its_time() -> None:
    ours, theirs = socket.socketpair()
    with Connection(ours) as connection, theirs:
        before = time.monotonic_ns()
        assert connection.receive_now(LONGEST_LOOK) is None
        assert time.monotonic_ns() - before >= LONGEST_LOOK


def test_a_look_ends_with_the_connection() -> None:
    ours, theirs = socket.socketpair()
    with Connection(ours) as connection:
        ending = threading.Timer(0.01, theirs.close)
        ending.start()
        with pytest.raises(Disconnected, match="between two messages"):
            connection.receive_now(AGES)
        ending.join()


class Watched:
    """A back end, and for how long it looked for each message."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = 10**9
        self.looks: list[int] = []
        receive_now = Connection.receive_now

        def watched(connection: Connection, patience: int = 0) -> Received | None:
            self.looks.append(patience)
            self.time += patience
            return receive_now(connection)

        monkeypatch.setattr(Connection, "receive_now", watched)
        monkeypatch.setattr(time, "monotonic_ns", lambda: self.time)

    def ask(self, server: Server, sock: socket.socket, after: int) -> list[int]:
        """For how long it looked, with a question that comes so many nanoseconds after it went to sleep."""
        self.time += after
        self.looks.clear()
        sock.sendall(QUESTION)
        server.loop.run_once(0)
        assert len(sock.recv(100)) == 20
        return self.looks


def test_a_front_end_is_waited_for_as_long_as_it_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, Server() as server:
        server.serve(theirs, Echo())
        watched = Watched(monkeypatch)
        assert watched.ask(server, ours, AGES) == [0, 0]
        assert watched.ask(server, ours, LONGEST_LOOK) == [LONGEST_LOOK, LONGEST_LOOK]
        assert watched.ask(server, ours, LONGEST_LOOK) == [LONGEST_LOOK, LONGEST_LOOK]
        assert watched.ask(server, ours, 3 * LONGEST_LOOK) == [0, 0]
        assert watched.ask(server, ours, 0) == [LONGEST_LOOK, LONGEST_LOOK]
