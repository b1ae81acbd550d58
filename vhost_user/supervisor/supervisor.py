"""The supervisor: it accepts front ends, hands their messages to a worker, and starts another when that one dies.

It is small, knows no device, and imports next to nothing, so there is little in it that could fail; and it never waits
for anybody. journal.py has the order in which things are done.

A worker that is told to end by somebody else, by SIGTERM, says so, and is replaced as by an upgrade: whoever sends that
to every process of a service means the supervisor, which cares for the rest.

A worker that dies is replaced at once, unless workers die without having done anything: then after a pause, which
grows. One that ends by itself before it was ready was started in the wrong way: then the supervisor ends, too.

Where a service manager keeps descriptors, the supervisor may be killed as well: ledger.py.
"""

from __future__ import annotations

import itertools
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Self

from vhost_user.backend.loop import Call, EventLoop
from vhost_user.errors import PeerError, UsageError
from vhost_user.owned_fd import OwnedFd
from vhost_user.supervisor.book import LISTENER, WORKED, Book, keep_open, session_key
from vhost_user.supervisor.front_end import FrontEnd
from vhost_user.supervisor.kept import Kept
from vhost_user.supervisor.limits import most_fds_each
from vhost_user.supervisor.listening import Listening
from vhost_user.supervisor.packets import Kind, Packet, parts_of
from vhost_user.supervisor.process import Start, WorkerProcess, describe, spawn, watch_exit
from vhost_user.supervisor.sessions import CRASHED, KILLED, Sessions
from vhost_user.supervisor.wire import Wire

if TYPE_CHECKING:
    from subprocess import Popen

    from vhost_user.supervisor.ledger import Ledger

log = logging.getLogger(__name__)

END_SECONDS = 5.0
"""A worker that is told to end has this long; then it is killed."""

RETIRE_SECONDS = 10.0
"""A worker that is to make room for another has this long, which may be at the end of a slow message."""

ENOUGH_LIFE = 1.0
"""Seconds after which a worker's death says nothing about the next one's."""

FREE_FAILURES = 5
"""Workers in a row that may die of nothing before the next one has to wait."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds before a worker is started, doubling from one failure to the next; not after SIGKILL, which is mostly no
mistake of the worker's."""

LEAVING_PAUSE = 0.2
"""Seconds before a worker that was told to end by somebody else is replaced: who tells every process of the service
means its end, which the supervisor then hears of as well."""


