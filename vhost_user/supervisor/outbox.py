"""What a dead supervisor had sent and taken: a page of shared memory, in which the kernel writes how much was sent.

sendmmsg(2) writes the number of bytes that it sent into its argument, in the same system call: a process that is killed
was killed before both or after both. The argument lies in a memfd that is stored, so the next process knows what the
other end of a connection has, or will read. There is no other way to know: a socket tells how much its reader has not
read yet, and not how much was ever sent.

    byte 0          the number of what was taken out of the socket last
    byte 64, 128    struct mmsghdr, for replies of even and of odd numbers: the one before is still there while the next
                    one is not kept
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
from collections.abc import Sequence

from vhost_user.owned_fd import OwnedFd

_SLOTS = (64, 128)
_CMSG = struct.Struct("@Nii")


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_char_p), ("len", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """struct msghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.POINTER(_IoVec)),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_char_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Slot(ctypes.Structure):
    """struct mmsghdr: a message, and how much of it was sent."""

    _fields_ = (("message", _Message), ("sent", ctypes.c_uint))


_sendmmsg = ctypes.CDLL(None, use_errno=True).sendmmsg


class Outbox:
    """The page in the memfd `fd`, which is taken over."""

    def __init__(self, fd: OwnedFd) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd.fileno(), mmap.PAGESIZE)
        self._words = memoryview(self._map).cast("Q")
        self._slots = [_Slot.from_buffer(self._map, at) for at in _SLOTS]

    @classmethod
    def create(cls) -> Outbox:
        """One in which nothing was sent. OSError where the host has no room."""
        fd = OwnedFd(os.memfd_create("outbox", os.MFD_CLOEXEC))
        os.ftruncate(fd.fileno(), mmap.PAGESIZE)
        return cls(fd)

    @property
    def taken(self) -> int:
        """The number of what was taken out of the socket last."""
        return self._words[0]

    @taken.setter
    def taken(self, number: int) -> None:
        self._words[0] = number

    def clear(self, number: int) -> None:
        """Nothing of the reply of this number was sent."""
        self._slots[number % 2].sent = 0

    def sent(self, number: int) -> int:
        """How many bytes of the reply of this number were sent."""
        return int(self._slots[number % 2].sent)

    def send(self, sock: socket.socket, number: int, data: bytes, fds: Sequence[OwnedFd]) -> int:
        """Send what there is room for of the reply of this number, with its descriptors; the number of bytes. OSError
        as send(2)."""
        control = _rights(fds)
        slot = self._slots[number % 2]
        vector = _IoVec(data, len(data))
        slot.message.iov, slot.message.iovlen = ctypes.pointer(vector), 1
        slot.message.control, slot.message.controllen = control or None, len(control)
        if _sendmmsg(sock.fileno(), ctypes.byref(slot), 1, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return int(slot.sent)

    def close(self) -> None:
        """Let go of the memfd; the memory goes with this object."""
        self._words.release()
        self.fd.close()


def _rights(fds: Sequence[OwnedFd]) -> bytes:
    """A control message with descriptors, cmsg(3)."""
    if not fds:
        return b""
    numbers = struct.pack(f"={len(fds)}i", *(fd.fileno() for fd in fds))
    head = _CMSG.pack(socket.CMSG_LEN(len(numbers)), socket.SOL_SOCKET, socket.SCM_RIGHTS)
    return (head + numbers).ljust(socket.CMSG_SPACE(len(numbers)), b"\0")
