"""One end of a vhost-user socket: whole messages in and out, with the descriptors that ride on them.

A stream socket knows no messages, and a descriptor arrives with the byte that it was sent with. So no read asks for
more than the rest of the header or, behind it, of the payload that it is in: it never crosses into the next message,
and the descriptors that came with it are this message's. They belong to the header: the document has them ride on its
first byte, and any that come later are a violation. That is done in C (csrc/socket.c), a whole message in a call.

The kernel installs what descriptors it can while the message is read. They are the C core's until the message is whole,
and each is in an `OwnedFd` before anything else is looked at, so whatever is raised, none leaks.

Sending and receiving take a time limit, and a limit of 0 means "not at all": a back end that serves many front ends
from one loop closes a connection rather than wait for one of them.

The number of a descriptor that is closed is the next one's that anybody opens. So while a thread is in a call of the C
core with the socket's number, or polls it, another one that closes the connection only shuts the socket down. That ends
the call, and who made it closes the descriptor.
"""

from __future__ import annotations

import errno
import select
import socket
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Self
from weakref import WeakSet

from vhost_user import _native
from vhost_user.awake import LONGEST_LOOK
from vhost_user.errors import Disconnected, FieldError, HostError, PeerError, TimedOut, UsageError
from vhost_user.message.header import HEADER, Header
from vhost_user.message.message import encode_message
from vhost_user.message.numbers import MAX_FDS
from vhost_user.message.table import MAX_PAYLOAD
from vhost_user.owned_fd import OwnedFd, ReceivedFd, close_all, close_socket
from vhost_user.unix_socket import connect_within

assert MAX_FDS <= _native.MOST_FDS

_WHOLE = _native.WHOLE

_LONGEST_WAIT = 1_000_000_000
"""Nanoseconds. Python runs a signal's handler when a wait is over, also where the signal came just before it began."""

_NEVER = 9e9
"""Seconds of time.monotonic(): 285 years, in nanoseconds about as many as 64 bits have."""


