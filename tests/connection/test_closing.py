"""A connection that is closed while another thread, or the same one, is in a call of it."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from tests.closing import meanwhile, require_closed_here
from vhost_user import _native
from vhost_user._core import ffi
from vhost_user.connection import Connection
from vhost_user.errors import Disconnected, PeerError, TimedOut
from vhost_user.event import Event
from vhost_user.message import HEADER, FrontendRequest, encode_message

LATE = 30.0
"""Seconds after which a call ends by itself: the test has failed."""

MESSAGE = encode_message(FrontendRequest.SET_OWNER, b"")

PAYLOAD = 100


@pytest.fixture
def ends() -> Iterator[tuple[Connection, socket.socket]]:
    ours, theirs = socket.socketpair()
    with theirs:
        yield Connection(ours), theirs


def fill(connection: Connection) -> None:
    """Until nothing can be sent."""
    with suppress(TimedOut):
        while True:
            connection.send(24, bytes(4000), timeout=0)


@pytest.mark.parametrize("peer_leaves", [True, False])
def test_the_number_is_not_the_next_one_s_while_it_is_read_from(
    ends: tuple[Connection, socket.socket], peer_leaves: bool
) -> None:
    connection, theirs = ends
    number = connection.fileno()
    with ExitStack() as others:
        with meanwhile(lambda: connection.receive(LATE)) as ended:
            connection.close()
            strangers = [socket.socketpair()]
            while max(each.fileno() for each in strangers[-1]) < number:
                strangers.append(socket.socketpair())
            for pair in strangers:
                for each in pair:
                    others.enter_context(each)
                    each.sendall(MESSAGE)
            if peer_leaves:
                theirs.close()
        require_closed_here(ended, "connection")
        assert connection.fileno() == -1
        for pair in strangers:
            for each in pair:
                assert each.recv(100, socket.MSG_DONTWAIT) == MESSAGE


@pytest.mark.parametrize("come", [1, HEADER.size, HEADER.size + 3])
def test_what_half_a_message_brought_is_closed_by_who_waits_for_the_rest(
    ends: tuple[Connection, socket.socket], come: int
) -> None:
    connection, theirs = ends
    read, write = os.pipe()
    socket.send_fds(theirs, [encode_message(37, bytes(40))[:come]], [write])
    os.close(write)
    with meanwhile(lambda: connection.receive(LATE)) as ended:
        connection.close()
    require_closed_here(ended, "connection")
    assert os.read(read, 1) == b""
    os.close(read)
    assert not connection.within_message


def test_who_waits_to_send_is_told_too(ends: tuple[Connection, socket.socket]) -> None:
    connection, _ = ends
    fill(connection)
    with meanwhile(lambda: connection.send(24, bytes(4000), timeout=LATE)) as ended:
        connection.close()
    require_closed_here(ended, "connection")
    assert connection.fileno() == -1


def test_the_last_of_two_who_use_it_closes_it(ends: tuple[Connection, socket.socket]) -> None:
    connection, _ = ends
    fill(connection)
    sending = meanwhile(lambda: connection.send(24, bytes(4000), timeout=LATE))
    with meanwhile(lambda: connection.receive(LATE)) as received, sending as sent:
        connection.close()
    require_closed_here(received, "connection")
    require_closed_here(sent, "connection")
    assert connection.fileno() == -1


def test_who_waits_beside_others_is_told_too(ends: tuple[Connection, socket.socket]) -> None:
    connection, _ = ends
    with Event.create() as event:
        beside = lambda: connection.receive_beside([event.fileno()], time.monotonic() + LATE)  # noqa: E731
        with meanwhile(beside) as ended:
            connection.close()
        require_closed_here(ended, "connection")


@contextmanager
def closed_by_a_signal(connection: Connection) -> Iterator[None]:
    """A signal comes soon, whose handler closes the connection."""
    before = signal.signal(signal.SIGALRM, lambda *_: connection.close())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_handler_of_a_signal_may_close(ends: tuple[Connection, socket.socket]) -> None:
    connection, _ = ends
    with closed_by_a_signal(connection), pytest.raises(Disconnected):
        connection.receive(LATE)
    assert connection.fileno() == -1


def test_a_signal_that_another_thread_got_is_not_slept_over(ends: tuple[Connection, socket.socket]) -> None:
    """As one that comes just before the wait begins: nothing interrupts that."""
    connection, _ = ends
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    try:
        with closed_by_a_signal(connection), pytest.raises(Disconnected):
            connection.receive(LATE)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        done.set()
        other.join()


def test_a_close_while_it_is_asked_whether_the_peer_is_there(
    ends: tuple[Connection, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, _ = ends
    poll = select.poll

    def close_first() -> select.poll:
        connection.close()
        return poll()

    monkeypatch.setattr(select, "poll", close_first)
    assert connection.hung_up
    assert connection.fileno() == -1


def test_the_number_is_not_the_next_one_s_while_it_is_polled(ends: tuple[Connection, socket.socket]) -> None:
    connection, _ = ends
    number, poll = connection.fileno(), select.poll()
    with connection.polled() as polled, connection.polled():
        assert polled == number
        poll.register(polled, 0)
        assert poll.poll(0) == []
        with meanwhile(lambda: poll.poll(LATE * 1000)) as ended:
            connection.close()
        assert ended == [[(number, select.POLLHUP)]]
        assert connection.fileno() == number
    assert connection.fileno() == -1
    with connection.polled() as polled:
        assert polled == -1


def test_an_interrupt_does_not_leave_it_polled(
    ends: tuple[Connection, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, _ = ends

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(connection._polls, "discard", interrupted)
        with suppress(KeyboardInterrupt), connection.polled():
            pass
    connection.close()
    assert connection.fileno() == -1


def test_nothing_is_asked_of_one_that_is_closed(ends: tuple[Connection, socket.socket]) -> None:
    connection, _ = ends
    connection.close()
    connection.close()
    connection.end()
    assert connection.hung_up
    for call in (connection.receive_now, lambda: connection.receive(LATE), lambda: connection.send(1, timeout=LATE)):
        with pytest.raises(Disconnected, match="was closed"):
            call()


def test_it_is_closed_at_whatever_moment() -> None:
    for _ in range(100):
        ours, theirs = socket.socketpair()
        connection = Connection(ours)

        def take(connection: Connection = connection) -> None:
            with suppress(PeerError):
                while True:
                    connection.receive(LATE).close()

        thread = threading.Thread(target=take)
        thread.start()
        with theirs, suppress(BrokenPipeError):
            theirs.sendall(encode_message(24, bytes(400)) * 10 + MESSAGE[:5])
            connection.close()
            thread.join()
        assert connection.fileno() == -1


def test_a_message_that_the_garbage_collector_ends_is_there_for_who_ends_after_it() -> None:
    """A generator, say, that closes its connection."""
    seen, others = [], []

    def last(incoming: _native.Incoming) -> Iterator[None]:
        try:
            yield
        finally:
            size = ffi.offsetof("struct vu_incoming", "payload")
            for _ in range(100):
                others.append(ffi.new("struct vu_incoming *", {"payload": PAYLOAD}))
                ffi.memmove(others[-1], b"\xff" * size, size)
            seen.append(incoming.have)

    incoming = _native.Incoming(8, PAYLOAD)
    using = last(incoming)
    next(using)
    cycle: list[object] = [incoming, using]
    cycle.append(cycle)
    del incoming, using, cycle
    gc.collect()
    assert seen == [0]
