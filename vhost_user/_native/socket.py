"""Whole messages over a stream socket."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from vhost_user._core import ffi, lib
from vhost_user._native.result import error

MOST_FDS: int = lib.VU_MOST_FDS

NOT_YET: int = lib.VU_NOT_YET
WHOLE: int = lib.VU_WHOLE
ENDED: int = lib.VU_ENDED
BAD_HEADER: int = lib.VU_BAD_HEADER
LATE_FDS: int = lib.VU_LATE_FDS
TRUNCATED_FDS: int = lib.VU_TRUNCATED_FDS
WATCHED: int = lib.VU_WATCHED
ANSWERED: int = lib.VU_ANSWERED

_HEAD = struct.Struct("=4I")
"""`struct vu_incoming` up to its descriptors: request, flags, size, how many descriptors."""

_NOTHING = ffi.NULL

_PAYLOAD = ffi.offsetof("struct vu_incoming", "payload")

assert _HEAD.size == ffi.offsetof("struct vu_incoming", "fds")


class Incoming:
    """A message of at most `largest` bytes of payload and `most_fds` descriptors, as far as it has come."""

    __slots__ = ("_bytes", "_end", "_pointer")

    def __init__(self, most_fds: int, largest: int) -> None:
        assert most_fds <= MOST_FDS
        limits = {"most_fds": most_fds, "largest": largest, "payload": largest}
        self._pointer = ffi.new("struct vu_incoming *", limits)
        # Beside it: the garbage collector may end this first of what goes together, and cffi frees what it ends.
        self._end = ffi.gc(self._pointer, lib.vu_incoming_drop)
        self._bytes = ffi.buffer(self._pointer, _PAYLOAD + largest)

    def answer(self, question: int, answer: bytes) -> None:
        """Have `question` answered where it is read, by these bytes."""
        assert len(answer) <= lib.VU_ANSWER_SIZE
        self._pointer.question, self._pointer.answer_size = question, len(answer)
        ffi.memmove(self._pointer.answer, answer, len(answer))

    def receive(self, sock: int, patience: int = 0, others: int = -1) -> int:
        """What `enum vu_received` in csrc/socket_api.h says of what has come, and comes within `patience` nanoseconds
        of looking, or until another is ready of the epoll `others`. OSError where the socket fails."""
        result: int = lib.vu_receive(sock, self._pointer, patience, others)
        if result < 0:
            raise error(result)
        return result

    def wait(self, sock: int, watched: Sequence[int], deadline: int, patience: int = 0) -> int:
        """The same, and then what comes until `deadline`, in nanoseconds of time.monotonic_ns(), or one of `watched`
        has something."""
        descriptors = watched or _NOTHING
        result: int = lib.vu_await(sock, self._pointer, descriptors, len(watched), deadline, patience)
        if result < 0:
            raise error(result)
        return result

    @property
    def have(self) -> int:
        """How many bytes there are of a message that is not whole."""
        count: int = self._pointer.have
        return count

    @property
    def head(self) -> tuple[int, int, int, int]:
        """Request, flags, size of the payload, how many descriptors."""
        return _HEAD.unpack_from(self._bytes)

    def take(self) -> tuple[int, int, bytes, Iterable[int]]:
        """Request, flags, payload, and the descriptors, which are the caller's, of a message that is whole."""
        request, flags, size, count = _HEAD.unpack_from(self._bytes)
        payload: bytes = self._bytes[_PAYLOAD : _PAYLOAD + size] if size else b""
        return request, flags, payload, self._pointer.fds[0:count] if count else ()

    def drop(self) -> None:
        """Close the descriptors of a message that is not whole."""
        lib.vu_incoming_drop(self._pointer)


def send(sock: int, data: bytes, fds: Sequence[int]) -> int:
    """How much of `data` was sent, which is what can be without waiting; OSError where nothing can."""
    sent: int = lib.vu_send(sock, data, len(data), fds or _NOTHING, len(fds))
    if sent < 0:
        raise error(sent)
    return sent


def can_be_read(fd: int) -> bool:
    """Whether a descriptor can be read now, or is broken; of an epoll, whether one that it watches is ready."""
    return bool(lib.vu_can_be_read(fd))
