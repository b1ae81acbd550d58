"""The line to one front end: messages from its socket to the session, answers back, until either side has enough."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from vhost_user import _native
from vhost_user.awake import LONGEST_LOOK, looking
from vhost_user.backend.answer import Answer, Deferred
from vhost_user.backend.device import Device
from vhost_user.backend.loop import Call, EventLoop
from vhost_user.backend.session import Session
from vhost_user.connection import ANSWERED, Connection, Received
from vhost_user.errors import Disconnected, FieldError, TimedOut
from vhost_user.message import FrontendRequest, ProtocolFeature, encode_message
from vhost_user.owned_fd import close_all

log = logging.getLogger(__name__)

MESSAGE_TIME_LIMIT = 10.0
"""Seconds within which a message that has begun must end, and within which a new front end must send its first one."""

_MESSAGES_AT_ONCE = 32
"""After so many it is another front end's turn."""

_QUICK = 3 * LONGEST_LOOK
"""Nanoseconds within which a front end asks again that is about to go on asking. To be woken takes a part of them."""


class SessionLink(Protocol):
    """What leads to a session, whoever has the connection."""

    session: Session
    names: set[object]

    def close(self) -> None:
        """End the session. Closing twice is allowed."""


class Link:
    """Serves the front end at the other end of `connection`, which is taken over; `gone` is called when it ends."""

    def __init__(
        self,
        device: Device,
        loop: EventLoop,
        connection: Connection,
        protocol_features: ProtocolFeature,
        own_names: Callable[[], set[object]],
        gone: Callable[[], None],
    ) -> None:
        self.session = Session(device, loop, protocol_features=protocol_features, own_names=own_names)
        self.names = connection.names
        self._loop, self._loop_fd = loop, loop.fileno()
        self._connection = connection
        self._gone = gone
        self._closed = False
        self._served_at = 0
        self._timer: Call | None = loop.call_later(MESSAGE_TIME_LIMIT, self._too_slow)
        self.session.rings.on_trouble = self._check_memory
        if not log.isEnabledFor(logging.DEBUG):  # else each message is told of
            # It confirms what was sent before it, so it is asked often.
            connection.answer_at_once(FrontendRequest.GET_FEATURES, self.session.offers.payload)
        loop.watch(connection, self._readable)
        log.info("%s: connected", connection.name)

    def _readable(self) -> None:
        """Serve what has come; and what comes soon, unless a descriptor of the loop's is ready. A front end that takes
        longer than `_QUICK` is not looked for again until it was quick once more."""
        if time.monotonic_ns() - self._served_at < _QUICK and looking.acquire(blocking=False):
            try:
                self._serve(LONGEST_LOOK)
            finally:
                looking.release()
        else:
            self._serve(0)

    def _serve(self, patience: int) -> None:
        try:
            for _ in range(_MESSAGES_AT_ONCE):
                received = self._connection.receive_now(patience, self._loop_fd)
                if received is None:
                    break
                if self._timer is not None:
                    self._set_timer(None)
                if received is not ANSWERED and not self._handle(received):
                    return
                self._check_memory()
                if self._closed:
                    return
                self._served_at = time.monotonic_ns()
                if patience and self._others_wait():
                    break  # each in its turn
            if self._connection.within_message and self._timer is None:
                self._set_timer(self._loop.call_later(MESSAGE_TIME_LIMIT, self._too_slow))
        except Disconnected as error:
            log.info("%s", error)
            self.close()
        except FieldError as error:
            log.warning("%s: closed: %s", self._connection.name, error)
            self.close()
        except Exception:
            log.exception("%s: closed, by a mistake of ours", self._connection.name)
            self.close()

    def _others_wait(self) -> bool:
        """Whether a descriptor of the loop's is ready that is not this connection."""
        return _native.can_be_read(self._loop_fd) and self._loop.ready_besides(self._connection)

    def _handle(self, received: Received) -> bool:
        """Whether the answer is known, and sent."""
        request = received.request
        answer = self.session.handle(received)
        if isinstance(answer, Deferred):
            self._defer(request, answer)
            return False
        if answer is not None:
            self._send(request, answer)
        return True

    def _send(self, request: int, answer: Answer) -> None:
        data, owned = encode_message(request, answer.payload, reply=True), answer.fds
        try:
            self._connection.send_bytes(data, [fd.fileno() for fd in owned] if owned else (), timeout=0)
        except TimedOut as error:
            error.limit = "has to read the replies to what it asks"
            raise
        finally:
            if owned:
                close_all(owned)

    def _defer(self, request: int, deferred: Deferred) -> None:
        """Read on when the answer is known and sent."""
        self._loop.forget(self._connection)

        def resume(answer: Answer) -> None:
            if self._closed:
                return
            try:
                self._send(request, answer)
            except FieldError as error:
                log.info("%s", error)
                self.close()
                return
            self._loop.watch(self._connection, self._readable)

        deferred.when_known(resume)

    def _set_timer(self, timer: Call | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = timer

    def _too_slow(self) -> None:
        log.warning("%s: closed: no whole message in %g seconds", self._connection.name, MESSAGE_TIME_LIMIT)
        self.close()

    def _check_memory(self) -> None:
        if self._closed:
            return
        try:
            self.session.require_memory()
        except FieldError as error:
            log.warning("%s: closed: %s", self._connection.name, error)
            self.close()

    def close(self) -> None:
        """End the session. Closing twice is allowed."""
        if self._closed:
            return
        self._closed = True
        self._set_timer(None)
        self._loop.forget(self._connection)
        self._connection.close()
        try:
            self.session.close()
        finally:
            self._gone()
