"""One connection of the API: HTTP/1.1 by h11, and a limit on everything that a client could make last or grow.

A request has REQUEST_SECONDS from its first byte to its last, its head about MAX_HEAD bytes and its body MAX_BODY. A
connection may be idle between requests for IDLE_SECONDS. A piece of a reply has SEND_SECONDS to go out. Whatever breaks
a limit, or HTTP's rules, gets an answer if it can be given one, and the connection ends.
"""

from __future__ import annotations

import logging
import select
import socket
import struct
import time
from collections.abc import Generator
from contextlib import closing, suppress
from http import HTTPStatus
from typing import TYPE_CHECKING

import h11

from virtio_mem.api.message import ApiError, ApiRequest, Peer, Reply, error_reply

if TYPE_CHECKING:
    from virtio_mem.api.server import ApiServer

log = logging.getLogger(__name__)

MAX_HEAD = 16 << 10
MAX_BODY = 64 << 10
REQUEST_SECONDS = 10.0
IDLE_SECONDS = 15.0
SEND_SECONDS = 10.0

_READ_SIZE = 4 << 10
_LINGER_SECONDS = 1.0
_LINGER_BYTES = 1 << 20


class _Ended(Exception):  # noqa: N818
    """The client has gone, or took too long: there is nothing more to say to it."""


