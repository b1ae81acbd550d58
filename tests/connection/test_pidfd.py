"""A peer that makes the socket can have the kernel add its pidfd to each read, which nobody asked for: none is kept."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.leaks import open_files
from vhost_user.connection import ANSWERED, Connection
from vhost_user.message import FrontendRequest, encode_message
from vhost_user.owned_fd import ROOM_FOR_FDS, OwnedFd, received_fds

SO_PASSPIDFD = 76
"""Of Linux 6.5; Python has no name for it."""

QUESTION = encode_message(FrontendRequest.GET_FEATURES, b"")


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A peer's, and one that it made for us."""
    peers, ours = socket.socketpair()
    with peers, ours:
        try:
            ours.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 1)
        except OSError as error:
            pytest.skip(f"this kernel passes no pidfds: {error}")
        yield peers, ours


@contextmanager
def nothing_is_kept() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() == before


def test_a_connection_keeps_none(sockets: tuple[socket.socket, socket.socket]) -> None:
    peers, ours = sockets
    with Connection(ours.dup()) as connection, nothing_is_kept():
        for byte in QUESTION * 2:
            peers.send(bytes([byte]))
            connection.receive_now()


def test_a_connection_that_is_given_descriptors_keeps_those(sockets: tuple[socket.socket, socket.socket]) -> None:
    peers, ours = sockets
    with Connection(ours.dup()) as connection, OwnedFd(os.eventfd(0)) as given:
        with nothing_is_kept():
            socket.send_fds(peers, [QUESTION], [given.fileno()])
            received = connection.receive_now()
            assert received is not None
            assert received is not ANSWERED
            (fd,) = received.fds
            os.eventfd_write(fd.fileno(), 7)
            fd.close()
        assert os.eventfd_read(given.fileno()) == 7


def test_no_other_reader_keeps_one(sockets: tuple[socket.socket, socket.socket]) -> None:
    peers, ours = sockets
    with nothing_is_kept():
        peers.send(QUESTION)
        for flags in (socket.MSG_PEEK, 0):
            _, ancillary, _, _ = ours.recvmsg(len(QUESTION), ROOM_FOR_FDS, flags)
            assert ancillary
            assert received_fds(ancillary) == []
