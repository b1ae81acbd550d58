"""Real sockets: descriptors that arrive, limits of time and number, ends."""

from __future__ import annotations

import array
import errno
import os
import signal
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from vhost_user import _native
from vhost_user.connection import Connection, connect, require_stream_socket
from vhost_user.errors import Disconnected, HostError, PeerError, TimedOut, UsageError
from vhost_user.event import Event
from vhost_user.message import MAX_FDS, FrontendRequest, encode_message
from vhost_user.owned_fd import OwnedFd

MESSAGE = encode_message(FrontendRequest.SET_OWNER, b"")


@pytest.fixture
def ends() -> tuple[Connection, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    return Connection(ours), theirs


def send_often(connection: Connection) -> None:
    for _ in range(10_000):
        connection.send(24, bytes(4000), timeout=0)


def send_fds(sock: socket.socket, data: bytes, count: int) -> None:
    with open("/dev/null", "rb") as file:
        socket.send_fds(sock, [data], [file.fileno()] * count)


def test_what_is_sent_is_received_with_its_descriptors(ends: tuple[Connection, socket.socket]) -> None:
    connection, theirs = ends
    with connection, Connection(theirs) as other, open("/dev/zero", "rb") as file:
        connection.send(37, b"x" * 40, [file.fileno()] * 8, need_reply=True, timeout=1)
        connection.send(38, b"", reply=True, timeout=1)
        with other.receive(1) as first, other.receive(1) as second:
            assert (first.request, first.body, len(first.fds)) == (37, b"x" * 40, 8)
            assert all(Path(f"/proc/self/fd/{fd.fileno()}").readlink() == Path("/dev/zero") for fd in first.fds)
            assert not any(os.get_inheritable(fd.fileno()) for fd in first.fds)
            assert second.reply
            assert second.fds == []


def test_a_read_never_crosses_into_the_next_message(ends: tuple[Connection, socket.socket]) -> None:
    connection, theirs = ends
    with connection, theirs:
        theirs.sendall(MESSAGE + MESSAGE)
        send_fds(theirs, MESSAGE, 1)
        with connection.receive(1) as one, connection.receive(1) as two, connection.receive(1) as three:
            assert [len(each.fds) for each in (one, two, three)] == [0, 0, 1]


@pytest.mark.parametrize("count", [MAX_FDS + 1, 64, 253])
def test_too_many_descriptors_are_refused_and_none_is_kept(ends: tuple[Connection, socket.socket], count: int) -> None:
    connection, theirs = ends
    with connection, theirs:
        send_fds(theirs, MESSAGE, count)
        with pytest.raises(PeerError, match="at most 8"):
            connection.receive(1)


def test_late_descriptors_are_refused(ends: tuple[Connection, socket.socket]) -> None:
    connection, theirs = ends
    with connection, theirs:
        theirs.sendall(MESSAGE[:4])
        assert connection.receive_now() is None
        assert connection.within_message
        send_fds(theirs, MESSAGE[4:], 1)
        with pytest.raises(PeerError, match="first byte"):
            connection.receive_now()


def test_other_ancillary_data_is_ignored(ends: tuple[Connection, socket.socket]) -> None:
    connection, theirs = ends
    with connection, theirs:
        credentials = array.array("i", [os.getpid(), os.getuid(), os.getgid()])
        theirs.sendmsg([MESSAGE], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)])
        with connection.receive(1) as received:
            assert received.fds == []


@pytest.mark.parametrize("sent", [b"", MESSAGE[:7]], ids=["between messages", "within one"])
def test_the_end_is_told(ends: tuple[Connection, socket.socket], sent: bytes) -> None:
    connection, theirs = ends
    with connection:
        theirs.sendall(sent)
        theirs.close()
        with pytest.raises(Disconnected, match="within" if sent else "between"):
            connection.receive(1)


def test_silence_has_a_limit_and_the_message_can_still_come(ends: tuple[Connection, socket.socket]) -> None:
    connection, theirs = ends
    with connection, theirs:
        theirs.sendall(MESSAGE[:5])
        with pytest.raises(TimedOut):
            connection.receive(0.01)
        theirs.sendall(MESSAGE[5:])
        with connection.receive(1) as received:
            assert received.request == FrontendRequest.SET_OWNER


def test_who_does_not_read_is_not_waited_for(ends: tuple[Connection, socket.socket]) -> None:
    connection, theirs = ends
    with connection, theirs, pytest.raises(TimedOut, match="has to take a message"):
        send_often(connection)


def test_a_long_message_is_sent_in_as_many_pieces_as_it_takes(ends: tuple[Connection, socket.socket]) -> None:
    connection, theirs = ends
    got = bytearray()

    def read() -> None:
        while len(got) < len(whole):
            got.extend(theirs.recv(4096))

    whole = encode_message(24, bytes(4000)) * 200
    with connection, theirs:
        thread = threading.Thread(target=read)
        thread.start()
        for _ in range(200):
            connection.send(24, bytes(4000), timeout=5)
        thread.join()
    assert got == whole


def test_sending_to_nobody_is_the_end(ends: tuple[Connection, socket.socket]) -> None:
    connection, theirs = ends
    with connection:
        theirs.close()
        with pytest.raises(Disconnected):
            connection.send(1, timeout=1)


@pytest.mark.parametrize("fds", [[999_999], [0, -1], [0] * 254])
def test_descriptors_that_cannot_be_sent_are_no_end(ends: tuple[Connection, socket.socket], fds: list[int]) -> None:
    connection, theirs = ends
    with connection, Connection(theirs) as other:
        with pytest.raises(UsageError, match="have to be open"):
            connection.send(5, b"lost", fds, timeout=1)
        connection.send(6, b"found", timeout=1)
        with other.receive(1) as received:
            assert (received.request, received.body, received.fds) == (6, b"found", [])


