"""A worker as the supervisor has it: its process, and the socket on which it is told things and answers.

Nothing here waits for the worker. What it has no room for is queued; that can't grow, since a front end has one message
in hand at a time. Once the process is dead, what it had sent before is read, and only then is its death told.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import operator
import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import NoReturn

from vhost_user.backend.loop import Call, EventLoop
from vhost_user.errors import PeerError
from vhost_user.owned_fd import OwnedFd
from vhost_user.signal_name import signal_name
from vhost_user.supervisor.packets import ENVIRONMENT, SIGNALS, Kind, Packet, encode, receive, send

log = logging.getLogger(__name__)

_CONTROL = 3
"""The control socket's number in a worker that is started by a command."""

_PACKETS_AT_ONCE = 64
"""After so many packets it is a front end's turn."""

_ROOM_INTERVAL = 0.001
"""Seconds until a packet is sent again for which there was no room. A socket that has room in its buffer may still take
no descriptors, so it can't be waited for."""

Start = Callable[[socket.socket], int]
"""Starts a worker whose end of the control socket this is, which stays the caller's; returns the process's id."""


def spawn(command: Sequence[str]) -> Start:
    """Starts a worker by a command, whose first word is a path."""

    def start(control: socket.socket) -> int:
        environment = {**os.environ, ENVIRONMENT: str(_CONTROL)}
        # Its own number may be the one that it is to have, and then stays closed at exec: dup2(2).
        with OwnedFd(fcntl.fcntl(control, fcntl.F_DUPFD_CLOEXEC, _CONTROL + 1)) as moved:
            actions = [(os.POSIX_SPAWN_DUP2, moved.fileno(), _CONTROL)]
            return os.posix_spawn(command[0], list(command), environment, file_actions=actions, setsigmask=SIGNALS)

    return start


def fork_first(main: Callable[[], int], others: Start) -> Start:
    """Starts the first worker by a fork of this process, where `main` is what it does and returns its exit status, and
    the `others` in another way.

    The fork has the interpreter and all that this process has imported for nothing, so it is there in half of the time.
    It has no later one's code, as after an upgrade. Of a process with several threads there is none.
    """
    ways: Iterator[Start] = chain([partial(_fork, main)], repeat(others))

    def start(control: socket.socket) -> int:
        way = next(ways)
        return (way if threading.active_count() == 1 else others)(control)

    return start


def _fork(main: Callable[[], int], control: socket.socket) -> int:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return os.fork() or _work(main, control)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(main: Callable[[], int], control: socket.socket) -> NoReturn:
    """All that a command would find: signals as they are by default, and blocked; the descriptors that exec does not
    close, and that of the control socket. What else the supervisor has open is not the worker's to keep alive."""
    status = os.EX_SOFTWARE
    try:
        gc.freeze()  # the supervisor's garbage would close numbers that are the worker's by then
        sys.stderr = sys.__stderr__ or sys.stderr  # the one of descriptor 2
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        os.dup2(control.fileno(), _CONTROL)
        os.set_inheritable(_CONTROL, True)  # it may have had this number before
        for fd in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
            with suppress(OSError):  # the listing's own is closed by now
                if not os.get_inheritable(fd):
                    os.close(fd)
        os.environ[ENVIRONMENT] = str(_CONTROL)
        status = operator.index(main()) & 0xFF
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


class WorkerProcess:
    """A worker that `start` starts. OSError where that fails.

    `on_packet` is called with each packet, which it closes; PeerError from it is the worker's end. `on_exit` is called
    once, with the status as `os.waitstatus_to_exitcode` gives it; a worker that broke the protocol has -SIGABRT.
    """

    def __init__(
        self,
        loop: EventLoop,
        start: Start,
        *,
        on_packet: Callable[[Packet], None],
        on_exit: Callable[[int], None],
    ) -> None:
        self._loop = loop
        self._on_packet, self._on_exit = on_packet, on_exit
        self._queue: deque[tuple[bytes, Sequence[OwnedFd]]] = deque()
        self._broken = False
        self._retry: Call | None = None
        self._deadline: Call | None = None
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self.pid = start(theirs)
            try:
                self._pidfd = OwnedFd(os.pidfd_open(self.pid))
            except OSError:
                self.signal(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise
        except BaseException:
            self._control.close()
            raise
        loop.watch(self._control, self._readable)
        loop.watch(self._pidfd, self._exited)

    def send(self, kind: Kind, *fields: bytes, fds: Sequence[OwnedFd] = ()) -> None:
        """Tell the worker something; later, where it has no room now. `fds` stay the caller's."""
        self._queue.append((encode(kind, fields), fds))
        if self._retry is None:
            self._flush()

    def _flush(self) -> None:
        self._retry = None
        while self._queue:
            data, fds = self._queue[0]
            try:
                # What has descriptors that are closed by now is about a front end that is gone by now.
                if not any(fd.closed for fd in fds):
                    send(self._control, data, fds)
            except BlockingIOError:
                self._retry = self._loop.call_later(_ROOM_INTERVAL, self._flush)
                return
            except OSError:
                self._queue.clear()  # it is dead, as we shall hear
                return
            self._queue.popleft()

    def _readable(self, most: int = _PACKETS_AT_ONCE) -> None:
        try:
            for _ in range(most):
                packet = receive(self._control)
                if packet is None:
                    return
                try:
                    self._on_packet(packet)
                finally:
                    for fd in packet.fds:
                        fd.close()
        except EOFError:
            self._loop.forget(self._control)
            self.end_within(1.0)  # it is dead, or about to be
        except (PeerError, OSError) as error:
            log.error("worker %d: killed, since it sent what it can't: %s", self.pid, error)
            self._loop.forget(self._control)
            self._broken = True
            self.signal(signal.SIGKILL)

    def _exited(self) -> None:
        if not self._broken:
            self._readable(1 << 30)  # all that it had sent
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._close()
        self._on_exit(-signal.SIGABRT if self._broken else status)

    def _close(self) -> None:
        for timer in (self._retry, self._deadline):
            if timer is not None:
                timer.cancel()
        self._loop.forget(self._control)
        self._loop.forget(self._pidfd)
        self._control.close()
        self._pidfd.close()
        self._queue.clear()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once, without a word to anybody."""
        self.signal(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._close()

    def end_within(self, seconds: float) -> None:
        """Kill it unless it has ended by itself by then."""
        if self._deadline is None:
            self._deadline = self._loop.call_later(seconds, self._too_late)

    def _too_late(self) -> None:
        log.warning("worker %d: killed, since it did not end", self.pid)
        self.signal(signal.SIGKILL)


def describe(status: int) -> str:
    """An exit status, for a log."""
    return f"exit status {status}" if status >= 0 else signal_name(-status)


def watch_exit(loop: EventLoop, pid: int, then: Callable[[], object]) -> None:
    """Have `then` called once, when a child has ended; it is not waited for."""
    pidfd = OwnedFd(os.pidfd_open(pid))

    def exited() -> None:
        loop.forget(pidfd)
        pidfd.close()
        then()

    loop.watch(pidfd, exited)
