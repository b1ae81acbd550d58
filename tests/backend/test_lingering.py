"""A descriptor whose last close waits: whoever sent it holds up nobody."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.backend.devices import Echo
from tests.backend.rig import SPLIT, Ram, start_ring
from vhost_user.backend import Server
from vhost_user.frontend import Frontend
from vhost_user.message import FrontendRequest
from vhost_user.owned_fd import ReceivedFd

LINGER_SECONDS = 100
KICK = struct.pack("=IIIQ", FrontendRequest.SET_VRING_KICK, 1, 8, 0)
NO_REQUEST = struct.pack("=III", 999, 1, 0)


@contextmanager
def lingering() -> Iterator[socket.socket]:
    """A socket with more to send than is taken, by which closing waits for who doesn't take it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        taker, _ = listener.accept()
    with sock, taker:  # who doesn't take goes first
        sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                sock.send(bytes(1 << 16))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_SECONDS))
        yield sock


def refused(front_end: socket.socket, sock: socket.socket) -> None:
    """With a message that it is wrong in, and gone from here when that is found."""
    socket.send_fds(front_end, [KICK[:12]], [sock.fileno()])
    time.sleep(0.05)
    sock.close()
    front_end.sendall(KICK[12:])


def too_many(front_end: socket.socket, sock: socket.socket) -> None:
    """With as many others as the message may have."""
    with open(os.devnull) as other:
        socket.send_fds(front_end, [KICK], [other.fileno()] * 8 + [sock.fileno()])
    sock.close()


def unread(front_end: socket.socket, sock: socket.socket) -> None:
    """Behind a message that ends the connection."""
    front_end.sendall(NO_REQUEST)
    try:
        socket.send_fds(front_end, [KICK], [sock.fileno()])
    except BrokenPipeError:  # it was closed before, and ours is the last close
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def queued(front_end: socket.socket, sock: socket.socket) -> None:
    """In the queue of a socket that comes with a wrong message."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [sock.fileno()])
        sock.close()
        socket.send_fds(front_end, [KICK], [theirs.fileno()])


def waiting(front_end: socket.socket, sock: socket.socket) -> None:
    """Of one that waits for its turn, and goes before it."""
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(front_end.getpeername())
        socket.send_fds(other, [KICK], [sock.fileno()])
        sock.close()
    front_end.sendall(NO_REQUEST)


@contextmanager
def in_process(path: str) -> Iterator[None]:
    with Server() as server:
        server.listen(path, Echo())
        with server.in_thread():
            yield


@contextmanager
def supervised(path: str) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.supervisor.echo", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield
        finally:
            process.kill()


@pytest.mark.parametrize("way", [refused, too_many, unread, queued, waiting])
@pytest.mark.parametrize("served", [in_process, supervised])
def test_the_next_front_end_is_served_at_once(
    served: Callable[[str], Iterator[None]], way: Callable[[socket.socket, socket.socket], None], tmp_path: Path
) -> None:
    path = str(tmp_path / "s")
    with served(path), lingering() as sock:  # type: ignore[attr-defined]
        with socket.socket(socket.AF_UNIX) as front_end:
            front_end.connect(path)
            way(front_end, sock)
            front_end.settimeout(5)
            with suppress(ConnectionResetError):
                assert front_end.recv(1) == b""
        ram = Ram()
        with Frontend.connect(path, features=SPLIT, timeout=5) as frontend:
            frontend.regions.share([ram.region])
            start_ring(frontend, ram).echo(b"good")
        ram.close()


def test_who_never_had_its_turn_holds_up_nobody(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with lingering() as sock:
        with in_process(path), socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
            for each in (first, second):
                each.connect(path)
            socket.send_fds(second, [KICK], [sock.fileno()])
            sock.close()
            second.close()
            began = time.monotonic()
        assert time.monotonic() - began < LINGER_SECONDS / 2


def test_it_is_closed_all_the_same() -> None:
    """And nothing else stays open with it."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    with lingering() as sock:
        began = time.monotonic()
        ReceivedFd(sock.detach()).close()
        assert time.monotonic() - began < LINGER_SECONDS / 2
    os.close(writing)
    assert os.read(reading, 1) == b""
    os.close(reading)
    ours, theirs = socket.socketpair()
    ReceivedFd(theirs.detach()).close()
    ours.settimeout(5)
    assert ours.recv(1) == b""
    ours.close()