class Received(Header):
    """A message as it came: its header, its payload as bytes, and its descriptors, which are closed with it."""

    __slots__ = ("body", "fds")

    def __init__(self, request: int, flags: int, body: bytes, fds: list[OwnedFd] | None = None) -> None:
        self.request, self.flags, self.size = request, flags, len(body)
        self.body = body
        self.fds = [] if fds is None else fds

    @classmethod
    def of(cls, data: bytes, fds: list[OwnedFd]) -> Self:
        """The message that these bytes are, which somebody else received. PeerError where they begin with no header."""
        header = Header.decode(data[: HEADER.size])
        return cls(header.request, header.flags, data[HEADER.size :], fds)

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        if self.fds:
            close_all(self.fds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


ANSWERED = Received(0, 0, b"")
"""Stands for a message that was answered where it was read; see `Connection.answer_at_once`."""


class _Poll:
    """Somebody polls the socket."""


class Connection:
    """A connected unix stream socket, taken over. `name` is what errors call it, and `most_fds` how many descriptors a
    message from the peer may bring.

    One thread at a time may receive, and one may send; any may close. After any error but TimedOut on receiving before
    a first byte, only `close()` makes sense: the stream is somewhere within a message.
    """

    def __init__(self, sock: socket.socket, name: str = "connection", *, most_fds: int = MAX_FDS) -> None:
        self.name = name
        self._most_fds = most_fds
        self._incoming = _native.Incoming(most_fds, MAX_PAYLOAD)
        self._sock = sock
        self._receiving, self._sending = threading.Lock(), threading.Lock()
        self._closing = threading.RLock()
        self._polls: WeakSet[_Poll] = WeakSet()
        self._closed = False
        sock.setblocking(False)

    def fileno(self) -> int:
        """For a selector."""
        return self._sock.fileno()

    @property
    def names(self) -> set[object]:
        """What the socket's ends are bound to: mostly the path that one of them listened at."""
        try:
            return {self._sock.getsockname(), self._sock.getpeername()} - {"", b"", None}
        except OSError:
            return set()

    @property
    def within_message(self) -> bool:
        """Whether a part of a message has come."""
        return self._incoming.have > 0

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        reply: bool = False,
        need_reply: bool = False,
        timeout: float,
    ) -> None:
        """Send one message with `fds`, which stay the caller's, within `timeout` seconds; errors as in `send_bytes`."""
        self.send_bytes(encode_message(request, payload, reply=reply, need_reply=need_reply), fds, timeout=timeout)

    def send_bytes(self, data: bytes, fds: Sequence[int] = (), *, timeout: float) -> None:
        """Send one message as `encode_message` makes it, with `fds`, which stay the caller's.

        Raises Disconnected where the peer is gone, and TimedOut where it does not read; a part may be sent then. Raises
        UsageError or HostError where `fds` can't be sent: then nothing was, and the connection is as good as before.
        """
        deadline = None
        try:
            with self._sending:
                while True:
                    try:
                        sent = _native.send(self._sock.fileno(), data, fds)
                    except BlockingIOError:
                        deadline = time.monotonic() + timeout if deadline is None else deadline
                        self._wait_to_send(deadline)
                        continue
                    if sent == len(data):
                        return
                    data, fds = data[sent:], ()
        except OSError as error:
            ended = not fds or self._closed or isinstance(error, ConnectionError) or error.errno == errno.ENOTCONN
            raise self._ended(error.strerror) if ended else _unsent(fds, error) from error
        finally:
            if self._closed:
                self._close_unless_used()

    def _wait_to_send(self, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise self._timed_out("take a message")

    def receive(self, timeout: float) -> Received:
        """The next message, within `timeout` seconds. Raises Disconnected, TimedOut or PeerError."""
        received = self.receive_beside((), time.monotonic() + timeout)
        if received is None:
            raise self._timed_out("send a whole message")
        return received

    def receive_beside(self, watched: Collection[int], deadline: float) -> Received | None:
        """The next message, unless it has not come by `deadline`, a time of time.monotonic(), or one of the descriptors
        `watched` has something or is broken. Raises Disconnected or PeerError."""
        end, fds = int(min(deadline, _NEVER) * 1e9), tuple(watched) if watched else ()
        try:
            with self._receiving:
                while True:
                    pause = min(end, time.monotonic_ns() + _LONGEST_WAIT)
                    try:
                        result = self._incoming.wait(self._sock.fileno(), fds, pause, LONGEST_LOOK)
                    except InterruptedError:
                        continue  # the signal's handler has run
                    if result == _native.ANSWERED:
                        continue
                    if result != _native.NOT_YET or pause == end:
                        return self._taken(result)
        except OSError as error:
            raise self._ended(error.strerror) from error
        finally:
            if self._closed:
                self._close_unless_used()

    def answer_at_once(self, request: int, payload: bytes) -> None:
        """Have this request, which always has the same answer, answered where it is read. It is one that has a header
        alone, and asks for nothing else: in any other form it is received."""
        self._incoming.answer(request, encode_message(request, payload, reply=True))

    def receive_now(self, patience: int = 0, others: int = -1) -> Received | None:
        """The next message if all of it has come, without sleeping: or comes within `patience` nanoseconds of looking
        for it. `others` may be an epoll that watches this connection: the first that it tells of ends the look. One
        that is answered already is ANSWERED. Raises Disconnected or PeerError."""
        try:
            with self._receiving:
                result = self._incoming.receive(self._sock.fileno(), patience, others)
                return ANSWERED if result == _native.ANSWERED else self._taken(result)
        except OSError as error:
            raise self._ended(error.strerror) from error
        finally:
            if self._closed:
                self._close_unless_used()

    def _taken(self, result: int) -> Received | None:
        if result == _WHOLE:
            request, flags, body, fds = self._incoming.take()
            return Received(request, flags, body, [ReceivedFd(fd) for fd in fds] if fds else [])
        if result in (_native.NOT_YET, _native.WATCHED):
            return None
        raise self._refusal(result)

    def _refusal(self, result: int) -> PeerError:
        """What is said of a stream that can't be read on."""
        request, flags, size, fd_count = self._incoming.head
        if result == _native.ENDED:
            return self._ended("within a message" if self.within_message else "between two messages")
        if result == _native.LATE_FDS:
            return PeerError("descriptors", fd_count, "have to ride on the first byte of their message")
        if result == _native.TRUNCATED_FDS:
            limit = f"have to be at most {self._most_fds} with a message, and as many as this process may still open"
            return PeerError("descriptors", f"more than {fd_count}", limit)
        assert result == _native.BAD_HEADER
        Header(request, flags, size).check()
        raise AssertionError(f"nothing is wrong with request {request}, flags {flags:#x}, size {size}")

    def _ended(self, how: str | None) -> Disconnected:
        return Disconnected(self.name, "meanwhile", "was closed") if self._closed else Disconnected(self.name, how)

    def _timed_out(self, what: str) -> TimedOut:
        return TimedOut(self.name, "silent", f"has to {what} within the time given", "give it more time, or close it")

    @contextmanager
    def polled(self) -> Iterator[int]:
        """The socket's number, to be polled beside others: it is no other's before the end of the block, and hangs up
        when either side closes. -1 where that was before. Any number of threads may poll."""
        poll = _Poll()  # known weakly: an interrupt between any two steps leaves none behind
        try:
            with self._closing:
                self._polls.add(poll)
            yield -1 if self._closed else self._sock.fileno()
        finally:
            self._polls.discard(poll)
            if self._closed:
                self._close_unless_used()

    @property
    def hung_up(self) -> bool:
        """Whether the peer has closed its end. What it sent before may not be read yet."""
        try:
            with self._sending:
                if self._closed:
                    return True
                poll = select.poll()
                poll.register(self._sock, 0)
                return bool(poll.poll(0))
        finally:
            if self._closed:
                self._close_unless_used()

    def end(self) -> None:
        """Send nothing more, for good: the peer sees the end, and that it saw it is seen by `hung_up`."""
        self._shut_down(socket.SHUT_WR)

    def _shut_down(self, how: int) -> None:
        with self._closing, suppress(OSError):
            self._sock.shutdown(how)

    def close(self) -> None:
        """Close the socket and what an unfinished message brought; closing twice is allowed.

        Does not wait for a thread that sends or receives: its call ends with Disconnected, and it closes them then.
        """
        self._closed = True
        with self._closing:
            if not self._close_unless_used():
                self._shut_down(socket.SHUT_RDWR)

    def _close_unless_used(self) -> bool:
        """Close what `close()` was to; whether no call was under way. Each call tries it when it has ended."""
        with self._closing:
            if self._polls or not self._receiving.acquire(blocking=False):
                return False
            try:
                if not self._sending.acquire(blocking=False):
                    return False
                try:
                    self._incoming.drop()
                    close_socket(self._sock)
                finally:
                    self._sending.release()
            finally:
                self._receiving.release()
            return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unsent(fds: Sequence[int], error: OSError) -> FieldError:
    """Why the kernel took no message with `fds`."""
    if error.errno in (errno.EBADF, errno.EINVAL):
        return UsageError("descriptors", list(fds), "have to be open, and of a kind that can be sent", "send others")
    return HostError.from_os_error("descriptors", list(fds), "sendmsg", error, "try again later")


def require_stream_socket(fd: OwnedFd) -> socket.socket:
    """The socket behind a descriptor that a peer sent. Takes it over; PeerError for anything but a unix stream."""
    with fd:
        try:
            sock = socket.socket(fileno=fd.fileno())
        except OSError as error:
            raise PeerError("descriptor", "no socket", "has to be a unix stream socket") from error
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            kind = f"{sock.family.name} {sock.type.name}" if isinstance(sock.family, socket.AddressFamily) else "other"
            sock.detach()
            raise PeerError("descriptor", kind, "has to be a unix stream socket")
        fd.take()
        return sock


def connect(path: str, *, timeout: float) -> Connection:
    """Connect to the daemon that listens at `path`.

    Raises HostError where nobody does, or where its backlog stays full for `timeout` seconds.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connect_within(sock, path, timeout)
    except OSError as error:
        sock.close()
        remedy = "start the daemon first, and look at the path and its permissions"
        raise HostError.from_os_error("socket", path, "connect", error, remedy) from error
    return Connection(sock, path)
