"""A session with a front end whose connection the supervisor has: what a Link is, by packets for a socket."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from vhost_user.backend.answer import Answer, Deferred
from vhost_user.backend.device import Device
from vhost_user.backend.journal import Change, Journal, Rank
from vhost_user.backend.server import Server
from vhost_user.backend.session import Session
from vhost_user.connection import Received
from vhost_user.errors import Disconnected, FieldError
from vhost_user.message import encode_message
from vhost_user.owned_fd import OwnedFd, close_all
from vhost_user.supervisor.packets import DONE, FD_REF, KEY, MESSAGE, SESSION, Kind, Source

log = logging.getLogger(__name__)


class Control(Protocol):
    """The way to the supervisor."""

    @property
    def retired(self) -> bool:
        """Whether another worker takes over."""

    def tell(self, kind: Kind, *fields: bytes, fds: Iterable[OwnedFd] = ()) -> None:
        """Send a packet. Any thread may call it."""

    def connected_names(self) -> set[object]:
        """What the sockets are bound to that front ends are connected by. Any thread may call it."""


class HandedLink:
    """A session with a front end whose connection the supervisor has. `gone` is called when it ends."""

    def __init__(
        self,
        device: Device,
        server: Server,
        control: Control,
        number: int,
        names: set[object],
        gone: Callable[[], None],
    ) -> None:
        self.session = Session(
            device, server.loop, protocol_features=server.protocol_features, own_names=control.connected_names
        )
        self.names = names
        self.number = number
        self.name = f"{device.name} front end {number}"
        self.waits = False
        """Whether an answer is not known yet."""
        self._device, self._control, self._gone = device, control, gone
        self._journal = Journal(self.session)
        self._closed = False
        self.session.rings.on_trouble = self._check_memory

    # A session that another process began.

    def rebuild(self) -> None:
        """Its journal follows."""
        self.session.rings.held = True
        self._control.tell(Kind.BEGUN, MESSAGE.pack(self.number, 0, True))

    def entry(self, rank: int, index: int, data: bytes, fds: list[OwnedFd]) -> None:
        """An entry of its journal."""
        with self._ending("not carried over"):
            self._journal.replay((Rank(rank), index), data, fds)

    def resume(self) -> None:
        """The journal is told: go on."""
        with self._ending("not carried over"):
            self._device.resumed()
            self.session.rings.release()
        if not self._closed:
            self._control.tell(Kind.RESUMED, SESSION.pack(self.number))
            log.info("%s: taken over", self.name)

    @contextmanager
    def _ending(self, what: str) -> Iterator[None]:
        """End the session for whatever is raised."""
        try:
            yield
        except Disconnected as error:
            log.info("%s: %s", self.name, error)
            self.close()
        except FieldError as error:
            log.warning("%s: %s: %s", self.name, what, error)
            self.close()
        except Exception:
            log.exception("%s: %s, by a mistake of ours", self.name, what)
            self.close()

    # Messages.

    def message(self, number: int, suspect: bool, data: bytes, fds: list[OwnedFd]) -> None:
        """Handle a message, and have the supervisor keep what it did, and reply."""
        if suspect:
            self._control.tell(Kind.BEGUN, MESSAGE.pack(self.number, number, True))
        with self._ending("closed"):
            received = Received.of(data, fds)
            self._journal.follow(received)
            answer = self.session.handle(received)
            request = received.request
            if isinstance(answer, Deferred):
                self.waits = True
                answer.when_known(lambda answer: self._done(number, request, answer))
            else:
                self._done(number, request, answer)
            self._check_memory()

    def _done(self, number: int, request: int, answer: Answer | None) -> None:
        self.waits = False
        if self._closed:
            return
        changes = self._journal.changes()
        reply_fds = answer.fds if answer is not None else ()
        reply = encode_message(request, answer.payload, reply=True) if answer is not None else b""
        head = DONE.pack(self.number, number, len(reply_fds), answer is not None)
        fds = [*reply_fds, *(fd for change in changes for fd in change.new)]
        try:
            self._control.tell(Kind.DONE, head, reply, *fields_of(changes), fds=fds)
        finally:
            close_all(fds)

    def _check_memory(self) -> None:
        if self._closed:
            return
        with self._ending("closed"):
            self.session.require_memory()

    def close(self) -> None:
        """End the session. Closing twice is allowed."""
        if self._closed:
            return
        self._closed = True
        try:
            self.session.close()
        finally:
            self._journal.close()
            self._control.tell(Kind.ENDED, SESSION.pack(self.number))
            self._gone()

    def abandon(self) -> None:
        """Leave the session to another process."""
        self._closed = True


def fields_of(changes: list[Change]) -> Iterable[bytes]:
    """The fields of a `DONE` packet."""
    new = 0
    for change in changes:
        references = []
        for fd in change.fds:
            source = Source.CURRENT if fd.key is None else Source.KEPT
            references.append(FD_REF.pack(source, b"" if fd.key is None else KEY.pack(*fd.key), fd.number))
        for _ in change.new:
            references.append(FD_REF.pack(Source.NEW, b"", new))
            new += 1
        yield KEY.pack(*change.key)
        yield change.data
        yield b"".join(references)
