"""A front end's connection, and a worker, of a supervisor whose book lasts: see ledger.py for the order of things."""

from __future__ import annotations

import select
import signal
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress

from vhost_user.backend.loop import EventLoop
from vhost_user.errors import PeerError
from vhost_user.owned_fd import OwnedFd, close_all, close_socket, received_fds
from vhost_user.supervisor.book import WORKED, WORKER, Book, keep_open
from vhost_user.supervisor.outbox import Outbox
from vhost_user.supervisor.packets import Packet, receive
from vhost_user.supervisor.peeked import PeekedSocket
from vhost_user.supervisor.process import Start, WorkerProcess
from vhost_user.supervisor.wire import Received, Wire

_HANDLED = struct.Struct("=Q")


_HEADER = struct.Struct("=III")
"""What a message begins with; the last of it is the size of the rest."""

_BRING_ONE = frozenset({7, 21, 32, 33, 37, 42})
"""Requests with which one descriptor comes, always: SET_LOG_FD, SET_BACKEND_REQ_FD, SET_INFLIGHT_FD, GPU_SET_SOCKET,
ADD_MEM_REG and SET_DEVICE_STATE_FD. By number, since `vhost_user.message` takes long to import."""

_SET_MEM_TABLE, _SET_LOG_BASE, _VRING_FDS = 5, 6, (12, 13, 14)

_LOOK = 8192
"""Bytes that are looked at: more than any message has, 4120."""


class StoredWire(Wire):
    """The connection `sock`, and what is noted of it in `outbox`; both are taken over.

    A look goes further than one thinks. When it has as many bytes as it was to have, the kernel goes on in the queue to
    the next thing that was sent with descriptors, and gives these, too, with no byte of it. But it never goes on behind
    descriptors. So the look is for more than a message: it ends with what they were sent with. Where that is a message
    or less, it is ours; where it is more, others are behind it, and whether they were sent at once or one by one can't
    be seen. Then descriptors are this message's if it has to bring some, else those of a message to come. Whether they
    were is seen when it is taken out.
    """

    def __init__(self, sock: PeekedSocket, outbox: Outbox) -> None:
        super().__init__(sock)
        self._peeked = sock
        self._outbox = outbox
        self.pieces = outbox.taken

    @classmethod
    def begin(cls, book: Book, key: bytes, listener: str, sock: socket.socket) -> StoredWire:
        """A new connection, which is kept from here on."""
        try:
            outbox = Outbox.create()
        except OSError:
            close_socket(sock)
            raise
        wire = cls(PeekedSocket.of(sock), outbox)
        try:
            keep_open(book, key, wire.sock, wire._outbox.fd, data=listener.encode())
        except OSError:
            wire.close()
            raise
        book.commit()
        return wire

    def settle(self, piece: int) -> None:
        """Go on after another process, whose last piece that is kept has this number."""
        if piece > self._outbox.taken:
            self.took(piece, 0)
        else:
            self._peeked.look_again()

    def receive(self, size: int, room: int, *, first: bool) -> Received:
        """See `Wire`."""
        data, ancillary, flags, _ = self._peeked.recvmsg(_LOOK, room, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
        looked_at, data = data, data[:size]
        self._peeked.look_again(after=len(data))
        if not first or (len(looked_at) > _length(looked_at) and not must_bring_fds(looked_at)):
            close_all(received_fds(ancillary))
            ancillary, flags = [], 0
        return data, ancillary, flags

    def took(self, piece: int, nb_fds: int) -> bool:
        """See `Wire`."""
        came = self._peeked.take()
        self._outbox.taken = piece
        return came == nb_fds

    def prepare(self, number: int) -> None:
        """See `Wire`."""
        self._outbox.clear(number)

    def sent(self, number: int) -> int:
        """See `Wire`."""
        return self._outbox.sent(number)

    def send(self, number: int, data: bytes, fds: Sequence[OwnedFd]) -> int:
        """See `Wire`."""
        return self._outbox.send(self.sock, number, data, fds)

    def close(self) -> None:
        """Close the connection, of which the store has a duplicate."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        close_socket(self.sock)
        self._outbox.close()


def _length(data: bytes) -> int:
    """Of the message that begins so, as far as that is known."""
    return _HEADER.size + _HEADER.unpack_from(data)[2] if len(data) >= _HEADER.size else _HEADER.size


def must_bring_fds(data: bytes) -> bool:
    """Whether the message that `data`, which has all of it, begins with is none without descriptors."""
    request: int
    size: int
    request, _, size = _HEADER.unpack_from(data)
    start = int.from_bytes(data[_HEADER.size : _HEADER.size + min(size, 8)], "little")
    if request == _SET_MEM_TABLE:
        return start & 0xFFFFFFFF != 0  # the number of regions
    if request == _SET_LOG_BASE:
        return size > 8  # size and offset, and not an address
    if request in _VRING_FDS:
        return not start & 0x100  # the flag that there is none
    return request in _BRING_ONE


class StoredWorker(WorkerProcess):
    """A worker of which each packet is handled once, though the supervisor may die over it. `book` has it."""

    def __init__(
        self,
        book: Book,
        loop: EventLoop,
        start: Start,
        *,
        on_packet: Callable[[Packet], None],
        on_exit: Callable[[int], None],
    ) -> None:
        super().__init__(loop, start, on_packet=self._handle, on_exit=self._ended)
        self._book = book
        self._then, self._in_the_end = on_packet, on_exit
        self._handled = 0
        loop.forget(self._control)
        self._control = self._peeked = PeekedSocket.of(self._control)
        loop.watch(self._control, self._readable)
        try:
            self._outbox = Outbox.create()
            files = (self._pidfd, self._control, self._outbox.fd)
            self._kept = keep_open(book, WORKER, *files, data=_HANDLED.pack(0))
        except OSError:
            self.kill()
            raise
        book.put(WORKED, b"")
        book.commit()

    def _handle(self, packet: Packet) -> None:
        self._handled += 1
        self._book.put(WORKER, _HANDLED.pack(self._handled), self._kept)
        self._then(packet)
        self._book.commit()
        self._peeked.take()
        self._outbox.taken = self._handled

    def _ended(self, status: int) -> None:
        self._book.drop(WORKER)
        self._outbox.close()
        self._in_the_end(status)
        self._book.commit()


def end_worker(data: bytes, fds: Sequence[OwnedFd], book: Book, then: Callable[[Packet], None]) -> None:
    """Kill the worker of a supervisor that is gone, wait until it is dead, and have `then` called with what it had sent
    and nobody handled. `data` and `fds`, which are taken over, are its entry."""
    pidfd, control, page = fds
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()
    (handled,) = _HANDLED.unpack(data)
    outbox = Outbox(page)
    with PeekedSocket.found(control) as sock:
        if handled > outbox.taken:
            sock.take()
        else:
            sock.look_again()
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # it had not read all, which is told before what it sent
        with suppress(EOFError, PeerError):
            while packet := receive(sock):
                handled += 1
                book.put(WORKER, _HANDLED.pack(handled), fds)
                try:
                    then(packet)
                finally:
                    close_all(packet.fds)
                book.commit()
                sock.take()
                outbox.taken = handled
    book.drop(WORKER)
    book.commit()
    outbox.close()
    close_all(fds)
