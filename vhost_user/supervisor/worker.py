"""A worker: a process that serves devices to front ends whose connections its supervisor has.

    worker = Worker.from_environment()
    with Server() as server:
        worker.attach(server, "blk0", device)
        worker.ready()
        server.run()

It may be killed anywhere in there, and another one that does the same goes on: with `worker.bytes` and `worker.fds` as
this one left them, and with the sessions of front ends. The device's own state is the device's to keep, by `put` or in
the memory behind `put_fd`. SIGTERM ends `server.run()`, and closes sessions as in any server.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import struct
import threading
from collections.abc import Iterable
from typing import Self

from vhost_user import _native
from vhost_user.backend import Device, Endpoint, Server
from vhost_user.backend.journal import Rank
from vhost_user.errors import HostError, PeerError, UsageError
from vhost_user.owned_fd import OwnedFd, close_all
from vhost_user.supervisor.endpoint import HandedEndpoint, HandedLink
from vhost_user.supervisor.kept import Kept
from vhost_user.supervisor.packets import (
    ENVIRONMENT,
    KEY,
    MESSAGE,
    SESSION,
    Kind,
    Packet,
    encode,
    parts_of,
    receive,
    send,
    unpack,
)

log = logging.getLogger(__name__)

Data = bytes
"""Where `bytes` is the worker's."""

_PACKETS_AT_ONCE = 64
"""After so many it is a ring's turn."""

_CREDENTIALS = struct.Struct("3i")
"""struct ucred of unix(7): process, user, group."""