class Supervisor:
    """Keeps a worker running for the front ends that come to `listeners`.

    `command` starts a worker, its first word a path; or it is a function that does, for workers that are forked.
    `listeners` are unix stream sockets that listen already, by the names under which the worker attaches devices; they
    are taken over, and their files are removed in the end. `kept_bytes` and `kept_fds` are what the first worker finds
    in `Worker.bytes` and `Worker.fds`; the descriptors are duplicated. `on_ready` is called once, when the first worker
    says `ready()`. `book` is where it writes down what it has, which was cleared; then nothing of that ends with the
    supervisor, and SIGTERM leaves front ends waiting for the next one.
    """

    def __init__(
        self,
        command: Sequence[str] | Start,
        listeners: Mapping[str, socket.socket],
        kept_bytes: Mapping[str, bytes] | None = None,
        kept_fds: Mapping[str, int] | None = None,
        *,
        on_ready: Callable[[], object] = lambda: None,
        book: Book | None = None,
    ) -> None:
        self.loop = EventLoop()
        self._book = book or Book()
        most_fds = most_fds_each(self._book, max(1, len(listeners)))
        self.kept = _kept(self._book, kept_bytes or {}, kept_fds or {})
        self._start = command if callable(command) else spawn(command)
        self._on_ready = on_ready
        self._listening = {name: Listening(self.loop, name, sock, self._accept) for name, sock in listeners.items()}
        for name, sock in listeners.items():
            keep_open(self._book, LISTENER + name.encode(), sock)
        self._sessions = Sessions(self.loop, self._book, most_fds, self._next)
        self._numbers = itertools.count(1)
        self._worker: WorkerProcess | None = None
        self._restart: Call | None = None
        self._workers = self._failures = self._status = 0
        self._ready = self._ever_ready = self._retiring = self._stopping = self._leaving = False
        self._started_at, self._handled_before = 0.0, 0
        self._book.commit()

    @classmethod
    def resume(
        cls, command: Sequence[str] | Start, ledger: Ledger, *, on_ready: Callable[[], object] = lambda: None
    ) -> Self:
        """Go on where the supervisor was that wrote `ledger`. HostError, OSError where that can't be."""
        from vhost_user.supervisor import restore  # noqa: PLC0415 - for those that have something to go on with

        found = dict(restore.listeners(ledger))
        made = cls(command, {}, on_ready=on_ready, book=ledger)
        made._listening = {
            name: Listening(made.loop, name, sock, made._accept, restored=True) for name, sock in found.items()
        }
        made._sessions = Sessions(made.loop, ledger, most_fds_each(ledger, len(found)), made._next)
        restore.kept(ledger, made.kept)
        for number in ledger.sessions:
            made._sessions.add(restore.front_end(ledger, number, made._front_end))
        made._numbers = itertools.count(max(ledger.sessions, default=0) + 1)
        restore.old_worker(ledger, made._left_packet)
        made.kept.forget_parts()
        made._sessions.died(KILLED)
        made._workers = int(WORKED in ledger)
        ledger.settle()
        ledger.commit()
        return made

    def add_child(self, child: Popen[bytes], on_exit: Callable[[int], object]) -> None:
        """Have `on_exit` called with the status that `child` ended with, negative for a signal. Nobody ends it here."""
        watch_exit(self.loop, child.pid, lambda: on_exit(child.wait()))

    @property
    def worker_pid(self) -> int | None:
        """The worker's process, if there is one just now."""
        return None if self._worker is None else self._worker.pid

    def run(self) -> int:
        """Serve until SIGTERM, SIGINT or `stop()`; SIGHUP replaces the worker. For the main thread.

        Returns 0, or the status of a worker that ended by itself before any was ready.
        """
        with ExitStack() as steps:
            steps.callback(self._close)
            steps.enter_context(self._signals())
            self._start_worker()
            self.loop.run()
        return self._status

    @contextmanager
    def _signals(self) -> Iterator[None]:
        wanted = {signal.SIGTERM: self.stop, signal.SIGINT: self.stop, signal.SIGHUP: self.upgrade}
        before = {number: signal.getsignal(number) for number in wanted}
        for number, action in wanted.items():
            signal.signal(number, lambda *_, action=action: self.loop.call_soon(action))
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # Front ends.

    def _accept(self, listener: str, sock: socket.socket) -> None:
        number = next(self._numbers)
        try:
            wire = self._book.wire(session_key(number), listener, sock)
        except OSError as error:
            log.error("%s: a front end can't be kept: %s", listener, error.strerror)
            self._next(listener)
            return
        front_end = self._front_end(wire, number, listener)
        log.info("%s: connected", front_end.name)
        self._sessions.add(front_end)

    def _front_end(self, wire: Wire, number: int, listener: str) -> FrontEnd:
        sessions = self._sessions
        return FrontEnd(
            self.loop, wire, number, listener, self._book, on_message=sessions.message, on_close=sessions.closed
        )

    def _next(self, listener: str) -> None:
        if self._ever_ready and not self._stopping:
            self._listening[listener].next()

    # Workers.

    def _start_worker(self) -> None:
        self._restart = None
        self._ready = self._retiring = False
        self._started_at, self._handled_before = time.monotonic(), self._sessions.handled
        try:
            worker = self._book.worker(self.loop, self._start, self._packet, self._exited)
        except OSError as error:
            log.error("no worker: %s", error)
            self._again(failed=True)
            return
        self._worker = worker
        self._workers += 1
        log.info("worker %d started", worker.pid)
        for name, data in self.kept.bytes.items():
            for part in parts_of(name, data):
                worker.send(Kind.KEPT_BYTES, *part)
        for name, fd in self.kept.fds.items():
            worker.send(Kind.KEPT_FD, name.encode(), fds=[fd])
        worker.send(Kind.KEPT_ALL, bytes([self._workers == 1]))
        self._sessions.begin(worker)

    def _packet(self, packet: Packet) -> None:
        match packet.kind:
            case Kind.READY:
                self._became_ready()
            case Kind.LEAVING:
                self._leave_soon()
            case Kind.PUT if len(packet.fields) == 3:
                name, last, part = packet.fields
                self.kept.put_part(_text(name), part, last=last != b"\0")
            case Kind.PUT_FD if len(packet.fields) == 1 and len(packet.fds) <= 1:
                self.kept.put_fd(_text(packet.fields[0]), packet.fds.pop() if packet.fds else None)
            case _:
                self._sessions.handle(packet)

    def _leave_soon(self) -> None:
        if not self._leaving:
            self._leaving = True
            self.loop.call_later(LEAVING_PAUSE, self._leave)

    def _leave(self) -> None:
        self._leaving = False
        self.upgrade()

    def _left_packet(self, packet: Packet) -> None:
        """Of a worker that is dead, and whose supervisor was."""
        if packet.kind is not Kind.READY:
            self._packet(packet)

    def _became_ready(self) -> None:
        self._ready = True
        if not self._ever_ready:
            self._ever_ready = True
            for name in self._listening.keys() - self._sessions.listeners:
                self._next(name)
            self._on_ready()

    def _exited(self, status: int) -> None:
        assert self._worker is not None
        pid, self._worker = self._worker.pid, None
        self.kept.forget_parts()
        if self._stopping or self._retiring:
            self._sessions.died(0)
            self._again(failed=False)
            return
        log.error("worker %d ended: %s", pid, describe(status))
        if status >= 0 and not self._ever_ready:
            self._status = status or 1
            self.stop()
            return
        killed = status == -signal.SIGKILL
        idle = self._sessions.handled == self._handled_before and time.monotonic() - self._started_at < ENOUGH_LIFE
        settled = self._ready and not self._sessions.resuming
        self._sessions.died(KILLED if killed else CRASHED)
        self._again(failed=idle and not (settled and killed), longest=FIRST_PAUSE if killed else LONGEST_PAUSE)

    def _again(self, *, failed: bool, longest: float = LONGEST_PAUSE) -> None:
        """Start the next worker, now or after a while."""
        if self._stopping:
            self.loop.stop()
            return
        self._failures = self._failures + 1 if failed else 0
        if self._failures < FREE_FAILURES:
            self.loop.call_soon(self._start_worker)
            return
        pause = min(longest, FIRST_PAUSE * 2.0 ** min(self._failures - FREE_FAILURES, 16))
        log.error("%d workers ended without having done anything: the next one in %g s", self._failures, pause)
        self._restart = self.loop.call_later(pause, self._start_worker)

    def upgrade(self) -> None:
        """Have a new worker take the old one's place, between two messages: no front end notices."""
        if self._worker is not None and not self._retiring and not self._stopping:
            log.info("worker %d makes room for another", self._worker.pid)
            self._retire(self._worker, RETIRE_SECONDS)

    def _retire(self, worker: WorkerProcess, seconds: float) -> None:
        self._retiring = True
        self._sessions.hold()
        worker.send(Kind.RETIRE)
        worker.end_within(seconds)

    # The end.

    def stop(self) -> None:
        """End the worker, then `run()`. In the loop's thread."""
        if self._stopping:
            return
        self._stopping = True
        for listening in self._listening.values():
            listening.stop()
        if self._restart is not None:
            self._restart.cancel()
        if self._worker is None:
            self.loop.stop()
        elif self._retiring:
            pass
        elif self._book.lasting:
            self._retire(self._worker, RETIRE_SECONDS)
        elif self._ready:
            self._sessions.end()
            self._retire(self._worker, END_SECONDS)
        else:
            self._worker.signal(signal.SIGKILL)

    def _close(self) -> None:
        with ExitStack() as steps:  # the last one first
            steps.callback(self.loop.close)
            steps.callback(self._book.close)
            if not self._book.lasting:  # what another supervisor goes on with is closed with this process
                steps.callback(self.kept.close)
                for listening in self._listening.values():
                    steps.callback(listening.close)
                steps.callback(self._sessions.close)
            if self._worker is not None:  # the loop was ended otherwise
                steps.callback(self._worker.kill)


def _kept(book: Book, kept_bytes: Mapping[str, bytes], kept_fds: Mapping[str, int]) -> Kept:
    kept = Kept(book)
    try:
        for name, data in kept_bytes.items():
            kept.put(name, data)
        for name, fd in kept_fds.items():
            kept.put_fd(name, OwnedFd.duplicate_of(fd))
    except PeerError as error:
        kept.close()
        raise UsageError(error.field, error.value, error.limit) from error
    except BaseException:
        kept.close()
        raise
    return kept


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise PeerError("name", name, "has to be UTF-8") from error
