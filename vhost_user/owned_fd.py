"""File descriptors that somebody owns from the first moment.

A descriptor that arrives with a message is an integer that nothing closes. Between the call that received it and the
one that makes use of it lie checks that may refuse, and each refusal would have to remember what to close. So whoever
receives a descriptor wraps it at once, and from then on three things can happen to it: it is closed, it is taken by
somebody who closes it, or its wrapper is forgotten and closes it then.

`OwnedFd` is not a file: it has no buffer, mode or position, and costs one object of one slot. One thread at a time may
use it.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Iterable

from vhost_user import _native
from vhost_user.errors import HostError, UsageError

_CLOSED = -1

_SCM_PIDFD = 4
"""Of Linux 6.5; Python has no name for it."""

ROOM_FOR_FDS = socket.CMSG_SPACE(253 * array.array("i").itemsize)
"""For all descriptors that one message can have, SCM_MAX_FD of unix(7): those that there is no room for the kernel
closes within recvmsg(2), and waits for what that waits for."""


class OwnedFd:
    """Owns the file descriptor `fd`: closes it unless it is taken. Raises UsageError for a number below 0.

    As a context manager it closes at the end of the block what was not taken by then.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = _CLOSED
        if fd < 0:
            raise UsageError("fd", fd, "has to be 0 or more", "check what the system call returned")
        self._fd = fd

    def __repr__(self) -> str:
        return "<OwnedFd closed>" if self.closed else f"<OwnedFd {self._fd}>"

    @property
    def closed(self) -> bool:
        """Whether there is nothing to close any more: it was closed, or taken."""
        return self._fd == _CLOSED

    def fileno(self) -> int:
        """The descriptor, which stays this object's. Raises UsageError where it was closed or taken."""
        if self._fd == _CLOSED:
            raise UsageError("fd", "closed", "was closed or taken before", "duplicate() what is needed in two places")
        return self._fd

    def take(self) -> int:
        """The descriptor, which is the caller's to close from now on. Raises UsageError where it is gone already."""
        fd = self.fileno()
        self._fd = _CLOSED
        return fd

    def duplicate(self) -> OwnedFd:
        """A second descriptor, closed at exec, for the same open file. Raises HostError where no number is free."""
        return self.duplicate_of(self.fileno())

    @classmethod
    def duplicate_of(cls, fd: int) -> OwnedFd:
        """As `duplicate`, of a descriptor that is somebody else's."""
        try:
            return cls(os.dup(fd))
        except OSError as error:
            raise HostError.from_os_error("fd", fd, "dup", error, "raise the limit, ulimit -n") from error

    def close(self) -> None:
        """Close the descriptor; closing twice, or after `take()`, does nothing.

        What a file system reports only when it is closed concerns the one who wrote to the file, and the number is free
        in any case: close(2). A peer can pass a file of such a file system, so that is no error here.
        """
        fd, self._fd = self._fd, _CLOSED
        if fd == _CLOSED:
            return
        try:
            self._close(fd)
        except OSError as error:
            if error.errno == errno.EBADF:
                raise AssertionError(f"somebody else closed descriptor {fd}") from error

    @staticmethod
    def _close(fd: int) -> None:
        os.close(fd)

    def __enter__(self) -> OwnedFd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class ReceivedFd(OwnedFd):
    """One that a peer sent, so that nobody knows what closing it waits for: `close` does not wait for that."""

    __slots__ = ()

    _close = staticmethod(_native.close_received)


def close_socket(sock: socket.socket) -> None:
    """Close one that a peer is at the other end of, or one that peers connect to: what they sent and nobody read is
    closed with it, as a `ReceivedFd` is. Closing twice is allowed."""
    if (fd := sock.detach()) != _CLOSED:
        ReceivedFd(fd).close()


def close_all(owned: Iterable[OwnedFd]) -> None:
    """Close each of them."""
    for fd in owned:
        fd.close()


def received_fds(ancillary: Iterable[tuple[int, int, bytes]]) -> list[OwnedFd]:
    """The descriptors that came with a message, as recvmsg(2) tells of them.

    The sender's pidfd, which nobody here asks for, but who made the socket can (SO_PASSPIDFD), is closed.
    """
    numbers, pidfds = array.array("i"), array.array("i")
    kept = {(socket.SOL_SOCKET, socket.SCM_RIGHTS): numbers, (socket.SOL_SOCKET, _SCM_PIDFD): pidfds}
    for level, kind, data in ancillary:
        if (level, kind) in kept:
            kept[level, kind].frombytes(data[: len(data) - len(data) % numbers.itemsize])
    close_all(OwnedFd(number) for number in pidfds if number >= 0)  # or why there is none
    return [ReceivedFd(number) for number in numbers]
