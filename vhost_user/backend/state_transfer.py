"""The state of a device on its way through a pipe, in pieces, while the loop does other things."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable

from vhost_user.backend.loop import EventLoop
from vhost_user.errors import FieldError, PeerError
from vhost_user.owned_fd import OwnedFd

log = logging.getLogger(__name__)

TIME_LIMIT = 30.0
"""Seconds for a whole transfer; a front end that doesn't read or write for so long has given up."""

_PIECE = 1 << 16
"""Bytes moved at once: what a pipe holds."""


class StateTransfer:
    """One transfer, from `save` or `load` to its end. The pipe's end is the transfer's, closed when it is done."""

    def __init__(self, loop: EventLoop, pipe: OwnedFd) -> None:
        self._loop = loop
        self._pipe = pipe
        self._result: bool | None = None
        self._then: Callable[[bool], None] | None = None
        self._timer = loop.call_later(TIME_LIMIT, lambda: self._end(good=False))

    @classmethod
    def save(cls, loop: EventLoop, pipe: OwnedFd, state: bytes) -> StateTransfer:
        """Write `state`, and close to mark its end. Takes `pipe` over; PeerError where it is no pipe."""
        transfer = cls(loop, _own_description(pipe, os.O_WRONLY))
        left = memoryview(state)

        def write() -> None:
            nonlocal left
            try:
                left = left[os.write(transfer._pipe.fileno(), left[:_PIECE]) :]
            except BlockingIOError:
                return
            except BrokenPipeError:
                transfer._end(good=False)
                return
            if not left:
                transfer._end(good=True)

        loop.watch(transfer._pipe, write, write=True)
        return transfer

    @classmethod
    def load(cls, loop: EventLoop, pipe: OwnedFd, limit: int, take: Callable[[bytes], None]) -> StateTransfer:
        """Read to the end, `limit` bytes at most, and give all to `take`, which may refuse by raising PeerError."""
        transfer = cls(loop, _own_description(pipe, os.O_RDONLY))
        data = bytearray()

        def read() -> None:
            try:
                piece = os.read(transfer._pipe.fileno(), _PIECE)
            except BlockingIOError:
                return
            data.extend(piece)
            if len(data) > limit:
                log.warning("device state: more than %d bytes", limit)
                transfer._end(good=False)
            elif not piece:
                transfer._end(good=_taken(take, bytes(data)))

        loop.watch(transfer._pipe, read)
        return transfer

    def when_done(self, then: Callable[[bool], None]) -> None:
        """Have `then` called with whether it went well, at once if it is done."""
        self._then = then
        if self._result is not None:
            then(self._result)

    def _end(self, *, good: bool) -> None:
        if self._result is not None:
            return
        self._result = good
        self.close()
        if self._then is not None:
            self._then(good)

    def close(self) -> None:
        """Give up, if it is not done."""
        self._timer.cancel()
        if not self._pipe.closed:
            self._loop.forget(self._pipe)
            self._pipe.close()


def _taken(take: Callable[[bytes], None], data: bytes) -> bool:
    try:
        take(data)
    except FieldError as error:
        log.warning("device state refused: %s", error)
        return False
    return True


def _own_description(fd: OwnedFd, flags: int) -> OwnedFd:
    """The pipe opened anew: whether reading and writing wait is the description's, and the peer's has the peer's."""
    with fd:
        if not stat.S_ISFIFO(os.fstat(fd.fileno()).st_mode):
            raise PeerError("device state fd", fd.fileno(), "has to be an end of a pipe")
        try:
            return OwnedFd(os.open(f"/proc/self/fd/{fd.fileno()}", flags | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            raise PeerError(
                "device state fd", os.strerror(error.errno or 0), "has to be a pipe whose other end is open"
            ) from error
