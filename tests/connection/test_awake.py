"""A message that is about to come is looked for before anybody sleeps; and not for longer than was said."""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest

from tests.backend.devices import Echo
from vhost_user import _native
from vhost_user.awake import LONGEST_LOOK, looking
from vhost_user.backend import Server
from vhost_user.connection import Connection, Received
from vhost_user.errors import Disconnected
from vhost_user.message import FrontendRequest, encode_message
from vhost_user.owned_fd import OwnedFd

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
        assert received.request == FrontendRequest.GET_FEATURES


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


def test_a_look_ends_soon_after_something_else_is_there_to_do() -> None:
    ours, theirs = socket.socketpair()
    with (
        Connection(ours) as connection,
        theirs,
        OwnedFd(os.eventfd(0)) as other,
        selectors.EpollSelector() as all_of_them,
    ):
        for each in (connection, other):
            all_of_them.register(each, selectors.EVENT_READ)
        sender = threading.Timer(0.01, theirs.sendall, [QUESTION])
        sender.start()
        assert connection.receive_now(AGES, all_of_them.fileno()) is not None
        waking = threading.Timer(0.01, os.eventfd_write, [other.fileno(), 1])
        waking.start()
        assert connection.receive_now(AGES, all_of_them.fileno()) is None
        theirs.sendall(QUESTION)
        assert connection.receive_now(AGES, all_of_them.fileno()) is not None
        for thread in (sender, waking):
            thread.join()


def test_an_answer_is_looked_for_and_then_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    wait = _native.Incoming.wait

    def watched(incoming: _native.Incoming, sock: int, fds: Sequence[int], deadline: int, patience: int = 0) -> int:
        looks.append(patience)
        return wait(incoming, sock, fds, deadline, patience)

    monkeypatch.setattr(_native.Incoming, "wait", watched)
    ours, theirs = socket.socketpair()
    with Connection(ours) as connection, theirs:
        sender = threading.Timer(0.01, theirs.sendall, [QUESTION])
        sender.start()
        assert connection.receive(60).request == FrontendRequest.GET_FEATURES
        sender.join()
    assert looks == [LONGEST_LOOK]


class Watched:
    """A back end, and for how long it looked for each message."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = 10**15
        self.looks: list[int] = []
        receive_now = Connection.receive_now

        def watched(connection: Connection, patience: int = 0, others: int = -1) -> Received | None:
            assert others >= 0
            self.looks.append(patience)
            return receive_now(connection)

        monkeypatch.setattr(Connection, "receive_now", watched)
        monkeypatch.setattr(time, "monotonic_ns", lambda: self.time)

    def ask(self, server: Server, sock: socket.socket, after: int) -> list[int]:
        """For how long it looked, with a question that comes so many nanoseconds after the one before was served."""
        self.time += after
        self.looks.clear()
        sock.sendall(QUESTION)
        server.loop.run_once(0)
        assert len(sock.recv(100)) == 20
        return self.looks


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[int]]]:
    """Asks the back end of a connection, so many nanoseconds after the last question."""
    ours, theirs = socket.socketpair()
    with ours, Server() as server:
        server.serve(theirs, Echo())
        yield partial(Watched(monkeypatch).ask, server, ours)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="nobody looks on a single processor")
def test_a_front_end_is_looked_for_as_long_as_it_is_quick(asked: Callable[[int], list[int]]) -> None:
    assert asked(AGES) == [0, 0]
    assert asked(0) == [LONGEST_LOOK, LONGEST_LOOK]
    assert asked(3 * LONGEST_LOOK - 1) == [LONGEST_LOOK, LONGEST_LOOK]
    assert asked(3 * LONGEST_LOOK) == [0, 0]
    assert asked(0) == [LONGEST_LOOK, LONGEST_LOOK]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="nobody looks on a single processor")
def test_a_front_end_that_is_looked_for_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: 10**15)
    (first, theirs), (second, others) = socket.socketpair(), socket.socketpair()
    with first, second, Server() as server:
        server.serve(theirs, Echo())
        server.serve(others, Echo())
        for sock in (first, second):  # each is quick from its second question on
            sock.sendall(QUESTION)
            server.loop.run_once(0)
            assert len(sock.recv(100)) == 20
        for sock in (first, second):
            sock.sendall(3 * QUESTION)
        server.loop.run_once(0)
        assert [len(sock.recv(100)) for sock in (first, second)] == [20, 20]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="nobody looks on a single processor")
def test_a_front_end_that_is_looked_for_and_alone_is_served_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: 10**15)
    ours, theirs = socket.socketpair()
    with ours, Server() as server:
        server.serve(theirs, Echo())
        for times in (1, 3):
            ours.sendall(times * QUESTION)
            server.loop.run_once(0)
            assert len(ours.recv(100)) == times * 20


def test_no_more_loops_look_than_there_are_processors_but_one(asked: Callable[[int], list[int]]) -> None:
    asked(0)
    taken = 0
    try:
        while looking.acquire(blocking=False):
            taken += 1
        assert taken == len(os.sched_getaffinity(0)) - 1
        assert asked(0) == [0, 0]
    finally:
        for _ in range(taken):
            looking.release()
