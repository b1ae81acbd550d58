"""A front end's connection: what is read from it and sent on it, by a supervisor that takes it along when it dies."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from vhost_user.owned_fd import OwnedFd, close_socket

_RECEIVE = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
_SEND = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

Received = tuple[bytes, list[tuple[int, int, bytes]], int]


class Wire:
    """`sock`, which is taken over. stored.py has one that outlives the process."""

    pieces = 0
    """How many pieces of messages were taken by supervisors before this one."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)
        # Else a byte that is sent out of band can be waited for, and is never there where one only looks.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)

    def receive(self, size: int, room: int, *, first: bool) -> Received:
        """The next bytes of a message, `size` at most, ancillary data, and flags, as recvmsg(2). BlockingIOError,
        OSError as there.

        It may all come again, unless `took` follows. `first` says whether the message begins here.
        """
        del first
        data, ancillary, flags, _ = self.sock.recvmsg(size, room, _RECEIVE)
        return data, ancillary, flags

    def took(self, piece: int, nb_fds: int) -> bool:
        """What was received, the piece of this number, is kept, and so many descriptors. Whether there were as many."""
        del piece, nb_fds
        return True

    def prepare(self, number: int) -> None:
        """The reply of this number is going to be sent; the one before was."""

    def settle(self, piece: int) -> None:
        """Go on after another process, whose last piece that is kept has this number."""

    def sent(self, number: int) -> int:
        """How many bytes of the reply of this number another process had sent."""
        del number
        return 0

    def send(self, number: int, data: bytes, fds: Sequence[OwnedFd]) -> int:
        """Send of a reply what there is room for, and the descriptors with it; the number of bytes. OSError as send."""
        del number
        if fds:
            return socket.send_fds(self.sock, [data], [fd.fileno() for fd in fds], _SEND)
        return self.sock.send(data, _SEND)

    def close(self) -> None:
        """Close the connection."""
        close_socket(self.sock)
