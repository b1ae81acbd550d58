"""A server of vhost-user devices: any number of sockets, one loop, one front end a device at a time.

A second front end that connects waits in the socket's backlog until the first one is gone. One that connects and says
nothing, or half a message, is closed after a while, so it can't keep the others out. Whatever a front end does ends its
own session at most: the loop, the other devices and the next front end go on.

    with Server() as server:
        server.listen("/run/blk.sock", device)
        server.run()                              # until server.stop(), from any thread or a signal handler
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vhost_user import unix_socket
from vhost_user.backend.device import Device
from vhost_user.backend.loop import EventLoop
from vhost_user.errors import UsageError
from vhost_user.owned_fd import close_socket

if TYPE_CHECKING:
    from vhost_user.backend.link import SessionLink
    from vhost_user.message import ProtocolFeature

log = logging.getLogger(__name__)

RECONNECT_INTERVAL = 1.0
"""Seconds between two tries to reach a front end that listens itself."""

_READ_INTERVAL = 0.001
"""Seconds between two looks whether a front end has read its notices."""


class Endpoint:
    """Where one device is served: the way front ends come, and the one that is there."""

    def __init__(self, server: Server, device: Device, name: str) -> None:
        self.device = device
        self.name = name
        self.link: SessionLink | None = None
        self.sessions = 0
        self._server = server
        self._listener: socket.socket | None = None
        self._path: str | None = None
        self._own: tuple[int, int] | None = None
        self._closed = False
        self._quiet = 0
        self._due = False

    @property
    def connected(self) -> bool:
        """Whether a front end is there."""
        return self.link is not None

    def config_changed(self) -> None:
        """Tell the front end, if there is one, that the configuration space changed. Any thread may call it."""
        self._server.loop.call_soon(self._config_changed)

    def _config_changed(self) -> None:
        if self._quiet:
            self._due = True
        elif self.link is not None:
            self.link.session.config_changed()

    @contextmanager
    def quiet(self, patience: float) -> Iterator[None]:
        """Send no notice meanwhile. The front end has read those before by then, unless it takes longer than `patience`
        seconds.

        For who is about to have the front end stop the device: QEMU 11.1 crashes when it finds a notice after that. Any
        thread but the loop's may call it.
        """
        all_read = threading.Event()
        self._server.loop.call_soon(partial(self._begin_quiet, all_read))
        try:
            all_read.wait(patience)
            yield
        finally:
            self._server.loop.call_soon(self._end_quiet)

    def _begin_quiet(self, all_read: threading.Event) -> None:
        self._quiet += 1
        self._look(all_read)

    def _look(self, all_read: threading.Event) -> None:
        if self._quiet and self.link is not None and self.link.session.unread_notices:
            self._server.loop.call_later(_READ_INTERVAL, partial(self._look, all_read))
        else:
            all_read.set()

    def _end_quiet(self) -> None:
        self._quiet -= 1
        if self._due and not self._quiet:
            self._due = False
            self._config_changed()

    def serve(self, sock: socket.socket) -> None:
        """Serve the front end at the other end of `sock`, which is taken over."""
        from vhost_user.backend.link import Link  # noqa: PLC0415 - what sessions need, once there is one
        from vhost_user.connection import Connection  # noqa: PLC0415

        assert self.link is None
        self.sessions += 1
        connection = Connection(sock, f"{self.name} session {self.sessions}")
        server = self._server
        try:
            link = Link(
                self.device, server.loop, connection, server.protocol_features, server.connected_names, self._gone
            )
        except BaseException:
            connection.close()
            self._next()
            raise
        self._use(link)

    def _use(self, link: SessionLink) -> None:
        """A session begins. What it tells of by itself waits as long as all notices do."""
        self.link = link
        link.session.tell_of_reset = self._config_changed

    def _gone(self) -> None:
        self.link = None
        if not self._closed:
            self._next()

    def _next(self) -> None:
        """Look for the next front end."""
        if self._listener is not None:
            self._server.loop.watch(self._listener, self._accept)
        elif self._path is not None:
            self._server.loop.call_later(RECONNECT_INTERVAL, self.try_to_connect)

    def listen(self, listener: socket.socket, own: tuple[int, int] | None) -> None:
        """Accept front ends, one at a time."""
        listener.setblocking(False)
        self._listener, self._own = listener, own
        self._next()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of descriptors, mostly. The front end stays in the backlog: look again a little later.
            log.warning("%s: accept failed: %s", self.name, error)
            self._server.loop.forget(self._listener)
            self._server.loop.call_later(RECONNECT_INTERVAL, self._retry_accept)
            return
        self._server.loop.forget(self._listener)
        self.serve(sock)

    def _retry_accept(self) -> None:
        if self.link is None and not self._closed:
            self._next()

    def connect_to(self, path: str) -> None:
        """Go to the front end that listens at `path`, and go there again whenever it is gone."""
        self._path = path
        self.try_to_connect()

    def try_to_connect(self) -> None:
        """Connect, or try again later."""
        if self._closed or self._path is None:
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            self._next()
            return
        self.serve(sock)

    def close(self) -> None:
        """End the session, and take no other."""
        self._closed = True
        listener, self._listener = self._listener, None
        try:
            if self.link is not None:
                self.link.close()
        finally:
            if listener is not None:
                self._server.loop.forget(listener)
                if self._own is not None:
                    unix_socket.remove(str(listener.getsockname()), self._own)
                close_socket(listener)


class Server:
    """Serves devices until it is stopped. All of it is the loop's thread's, but for what says otherwise.

    `protocol_features` are those offered to every front end, each still subject to what its device has; all that there
    are unless said otherwise.
    """

    def __init__(self, *, protocol_features: ProtocolFeature | None = None) -> None:
        self._protocol_features = protocol_features
        self.loop = EventLoop()
        self.endpoints: list[Endpoint] = []

    @property
    def protocol_features(self) -> ProtocolFeature:
        """Those that are offered."""
        if self._protocol_features is None:
            from vhost_user.backend.session import PROTOCOL_FEATURES  # noqa: PLC0415 - once there is a session

            self._protocol_features = PROTOCOL_FEATURES
        return self._protocol_features

    def connected_names(self) -> set[object]:
        """What the sockets are bound to that front ends are connected by."""
        return {name for endpoint in self.endpoints if endpoint.link is not None for name in endpoint.link.names}

    def listen(self, where: str | Path | socket.socket, device: Device) -> Endpoint:
        """Serve `device` at a socket: its path, or a unix stream socket that listens already, which is taken over.

        A socket file that nobody listens at any more is replaced; HostError for any other, and where binding fails;
        UsageError for what is no path of a socket.
        """
        self._require_new(device)
        if isinstance(where, socket.socket):
            listener, own = where, None
        else:
            listener = unix_socket.listen(where)
            own = unix_socket.identity(where)
        endpoint = self._endpoint(device, str(listener.getsockname()))
        endpoint.listen(listener, own)
        return endpoint

    def connect(self, path: str | Path, device: Device) -> Endpoint:
        """Serve `device` to the front end that listens at `path`; whenever nobody does, try again each second."""
        endpoint = self._endpoint(device, str(path))
        endpoint.connect_to(str(path))
        return endpoint

    def serve(self, sock: socket.socket, device: Device) -> Endpoint:
        """Serve `device` to the front end at the other end of `sock`, which is taken over, and to nobody after it."""
        endpoint = self._endpoint(device, "socket")
        endpoint.serve(sock)
        return endpoint

    def _require_new(self, device: Device) -> None:
        if any(endpoint.device is device for endpoint in self.endpoints):
            raise UsageError(
                "device", device.name, "has to be one that is not served yet", "make another one for each socket"
            )

    def _endpoint(self, device: Device, name: str) -> Endpoint:
        self._require_new(device)
        endpoint = Endpoint(self, device, name)
        self.endpoints.append(endpoint)
        return endpoint

    def add(self, endpoint: Endpoint) -> None:
        """Serve a device at an endpoint of another kind; UsageError for a device that is served already."""
        self._require_new(endpoint.device)
        self.endpoints.append(endpoint)

    def run(self) -> None:
        """Serve until `stop()` is called."""
        self.loop.run()

    def stop(self) -> None:
        """Have `run()` return. Any thread, and a signal handler, may call it."""
        self.loop.stop()

    @contextmanager
    def in_thread(self) -> Iterator[Server]:
        """Run in a thread of its own for the length of a `with`."""
        thread = threading.Thread(target=self.run, name="vhost-user-server", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.stop()
            thread.join()

    def close(self) -> None:
        """End every session, and close and remove the sockets. After `run()` has returned."""
        with ExitStack() as steps:  # the last one first, each whatever the others raise
            steps.callback(self.loop.close)
            for endpoint in self.endpoints:
                steps.callback(endpoint.close)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
