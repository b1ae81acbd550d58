"""What a worker has its supervisor keep, and the socket between the two."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterable

from vhost_user.errors import HostError, PeerError, UsageError
from vhost_user.owned_fd import OwnedFd
from vhost_user.supervisor.kept import Kept
from vhost_user.supervisor.packets import Kind, encode, parts_of, receive, send

log = logging.getLogger(__name__)

Data = bytes
"""Where `bytes` is what is kept."""


class Keeping:
    """What is kept by the supervisor at the other end of `control`, which is taken over.

    HostError where what is there does not begin by telling what it keeps.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._lock = threading.Lock()
        self._kept = Kept()
        try:
            self.first = self._receive_kept()
        except (EOFError, PeerError) as error:
            self._control.close()
            self._kept.close()
            raise HostError("supervisor", str(error), "has to tell a worker what it keeps") from error

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
                    raise PeerError("packet", packet.kind.name, "has to be what is kept")

    @property
    def bytes(self) -> dict[str, Data]:
        """What is kept, by name."""
        return self._kept.bytes

    @property
    def fds(self) -> dict[str, OwnedFd]:
        """The descriptors that are kept, by name."""
        return self._kept.fds

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

    def close(self) -> None:
        """Let go of the descriptors, and of the supervisor. Closing twice is allowed."""
        self._control.close()
        self._kept.close()
