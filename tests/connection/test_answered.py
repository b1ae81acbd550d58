"""A question that always has the same answer, answered where it is read."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.backend.devices import Echo
from vhost_user.backend import Server
from vhost_user.backend.session import Session
from vhost_user.connection import ANSWERED, Connection, Received
from vhost_user.errors import Disconnected
from vhost_user.message import U64, FrontendRequest, encode_message

ASKED = FrontendRequest.GET_FEATURES
QUESTION = encode_message(ASKED, b"")
NUMBER = U64(0x1234_5678_9ABC_DEF0).encode()
ANSWER = encode_message(ASKED, NUMBER, reply=True)


@pytest.fixture
def answering() -> Iterator[tuple[Connection, socket.socket]]:
    """A connection that answers, and the peer's end."""
    ours, theirs = socket.socketpair()
    with Connection(ours) as connection, theirs:
        connection.answer_at_once(ASKED, NUMBER)
        theirs.setblocking(False)
        yield connection, theirs


def test_each_is_answered_once(answering: tuple[Connection, socket.socket]) -> None:
    connection, theirs = answering
    theirs.sendall(QUESTION * 2)
    for _ in range(2):
        assert connection.receive_now() is ANSWERED
        assert theirs.recv(100) == ANSWER
    assert connection.receive_now() is None
    assert not connection.within_message


def test_in_pieces_it_is_the_same(answering: tuple[Connection, socket.socket]) -> None:
    connection, theirs = answering
    theirs.sendall(QUESTION[:7])
    assert connection.receive_now() is None
    theirs.sendall(QUESTION[7:])
    assert connection.receive_now() is ANSWERED
    assert theirs.recv(100) == ANSWER


@pytest.mark.parametrize(
    "other",
    [
        struct.pack("=III", ASKED + 1, 1, 0),
        struct.pack("=III", ASKED, 1 | 1 << 2, 0),
        struct.pack("=III", ASKED, 1 | 1 << 3, 0),
        struct.pack("=III", ASKED, 1 | 1 << 4, 0),
        struct.pack("=III", ASKED, 1, 1) + b"x",
    ],
    ids=["another request", "a reply", "acknowledged", "a bit without meaning", "a payload"],
)
def test_all_else_is_received(answering: tuple[Connection, socket.socket], other: bytes) -> None:
    connection, theirs = answering
    theirs.sendall(other)
    received = connection.receive_now()
    assert received is not None
    assert encode_as_it_came(received) == other
    with pytest.raises(BlockingIOError):
        theirs.recv(1)


def encode_as_it_came(received: Received) -> bytes:
    return struct.pack("=III", received.request, received.flags, received.size) + received.body


def test_with_a_descriptor_it_is_received(answering: tuple[Connection, socket.socket]) -> None:
    connection, theirs = answering
    with open("/dev/null", "rb") as file:
        socket.send_fds(theirs, [QUESTION], [file.fileno()])
    received = connection.receive_now()
    assert received is not None
    with received:
        assert len(received.fds) == 1


def test_who_does_not_read_is_left_to_the_caller(answering: tuple[Connection, socket.socket]) -> None:
    connection, theirs = answering
    answered = 0
    while True:
        theirs.sendall(QUESTION)
        if (received := connection.receive_now()) is not ANSWERED:
            break
        answered += 1
    assert received is not None
    assert received.request == ASKED
    theirs.setblocking(True)
    assert theirs.recv(len(ANSWER) * answered, socket.MSG_WAITALL) == ANSWER * answered


def test_who_is_gone_is_left_to_the_caller(answering: tuple[Connection, socket.socket]) -> None:
    connection, theirs = answering
    theirs.sendall(QUESTION)
    theirs.close()
    received = connection.receive_now()
    assert received is not None
    assert received is not ANSWERED
    with pytest.raises(Disconnected):
        connection.send_bytes(ANSWER, timeout=0)


def test_a_back_end_answers_so_what_it_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    handled = []
    real = Session.handle

    def handle(session: Session, received: Received) -> object:
        handled.append(received.flags)
        return real(session, received)

    monkeypatch.setattr(Session, "handle", handle)
    ours, theirs = socket.socketpair()
    with ours, Server() as server:
        endpoint = server.serve(theirs, Echo())
        answers = []
        for flags in (1, 1 | 1 << 3):
            ours.sendall(struct.pack("=III", ASKED, flags, 0))
            server.loop.run_once(0)
            answers.append(ours.recv(100))
        assert endpoint.link is not None
        assert answers == [encode_message(ASKED, U64(endpoint.link.session.offered).encode(), reply=True)] * 2
    assert handled == [1 | 1 << 3]


def test_what_was_answered_is_the_first_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has said something is given the time that it takes."""
    monkeypatch.setattr("vhost_user.backend.link.MESSAGE_TIME_LIMIT", 0)
    ours, theirs = socket.socketpair()
    with ours, Server() as server:
        ours.sendall(QUESTION)
        server.serve(theirs, Echo())
        server.loop.run_once(0)
        assert ours.recv(100)
        os.set_blocking(ours.fileno(), False)
        server.loop.run_once(0)
        with pytest.raises(BlockingIOError):
            ours.recv(1)


def test_who_debugs_sees_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    ours, theirs = socket.socketpair()
    with ours, Server() as server:
        server.serve(theirs, Echo())
        ours.sendall(QUESTION)
        server.loop.run_once(0)
        assert ours.recv(100)
    assert any("GET_FEATURES" in message for message in caplog.messages)


def test_who_waits_for_something_else_gets_that(answering: tuple[Connection, socket.socket]) -> None:
    connection, theirs = answering
    other = encode_message(FrontendRequest.GET_QUEUE_NUM, b"")
    theirs.sendall(QUESTION + other)
    assert connection.receive(1).request == FrontendRequest.GET_QUEUE_NUM
    assert theirs.recv(100) == ANSWER