@pytest.mark.parametrize("number", [errno.ETOOMANYREFS, errno.ENOMEM, errno.EMFILE])
def test_a_host_that_takes_no_descriptors_now_is_no_end(
    ends: tuple[Connection, socket.socket], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    connection, theirs = ends
    with connection, Connection(theirs) as other:
        with monkeypatch.context() as patch:
            patch.setattr(_native, "send", refuse)
            with pytest.raises(HostError, match=errno.errorcode[number]):
                connection.send(5, b"lost", [0], timeout=1)
        connection.send(6, b"found", [0], timeout=1)
        with other.receive(1) as received:
            assert (received.request, received.body, len(received.fds)) == (6, b"found", 1)


def test_descriptors_for_nobody_are_the_end(ends: tuple[Connection, socket.socket]) -> None:
    connection, theirs = ends
    theirs.close()
    with pytest.raises(Disconnected, match="closed by the peer"):
        connection.send(5, b"", [0], timeout=1)
    connection.close()
    with pytest.raises(Disconnected, match="was closed"):
        connection.send(5, b"", [0], timeout=1)


def test_a_socket_that_a_peer_sent_is_looked_at() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, require_stream_socket(OwnedFd(theirs.detach())) as sock:
        sock.sendall(b"x")
        assert ours.recv(1) == b"x"


@pytest.mark.parametrize("kind", ["file", "datagram", "inet"])
def test_anything_but_a_unix_stream_is_refused(kind: str) -> None:
    if kind == "file":
        fd = os.open("/dev/null", os.O_RDONLY)
    elif kind == "inet":
        fd = socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach()
    else:
        fd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()
    owned = OwnedFd(fd)
    with pytest.raises(PeerError, match="unix stream"):
        require_stream_socket(owned)
    assert owned.closed


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="start the daemon first"):
        connect(str(tmp_path / "nothing"), timeout=1)


@pytest.mark.parametrize("most", [0, 1])
def test_who_needs_no_descriptors_takes_none(most: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with Connection(ours, most_fds=most) as connection, theirs:
        send_fds(theirs, MESSAGE[:4], most + 4)
        with pytest.raises(PeerError, match=f"at most {most}"):
            connection.receive_now()


def test_a_socket_that_its_peer_makes_blocking_is_not_waited_for() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours.dup() as kept, Connection(ours) as connection, theirs:
        kept.setblocking(True)
        assert connection.receive_now() is None
        theirs.sendall(MESSAGE[:6])
        assert connection.receive_now() is None
        with pytest.raises(TimedOut):
            send_often(connection)


class TestBeside:
    """Waiting for a message and for other descriptors at the same time."""

    def test_what_is_watched_comes_first_while_nothing_else_does(self, ends: tuple[Connection, socket.socket]) -> None:
        connection, theirs = ends
        with connection, theirs, Event.create() as event:
            event.signal()
            assert connection.receive_beside([event.fileno()], time.monotonic() + 30) is None

    def test_a_message_that_is_there_comes_before_it(self, ends: tuple[Connection, socket.socket]) -> None:
        connection, theirs = ends
        with connection, theirs, Event.create() as event:
            event.signal()
            theirs.sendall(MESSAGE)
            received = connection.receive_beside([event.fileno()], time.monotonic() + 30)
            assert received is not None

    def test_half_a_message_waits_beside_it(self, ends: tuple[Connection, socket.socket]) -> None:
        connection, theirs = ends
        with connection, theirs, Event.create() as event:
            theirs.sendall(MESSAGE[:5])
            assert connection.receive_beside([event.fileno()], time.monotonic() + 0.01) is None
            event.signal()
            assert connection.receive_beside([event.fileno()], time.monotonic() + 30) is None
            theirs.sendall(MESSAGE[5:])
            received = connection.receive_beside([event.fileno()], time.monotonic() + 30)
            assert received is not None
            assert received.request == FrontendRequest.SET_OWNER

    def test_many_are_watched(self, ends: tuple[Connection, socket.socket]) -> None:
        connection, theirs = ends
        with ExitStack() as stack:
            stack.enter_context(connection)
            stack.enter_context(theirs)
            events = [stack.enter_context(Event.create()) for _ in range(100)]
            events[-1].signal()
            assert connection.receive_beside([event.fileno() for event in events], time.monotonic() + 30) is None

    def test_it_may_have_ended(self, ends: tuple[Connection, socket.socket]) -> None:
        connection, theirs = ends
        reading, writing = os.pipe2(os.O_CLOEXEC)
        os.close(writing)
        with connection, theirs, OwnedFd(reading):
            assert connection.receive_beside([reading], time.monotonic() + 30) is None

    def test_a_signal_is_looked_after_and_waiting_goes_on(self, ends: tuple[Connection, socket.socket]) -> None:
        connection, theirs = ends
        before = signal.signal(signal.SIGALRM, lambda *_: theirs.sendall(MESSAGE))
        try:
            with connection, theirs:
                signal.setitimer(signal.ITIMER_REAL, 0.02)
                with connection.receive(30) as received:
                    assert received.request == FrontendRequest.SET_OWNER
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def test_no_limit_is_one(self, ends: tuple[Connection, socket.socket]) -> None:
        connection, theirs = ends
        with connection, theirs, Event.create() as event:
            event.signal()
            assert connection.receive_beside([event.fileno()], float("inf")) is None
