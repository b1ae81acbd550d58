"""A service manager in a process of its own, with a descriptor store as systemd has it, which starts a service again.

As systemd 254 and later: it reads what the main process sent before it looks whether that is dead; it drops what it has
already, whatever the name, and what it has no room for; it gives all back by LISTEN_FDS, the newest first.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.supervisor.rig import Board, fork, kill, send_signal
from vhost_user.owned_fd import OwnedFd, received_fds

MAIN, STARTS, STORED, DROPPED, FAILED = range(5)
"""Words of the manager's board: the main process, how often there was one that became ready, descriptors that are
stored, those that were not taken, and main processes that failed."""

_CREDENTIALS = struct.Struct("3i")


class Manager:
    """What the process does. `service` is called in each main process; one that ends by itself has a successor if it
    `restarts`."""

    def __init__(
        self, notify: socket.socket, room: int, service: Callable[[], object], board: Board, restarts: bool
    ) -> None:
        self._notify, self._room, self._service, self._board = notify, room, service, board
        self._restarts = restarts
        self._address = str(notify.getsockname())
        self._stored: list[tuple[str, OwnedFd]] = []
        self._main = 0
        self._ending = False

    def run(self) -> int:
        """Until SIGTERM, or until a main process ends by itself; the status of the last one then."""
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        while True:
            pidfd = self._start()
            poll = select.poll()
            poll.register(self._notify, select.POLLIN)
            poll.register(pidfd, select.POLLIN)
            # Python misses a signal that comes just before the wait, so that is a short one.
            while pidfd not in dict(poll.poll(1000)) or select.select([self._notify], [], [], 0)[0]:
                self._read()
            os.close(pidfd)
            _, status = os.waitpid(self._main, 0)
            if (code := os.waitstatus_to_exitcode(status)) > 0:
                self._board[FAILED] += 1
            if self._ending and code != -signal.SIGKILL:  # which may have come before
                return 0 if code == -signal.SIGTERM else code
            if code >= 0 and not self._restarts:
                return code

    def _end(self) -> None:
        """A signal's handler: while the main process is forked there is none to be told yet, and `_start` tells it."""
        self._ending = True
        if self._main:
            send_signal(self._main, signal.SIGTERM)

    def _start(self) -> int:
        self._main = 0
        self._main = fork(self._become_main)
        self._board[MAIN] = self._main
        if self._ending:
            self._end()
        return os.pidfd_open(self._main)

    def _become_main(self) -> None:
        high = [fcntl.fcntl(fd.fileno(), fcntl.F_DUPFD_CLOEXEC, 600) for _, fd in self._stored]
        for number, fd in enumerate(high, 3):
            os.dup2(fd, number)
            os.close(fd)
        os.environ["NOTIFY_SOCKET"] = self._address
        os.environ["FDSTORE"] = str(self._room)
        os.environ["LISTEN_PID"] = str(os.getpid())
        os.environ["LISTEN_FDS"] = str(len(high))
        os.environ["LISTEN_FDNAMES"] = ":".join(name for name, _ in self._stored)
        self._service()

    def _read(self) -> None:
        if not select.select([self._notify], [], [], 0)[0]:
            return
        room = socket.CMSG_SPACE(1024) + socket.CMSG_SPACE(_CREDENTIALS.size)
        data, ancillary, _, _ = self._notify.recvmsg(4096, room, socket.MSG_CMSG_CLOEXEC)
        fds = received_fds(ancillary)
        sender = next(_CREDENTIALS.unpack(part)[0] for _, kind, part in ancillary if kind == socket.SCM_CREDENTIALS)
        assert sender == self._main, "NotifyAccess=main"
        said = dict(line.split("=", 1) for line in data.decode().splitlines())
        if said.get("READY") == "1":
            self._board[STARTS] += 1
        if said.get("FDSTORE") == "1":
            assert said["FDPOLL"] == "0"
            for fd in fds:
                self._store(said["FDNAME"], fd)
        if said.get("FDSTOREREMOVE") == "1":
            self._stored = [(name, fd) for name, fd in self._stored if name != said["FDNAME"]]
        self._board[STORED] = len(self._stored)

    def _store(self, name: str, fd: OwnedFd) -> None:
        if len(self._stored) >= self._room or any(_same(fd, each) for _, each in self._stored):
            self._board[DROPPED] += 1
        else:
            self._stored.insert(0, (name, fd))


def _same(one: OwnedFd, other: OwnedFd) -> bool:
    return os.path.sameopenfile(one.fileno(), other.fileno())


class Managed:
    """The manager's process."""

    def __init__(self, pid: int, board: Board) -> None:
        self.pid = pid
        self.board = board

    def kill_main(self, after: float = 0.0) -> None:
        """SIGKILL for the main process of this moment. Its worker may go on without it for `after` seconds."""
        main = self.board[MAIN]
        if after:
            send_signal(main, signal.SIGSTOP)
            time.sleep(after)
        send_signal(main, signal.SIGKILL)


@contextmanager
def managed(
    directory: Path, service: Callable[[], object], *, room: int = 512, restarts: bool = False, status: int = 0
) -> Iterator[Managed]:
    """A manager that runs `service`, which ends with `status` when it is told to, or before."""
    board = Board()
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    notify.bind(str(directory / "notify"))

    def manage() -> None:
        # Nobody may close what pytest has open after its numbers are those of passed descriptors.
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        logging.basicConfig(level=logging.CRITICAL, force=True)
        code = Manager(notify, room, service, board, restarts).run()
        sys.stderr.flush()
        os._exit(code)

    pid = fork(manage)
    notify.close()
    try:
        yield Managed(pid, board)
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
        assert board[DROPPED] == 0
    finally:
        kill(pid)
        if board[MAIN]:
            send_signal(board[MAIN], signal.SIGKILL)
        board.close()