class Worker:
    """What the supervisor of this process keeps for it, and the front ends that it hands on.

    `bytes` and `fds` are what was kept when this worker began, and what it has had kept since; the descriptors are
    closed with the worker, so duplicate what is to live longer. Any thread may call `put`, `put_fd` and `drop`. `first`
    says whether no worker was here before. `retired` says that another worker takes this one's place, which is given
    the sessions: `Server.close()` then leaves them as they are.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._lock = threading.Lock()
        self._kept = Kept()
        self._server: Server | None = None
        self._endpoints: dict[str, HandedEndpoint] = {}
        self.retired = False
        try:
            self.first = self._receive_kept()
        except (EOFError, PeerError) as error:
            self.close()
            raise HostError("supervisor", str(error), "tells a worker what it keeps") from error

    @classmethod
    def from_environment(cls) -> Self:
        """The supervisor that started this process. UsageError where none did."""
        number = os.environ.pop(ENVIRONMENT, "")
        if not number.isdigit():
            raise UsageError(ENVIRONMENT, number or "not set", "set by a supervisor", "don't start a worker by hand")
        os.set_inheritable(int(number), False)
        return cls.adopt(socket.socket(fileno=int(number)))

    @classmethod
    def adopt(cls, control: socket.socket) -> Self:
        """The supervisor at the other end of `control`, for a worker that it forked. This process dies with it."""
        pid, _, _ = _CREDENTIALS.unpack(control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        _native.die_with_parent()
        if os.getppid() != pid:
            control.close()
            raise UsageError("supervisor", pid, "the parent of this process", "start workers by a supervisor")
        return cls(control)

    def _receive_kept(self) -> bool:
        while True:
            packet = receive(self._control, wait=True)
            assert packet is not None
            match packet.kind, packet.fields:
                case Kind.KEPT_BYTES, [name, last, part]:
                    self._kept.put_part(name.decode(), part, last=last != b"\0")
                case Kind.KEPT_FD, [name]:
                    self._kept.put_fd(name.decode(), packet.fds[0])
                case Kind.KEPT_ALL, [first]:
                    return first != b"\0"
                case _:
                    raise PeerError("packet", packet.kind.name, "what is kept")

    @property
    def bytes(self) -> dict[str, Data]:
        """What is kept, by name."""
        return self._kept.bytes

    @property
    def fds(self) -> dict[str, OwnedFd]:
        """The descriptors that are kept, by name."""
        return self._kept.fds

    # What is kept.

    def put(self, name: str, data: Data) -> None:
        """Keep `data`, at most 1 MiB, in place of what was kept under `name`; nothing where it is empty.

        It is kept once this returns, whatever becomes of this process. UsageError where it is too much.
        """
        with self._lock:
            try:
                self._kept.put(name, data)
            except PeerError as error:
                raise UsageError(error.field, error.value, error.limit) from error
            for part in parts_of(name, data):
                self._send(Kind.PUT, part)

    def put_fd(self, name: str, fd: int | OwnedFd) -> None:
        """Keep a duplicate of `fd` under `name`, as `put`."""
        own = OwnedFd.duplicate_of(fd if isinstance(fd, int) else fd.fileno())
        with self._lock:
            try:
                self._kept.put_fd(name, own)
            except PeerError as error:
                raise UsageError(error.field, error.value, error.limit) from error
            self._send(Kind.PUT_FD, [name.encode()], [own])

    def drop(self, name: str) -> None:
        """Keep neither bytes nor a descriptor under `name`."""
        with self._lock:
            self._kept.put(name, b"")
            self._kept.put_fd(name, None)
            self._send(Kind.PUT, [name.encode(), b"\1", b""])
            self._send(Kind.PUT_FD, [name.encode()])

    def tell(self, kind: Kind, *fields: Data, fds: Iterable[OwnedFd] = ()) -> None:
        """Send the supervisor a packet. Nothing, where it is gone."""
        with self._lock:
            self._send(kind, fields, fds)

    def _send(self, kind: Kind, fields: Iterable[Data], fds: Iterable[OwnedFd] = ()) -> None:
        data, fds = encode(kind, fields), list(fds)
        while True:
            try:
                send(self._control, data, fds, wait=True)
                return
            except BlockingIOError:
                threading.Event().wait(0.001)  # too many descriptors on their way: packets.py
            except OSError as error:
                log.info("the supervisor is gone: %s", error)
                return

    # Serving.

    def attach(self, server: Server, name: str, device: Device) -> Endpoint:
        """Have `server` serve `device` to the front ends of the listener `name`. Before `ready()`; one server for all.

        UsageError for a second device of a name.
        """
        if name in self._endpoints or self._server not in {None, server}:
            raise UsageError("attach", name, "once, and to the server of the other devices")
        endpoint = HandedEndpoint(server, device, name, self)
        server.add(endpoint)
        self._endpoints[name] = endpoint
        if self._server is None:
            self._server = server
            server.loop.watch(self._control, self._readable)
        return endpoint

    def ready(self) -> None:
        """Every device is attached: front ends may come.

        In the main thread, SIGTERM has `server.stop()` called from now on; SIGINT and SIGHUP, which a terminal sends to
        every process, are the supervisor's to care for.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: self._stop())
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
        self.tell(Kind.READY)

    def _stop(self) -> None:
        if self._server is not None:
            self._server.stop()

    def _readable(self) -> None:
        try:
            for _ in range(_PACKETS_AT_ONCE):
                if self.retired or (packet := receive(self._control)) is None:
                    return
                try:
                    self._take(packet)
                finally:
                    close_all(packet.fds)
        except (EOFError, PeerError) as error:
            log.warning("ends, without its supervisor: %s", error)
            assert self._server is not None
            self._server.loop.forget(self._control)
            self._server.stop()

    def _take(self, packet: Packet) -> None:
        kind, fields = packet.kind, packet.fields
        if kind is Kind.RETIRE:
            self._retire()
        elif kind in {Kind.CONNECT, Kind.RESUME}:
            (number,) = unpack(SESSION, fields[0])
            self._begin(kind, number, fields[1].decode(), fields[2:])
        elif kind is Kind.ENTRY and (link := self._link(*unpack(SESSION, fields[0]))):
            rank, index = unpack(KEY, fields[1])
            link.entry((Rank(rank), index), fields[2], _taken(packet))
        elif kind is Kind.JOURNAL_END and (link := self._link(*unpack(SESSION, fields[0]))):
            link.resume()
        elif kind is Kind.MESSAGE:
            number, message, suspect = unpack(MESSAGE, fields[0])
            if link := self._link(number):
                link.message(message, bool(suspect), fields[1], _taken(packet))
        elif kind is Kind.CLOSE and (link := self._link(*unpack(SESSION, fields[0]))):
            link.close()

    def _link(self, number: int) -> HandedLink | None:
        """The session, unless it has ended."""
        for endpoint in self._endpoints.values():
            if endpoint.handed is not None and endpoint.handed.number == number:
                return endpoint.handed
        return None

    def _begin(self, kind: Kind, number: int, listener: str, names: list[Data]) -> None:
        endpoint = self._endpoints.get(listener)
        if endpoint is None:
            log.error("%s: no device is attached there", listener)
            self.tell(Kind.ENDED, SESSION.pack(number))
            return
        link = endpoint.begin(number, {os.fsdecode(name[1:]) if name[:1] == b"s" else name[1:] for name in names})
        if kind is Kind.RESUME:
            link.rebuild()

    def _retire(self) -> None:
        """Leave everything to another worker; after the answers that are not known yet, which it could not give."""
        assert self._server is not None
        if any(endpoint.handed is not None and endpoint.handed.waits for endpoint in self._endpoints.values()):
            self._server.loop.call_later(0.01, self._retire)
            return
        self.retired = True
        self._server.stop()

    def close(self) -> None:
        """Let go of the descriptors, and of the supervisor. Closing twice is allowed."""
        if self._server is not None:
            self._server.loop.forget(self._control)
        self._control.close()
        self._kept.close()


def _taken(packet: Packet) -> list[OwnedFd]:
    """The packet's descriptors, which are the caller's now."""
    fds = packet.fds[:]
    packet.fds.clear()
    return fds
