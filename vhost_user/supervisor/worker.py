"""A worker: a process that serves devices to front ends whose connections its supervisor has.

    worker = Worker.from_environment()
    with Server() as server:
        worker.attach(server, "blk0", device)
        worker.ready()
        server.run()

It may be killed anywhere in there, and another one that does the same goes on: with `worker.bytes` and `worker.fds` as
this one left them, and with the sessions of front ends. The device's own state is the device's to keep, by `put` or in
the memory behind `put_fd`. SIGTERM has another worker take its place, between two messages. `server.run()` ends when
the supervisor says so, which has sessions closed before, as in any server, unless somebody goes on with them.

With several servers, and `worker.run()` in place of `server.run()`, each has a thread of its own, and a device that
takes its time holds up those of its server alone. The supervisor is listened to in the calling thread, which waits for
no device: what concerns a session is left to its server's thread (endpoint.py). A single server's thread listens to the
supervisor itself: what that says waits for this thread anyway, and nobody else has to be woken first. A loop that fails
ends the process there and then, sessions and all as a kill would leave them: without one of its threads a worker is not
half a worker, but one that keeps front ends waiting.

Sessions that another worker began are rebuilt one after the other, whatever threads there are: a worker that dies of a
journal is to die of the one that it said it had begun with, and no other front end is to blame (sessions.py). But a
ring may have much to finish, such as a discard that was cut off. So the next session waits for a while, and no longer.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from importlib import import_module
from typing import Self

from vhost_user import _native
from vhost_user.backend import Device, Endpoint, Server
from vhost_user.backend.loop import EventLoop
from vhost_user.errors import PeerError, UsageError
from vhost_user.owned_fd import OwnedFd, close_all
from vhost_user.supervisor.endpoint import HandedEndpoint
from vhost_user.supervisor.keeping import Data, Keeping
from vhost_user.supervisor.packets import (
    ENVIRONMENT,
    KEY,
    MESSAGE,
    SESSION,
    SIGNALS,
    FdsLost,
    Kind,
    Packet,
    receive,
    unpack,
)

log = logging.getLogger(__name__)

_PACKETS_AT_ONCE = 64
"""After so many it is a ring's turn."""

PATIENCE = 0.2
"""Seconds that a session which is being rebuilt keeps the next one waiting. Without a device that takes its time it is
done in a few milliseconds."""

_ANSWER_INTERVAL = 0.01
"""Seconds between two looks whether an answer is known that a worker which makes room has still to give."""

_CREDENTIALS = struct.Struct("3i")
"""struct ucred of unix(7): process, user, group."""