class HttpConnection:
    """Serves one client until it has gone; `run()` is the whole life of a thread."""

    def __init__(self, server: ApiServer, sock: socket.socket) -> None:
        self.sock = sock
        self._server = server
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        pid, uid, gid = struct.unpack(
            "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        )
        self.peer = Peer(pid, uid, gid)
        self._deadline = time.monotonic() + REQUEST_SECONDS
        self._first_byte = False

    def run(self) -> None:
        """Serve requests, one after the other."""
        try:
            while self._serve_one():
                self._http.start_next_cycle()
                self._deadline, self._first_byte = time.monotonic() + IDLE_SECONDS, False
            self._linger()
        except (_Ended, OSError) as reason:
            log.debug("%s: connection ended: %s", self.peer, reason)

    def interrupt(self) -> None:
        """End it, from another thread."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def _serve_one(self) -> bool:
        """Read a request and answer it; whether there may be another one."""
        try:
            request = self._read_request()
        except h11.RemoteProtocolError as error:
            status = HTTPStatus(error.error_status_hint)
            wrong = ApiError(status, "request", "malformed", str(error), "speak HTTP/1.1")
            self._refuse(error_reply(wrong, status))
            return False
        except ApiError as error:
            self._refuse(error_reply(error, error.status))
            return False
        if request is None:
            return False
        with self._server.room_for(request) as room:
            if not room:
                self._refuse(busy_reply(), request.method)
                raise _Ended("no room for what it asks")  # or it would keep that of others, for as long as it is idle
            self._send(self._server.api.answer(request), request.method)
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    # Reading.

    def _read_request(self) -> ApiRequest | None:
        head = self._next_event()
        if isinstance(head, h11.ConnectionClosed):
            return None
        assert isinstance(head, h11.Request), head
        self._check_head(head)
        body = bytearray()
        while not isinstance(event := self._next_event(), h11.EndOfMessage):
            if not isinstance(event, h11.Data):
                return None
            body += event.data
            if len(body) > MAX_BODY:
                raise _too_large(f"more than {MAX_BODY}")
        path, _, query = _origin_form(head.target.decode("ascii")).partition("?")
        headers = {name.decode("ascii"): value.decode("latin-1") for name, value in head.headers}
        method = head.method.decode("ascii")
        return ApiRequest(method, path, query, headers, bytes(body), self.peer, self._gone)

    def _next_event(self) -> h11.Event:
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                if self._http.they_are_waiting_for_100_continue:
                    self._write(h11.InformationalResponse(status_code=100, headers=[]))
                self._http.receive_data(self._receive())
            elif event is h11.PAUSED:
                raise _Ended("the client wants another protocol")
            else:
                assert isinstance(event, h11.Event)
                return event

    def _receive(self) -> bytes:
        patience = self._deadline - time.monotonic()
        if patience <= 0:
            raise self._late()
        self.sock.settimeout(patience)
        try:
            data = self.sock.recv(_READ_SIZE)
        except TimeoutError:
            raise self._late() from None
        if data and not self._first_byte:
            self._first_byte, self._deadline = True, min(self._deadline, time.monotonic() + REQUEST_SECONDS)
        return data

    def _late(self) -> Exception:
        """What to say of a request that does not come to its end; of one that never began, nothing."""
        if not self._first_byte:
            return _Ended("idle for too long")
        limit = f"must be whole within {REQUEST_SECONDS:.0f} s"
        return ApiError(HTTPStatus.REQUEST_TIMEOUT, "request", "incomplete", limit, "send it at once")

    @staticmethod
    def _check_head(head: h11.Request) -> None:
        """What HTTP allows, or h11, and we don't: other versions, two lengths for one body, and large ones."""
        if head.http_version not in (b"1.0", b"1.1"):
            version = f"HTTP/{head.http_version.decode('ascii')}"
            raise ApiError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "version", version, "must be HTTP/1.1")
        headers = dict(iter(head.headers))
        length = headers.get(b"content-length")
        if length is not None and b"transfer-encoding" in headers:
            limit = "can't go with a Transfer-Encoding"
            raise ApiError(HTTPStatus.BAD_REQUEST, "Content-Length", length.decode("ascii"), limit, "leave one out")
        if length is not None and int(length) > MAX_BODY:
            raise _too_large(length.decode("ascii"))

    def _gone(self) -> bool:
        """Whether the client has closed its end, or the server is about to close ours."""
        if self._server.stopping:
            return True
        poll = select.poll()
        poll.register(self.sock, 0)  # what closed its end wholly, not what only has no more to say
        return bool(poll.poll(0))

    # Writing.

    def _refuse(self, reply: Reply, method: str = "") -> None:
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._send(Reply(reply.status, reply.body, {**reply.headers, "Connection": "close"}), method)

    def _send(self, reply: Reply, method: str) -> None:
        headers = list(reply.headers.items())
        if isinstance(reply.body, bytes):
            if reply.status is not HTTPStatus.NO_CONTENT:
                headers.append(("Content-Length", str(len(reply.body))))
            data = self._response(reply.status, headers)
            if reply.body and method != "HEAD":
                data += self._http.send(h11.Data(data=reply.body)) or b""
            self._send_bytes(data + (self._http.send(h11.EndOfMessage()) or b""))
        else:
            self._send_pieces(reply.status, headers, reply.body)

    def _send_pieces(self, status: HTTPStatus, headers: list[tuple[str, str]], pieces: Generator[bytes]) -> None:
        with closing(pieces):
            self._send_bytes(self._response(status, headers))
            for piece in pieces:
                self._write(h11.Data(data=piece))
            self._write(h11.EndOfMessage())

    def _response(self, status: HTTPStatus, headers: list[tuple[str, str]]) -> bytes:
        response = h11.Response(status_code=status, headers=headers, reason=status.phrase.encode())
        return self._http.send(response) or b""

    def _write(self, event: h11.Event) -> None:
        self._send_bytes(self._http.send(event) or b"")

    def _send_bytes(self, data: bytes) -> None:
        self.sock.settimeout(SEND_SECONDS)
        self.sock.sendall(data)

    def _linger(self) -> None:
        """Read what the client still sends, for a moment: it would be told of a broken pipe before it reads why."""
        self.sock.shutdown(socket.SHUT_WR)
        deadline, left = time.monotonic() + _LINGER_SECONDS, _LINGER_BYTES
        while left > 0 and (patience := deadline - time.monotonic()) > 0:
            self.sock.settimeout(patience)
            data = self.sock.recv(_READ_SIZE)
            if not data:
                return
            left -= len(data)


def busy_reply() -> Reply:
    """What is said to one too many."""
    limit = "as many connections are served as can be"
    error = ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "connections", "too many", limit, "try again in a second")
    error.headers["Retry-After"] = "1"
    return error_reply(error, error.status)


def _too_large(size: str) -> ApiError:
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body", size, f"must be at most {MAX_BODY} bytes")


def _origin_form(target: str) -> str:
    """The path and query of a request's target, which may be a whole URL."""
    scheme, separator, rest = target.partition("://")
    if separator and scheme.lower() in ("http", "https") and not target.startswith("/"):
        return f"/{rest.partition('/')[2]}"
    return target
