"""The front ends that are here, and what the worker is told of each and says of it.

A worker that dies under a message, or while it rebuilds a session, may do so because of it: with three crashes in a row
a front end has to go. SIGKILL is mostly somebody else's doing, who may well strike at the same place many times; but it
may also be the kernel's answer to a message that takes all memory. So that takes forty times as many. To find the right
one, messages that a worker died under are given to the next one by one, and count only if it says that it has begun
with them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from vhost_user.backend.loop import Call, EventLoop
from vhost_user.errors import PeerError
from vhost_user.supervisor.book import Book
from vhost_user.supervisor.front_end import FrontEnd
from vhost_user.supervisor.packets import DONE, MESSAGE, SESSION, Kind, Packet, unpack
from vhost_user.supervisor.process import WorkerProcess

log = logging.getLogger(__name__)

CRASHED, KILLED, TOO_MUCH = 40, 1, 120
"""Points of blame: for a death by a mistake, for one by SIGKILL, and for being told to go."""

PATIENCE = 1.0
"""Seconds that a message which a worker died under keeps the next such message waiting."""


class Sessions:
    """Each front end, its worker, and what lies between them. `on_free` is told of a listener whose front end is gone;
    a front end may have `most_fds` descriptors kept for it. `book` has what is kept."""

    def __init__(self, loop: EventLoop, book: Book, most_fds: int, on_free: Callable[[str], None]) -> None:
        self._loop = loop
        self._book = book
        self._most_fds = most_fds
        self._on_free = on_free
        self._all: dict[int, FrontEnd] = {}
        self._worker: WorkerProcess | None = None
        self._suspects: deque[FrontEnd] = deque()
        self._trying: FrontEnd | None = None
        self._holding = False
        self._patience: Call | None = None
        self.handled = 0
        """Messages that workers have done with."""

    @property
    def listeners(self) -> set[str]:
        """Where a front end is, so that the next one has to wait."""
        return {front_end.listener for front_end in self._all.values()}

    @property
    def resuming(self) -> bool:
        """Whether the worker is still at a journal."""
        return any(front_end.resuming for front_end in self._all.values())

    # What front ends do.

    def add(self, front_end: FrontEnd) -> None:
        """A front end came."""
        self._all[front_end.number] = front_end
        if self._worker is not None and not self._holding:
            self._introduce(self._worker, front_end, Kind.CONNECT)

    @staticmethod
    def _introduce(worker: WorkerProcess, front_end: FrontEnd, kind: Kind) -> None:
        front_end.told = True
        worker.send(kind, SESSION.pack(front_end.number), front_end.listener.encode(), *front_end.names)

    def message(self, front_end: FrontEnd) -> None:
        """Its current message has come as a whole."""
        message = front_end.current
        if self._worker is not None and not self._holding and message is not None:
            message.sent = True
            key = MESSAGE.pack(front_end.number, message.number, message.blame > 0)
            self._worker.send(Kind.MESSAGE, key, message.data, fds=message.fds)

    def closed(self, front_end: FrontEnd) -> None:
        """Its connection is closed. The next one comes once the worker has closed the session."""
        if front_end.number not in self._all:
            return  # it was the worker that ended it
        if self._worker is not None and front_end.told:
            self._worker.send(Kind.CLOSE, SESSION.pack(front_end.number))
        else:
            self._forget(front_end)

    def _forget(self, front_end: FrontEnd) -> None:
        del self._all[front_end.number]
        front_end.close("ended by the back end")
        self._tried(front_end)
        self._on_free(front_end.listener)

    # What becomes of workers.

    def begin(self, worker: WorkerProcess) -> None:
        """A new worker: have it go on with every session."""
        self._worker, self._holding = worker, False
        front_ends = list(self._all.values())
        for front_end in front_ends:
            self._introduce(worker, front_end, Kind.RESUME)
            front_end.resuming = True
            number = SESSION.pack(front_end.number)
            for key, entry in front_end.journal:
                worker.send(Kind.ENTRY, number, key, entry.data, fds=entry.fds)
            worker.send(Kind.JOURNAL_END, number)
        for front_end in front_ends:
            if front_end.current is not None and front_end.current.blame:
                self._suspects.append(front_end)
            else:
                self.message(front_end)
        self._try_next()

    def hold(self) -> None:
        """Give the worker no more messages: another one takes its place."""
        self._holding = True

    def end(self) -> None:
        """Have the worker close every session."""
        for front_end in self._all.values():
            if self._worker is not None and front_end.told:
                self._worker.send(Kind.CLOSE, SESSION.pack(front_end.number))

    def died(self, points: int) -> None:
        """The worker is dead; `points` of blame go to whom it may have died of."""
        self._worker = self._trying = None
        self._suspects.clear()
        if self._patience is not None:
            self._patience.cancel()
        for front_end in list(self._all.values()):
            front_end.told = False
            blame = _blame(front_end, points)
            if front_end.current is not None:
                front_end.save()
            if front_end.closed:
                self._forget(front_end)
            elif blame >= TOO_MUCH:
                front_end.close("workers die of what it asks")

    def _try_next(self) -> None:
        self._trying = self._patience = None
        if self._suspects:
            self._trying = self._suspects.popleft()
            self._patience = self._loop.call_later(PATIENCE, self._try_next)
            self.message(self._trying)

    def _tried(self, front_end: FrontEnd) -> None:
        if front_end is self._trying:
            if self._patience is not None:
                self._patience.cancel()
            self._try_next()

    # What the worker says.

    def handle(self, packet: Packet) -> None:
        """A packet of the worker. PeerError for what it can't say."""
        if not packet.fields:
            raise PeerError(packet.kind.name, "no fields", "has to say which session it is about")
        match packet.kind:
            case Kind.DONE:
                self._done(packet)
            case Kind.BEGUN:
                number, message, _ = unpack(MESSAGE, packet.fields[0])
                self._begun(self._get(number), message)
            case Kind.RESUMED:
                front_end = self._get(*unpack(SESSION, packet.fields[0]))
                front_end.resuming, front_end.begun, front_end.blame = False, False, 0
            case Kind.ENDED:
                self._forget(self._get(*unpack(SESSION, packet.fields[0])))
            case _:
                raise PeerError("packet", packet.kind.name, "has to be one that a worker sends")

    def _get(self, number: int) -> FrontEnd:
        if number not in self._all:
            raise PeerError("session", number, "has to be one that is open")
        return self._all[number]

    @staticmethod
    def _begun(front_end: FrontEnd, message: int) -> None:
        if message == 0:
            front_end.begun = True
        elif front_end.current is not None and front_end.current.number == message:
            front_end.current.begun = True

    def _done(self, packet: Packet) -> None:
        number, message, reply_fds, replies = unpack(DONE, packet.fields[0])
        front_end = self._get(number)
        if front_end.closed:
            return
        current = front_end.current
        if current is None or current.number != message or len(packet.fields) < 2 or reply_fds > len(packet.fds):
            raise PeerError(
                "DONE", (message, len(packet.fields), reply_fds), "has to be the message in hand, and its reply"
            )
        _, reply, *changes = packet.fields
        fds, current_fds = self._book.keep(packet.fds), current.fds
        packet.fds.clear()
        current.fds = []
        try:
            front_end.journal.apply(changes, current_fds, fds[reply_fds:])
        except BaseException:
            for fd in fds:
                fd.close()
            raise
        self.handled += 1
        front_end.reply(reply if replies else b"", fds[:reply_fds])
        if front_end.journal.fd_count > self._most_fds:
            front_end.close(f"more than {self._most_fds} descriptors to be kept for it")
        self._tried(front_end)

    def close(self) -> None:
        """Close every connection."""
        self._worker = None
        for front_end in list(self._all.values()):
            front_end.close("the service ends", logging.INFO)
            self._all.pop(front_end.number, None)


def _blame(front_end: FrontEnd, points: int) -> int:
    """What a front end is to blame for, now that a worker died."""
    if front_end.resuming and front_end.begun:
        front_end.blame += points
    front_end.resuming = front_end.begun = False
    message = front_end.current
    if message is None:
        return front_end.blame
    if message.sent and (message.begun or not message.blame):
        message.blame += points
    message.sent = message.begun = False
    return max(front_end.blame, message.blame)
