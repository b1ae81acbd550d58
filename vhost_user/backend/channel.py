"""The back-end channel: the socket on which a back end sends requests of its own to the front end.

Nothing here ever waits. The front end may be in the middle of a request on the main socket, and answer nothing on this
one before it has its reply there: two sides that wait for each other. So what needs an answer is sent, and the answer
is taken when it comes. A front end that doesn't read its channel loses notices, of which one unread is as good as many.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable, Sequence, Set

from vhost_user.connection import Connection, require_stream_socket
from vhost_user.errors import PeerError, TimedOut
from vhost_user.message import U64, BackendRequest, name_of, spec_of
from vhost_user.message.numbers import ProtocolFeature
from vhost_user.owned_fd import OwnedFd, close_socket

log = logging.getLogger(__name__)

OnReply = Callable[[bool], None]

_INT = struct.Struct("i")

_UNANSWERED_AT_MOST = 64
"""Requests that wait for an answer at one time: a front end that gives none is not asked any more."""


class BackendChannel:
    """Requests to the front end over `connection`, which is taken over."""

    def __init__(self, connection: Connection, acked: ProtocolFeature) -> None:
        self._connection = connection
        self._acked = acked
        self._waiting: deque[tuple[BackendRequest, OnReply]] = deque()

    def fileno(self) -> int:
        """For the loop: `answer()` is to be called when it can be read."""
        return self._connection.fileno()

    def send(
        self,
        request: BackendRequest,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        on_reply: OnReply | None = None,
    ) -> bool:
        """Send a request; False where the front end doesn't read. `on_reply` is told whether it was granted.

        Raises PeerError where what the request belongs to was not negotiated, and where the channel is closed.
        """
        spec = spec_of(request, self._acked, backend_channel=True)
        if spec.needs & ~self._acked:
            raise PeerError(
                name_of(request, backend_channel=True),
                "sent",
                f"needs {(spec.needs & ~self._acked).name}, which was not negotiated",
            )
        if on_reply is not None and not self._acked & ProtocolFeature.REPLY_ACK:
            raise PeerError("REPLY_ACK", "not negotiated", "has to be negotiated where an answer is wanted")
        if len(self._waiting) >= _UNANSWERED_AT_MOST:
            return False
        try:
            self._connection.send(request, payload, fds, need_reply=on_reply is not None, timeout=0)
        except TimedOut:
            return False
        if on_reply is not None:
            self._waiting.append((request, on_reply))
        return True

    @property
    def unread(self) -> bool:
        """Whether the front end has not read all that was sent: SIOCOUTQ of unix(7)."""
        (left,) = _INT.unpack(fcntl.ioctl(self._connection.fileno(), termios.TIOCOUTQ, bytes(_INT.size)))
        return bool(left)

    def answer(self) -> None:
        """Take the answers that have come. PeerError for what answers nothing; Disconnected at the end."""
        while (received := self._connection.receive_now()) is not None:
            with received:
                if not received.reply or not self._waiting:
                    raise PeerError("back-end channel", received.request, "has to be the answer to a request")
                request, on_reply = self._waiting.popleft()
                if received.request != request:
                    raise PeerError("back-end channel", received.request, f"has to be the answer to request {request}")
                on_reply(U64.decode(received.body).value == 0)

    def close(self) -> None:
        """Close the socket. Who waits for an answer hears that it was not granted."""
        self._connection.close()
        while self._waiting:
            _, on_reply = self._waiting.popleft()
            on_reply(False)


def require_channel(fd: OwnedFd, own_names: Set[object]) -> socket.socket:
    """The socket behind a descriptor that came for the channel. Takes it over; PeerError for what can't be one.

    That is also a front end's end of a connection to this process: its own, or that of another session. Held here, it
    would keep that session from ever ending, as the front end could go and the connection would still be open. One of
    the ends has the name that was listened at, which is one of `own_names`; or the kernel names us as its peer, and an
    end has any name: a pair of sockets has none, so a front end may live in this process.
    """
    sock = require_stream_socket(fd)
    try:
        pid, _, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        names = {sock.getpeername(), sock.getsockname()} - {"", b"", None}
        if names & own_names or (names and pid == os.getpid()):
            raise PeerError(
                "descriptor", "a connection to this process", "has to be a socket whose other end is the front end's"
            )
    except OSError as error:
        close_socket(sock)
        raise PeerError("descriptor", os.strerror(error.errno or 0), "has to be a socket that is connected") from error
    except BaseException:
        close_socket(sock)
        raise
    return sock


_CREDENTIALS = struct.Struct("3i")
"""struct ucred of unix(7): process, user, group."""
