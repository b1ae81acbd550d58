"""The API's server: a unix socket that only its owner can open, and a thread for each of a bounded number of clients.

A client that comes while all threads are taken is told so at once (503), and closed. Those that wait for operations or
listen to events may take most of the threads and never the last ones, so that `vm.info` and a resize always go through.

    with ApiServer(control, "/run/virtio-mem.sock"):
        ...
"""

from __future__ import annotations

import logging
import math
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from vhost_user import unix_socket
from vhost_user.errors import UsageError
from vhost_user.event import Event
from virtio_mem.api.message import ApiRequest
from virtio_mem.api.routes import Api
from virtio_mem.control import Control

try:
    from virtio_mem.api.connection import HttpConnection, busy_reply
except ImportError as error:  # pragma: no cover
    raise UsageError("api", "h11", f"needs the Python package h11: {error}", "pip install h11") from None

log = logging.getLogger(__name__)

SOCKET_MODE = 0o600
BACKLOG = 512
MAX_CONNECTIONS = 32
MAX_LONG = 24
"""Connections that may be taken by requests that last."""

REFUSED_SECONDS = 1.0
"""How long a client that was refused may take to send its request and to read so: closed at once, the socket would
break under the request that it is about to write, and it would not look for a reply."""

MAX_REFUSED = 64
"""Refused clients that are let linger; of more, the one that came first is closed."""

_RETRY_MS = 1000
_LOOK_MS = 100


def listen(path: str | Path) -> socket.socket:
    """The API's listening socket at `path`, mode 0600 from the first moment on. It raises what `unix_socket.listen`
    does."""
    return unix_socket.listen(path, backlog=BACKLOG, mode=SOCKET_MODE, field="--api-socket")


class ApiServer:
    """Serves `control` at a path, or at a socket that listens already and stays its owner's.

    It serves from its making to `close()`, in threads of its own; a context manager. Raises what `listen` does.
    """

    def __init__(self, control: Control, where: str | Path | socket.socket) -> None:
        self.api = Api(control)
        self.stopping = False
        self.refused = 0
        self._lock = threading.Lock()
        self._connections: dict[HttpConnection, threading.Thread] = {}
        self._refused: deque[tuple[float, socket.socket]] = deque()
        self._long = 0
        with ExitStack() as undo:
            if isinstance(where, socket.socket):
                self._listener = undo.enter_context(where.dup())
            else:
                self._listener = undo.enter_context(listen(where))
                undo.callback(unix_socket.remove, where, unix_socket.identity(where))
            self._listener.setblocking(False)
            self._wake = undo.enter_context(Event.create())
            self._thread = threading.Thread(target=self._accept_all, name="api", daemon=True)
            self._thread.start()
            self._undo = undo.pop_all()

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    @contextmanager
    def room_for(self, request: ApiRequest) -> Iterator[bool]:
        """Whether there is room for `request`, which is served meanwhile."""
        if not self.api.is_long(request):
            yield True
            return
        with self._lock:
            room = self._long < MAX_LONG
            self._long += room
        try:
            yield room
        finally:
            with self._lock:
                self._long -= room

    def _accept_all(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self.stopping:
            poll.poll(_LOOK_MS if self._refused else None)
            self._forget_refused(time.monotonic())
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                continue
            except OSError as error:  # out of descriptors, mostly: the client stays in the backlog
                log.warning("api: accept failed: %s", error)
                select.poll().poll(_RETRY_MS)
                continue
            if not self._take(sock):
                self._refuse(sock)
        self._forget_refused(math.inf)

    def _take(self, sock: socket.socket) -> bool:
        """Serve a client in a thread of its own, if there is room for it."""
        if len(self._connections) >= MAX_CONNECTIONS:
            return False
        connection = HttpConnection(self, sock)
        thread = threading.Thread(target=self._serve, args=(connection,), name="api-client", daemon=True)
        with self._lock:
            self._connections[connection] = thread
        try:
            thread.start()
        except RuntimeError as error:  # the host has no thread left, or a limit
            log.warning("api: %s", error)
            with self._lock:
                del self._connections[connection]
            return False
        return True

    def _refuse(self, sock: socket.socket) -> None:
        """Tell a client that there is no room, without ever waiting for it."""
        self.refused += 1
        self._refused.append((time.monotonic() + REFUSED_SECONDS, sock))
        with suppress(OSError):
            sock.setblocking(False)
            sock.send(_BUSY)
            sock.shutdown(socket.SHUT_WR)
        if len(self._refused) > MAX_REFUSED:
            self._refused.popleft()[1].close()

    def _forget_refused(self, now: float) -> None:
        while self._refused and self._refused[0][0] <= now:
            self._refused.popleft()[1].close()

    def _serve(self, connection: HttpConnection) -> None:
        try:
            connection.run()
        except Exception:
            log.exception("%s: a connection failed", connection.peer)
        finally:
            connection.sock.close()
            with self._lock:
                self._connections.pop(connection, None)

    def close(self) -> None:
        """End every connection, and remove the socket if it is ours. Closing twice is allowed."""
        if self.stopping:
            return
        self.stopping = True
        self._wake.signal()
        self._thread.join()
        self.api.control.wake()
        with self._lock:
            threads = list(self._connections.items())
        for connection, _ in threads:
            connection.interrupt()
        for _, thread in threads:
            thread.join()
        self._undo.close()

    def __enter__(self) -> ApiServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _busy() -> bytes:
    reply = busy_reply()
    assert isinstance(reply.body, bytes)
    headers = {**reply.headers, "Content-Length": str(len(reply.body)), "Connection": "close"}
    lines = [
        f"HTTP/1.1 {reply.status.value} {reply.status.phrase}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + reply.body


_BUSY = _busy()
