"""The back-end channel: the socket on which a back end sends requests of its own to the front end.

Nothing here ever waits. The front end may be in the middle of a request on the main socket, and answer nothing on this
one before it has its reply there: two sides that wait for each other. So what needs an answer is sent, and the answer
is taken when it comes. A front end that doesn't read its channel loses notices, of which one unread is as good as many.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

from vhost_user.connection import Connection
from vhost_user.errors import PeerError, TimedOut
from vhost_user.message import U64, BackendRequest, name_of, spec_of
from vhost_user.message.numbers import ProtocolFeature

log = logging.getLogger(__name__)

OnReply = Callable[[bool], None]

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
            raise PeerError(name_of(request, backend_channel=True), "sent", f"negotiated {spec.needs!r}")
        if on_reply is not None and not self._acked & ProtocolFeature.REPLY_ACK:
            raise PeerError("REPLY_ACK", "not negotiated", "negotiated where an answer is wanted")
        if len(self._waiting) >= _UNANSWERED_AT_MOST:
            return False
        try:
            self._connection.send(request, payload, fds, need_reply=on_reply is not None, timeout=0)
        except TimedOut:
            return False
        if on_reply is not None:
            self._waiting.append((request, on_reply))
        return True

    def answer(self) -> None:
        """Take the answers that have come. PeerError for what answers nothing; Disconnected at the end."""
        while (received := self._connection.receive_now()) is not None:
            with received:
                if not received.header.reply or not self._waiting:
                    raise PeerError("back-end channel", received.header.request, "the answer to a request")
                request, on_reply = self._waiting.popleft()
                if received.header.request != request:
                    raise PeerError("back-end channel", received.header.request, f"the answer to request {request}")
                on_reply(U64.decode(received.body).value == 0)

    def close(self) -> None:
        """Close the socket. Who waits for an answer hears that it was not granted."""
        self._connection.close()
        while self._waiting:
            _, on_reply = self._waiting.popleft()
            on_reply(False)
