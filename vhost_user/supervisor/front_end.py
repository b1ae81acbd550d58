"""A front end's connection as the supervisor has it: whole messages in, whole replies out, one at a time.

A message is known by its header's size alone. It is read as a whole with its descriptors, and is the current one until
what the worker made of it is kept; then the reply is sent, as a whole; then the next message is read. So at any moment
a worker may die: its successor is given the journal, and the current message if there is one.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

from vhost_user.backend.loop import Call, EventLoop
from vhost_user.owned_fd import ROOM_FOR_FDS, OwnedFd, close_all, received_fds
from vhost_user.supervisor.book import INPUT, OUTPUT, Book, session_key
from vhost_user.supervisor.kept import Journal
from vhost_user.supervisor.wire import Wire

log = logging.getLogger(__name__)

TIME_LIMIT = 10.0
"""Seconds within which a message that has begun must end, a new front end must send its first one, and a reply must be
taken."""

MAX_PAYLOAD = 4108
"""The most bytes that may follow a header: `vhost_user.message.table.MAX_PAYLOAD`, which takes long to import."""

MAX_FDS = 8
"""`vhost_user.message.MAX_FDS`, for the same reason."""

_HEADER = struct.Struct("=III")

_INPUT = struct.Struct("=QQQ")
"""In a book: the number of the piece that was read last, of the message before this one, and what it is blamed for."""

_OUTPUT = struct.Struct("=Q")
"""The reply's number."""


class Message:
    """The message that is in hand, and its descriptors. `blame` counts the deaths under it, see supervisor.py."""

    def __init__(self, number: int, data: bytes, fds: list[OwnedFd]) -> None:
        self.number = number
        self.data = data
        self.fds = fds
        self.blame = 0
        self.sent = False
        self.begun = False


