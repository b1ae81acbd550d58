"""Requests to a back end and what it answers, one at a time.

A request that has no reply of its own is acknowledged wherever REPLY_ACK was negotiated, so that a refusal is known
where it happens. What a back end sends on its own channel is looked at while its answer is waited for: some wait for
theirs before they give ours.

A wrong answer, or none in time, leaves the stream in a state that nothing can be concluded from. The back end is then
given up: the connection is ended, as the document has it, and stays so. But a back end that is stuck doesn't see that,
and has what it was given until it closes its own end. So that end is watched: `lingering` says whether it is open.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from vhost_user.connection import Connection, Received
from vhost_user.errors import Disconnected, FieldError, HostError, PeerError, Refused, TimedOut, UsageError
from vhost_user.frontend.ending import Ending
from vhost_user.message import (
    U64,
    FrontendRequest,
    MessageSpec,
    Payload,
    ProtocolFeature,
    Reply,
    decode_reply,
    encode_message,
    name_of,
    specs_of,
)
from vhost_user.owned_fd import OwnedFd

log = logging.getLogger(__name__)

Answer = TypeVar("Answer", bound=Payload)

_Answer = tuple[Payload, list[OwnedFd]]

_Events = Mapping[int, int]
"""By descriptor, what poll(2) is to tell of."""

_CONFIRMATION = encode_message(FrontendRequest.GET_FEATURES, b"")

_SUCCESS = U64(0).encode()
"""The payload of nearly every acknowledgement. One that has another, or descriptors, is decoded and judged."""


_NONE: Collection[int] = ()


def _nothing() -> None:
    """What there is to do for a descriptor that is watched no more."""


class Requests:
    """The front end's side of the main socket. `timeout` in seconds is for each request. Any thread may ask."""

    def __init__(self, connection: Connection, timeout: float) -> None:
        self._agree(ProtocolFeature.NONE, postcopy=False)
        self.timeout = timeout
        self.lock = threading.RLock()
        self.ending = Ending(connection.name)
        """Of the front end: a connection may end and another one come."""
        self.watched: dict[int, Callable[[], None]] = {}
        """What to look after while an answer is waited for: by descriptor, what is called when it can be read."""
        self._busy = False
        self._afterwards: deque[Callable[[], None]] = deque()
        self._connection: Connection | None = connection
        self._given_up: Connection | None = None
        self._name = connection.name
        self._exchanging = threading.RLock()

    @property
    def acked(self) -> ProtocolFeature:
        """The protocol features that were negotiated."""
        return self._acked

    @acked.setter
    def acked(self, acked: ProtocolFeature) -> None:
        self._agree(acked, postcopy=self._postcopy)

    @property
    def acknowledged(self) -> bool:
        """Whether what has no reply of its own is acknowledged."""
        return self._acknowledged

    @property
    def postcopy(self) -> bool:
        """Whether POSTCOPY_LISTEN was sent, and no POSTCOPY_END."""
        return self._postcopy

    @postcopy.setter
    def postcopy(self, postcopy: bool) -> None:
        self._agree(self._acked, postcopy=postcopy)

    def _agree(self, acked: ProtocolFeature, *, postcopy: bool) -> None:
        """What follows for messages is found once, and not for each."""
        specs, acknowledged = specs_of(acked, postcopy=postcopy), ProtocolFeature.REPLY_ACK in acked
        self._acked, self._postcopy, self._specs, self._acknowledged = acked, postcopy, specs, acknowledged

    @property
    def connected(self) -> bool:
        """Whether nothing has ended the connection, as far as is known."""
        return self._connection is not None

    @property
    def lingering(self) -> bool:
        """Whether a back end that was given up has its end open still, and may use all that it was given."""
        with self.lock:
            given_up = self._given_up  # close() does not wait for the lock
            if given_up is not None and given_up.hung_up:
                given_up.close()
                self._given_up = given_up = None
            return given_up is not None

    def notice_end(self) -> None:
        """Close the connection if the back end closed its end; nothing is sent or awaited."""
        with self.lock:
            connection = self._connection  # close() does not wait for the lock
            if connection is not None and connection.hung_up:
                self.close()

    def tell(self, request: FrontendRequest, payload: Payload | None = None, fds: Sequence[int] = ()) -> None:
        """Send a message that has no reply of its own, and wait for its acknowledgement if there can be one.

        Raises Refused where the back end acknowledges a failure, which leaves the connection as good as it was;
        Disconnected, TimedOut and PeerError as `ask` does; UsageError or HostError where `fds` can't be sent, which
        leaves the connection as well.
        """
        with self.lock:
            spec, acked = self._specs[request], self._acknowledged
            assert spec.reply is Reply.ACK
            answer = self._exchange(_encode(request, payload, need_reply=acked), fds, spec if acked else None)
            if answer is not None:
                code, _ = answer
                assert isinstance(code, U64)
                raise Refused(name_of(request), f"{payload or ''}", f"was acknowledged with failure {code.value}")

    def ask(
        self, request: FrontendRequest, kind: type[Answer], payload: Payload | None = None, fds: Sequence[int] = ()
    ) -> Answer:
        """Send a message that has a reply of its own, of `kind`, which brings no descriptor.

        Raises Disconnected where the back end is gone, TimedOut where it doesn't answer, PeerError for a wrong answer;
        the connection is closed then.
        """
        answer, received = self.ask_for_fds(request, kind, payload, fds)
        for fd in received:
            fd.close()
        return answer

    def ask_for_fds(
        self, request: FrontendRequest, kind: type[Answer], payload: Payload | None = None, fds: Sequence[int] = ()
    ) -> tuple[Answer, list[OwnedFd]]:
        """As `ask`, for a reply that may bring descriptors, which are the caller's."""
        with self.lock:
            spec = self._specs[request]
            assert spec.reply is Reply.ALWAYS
            answer = self._exchange(_encode(request, payload), fds, spec)
            assert answer is not None
            body, received = answer
            if not isinstance(body, kind):
                for fd in received:
                    fd.close()
                raise Refused(name_of(request), f"{payload or ''}", "was answered by a failure")
            return body, received

    def send(self, request: FrontendRequest, payload: Payload) -> None:
        """Send a message that nothing answers, not even an acknowledgement. Raises Disconnected and TimedOut."""
        with self.lock:
            self._exchange(_encode(request, payload), (), None)

    def confirm(self) -> None:
        """Make a round trip: everything sent before has been taken in, and the back end has not closed because of it.

        An acknowledgement alone does not prove that: there are back ends that acknowledge with 0 and then close.
        """
        with self.lock:
            self._exchange(_CONFIRMATION, (), self._specs[FrontendRequest.GET_FEATURES])

    def when_free(self, call: Callable[[], None]) -> None:
        """Have `call` make a request of its own: now, or where one waits for its answer at this moment, after that.

        For what the back end asks on its channel. Of a call that is made later, errors are logged.
        """
        with self.lock:
            if self._busy:
                self._afterwards.append(call)
            else:
                call()

    def _exchange(self, data: bytes, fds: Sequence[int], answered: MessageSpec | None) -> _Answer | None:
        """Send a message, and return what answers it, unless nothing does, or the acknowledgement of success."""
        outermost, self._busy = not self._busy, True
        try:
            return self._exchange_now(data, fds, answered)
        finally:
            try:
                if outermost and self._afterwards:
                    self._make_up()
            finally:
                self._busy = not outermost

    def _make_up(self) -> None:
        """Make the requests that had to wait. Each may bring up others, so a back end can hold the caller in here, but
        not for much longer than `timeout`; what is left is made after the next request."""
        deadline = time.monotonic() + self.timeout
        while self._afterwards and time.monotonic() < deadline:
            try:
                self._afterwards.popleft()()
            except FieldError as error:
                log.warning("%s: %s", self._name, error)

    def _exchange_now(self, data: bytes, fds: Sequence[int], answered: MessageSpec | None) -> _Answer | None:
        connection = self._connection
        if connection is None:
            raise Disconnected(self._name, "no longer connected", "was closed")
        sent = False
        try:
            connection.send_bytes(data, fds, timeout=self.timeout)
            sent = True
            return None if answered is None else self._answer(answered, connection)
        except Disconnected:
            self.close()
            raise
        except BaseException as error:  # an interrupt, too, leaves an answer that the next would take for its own
            if sent or not isinstance(error, UsageError | HostError):  # these say that nothing was sent
                self.give_up()
            raise

    def _answer(self, spec: MessageSpec, connection: Connection) -> _Answer | None:
        received = self._receive(connection)
        try:
            if not received.reply or received.request != spec.request:
                raise PeerError("reply", name_of(received.request), f"has to be the reply to {spec.name}")
            if spec.reply is Reply.ACK and received.body == _SUCCESS and not received.fds:
                return None
            return decode_reply(spec, received.body, len(received.fds)), received.fds
        except BaseException:
            received.close()
            raise

    def _receive(self, connection: Connection) -> Received:
        deadline, late = time.monotonic() + self.timeout, False
        while (received := connection.receive_beside(self.watched, deadline)) is None:
            if late:
                raise TimedOut(self._name, "silent", f"has to answer within {self.timeout:g} s")
            self._look_after({}, 0.0)
            # Who always has something for us to look after may not have us wait for ever.
            late = time.monotonic() >= deadline
        return received

    def wait_ready(self, fd: int, timeout: float, *, write: bool = False) -> bool:
        """Wait until `fd` can be read, or written, `timeout` seconds at most, and look after what is watched meanwhile;
        whether it can. Raises Disconnected when the front end is closed, and when the back end is gone, after all that
        it had done by then: as long as `fd` can be read, that comes first."""
        deadline = time.monotonic() + timeout
        with self.ending.call():
            others = {fd: select.POLLOUT if write else select.POLLIN, self.ending.fileno(): select.POLLIN}
            while True:
                left = max(0.0, deadline - time.monotonic())
                connection, ready, gone = self._connection, _NONE, True
                if connection is not None:
                    with connection.polled() as end:
                        ready = self._look_after(others, left, end)
                        gone = end < 0 or end in ready
                self.ending.check()
                if fd in ready or (gone and self._ready_at_last(fd, others, connection, deadline)):
                    return True
                if left == 0.0:
                    return False

    def _ready_at_last(self, fd: int, others: _Events, connection: Connection | None, deadline: float) -> bool:
        """Whether `fd`, one of the `others`, is ready now that the back end at the other end of `connection` is gone.
        What it sent on its channel is looked after. Disconnected if not, unless another thread has reconnected."""
        late = False
        while not late and (ready := self._look_after(others, 0.0)):
            self.ending.check()
            if fd in ready:
                return True
            late = time.monotonic() >= deadline  # its channel may be another process's, which sends without end
        with self.lock:  # an answer that another thread waits for is there as well
            if self._connection is not connection:
                return False
            if connection is None:
                raise Disconnected(self._name, "no longer connected", "was closed")
            self.close()
            raise Disconnected(self._name, "while it was waited for")

    def _look_after(self, others: _Events, seconds: float, end: int = -1) -> Collection[int]:
        """Wait until what is watched can be read, or one of the `others` is ready, or the socket `end` hangs up, and
        look after what is watched; which of them all it was."""
        poll = select.poll()
        for each in self.watched.copy():  # at once: another thread may change it
            poll.register(each, select.POLLIN)
        for each, events in others.items():
            poll.register(each, events)
        if end >= 0:
            poll.register(end, 0)
        ready = dict(poll.poll(seconds * 1000))
        for each, events in ready.items():
            if not events & (select.POLLIN | select.POLLHUP) and each not in others:
                self.watched.pop(each, None)  # an error stays, and nothing will come of it
            else:
                self.watched.get(each, _nothing)()
        return ready

    def renew(self, connection: Connection) -> None:
        """Go on with another connection, on which nothing is negotiated yet."""
        with self.lock:
            self.close()
            with self._exchanging:
                self._connection, self._name = connection, connection.name
            self.ending.name = connection.name
            self._afterwards.clear()
            self._agree(ProtocolFeature.NONE, postcopy=False)

    def fileno(self) -> int:
        """The socket, for a selector, to be told when the back end goes; -1 when it is closed."""
        connection = self._connection
        return -1 if connection is None else connection.fileno()

    def give_up(self) -> None:
        """End the connection, since nobody knows any more what the back end makes of it."""
        with self.lock:
            connection = self._connection
            if connection is not None:  # close() waits for nothing: in this order it finds it between any two steps
                self._given_up = connection
                self._connection = None
                connection.end()

    def close(self) -> None:
        """Close the connection; closing twice is allowed. A request of another thread ends with Disconnected."""
        with self._exchanging:  # else one that comes at this moment would be forgotten, and stay open
            connections = self._connection, self._given_up
            self._connection = self._given_up = None
        for connection in connections:
            if connection is not None:
                connection.close()


def _encode(request: FrontendRequest, payload: Payload | None, *, need_reply: bool = False) -> bytes:
    return encode_message(request, payload.encode() if payload else b"", need_reply=need_reply)
