"""A socket where front ends come, one at a time: others wait in its backlog until `next()` is called."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

from vhost_user.backend.loop import Call, EventLoop
from vhost_user.errors import HostError
from vhost_user.owned_fd import close_socket
from vhost_user.unix_socket import identity, remove

log = logging.getLogger(__name__)

RETRY_INTERVAL = 1.0
"""Seconds until a front end is accepted that could not be, for want of descriptors mostly."""


class Listening:
    """Accepts at `sock`, which listens already and is taken over; `then` gets each connection with the name. HostError
    where its file is gone, unless that is what may be after another process."""

    def __init__(
        self,
        loop: EventLoop,
        name: str,
        sock: socket.socket,
        then: Callable[[str, socket.socket], None],
        *,
        restored: bool = False,
    ) -> None:
        self.name = name
        self._loop, self._sock, self._then = loop, sock, then
        self._retry: Call | None = None
        self._closed = False
        where = sock.getsockname()
        self._path = where if isinstance(where, str) and where else None
        try:
            self._own = identity(self._path) if self._path is not None else None
        except OSError as error:
            if not restored:
                raise HostError.from_os_error("socket", self._path, "stat", error, "bind it in this process") from error
            log.warning("%s: nobody can come: %s: %s", name, self._path, error.strerror)
            self._own = None
        sock.setblocking(False)

    def next(self) -> None:
        """Accept one more."""
        if not self._closed:
            self._loop.watch(self._sock, self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("%s: accept failed: %s", self.name, error)
            self._loop.forget(self._sock)
            self._retry = self._loop.call_later(RETRY_INTERVAL, self.next)
            return
        self._loop.forget(self._sock)
        self._then(self.name, sock)

    def stop(self) -> None:
        """Accept no more."""
        self._closed = True
        self._loop.forget(self._sock)
        if self._retry is not None:
            self._retry.cancel()

    def close(self) -> None:
        """Close the socket and remove its file, unless that is another's by now."""
        self.stop()
        if self._path is not None and self._own is not None:
            remove(self._path, self._own)
        close_socket(self._sock)
