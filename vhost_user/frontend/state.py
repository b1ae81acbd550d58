"""Device state on its way from one back end to another: what a device knows that is not in guest memory.

The state is the back end's own business, bytes without a meaning here. It goes through a pipe: the front end makes one
and gives the back end the other end, or the back end answers with an end of a channel that it prefers. Whoever writes
closes to mark the end, and CHECK_DEVICE_STATE then asks the back end how it went. All rings are stopped meanwhile.

The back end may write without end, not at all, or hand over anything as its channel. So how much is taken is limited,
and how long it may take; and a channel of its own must be a pipe or a stream socket, on which nobody has to wait.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from typing import Protocol

from vhost_user.connection import require_stream_socket
from vhost_user.errors import HostError, PeerError, Refused, TimedOut
from vhost_user.frontend.requests import Requests
from vhost_user.message import U64, DeviceState, DeviceStateReply, FrontendRequest, TransferDirection
from vhost_user.owned_fd import ROOM_FOR_FDS, OwnedFd, close_all, close_socket, received_fds
from vhost_user.units import MIB

MAX_STATE = 64 * MIB
"""Bytes of a state at most, where the caller sets no other limit: virtiofsd's has about a hundred for each file that
its guest knows."""

TIME_LIMIT = 60.0
"""Seconds for a whole transfer, where the caller sets no other limit."""

_PIECE = 1 << 16
"""Bytes moved at once: what a pipe holds."""


def save_state(requests: Requests, *, limit: int = MAX_STATE, timeout: float = TIME_LIMIT) -> bytes:
    """The state of a back end whose rings are all stopped.

    Raises Refused where it says that it can't, TimedOut where it isn't done within `timeout` seconds, PeerError for
    more than `limit` bytes and for a channel that is none.
    """
    with requests.lock:
        with _begin(requests, TransferDirection.SAVE) as channel:
            state = _read_all(requests, channel, limit, time.monotonic() + timeout)
        _check(requests)
        return state


def load_state(requests: Requests, state: bytes, *, timeout: float = TIME_LIMIT) -> None:
    """Give a back end the state of another one, before its rings are started.

    Raises Refused where it says that it can't take it, TimedOut where it hasn't read it within `timeout` seconds.
    """
    with requests.lock:
        with _begin(requests, TransferDirection.LOAD) as channel:
            _write_all(requests, channel, state, time.monotonic() + timeout)
        _check(requests)


def _read_all(requests: Requests, channel: _Channel, limit: int, deadline: float) -> bytes:
    state = bytearray()
    while True:
        left = deadline - time.monotonic()  # what can always be read comes to an end, too
        if left <= 0 or not requests.wait_ready(channel.fileno(), left):
            raise TimedOut("device state", f"{len(state)} bytes", "has to come whole within the time given")
        try:
            piece = channel.read()
        except BlockingIOError:
            continue
        except ConnectionResetError:
            raise PeerError(
                "device state", f"{len(state)} bytes", "has to end by a close, and not by a reset"
            ) from None
        if not piece:
            return bytes(state)
        state += piece
        if len(state) > limit:
            raise PeerError(
                "device state",
                f"more than {limit} bytes",
                "has to be within the limit that was given",
                "set a higher one",
            )


def _write_all(requests: Requests, channel: _Channel, state: bytes, deadline: float) -> None:
    rest = memoryview(state)
    while rest:
        left = deadline - time.monotonic()
        if left <= 0 or not requests.wait_ready(channel.fileno(), left, write=True):
            raise TimedOut("device state", f"{len(rest)} bytes left", "has to be read within the time given")
        try:
            rest = rest[channel.write(rest[:_PIECE]) :]
        except BlockingIOError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            return  # it has read what it wanted to, and is asked what it thinks of that


def _check(requests: Requests) -> None:
    code = requests.ask(FrontendRequest.CHECK_DEVICE_STATE, U64).value
    if code:
        raise Refused("CHECK_DEVICE_STATE", code, "the back end could not transfer all of it, or not use it")


class _Channel(Protocol):
    """Our end. Neither reading nor writing waits: BlockingIOError."""

    def __enter__(self) -> _Channel: ...
    def __exit__(self, *_: object) -> None: ...
    def fileno(self) -> int: ...
    def read(self) -> bytes: ...
    def write(self, data: memoryview) -> int: ...


class _Pipe(OwnedFd):
    """An open file description that nobody else has, so that its O_NONBLOCK is ours."""

    __slots__ = ()

    def __enter__(self) -> _Pipe:
        return self

    def read(self) -> bytes:
        return os.read(self.fileno(), _PIECE)

    def write(self, data: memoryview) -> int:
        return os.write(self.fileno(), data)


class _Socket:
    """A socket that the back end has too: each call asks not to wait."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.fileno = sock.fileno

    def __enter__(self) -> _Socket:
        return self

    def __exit__(self, *_: object) -> None:
        close_socket(self._sock)

    def read(self) -> bytes:
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        data, ancillary, _, _ = self._sock.recvmsg(_PIECE, ROOM_FOR_FDS, flags)
        close_all(received_fds(ancillary))  # nobody asked for any
        return data

    def write(self, data: memoryview) -> int:
        return self._sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _begin(requests: Requests, direction: TransferDirection) -> _Channel:
    """Our end of the channel on which the back end transfers its state now."""
    try:
        reading, writing = os.pipe2(os.O_CLOEXEC)
    except OSError as error:
        remedy = "raise the limit on open files"
        raise HostError.from_os_error("device state", "pipe", "pipe2", error, remedy) from error
    ours, theirs = (reading, writing) if direction is TransferDirection.SAVE else (writing, reading)
    with _Pipe(ours) as channel, OwnedFd(theirs) as sent:
        question = DeviceState(direction)
        request = FrontendRequest.SET_DEVICE_STATE_FD
        answer, fds = requests.ask_for_fds(request, DeviceStateReply, question, [sent.fileno()])
        if answer.error:
            raise Refused("SET_DEVICE_STATE_FD", direction.name, f"was answered by error {answer.error}")
        if fds:
            return _theirs(fds[0], direction)
        os.set_blocking(channel.fileno(), False)
        return _Pipe(channel.take())


def _theirs(fd: OwnedFd, direction: TransferDirection) -> _Channel:
    """Our way of using a channel of the back end's. Takes `fd` over."""
    with fd:
        if not stat.S_ISFIFO(os.fstat(fd.fileno()).st_mode):
            return _Socket(require_stream_socket(fd))
        flags = os.O_RDONLY if direction is TransferDirection.SAVE else os.O_WRONLY
        try:
            return _Pipe(os.open(f"/proc/self/fd/{fd.fileno()}", flags | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            remedy = "raise the limit on open files"
            raise HostError.from_os_error("device state", "the back end's pipe", "open", error, remedy) from error
