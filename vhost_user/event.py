"""Kicks, calls and errors: the descriptors by which one side of a ring wakes the other.

The protocol passes eventfds, or pipe ends where a platform has no eventfd. Both ends share one open file description,
so O_NONBLOCK is the peer's to set and to clear: a peer that fills its eventfd and makes it blocking would hold whoever
calls write(2) on it for ever. So nothing here depends on flags. An eventfd is signalled by the kernel itself, a pipe is
opened anew, which makes a description that is ours alone, and reading asks not to wait call by call (RWF_NOWAIT).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from pathlib import Path
from typing import Self

from vhost_user import _native
from vhost_user.errors import HostError, PeerError
from vhost_user.owned_fd import OwnedFd

_RING = (1).to_bytes(8, "little")
"""What is written to a pipe; the value has no meaning."""


_PROBES = 16
"""Rings in a row that the other side can't have made by chance."""


class Event:
    """Something to wake up with, or to be woken by. Owns its descriptor; closing twice is allowed."""

    __slots__ = ("_fd", "is_pipe")

    def __init__(self, fd: OwnedFd, *, is_pipe: bool = False) -> None:
        self._fd = fd
        self.is_pipe = is_pipe
        """Whether it is an end of a pipe, and no eventfd."""

    @classmethod
    def create(cls) -> Self:
        """A new eventfd. HostError where the process or the host has no descriptor left."""
        try:
            return cls(OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)))
        except OSError as error:
            raise HostError.from_os_error(
                "eventfd", "new", "eventfd", error, "raise the limit on open files"
            ) from error

    @classmethod
    def to_signal(cls, fd: OwnedFd) -> Self:
        """An eventfd or the writing end of a pipe that a peer sent, to be signalled. Takes `fd` over, also on failure.

        Raises PeerError for any other kind of file.
        """
        with fd:
            if stat.S_ISFIFO(os.fstat(fd.fileno()).st_mode):
                try:
                    own = OwnedFd(os.open(f"/proc/self/fd/{fd.fileno()}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
                except OSError as error:
                    raise HostError.from_os_error("event fd", "pipe", "open", error) from error
                return cls(own, is_pipe=True)
            _require_event(fd)
            return cls(OwnedFd(fd.take()))

    @classmethod
    def to_wait(cls, fd: OwnedFd) -> Self:
        """An eventfd or the reading end of a pipe that a peer sent, to be waited for. As `to_signal` otherwise."""
        with fd:
            is_pipe = stat.S_ISFIFO(os.fstat(fd.fileno()).st_mode)
            if not is_pipe:
                _require_event(fd)
                _require_no_semaphore(fd.fileno())
            elif fcntl.fcntl(fd.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
                raise PeerError("event fd", "the writing end of a pipe", "has to be the end that can be read")
            return cls(OwnedFd(fd.take()), is_pipe=is_pipe)

    def fileno(self) -> int:
        """The descriptor, for a selector or for a peer; it stays ours."""
        return self._fd.fileno()

    def signal(self) -> None:
        """Wake the other side. Never waits: what is full needs no further ring, and who is gone hears none."""
        try:
            if self.is_pipe:
                os.write(self._fd.fileno(), _RING)
            else:
                _native.event_signal(self._fd.fileno())
        except (BlockingIOError, BrokenPipeError):
            pass

    def take(self) -> bool:
        """Take the rings that have come; False if there were none. Never waits. Raises EOFError at a pipe's end."""
        try:
            return _native.event_take(self._fd.fileno())
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise EOFError("the pipe's other end is closed") from None
            raise

    def close(self) -> None:
        """Close the descriptor; the peer's stays as it is."""
        self._fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _require_event(fd: OwnedFd) -> None:
    """The kernel gives anonymous inodes no type; /proc tells what they are."""
    target = str(Path(f"/proc/self/fd/{fd.fileno()}").readlink())
    if target != "anon_inode:[eventfd]":
        raise PeerError("event fd", target, "has to be an eventfd or an end of a pipe")


def _require_no_semaphore(fd: int) -> None:
    """With EFD_SEMAPHORE a read takes one of all rings: one write could wake who waits for it 2**64 times."""
    if _is_semaphore(fd):
        raise PeerError(
            "event fd", "an eventfd with EFD_SEMAPHORE", "has to be an eventfd that is empty when it was read"
        )


def _is_semaphore(fd: int) -> bool:
    """Whether an eventfd has the flag.

    Newer kernels tell the flag in /proc. Elsewhere one read leaves nothing of an ordinary eventfd, unless its other
    side rings between any two of ours. A ring that is lost by this is made up for: a vring is looked at on its start.
    """
    told = re.search(r"^eventfd-semaphore:\s*(\d)", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE)
    if told is not None:
        return told[1] == "1"
    for _ in range(_PROBES):
        _native.event_signal(fd)
    return sum(_native.event_take(fd) for _ in range(_PROBES)) == _PROBES
