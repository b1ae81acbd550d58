"""A socket whose bytes stay in it until somebody says that they are kept.

Its option SO_PEEK_OFF, socket(7), is where the next look begins. It is the socket's, not the process's: a look moves
it up, and what is taken out moves it down, each within the system call. So it is how much was looked at and is still
there.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any, Self

from vhost_user.owned_fd import ROOM_FOR_FDS, OwnedFd, close_all, received_fds

SO_PEEK_OFF = 42
"""asm-generic/socket.h; Python has no name for it."""


class PeekedSocket(socket.socket):
    """A unix socket of which `recvmsg` looks at what comes next, all of which is then taken out by `take`, or looked
    at again after `look_again`."""

    @classmethod
    def of(cls, sock: socket.socket) -> Self:
        """Takes `sock` over."""
        made = cls(fileno=sock.detach())
        made.look_again()
        return made

    @classmethod
    def found(cls, fd: OwnedFd) -> Self:
        """Goes on where another process stopped; `fd` is taken over."""
        made = cls(fileno=fd.take())
        made.setblocking(False)
        return made

    @property
    def looked_at(self) -> int:
        """How many bytes were looked at and not taken out."""
        return self.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)

    def look_again(self, *, after: int = 0) -> None:
        """Look at the same once more, but for the first `after` bytes."""
        self.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, after)

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /) -> Any:
        """A look, as recvmsg(2) with MSG_PEEK."""
        return super().recvmsg(bufsize, ancbufsize, flags | socket.MSG_PEEK)

    def take(self) -> int:
        """Take out what was looked at; how many descriptors were with it, which are not wanted a second time."""
        count = 0
        while (left := self.looked_at) > 0:
            # The other end died and had not read all: that is told once, even before what it sent.
            with suppress(ConnectionResetError):
                _, ancillary, _, _ = super().recvmsg(left, ROOM_FOR_FDS, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
                fds = received_fds(ancillary)
                count += len(fds)
                close_all(fds)
        return count
