"""A connection that may break every rule: raw bytes and descriptors out, messages in.

What comes back is read as a well-behaved front end reads it, so that a daemon that answers nonsense is noticed too.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence
from contextlib import suppress

from vhost_user.attack.theme import Outcome, Reaction
from vhost_user.connection import Connection, Received
from vhost_user.errors import Disconnected, PeerError, TimedOut
from vhost_user.message import (
    FRONTEND_MESSAGES,
    HEADER,
    U64,
    VERSION,
    FrontendRequest,
    Payload,
    ProtocolFeature,
    Reply,
)
from vhost_user.unix_socket import connect_within

NEED_REPLY = 0x8
REPLY = 0x4

_FAILURES_OF_STATE_REPLIES = 0xFF
"""The reply to SET_DEVICE_STATE_FD has its error in the lower eight bits; the ninth says whether it has an fd."""


class Line:
    """One connection to the daemon at `path`. `timeout` is in seconds, for each thing waited for.

    Raises OSError where there is nobody.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self.timeout = timeout
        self.acked = ProtocolFeature.NONE
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connect_within(self.sock, path, timeout)
        except BaseException:
            self.sock.close()
            raise
        self._connection = Connection(self.sock, "daemon")

    # Out.

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send these, with one call if the daemon reads. Raises Disconnected where it is gone, TimedOut if it won't."""
        deadline = time.monotonic() + self.timeout
        while data:
            try:
                sent = socket.send_fds(self.sock, [data], list(fds)) if fds else self.sock.send(data)
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
                continue
            except OSError as error:
                raise Disconnected("daemon", error.strerror) from error
            data, fds = data[sent:], ()

    def send(
        self,
        request: int,
        payload: Payload | bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int | None = None,
        size: int | None = None,
    ) -> None:
        """Send a message, with other `flags` or another `size` in its header than it should have, if they are given."""
        body = payload if isinstance(payload, bytes) else payload.encode()
        asks = NEED_REPLY if self.acknowledges else 0
        header = HEADER.pack(request, VERSION | asks if flags is None else flags, len(body) if size is None else size)
        self.send_bytes(header + body, fds)

    @property
    def acknowledges(self) -> bool:
        """Whether the daemon acknowledges what has no reply of its own."""
        return ProtocolFeature.REPLY_ACK in self.acked

    # In.

    def receive(self, timeout: float | None = None) -> Received:
        """The next message. Raises Disconnected, TimedOut, and PeerError for what is none."""
        return self._connection.receive(self.timeout if timeout is None else timeout)

    def ask(self, request: FrontendRequest, payload: Payload | bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send a request that has a reply of its own; the body of that. Descriptors with it are closed."""
        self.send(request, payload, fds, flags=VERSION)
        with self.receive() as received:
            if received.request != request or not received.reply:
                raise PeerError("reply", received.request, f"has to be the reply to {request.name}")
            return received.body

    def ask_number(self, request: FrontendRequest) -> int:
        """Send a request that is answered by a number; the number."""
        return U64.decode(self.ask(request)).value

    def tell(self, request: FrontendRequest, payload: Payload | bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send what an attack needs before it can begin. PeerError where the daemon doesn't take it."""
        self.send(request, payload, fds)
        if not self.acknowledges:
            return
        with self.receive() as received:
            if received.request != request or U64.decode(received.body).value:
                raise PeerError(request.name, received.body.hex(), "has to be acknowledged with 0")

    def answers(self) -> bool:
        """Whether the next message is answered. Raises Disconnected and TimedOut."""
        self.ask_number(FrontendRequest.GET_FEATURES)
        return True

    # Both.

    def provoke(
        self,
        request: int,
        payload: Payload | bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int | None = None,
        size: int | None = None,
    ) -> Outcome:
        """Send a message that should not be, and a good one right behind it; what the daemon made of the first."""
        try:
            self.send(request, payload, fds, flags=flags, size=size)
        except Disconnected:
            return Outcome(Reaction.CLOSED)
        except TimedOut:
            return Outcome(Reaction.SILENT, "and does not read")
        return self.judge(request)

    def judge(self, request: int) -> Outcome:
        """What the daemon makes of a message of this number that was just sent."""
        with suppress(Disconnected, TimedOut):
            self.send(FrontendRequest.GET_FEATURES, flags=VERSION)
        said: Outcome | None = None
        try:
            with self.receive() as received:
                if self._answers(received, request):
                    said = _judged(request, received)
            if said is not None:
                # Twice the same number, where the attack is on GET_FEATURES: this is the second answer.
                self.receive().close()
        except Disconnected:
            detail = f"after {said}" if said is not None and said.reaction is Reaction.ACCEPTED else ""
            return Outcome(Reaction.CLOSED, detail)
        except TimedOut:
            return said or Outcome(Reaction.SILENT)
        except PeerError as error:
            return Outcome(Reaction.CLOSED, f"by us, for a reply that is none: {error}")
        return said or Outcome(Reaction.IGNORED)

    @staticmethod
    def _answers(received: Received, request: int) -> bool:
        return received.reply and received.request == request != FrontendRequest.GET_FEATURES

    def wait_for_silence(self, seconds: float) -> Outcome:
        """Say nothing for so long, and see whether the daemon closes."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return Outcome(Reaction.SILENT, "waits for more")
        try:
            self.receive(seconds).close()
        except Disconnected:
            return Outcome(Reaction.CLOSED)
        except PeerError as error:
            return Outcome(Reaction.SILENT, str(error))
        return Outcome(Reaction.ACCEPTED, "answers half a message")

    def _wait(self, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self.sock, event)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TimedOut("daemon", "silent", "has to read within the time given")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _judged(request: int, received: Received) -> Outcome:
    """A reply to what should not have been asked: yes or no?"""
    spec = FRONTEND_MESSAGES.get(FrontendRequest(request)) if request in set(FrontendRequest) else None
    body = received.body
    if not body:
        refuses = spec is not None and (spec.empty_reply or spec.reply_fds[1] > 0) and not received.fds
        return Outcome(Reaction.REFUSED if refuses else Reaction.ACCEPTED, "an empty reply")
    number = int.from_bytes(body[:8], "little")
    if spec is not None and spec.reply is Reply.ALWAYS and spec.reply_payload is not U64:
        if request == FrontendRequest.SET_DEVICE_STATE_FD and body[0] & _FAILURES_OF_STATE_REPLIES:
            return Outcome(Reaction.REFUSED)
        if len(body) == U64.max_size() and number == 1:
            return Outcome(Reaction.REFUSED, "an acknowledgement of 1 in place of the reply")
        return Outcome(Reaction.ACCEPTED, f"a reply of {len(body)} bytes")
    if request in _NUMBERS_THAT_ARE_ANSWERS:
        return Outcome(Reaction.ACCEPTED, f"answers {number:#x}")
    return Outcome(Reaction.REFUSED, "" if number == 1 else f"{number:#x}") if number else Outcome(Reaction.ACCEPTED)


_NUMBERS_THAT_ARE_ANSWERS = frozenset(
    {
        FrontendRequest.GET_FEATURES,
        FrontendRequest.GET_PROTOCOL_FEATURES,
        FrontendRequest.GET_QUEUE_NUM,
        FrontendRequest.GET_MAX_MEM_SLOTS,
        FrontendRequest.GET_STATUS,
    }
)
"""Whose reply is a number that says nothing of success."""