class Worker(Keeping):
    """What the supervisor of this process keeps for it, and the front ends that it hands on.

    `bytes` and `fds` are what was kept when this worker began, and what it has had kept since; the descriptors are
    closed with the worker, so duplicate what is to live longer. Any thread may call `put`, `put_fd` and `drop`. `first`
    says whether no worker was here before. `retired` says that another worker takes this one's place, which is given
    the sessions: `Server.close()` then leaves them as they are.
    """

    def __init__(self, control: socket.socket) -> None:
        super().__init__(control)
        self._loop: EventLoop | None = None
        self._own: EventLoop | None = None
        """The calling thread's, while `run()` has threads for everything else."""
        self._turn: object = None
        self._endpoints: dict[str, HandedEndpoint] = {}
        self._servers: dict[Server, list[HandedEndpoint]] = {}
        self._left: set[Server] = set()
        self._stopping = False
        self.retired = False

    @classmethod
    def from_environment(cls) -> Self:
        """The supervisor that started this process. UsageError where none did."""
        number = os.environ.pop(ENVIRONMENT, "")
        if not number.isdigit():
            raise UsageError(
                ENVIRONMENT, number or "not set", "has to be set by a supervisor", "don't start a worker by hand"
            )
        os.set_inheritable(int(number), False)
        return cls.adopt(socket.socket(fileno=int(number)))

    @classmethod
    def adopt(cls, control: socket.socket) -> Self:
        """The supervisor at the other end of `control`, for a worker that it forked. This process dies with it."""
        pid, _, _ = _CREDENTIALS.unpack(control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        _native.die_with_parent()
        if os.getppid() != pid:
            control.close()
            raise UsageError("supervisor", pid, "has to be the parent of this process", "start workers by a supervisor")
        return cls(control)

    # Serving.

    def attach(self, server: Server, name: str, device: Device) -> Endpoint:
        """Have `server` serve `device` to the front ends of the listener `name`. Before `ready()`.

        UsageError for a second device of a name.
        """
        if name in self._endpoints:
            raise UsageError("attach", name, "may be one device for a listener")
        endpoint = HandedEndpoint(server, device, name, self)
        server.add(endpoint)
        self._endpoints[name] = endpoint
        self._servers.setdefault(server, []).append(endpoint)
        self._listen_in(self._loop or server.loop)
        return endpoint

    def connected_names(self) -> set[object]:
        """What the sockets are bound to that front ends are connected by, whichever server has them. Any thread may
        call it."""
        links = [endpoint.handed for endpoint in self._endpoints.values()]
        return {name for link in links if link is not None for name in link.names}

    def ready(self) -> None:
        """Every device is attached: front ends may come.

        In the main thread, SIGTERM has the supervisor replace this worker from now on; SIGINT and SIGHUP, which a
        terminal sends to every process, are the supervisor's to care for.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: self._ask_to_leave())
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self.tell(Kind.READY)
        import_module("vhost_user.supervisor.handed")  # what sessions need, which is much: the first one is yet to come

    def run(self, *others: EventLoop) -> None:
        """Serve until the supervisor says that it is enough, each server in a thread of its own. After `ready()`.

        `others` are loops of the caller's, which run meanwhile in threads of their own, and then are stopped too. The
        calling thread is free for signals, whatever the devices do.
        """
        loops: list[Server | EventLoop] = [*self._servers, *others]
        with closing(EventLoop()) as own:
            self._own = own
            if len(self._servers) == 1:
                ends = own.stop
            else:
                self._listen_in(own)
                ends = _nothing
            targets = [(server.run, ends) for server in self._servers] + [(loop.run, _nothing) for loop in others]
            threads = [threading.Thread(target=_run, args=target, daemon=True) for target in targets]

            def run() -> None:
                for thread in threads:
                    thread.start()
                own.run()

            if not self._stopping:
                _run(run)
            for loop in loops:
                loop.stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            if self._loop is not None:
                self._loop.forget(self._control)
            self._loop = self._own = None

    def _ask_to_leave(self) -> None:
        """Have the supervisor retire this worker. A signal handler may call it, at any time."""
        loop = self._own or self._loop
        if loop is not None:
            loop.call_soon(lambda: self.tell(Kind.LEAVING))

    def _stop(self) -> None:
        """Have `run()` return."""
        self._stopping = True
        for server in self._servers:
            server.stop()
        if self._loop is not None:
            self._loop.stop()

    # What the supervisor says.

    def _listen_in(self, loop: EventLoop) -> None:
        if self._loop is not None:
            self._loop.forget(self._control)
        self._loop = loop
        loop.watch(self._control, self._readable)
        for endpoint in self._endpoints.values():
            endpoint.told_in(loop)

    def _readable(self) -> None:
        try:
            for _ in range(_PACKETS_AT_ONCE):
                if self.retired or self._turn is not None:
                    return
                try:
                    packet = receive(self._control)
                except FdsLost as error:
                    self._end_session(error)
                    continue
                if packet is None:
                    return
                try:
                    self._take(packet)
                finally:
                    close_all(packet.fds)
        except (EOFError, PeerError) as error:
            log.warning("ends, without its supervisor: %s", error)
            assert self._loop is not None
            self._loop.forget(self._control)
            self._stop()

    def _take(self, packet: Packet) -> None:
        kind, fields = packet.kind, packet.fields
        if kind is Kind.RETIRE:
            self._retire()
        elif kind in {Kind.CONNECT, Kind.RESUME}:
            (number,) = unpack(SESSION, fields[0])
            self._begin(kind, number, fields[1].decode(), fields[2:])
        elif kind is Kind.ENTRY and (endpoint := self._endpoint(*unpack(SESSION, fields[0]))):
            rank, index = unpack(KEY, fields[1])
            data = fields[2]
            endpoint.post(lambda link, fds: link.entry(rank, index, data, fds), _taken(packet))
        elif kind is Kind.JOURNAL_END and (endpoint := self._endpoint(*unpack(SESSION, fields[0]))):
            endpoint.post(lambda link, _: link.resume(), [])
            self._wait_for(endpoint)
        elif kind is Kind.MESSAGE:
            session, message, suspect = unpack(MESSAGE, fields[0])
            if endpoint := self._endpoint(session):
                data = fields[1]
                endpoint.post(lambda link, fds: link.message(message, bool(suspect), data, fds), _taken(packet))
        elif kind is Kind.CLOSE and (endpoint := self._endpoint(*unpack(SESSION, fields[0]))):
            endpoint.post(lambda link, _: link.close(), [])

    def _end_session(self, error: FdsLost) -> None:
        """There is no room for the descriptors of one front end: it has to go, and the others need not."""
        kind, fields, _ = error.packet
        if kind not in {Kind.MESSAGE, Kind.ENTRY}:
            raise error
        (number,) = SESSION.unpack_from(fields[0])
        log.error("front end %d is closed: %s", number, error)
        if endpoint := self._endpoint(number):
            endpoint.post(lambda link, _: link.close(), [])

    def _endpoint(self, number: int) -> HandedEndpoint | None:
        """Where this session is, unless another one has begun there since."""
        return next((endpoint for endpoint in self._endpoints.values() if endpoint.number == number), None)

    def _begin(self, kind: Kind, number: int, listener: str, names: list[Data]) -> None:
        endpoint = self._endpoints.get(listener)
        if endpoint is None:
            log.error("%s: no device is attached there", listener)
            self.tell(Kind.ENDED, SESSION.pack(number))
            return
        bound: set[object] = {os.fsdecode(name[1:]) if name[:1] == b"s" else name[1:] for name in names}
        endpoint.begin(number, bound, rebuild=kind is Kind.RESUME)

    def _wait_for(self, endpoint: HandedEndpoint) -> None:
        """Read on when the endpoint has done what it was given, or after a while."""
        assert self._loop is not None
        loop = self._loop
        self._turn = turn = object()
        loop.forget(self._control)
        loop.call_later(PATIENCE, partial(self._read_on, turn))
        endpoint.when_done(lambda: loop.call_soon(partial(self._read_on, turn)))

    def _read_on(self, turn: object) -> None:
        if turn is self._turn and self._loop is not None:
            self._turn = None
            self._loop.watch(self._control, self._readable)

    def _retire(self) -> None:
        """Leave everything to another worker: each server does, and the last one ends this one."""
        self._left = set()
        for server in self._servers:
            server.loop.call_soon(partial(self._leave, server))
        self._note_left(set())  # of no servers, all have left

    def _leave(self, server: Server) -> None:
        """In the server's thread: stop it, after the answers that are not known yet, which no other could give."""
        if any(endpoint.waits for endpoint in self._servers[server]):
            server.loop.call_later(_ANSWER_INTERVAL, partial(self._leave, server))
            return
        server.stop()
        self._note_left({server})

    def _note_left(self, servers: set[Server]) -> None:
        with self._lock:
            self._left |= servers
            if len(self._left) == len(self._servers) and self._loop is not None:
                self.retired = True
                self._loop.stop()

    def close(self) -> None:
        """Let go of the descriptors, and of the supervisor. Closing twice is allowed."""
        if self._loop is not None:
            self._loop.forget(self._control)
        super().close()
        if self.retired:
            gc.freeze()  # what sessions hold goes with the process: taken apart, it would complain of itself


def _nothing() -> None:
    """What is done when a thread ends that others don't wait for."""


def _run(run: Callable[[], None], then: Callable[[], None] = _nothing) -> None:
    """Run a loop. Where that fails by a mistake of ours, the process ends: see above."""
    try:
        run()
        then()
    except BaseException:
        log.exception("a loop failed: this worker ends, and another one goes on")
        os._exit(os.EX_SOFTWARE)


def _taken(packet: Packet) -> list[OwnedFd]:
    """The packet's descriptors, which are the caller's now."""
    fds = packet.fds[:]
    packet.fds.clear()
    return fds
