"""One end of a vhost-user socket: whole messages in and out, with the descriptors that ride on them.

A stream socket knows no messages, and a descriptor arrives with the byte that it was sent with. So a reader never asks
for more than the rest of the message that it is in: `MessageReader` says how many bytes that is, and holds no socket.
A read thus never crosses into the next message, and the descriptors that came with it are this message's. They belong
to the header: the document has them ride on its first byte, and any that come later are a violation.

The kernel installs what descriptors it can while the message is read. Each is in an `OwnedFd` before anything else is
looked at, so whatever is raised, none leaks.

Sending and receiving take a time limit, and a limit of 0 means "not at all": a back end that serves many front ends
from one loop closes a connection rather than wait for one of them.
"""

from __future__ import annotations

import array
import select
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Self

from vhost_user.errors import Disconnected, HostError, PeerError, TimedOut
from vhost_user.message.header import HEADER, Header
from vhost_user.message.message import encode_message
from vhost_user.message.numbers import MAX_FDS
from vhost_user.owned_fd import OwnedFd, close_all, received_fds

# MSG_DONTWAIT for each call: a socket that a peer made shares its O_NONBLOCK with that peer, who may clear it. They are
# integers, since an operator of the enumeration costs as much as a system call.
_SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_RECEIVE_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_TRUNCATED = int(socket.MSG_CTRUNC)


class Received:
    """A message as it came: its header, its payload as bytes, and its descriptors, which are closed with it."""

    __slots__ = ("body", "fds", "header")

    def __init__(self, header: Header, body: bytes, fds: Sequence[OwnedFd] = ()) -> None:
        self.header = header
        self.body = body
        self.fds = list(fds)

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        close_all(self.fds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MessageReader:
    """Puts messages together from bytes, sans-IO: `wanted` bytes at a time, never more."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._header: Header | None = None
        self._fds: list[OwnedFd] = []

    @property
    def wanted(self) -> int:
        """How many bytes are missing from the header or, behind it, from the payload."""
        whole = HEADER.size if self._header is None else self._header.size
        return whole - len(self._bytes)

    @property
    def within_message(self) -> bool:
        """Whether a message has begun and not ended."""
        return self._header is not None or bool(self._bytes)

    def feed(self, data: bytes, fds: Iterable[OwnedFd] = ()) -> Received | None:
        """Take at most `wanted` bytes, and the descriptors that came with them; the message if it is complete now.

        Raises PeerError, and closes every descriptor that it has, for a header that can't be and for descriptors that
        came late; the stream can't be read on after that.
        """
        fds = list(fds)
        began = self.within_message
        self._fds += fds
        try:
            assert len(data) <= self.wanted
            if began and fds:
                raise PeerError("descriptors", len(fds), "ride on the first byte of their message")
            self._bytes += data
            if self._header is None and self.wanted == 0:
                self._header = Header.decode(bytes(self._bytes))
                self._bytes.clear()
        except BaseException:
            self.close()
            raise
        if self._header is None or self.wanted:
            return None
        received = Received(self._header, bytes(self._bytes), self._fds)
        self._header, self._fds = None, []
        self._bytes.clear()
        return received

    def close(self) -> None:
        """Close the descriptors of a message that never ended."""
        close_all(self._fds)
        self._fds = []


class Connection:
    """A connected unix stream socket, taken over. `name` is what errors call it, and `most_fds` how many descriptors a
    message from the peer may bring.

    One thread at a time may receive, and one may send. After any error but TimedOut on receiving before a first byte,
    only `close()` makes sense: the stream is somewhere within a message.
    """

    def __init__(self, sock: socket.socket, name: str = "connection", *, most_fds: int = MAX_FDS) -> None:
        self.name = name
        self._most_fds = most_fds
        self._ancillary_room = socket.CMSG_SPACE(most_fds * array.array("i").itemsize) if most_fds else 0
        self._reader = MessageReader()
        self._sock = sock
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
        return self._reader.within_message

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
        """Send one message with `fds`, which stay the caller's, within `timeout` seconds.

        Raises Disconnected where the peer is gone, and TimedOut where it does not read; a part may be sent then.
        """
        data = encode_message(request, payload, reply=reply, need_reply=need_reply)
        deadline = time.monotonic() + timeout
        while True:
            try:
                sent = self._send(data, fds)
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline, "takes a message")
                continue
            except OSError as error:
                raise Disconnected(self.name, error.strerror) from error
            data, fds = data[sent:], ()
            if not data:
                return

    def _send(self, data: bytes, fds: Sequence[int]) -> int:
        if fds:
            return socket.send_fds(self._sock, [data], list(fds), _SEND_FLAGS)
        return self._sock.send(data, _SEND_FLAGS)

    def receive(self, timeout: float) -> Received:
        """The next message, within `timeout` seconds. Raises Disconnected, TimedOut or PeerError."""
        deadline = time.monotonic() + timeout
        while True:
            received = self.receive_now()
            if received is not None:
                return received
            self._wait(select.POLLIN, deadline, "sends a whole message")

    def receive_now(self) -> Received | None:
        """The next message if all of it has come, without waiting. Raises Disconnected or PeerError."""
        while True:
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    self._reader.wanted, self._ancillary_room, _RECEIVE_FLAGS
                )
            except BlockingIOError:
                return None
            except OSError as error:
                raise Disconnected(self.name, error.strerror) from error
            fds = received_fds(ancillary)
            if flags & _TRUNCATED:
                close_all(fds)
                limit = f"at most {self._most_fds} with a message, and as many as this process may still open"
                raise PeerError("descriptors", f"more than {len(fds)}", limit)
            if not data:
                close_all(fds)
                raise Disconnected(self.name, "within a message" if self.within_message else "between two messages")
            received = self._reader.feed(data, fds)
            if received is not None:
                return received

    def _wait(self, event: int, deadline: float, what: str) -> None:
        poll = select.poll()
        poll.register(self._sock, event)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TimedOut(self.name, "silent", f"{what} within the time given", "give it more time, or close it")

    @property
    def hung_up(self) -> bool:
        """Whether the peer has closed its end. What it sent before may not be read yet."""
        poll = select.poll()
        poll.register(self._sock, 0)
        return bool(poll.poll(0))

    def end(self) -> None:
        """Send nothing more, for good: the peer sees the end, and that it saw it is seen by `hung_up`."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket and what an unfinished message brought; closing twice is allowed."""
        self._reader.close()
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def require_stream_socket(fd: OwnedFd) -> socket.socket:
    """The socket behind a descriptor that a peer sent. Takes it over; PeerError for anything but a unix stream."""
    with fd:
        try:
            sock = socket.socket(fileno=fd.fileno())
        except OSError as error:
            raise PeerError("descriptor", "no socket", "a unix stream socket") from error
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            kind = f"{sock.family.name} {sock.type.name}" if isinstance(sock.family, socket.AddressFamily) else "other"
            sock.detach()
            raise PeerError("descriptor", kind, "a unix stream socket")
        fd.take()
        return sock


def connect_within(sock: socket.socket, path: str, timeout: float) -> None:
    """Connect a unix socket within `timeout` seconds. OSError where that can't be.

    A full backlog is an error at once for a socket that does not block, and nothing tells when there is room again.
    """
    sock.setblocking(False)
    deadline, pause = time.monotonic() + timeout, 0.001
    while True:
        try:
            sock.connect(path)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 0.05)


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