class FrontEnd:
    """The front end at the other end of `wire`, which is taken over.

    `on_message` is called with each that has come as a whole; `reply()` has the next one read. `on_close` is called
    once, when the connection is closed from either side. `book` has all of it at any time.
    """

    def __init__(
        self,
        loop: EventLoop,
        wire: Wire,
        number: int,
        listener: str,
        book: Book,
        *,
        on_message: Callable[[FrontEnd], None],
        on_close: Callable[[FrontEnd], None],
    ) -> None:
        self.number = number
        self.listener = listener
        self.name = f"{listener} front end {number}"
        self.names = _names(wire.sock)
        self.journal = Journal(book, session_key(number))
        self.current: Message | None = None
        self.blame = 0
        self.told = False
        """Whether the worker knows of it."""
        self.resuming = self.begun = False
        """Whether a worker has its journal, and whether it said that it is at it."""
        self.closed = False
        self._loop, self._wire, self._sock = loop, wire, wire.sock
        self._book, self._key = book, session_key(number)
        self._on_message, self._on_close = on_message, on_close
        self._messages = self._replies = 0
        self._pieces = wire.pieces
        self._data = bytearray()
        self._fds: list[OwnedFd] = []
        self._reply, self._reply_fds = b"", list[OwnedFd]()
        self._timer: Call | None = None
        self._set_timer("no whole message")
        loop.watch(self._sock, self._readable)

    # After another process.

    def restore(self, piece: bytes | None, piece_fds: list[OwnedFd], reply: bytes | None, fds: list[OwnedFd]) -> None:
        """Go on with what the book has: what was read, or in hand, or was to be sent. Its journal is the caller's."""
        self._set_timer(None)
        if piece is not None:
            self._pieces, self._messages, blame = _INPUT.unpack_from(piece)
            self._data, self._fds = bytearray(piece[_INPUT.size :]), piece_fds
        self._wire.settle(self._pieces)
        if piece is not None:
            self._set_timer("half a message")
            if len(self._data) >= _HEADER.size:
                self._look()
            if self.current is not None:
                self.current.blame, self.current.sent = blame, True
        elif reply is not None:
            (self._replies,) = _OUTPUT.unpack_from(reply)
            sent = self._wire.sent(self._replies)
            if sent:  # they went with the first byte
                close_all(fds)
                fds = []
            self._keep_reply(reply[_OUTPUT.size + sent :], fds)
            if self._reply:
                self._set_timer("reads no reply")
                self._loop.forget(self._sock)
                self._loop.watch(self._sock, self._writable, write=True)

    def save(self) -> None:
        """Have the book have what was read, or is in hand. It is written with what is committed next."""
        count, blame, data, fds = self._messages, 0, bytes(self._data), self._fds
        if self.current is not None:
            count, blame, data, fds = count - 1, self.current.blame, self.current.data, self.current.fds
        self._book.put(self._key + INPUT, _INPUT.pack(self._pieces, count, blame) + data, fds)

    # In.

    def _readable(self) -> None:
        while self.current is None and not self.closed:
            wanted = _HEADER.size - len(self._data)
            if wanted <= 0:
                wanted += _size(self._data)
            if not self._receive(wanted):
                return
            if len(self._data) >= _HEADER.size:
                self._look()

    def _receive(self, wanted: int) -> bool:
        """Read `wanted` bytes at most; whether to go on."""
        try:
            data, ancillary, told = self._wire.receive(wanted, ROOM_FOR_FDS, first=not self._data)
        except BlockingIOError:
            return False
        except OSError as error:
            self.close(str(error.strerror), logging.INFO)
            return False
        fds = received_fds(ancillary)
        late = bool(self._data and fds)
        if len(fds) > MAX_FDS:
            close_all(fds)
            self.close(f"{len(fds)} descriptors, where no message has more than {MAX_FDS}")
            return False
        try:
            self._fds += self._book.keep(fds)
        except OSError as error:
            close_all(fds)
            self.close(f"its descriptors can't be kept: {error.strerror}")
        if told & socket.MSG_CTRUNC:
            self.close(f"more than {len(fds)} descriptors, or more than this process may open")
        elif late:
            self.close("descriptors that did not come with a message's first byte")
        elif not data:
            self.close("gone within a message" if self._data else "gone", logging.INFO)
        if self.closed:
            return False
        if not self._data and self._timer is None:
            self._set_timer("half a message")
        self._data += data
        self._pieces += 1
        self._book.drop(self._key + OUTPUT)
        self.save()
        self._book.commit()
        if not self._wire.took(self._pieces, len(fds)):
            self.close("descriptors that came with another message, or not with a message's first byte")
        return not self.closed

    def _look(self) -> None:
        """See whether a message is complete."""
        size = _size(self._data)
        if size > MAX_PAYLOAD:
            self.close(f"a payload of {size} bytes, where no message has more than {MAX_PAYLOAD}")
        elif len(self._data) == _HEADER.size + size:
            self._messages += 1
            self.current = Message(self._messages, bytes(self._data), self._fds)
            self._data, self._fds = bytearray(), []
            self._set_timer(None)
            self._loop.forget(self._sock)
            self._on_message(self)

    # Out.

    def reply(self, data: bytes, fds: list[OwnedFd]) -> None:
        """The current message is done with: send the reply, if there is one, and read on.

        `fds`, which the book has, are taken over. What was put into the book before is committed.
        """
        self.current = None
        self._book.drop(self._key + INPUT)
        self._keep_reply(data, fds)
        if not data:
            close_all(self._reply_fds)
            self._read_on()
        elif self._send_reply():
            self._read_on()
        elif not self.closed:  # most take it at once, and nothing has to be waited for
            self._set_timer("reads no reply")
            self._loop.watch(self._sock, self._writable, write=True)

    def _keep_reply(self, data: bytes, fds: list[OwnedFd]) -> None:
        self._reply, self._reply_fds = data, fds
        self._replies += 1
        self._wire.prepare(self._replies)
        if data:
            self._book.put(self._key + OUTPUT, _OUTPUT.pack(self._replies) + data, fds)
        self._book.commit()

    def _writable(self) -> None:
        if self._send_reply():
            self._loop.forget(self._sock)
            self._set_timer(None)
            self._read_on()

    def _send_reply(self) -> bool:
        """Send what there is room for; whether that is all of it."""
        try:
            while self._reply:
                sent = self._wire.send(self._replies, self._reply, self._reply_fds)
                close_all(self._reply_fds)
                if sent == len(self._reply):
                    self._reply, self._reply_fds = b"", []
                else:
                    self._keep_reply(self._reply[sent:], [])
        except BlockingIOError:
            return False
        except OSError as error:
            self.close(str(error.strerror), logging.INFO)
            return False
        return True

    def _read_on(self) -> None:
        self._loop.watch(self._sock, self._readable)

    # The end.

    def _set_timer(self, slow: str | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if slow is not None:
            self._timer = self._loop.call_later(TIME_LIMIT, lambda: self.close(f"{slow} in {TIME_LIMIT:g} seconds"))

    def close(self, why: str, level: int = logging.WARNING) -> None:
        """Close the connection, and forget all of it. Closing twice is allowed."""
        if self.closed:
            return
        self.closed = True
        log.log(level, "%s: closed: %s", self.name, why)
        self._set_timer(None)
        self._loop.forget(self._sock)
        self._book.drop_all(self._key)
        self._book.commit()
        self._wire.close()
        self.journal.close()
        close_all((*self._fds, *self._reply_fds))
        if self.current is not None:
            close_all(self.current.fds)
        self._on_close(self)


def _size(data: bytearray) -> int:
    size: int = _HEADER.unpack_from(data)[2]
    return size


def _names(sock: socket.socket) -> list[bytes]:
    """What the ends are bound to, with a letter in front: s for a path, b for an abstract name."""
    found: set[str | bytes] = set()
    with suppress(OSError):
        found = {sock.getsockname(), sock.getpeername()} - {"", b""}
    return [b"s" + os.fsencode(name) if isinstance(name, str) else b"b" + bytes(name) for name in found]
