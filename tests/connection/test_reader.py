"""Messages out of a stream: whole, byte by byte, in a row; and descriptors, which are closed whatever happens."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vhost_user.connection import Connection, Received
from vhost_user.errors import PeerError
from vhost_user.message import HEADER, MAX_PAYLOAD, FrontendRequest, Header, encode_message
from vhost_user.owned_fd import OwnedFd

MESSAGE = encode_message(FrontendRequest.SET_FEATURES, bytes(range(8)), need_reply=True)


@contextmanager
def stream() -> Iterator[tuple[Connection, socket.socket]]:
    """A connection, and the socket that feeds it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with Connection(ours) as connection, theirs:
        yield connection, theirs


class Pipe:
    """What is sent: its writing end, which is closed everywhere once the reading end tells of the end."""

    def __init__(self) -> None:
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._reading, self._writing = OwnedFd(reading), OwnedFd(writing)

    def send(self, sock: socket.socket, data: bytes, times: int = 1) -> None:
        socket.send_fds(sock, [data], [self._writing.fileno()] * times)

    def closed_by_others(self) -> bool:
        self._writing.close()
        with self._reading:
            try:
                return os.read(self._reading.fileno(), 1) == b""
            except BlockingIOError:
                return False


def feed(connection: Connection, theirs: socket.socket, data: bytes, piece: int) -> Iterator[Received]:
    """What comes out when `data` is sent in pieces."""
    for at in range(0, len(data), piece):
        theirs.sendall(data[at : at + piece])
        while (received := connection.receive_now()) is not None:
            yield received


@pytest.mark.parametrize("piece", [1, 5, 12, 20, 33, 40])
def test_in_any_pieces_it_is_the_same(piece: int) -> None:
    with stream() as (connection, theirs):
        got = list(feed(connection, theirs, MESSAGE * 2, piece))
        assert [each.body for each in got] == [bytes(range(8))] * 2
        assert all(each.request == FrontendRequest.SET_FEATURES and each.need_reply for each in got)
        assert not connection.within_message


def test_it_is_within_a_message_from_the_first_byte_to_the_last() -> None:
    with stream() as (connection, theirs):
        seen = []
        for at in range(len(MESSAGE)):
            theirs.sendall(MESSAGE[at : at + 1])
            seen.append((connection.receive_now() is not None, connection.within_message))
        assert seen == [(False, True)] * 19 + [(True, False)]


def test_a_message_without_payload_is_complete_with_its_header() -> None:
    with stream() as (connection, theirs):
        theirs.sendall(encode_message(FrontendRequest.GET_FEATURES, b""))
        received = connection.receive_now()
        assert received is not None
        assert received.body == b""
        assert not connection.within_message


@given(st.lists(st.tuples(st.integers(0, 100), st.binary(max_size=50)), max_size=8), st.integers(1, 100))
def test_messages_in_a_row_come_out_one_by_one(messages: list[tuple[int, bytes]], piece: int) -> None:
    data = b"".join(encode_message(request, payload) for request, payload in messages)
    with stream() as (connection, theirs):
        got = feed(connection, theirs, data, piece)
        assert [(each.request, each.body) for each in got] == messages


def test_the_largest_payload_is_taken() -> None:
    with stream() as (connection, theirs):
        body = os.urandom(MAX_PAYLOAD)
        theirs.sendall(encode_message(1, body) + MESSAGE)
        with connection.receive(1) as first, connection.receive(1) as second:
            assert (first.body, second.body) == (body, bytes(range(8)))


@pytest.mark.parametrize("at", [1, 5, 12, 15, 20])
def test_descriptors_ride_on_the_first_byte(at: int) -> None:
    pipe = Pipe()
    with stream() as (connection, theirs):
        pipe.send(theirs, MESSAGE[:at], 2)
        theirs.sendall(MESSAGE[at:])
        with connection.receive(1) as received:
            assert len(received.fds) == 2
        assert all(fd.closed for fd in received.fds)
        assert pipe.closed_by_others()


@pytest.mark.parametrize("at", [1, 11, 12, 15])
def test_descriptors_that_come_late_are_a_violation_and_closed(at: int) -> None:
    pipe = Pipe()
    with stream() as (connection, theirs):
        pipe.send(theirs, MESSAGE[:at], 2)
        assert connection.receive_now() is None
        pipe.send(theirs, MESSAGE[at : at + 1], 2)
        with pytest.raises(PeerError, match=r"descriptors=2: have to ride on the first byte"):
            connection.receive_now()
        assert pipe.closed_by_others()


@pytest.mark.parametrize("at", [1, 20])
def test_too_many_descriptors_are_closed_and_those_before_them(at: int) -> None:
    pipe = Pipe()
    with stream() as (connection, theirs):
        pipe.send(theirs, MESSAGE[:at], 9)
        with pytest.raises(PeerError, match="more than 8"):
            connection.receive_now()
        assert pipe.closed_by_others()


ANY = st.integers(0, 2**32 - 1)


@given(st.builds(HEADER.pack, ANY, ANY | st.integers(0, 15), ANY | st.integers(0, 2 * MAX_PAYLOAD)))
@example(HEADER.pack(1, 1, MAX_PAYLOAD))
@example(HEADER.pack(1, 1, MAX_PAYLOAD + 1))
@example(HEADER.pack(1, 2, 0))
@example(HEADER.pack(1, 0, 0))
@example(HEADER.pack(1, 0xFFFFFFFD, 0))
def test_a_header_that_can_not_be_is_refused_as_the_codec_has_it(data: bytes) -> None:
    with stream() as (connection, theirs):
        theirs.sendall(data)
        refused: list[str] = []
        for judge in (lambda: Header.decode(data), connection.receive_now):
            try:
                judge()
            except PeerError as error:
                refused.append(str(error))
        assert len(refused) in (0, 2)
        assert len(set(refused)) < 2


def test_a_header_that_can_not_be_closes_its_descriptors() -> None:
    pipe = Pipe()
    with stream() as (connection, theirs):
        pipe.send(theirs, HEADER.pack(1, 2, 0))
        with pytest.raises(PeerError, match="version"):
            connection.receive_now()
        assert pipe.closed_by_others()


def test_an_unfinished_message_lets_go_of_its_descriptors() -> None:
    pipe = Pipe()
    with stream() as (connection, theirs):
        pipe.send(theirs, MESSAGE[:3])
        assert connection.receive_now() is None
        assert connection.within_message
        connection.close()
        assert pipe.closed_by_others()


def test_a_connection_that_is_forgotten_lets_go_of_them_too() -> None:
    pipe = Pipe()
    with stream() as (kept, theirs):
        connection = Connection(kept._sock.dup())
        pipe.send(theirs, MESSAGE[:3])
        assert connection.receive_now() is None
        connection._sock.close()
        del connection
        assert pipe.closed_by_others()
