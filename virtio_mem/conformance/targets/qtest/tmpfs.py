"""A file system in memory that can run full and refuse to give back: a host that is at its end, for one file.

It is a tmpfs of its own, mounted nowhere, so nobody else notices. It has no room any more once its size is cut to what
is used: then a page that is touched is a SIGBUS, and one that is populated by madvise(2) an error. A file that is made
immutable keeps its pages: fallocate(2) punches no holes into it. Either can be taken back. Both are for root.

The system calls have no wrapper in Python, and need none in C: they move numbers and short strings. Sources: fsopen(2),
fsconfig(2), fsmount(2), fspick(2), ioctl_iflags(2); Linux 6.1 for immutable files on a tmpfs.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os

from vhost_user.errors import HostError

_FSOPEN, _FSCONFIG, _FSMOUNT, _FSPICK = 430, 431, 432, 433
"""Numbers of system calls that came after 2019, which are the same on all machines."""

_SET_STRING, _CREATE, _RECONFIGURE = 1, 6, 7
_CLOEXEC = 1
"""FSOPEN_, FSMOUNT_ and FSPICK_CLOEXEC."""
_EMPTY_PATH = 8

_SLACK = 1 << 20
"""Bytes beside those of the file."""

_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602
_IMMUTABLE = 0x10

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, number: int, *arguments: int | bytes | None) -> int:
    """A system call; HostError where it fails."""
    converted = [ctypes.c_long(one) if isinstance(one, int) else ctypes.c_char_p(one) for one in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *converted)
    if result < 0:
        code = ctypes.get_errno()
        remedy = "be root, and have Linux 6.1 or later"
        raise HostError.from_os_error("memory", "tmpfs", name, OSError(code, os.strerror(code)), remedy)
    return result


class Tmpfs:
    """A tmpfs with a file of `size` bytes, none of which is allocated, open at `fd`. HostError where that can't be."""

    def __init__(self, size: int) -> None:
        self._size = size
        context = _call("fsopen", _FSOPEN, b"tmpfs", _CLOEXEC)
        try:
            self._configure(context, size + _SLACK, _CREATE)
            self._mount = _call("fsmount", _FSMOUNT, context, _CLOEXEC, 0)
        finally:
            os.close(context)
        try:
            ballast, self.fd = (
                os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self._mount)
                for name in ("ballast", "region")
            )
            os.write(ballast, b"a page")  # a size of 0 would be no limit: so never is nothing used
            os.close(ballast)
            os.ftruncate(self.fd, size)
        except OSError as error:
            os.close(self._mount)
            raise HostError.from_os_error("memory", "tmpfs", "open", error) from error

    def refuse(self, refuses: bool) -> None:
        """While `refuses`, the file gets no page and gives none back."""
        found = os.fstatvfs(self._mount)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        context = _call("fspick", _FSPICK, self._mount, b"", _CLOEXEC | _EMPTY_PATH)
        try:
            self._configure(context, used if refuses else self._size + _SLACK, _RECONFIGURE)
        finally:
            os.close(context)
        flags = array.array("l", [0])
        try:
            fcntl.ioctl(self.fd, _GET_FLAGS, flags)
            flags[0] = flags[0] | _IMMUTABLE if refuses else flags[0] & ~_IMMUTABLE
            fcntl.ioctl(self.fd, _SET_FLAGS, flags)
        except OSError as error:
            raise HostError.from_os_error("memory", "tmpfs", "FS_IOC_SETFLAGS", error, "be root") from error

    @staticmethod
    def _configure(context: int, size: int, command: int) -> None:
        """Have all of it take `size` bytes at most."""
        _call("fsconfig", _FSCONFIG, context, _SET_STRING, b"size", str(size).encode(), 0)
        _call("fsconfig", _FSCONFIG, context, command, None, None, 0)

    def close(self) -> None:
        """Let all of it go. Closing twice is allowed."""
        for name in ("fd", "_mount"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)
