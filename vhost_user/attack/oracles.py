"""What is known of the daemon without asking it: whether its process lives, what it holds open and mapped.

`/proc` tells both, for the process that listens at the socket: the kernel names it to whoever connects (SO_PEERCRED),
where it is in the same process id namespace and belongs to us. A descriptor that refers to memory of ours after we are
gone is a leak beyond doubt; of other kinds the number must come back to what it was. Mappings count where they are
shared ones: what a daemon allocates for itself is no concern of its front end.
"""

from __future__ import annotations

import os
import re
import select
import shlex
import socket
import stat
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vhost_user.errors import HostError, UsageError
from vhost_user.owned_fd import OwnedFd
from vhost_user.signal_name import signal_name

PANIC = 101
"""The exit status of a Rust program that panicked."""

_LISTENS = 0x10000
"""SO_ACCEPTCON of <linux/net.h>, as /proc/net/unix has it."""


_BOUND = re.compile(r"^\w+: \w+ \w+ (\w+) \w+ \w+ +\d+ (.+)$", re.MULTILINE)
"""Of the lines there: flags and path. A path may have any letter, so that its line looks like two."""


def wait_until(true: Callable[[], object], seconds: float) -> bool:
    """Whether it comes true in time, asked ever less often."""
    deadline, pause = time.monotonic() + seconds, 0.0005
    while not true():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    return True


def holdings(pid: int) -> Counter[str]:
    """What a process has open, and shared mappings, by kind: how many of each. HostError where that can't be read."""
    found: Counter[str] = Counter()
    try:
        for fd in list(Path(f"/proc/{pid}/fd").iterdir()):
            with suppress(FileNotFoundError):
                found["fd of " + _kind(str(fd.readlink()))] += 1
        for line in os.fsdecode(Path(f"/proc/{pid}/maps").read_bytes()).split("\n")[:-1]:
            _, access, _, _, _, *name = line.split(maxsplit=5)
            if access.endswith("s"):
                found["mapping of " + _kind("".join(name))] += 1
    except OSError as error:
        raise HostError.from_os_error("pid", pid, "reading /proc", error, "run this as the daemon's user") from error
    return found


def _kind(target: str) -> str:
    """socket:[123] and its like without their numbers."""
    return re.sub(r":\[\d+\]$", "", target.removesuffix(" (deleted)"))


def more(now: Counter[str], before: Counter[str]) -> str:
    """What there is now beyond what there was; empty where there is nothing."""
    return ", ".join(f"{extra} more {what}" for what, extra in sorted((now - before).items()))


def peer_pid(fd: int) -> int:
    """The process at the other end of the socket `fd`, or 0 where it is not to be seen from here."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


def listens(path: str) -> bool:
    """Whether somebody accepts connections at `path`, found out without connecting.

    The kernel knows the path as whoever listens has named it, so one that may be relative is compared by its end.
    """
    name = Path(path).name
    for flags, bound in _BOUND.findall(os.fsdecode(Path("/proc/net/unix").read_bytes())):
        if int(flags, 16) & _LISTENS:
            same = bound == path or (Path(bound).name == name and not Path(bound).is_absolute())
            if same or bound == str(Path(path).absolute()):
                return True
    return False


def _words(restart: str) -> list[str]:
    try:
        words = shlex.split(restart)
    except ValueError as error:
        raise UsageError("restart", restart, f"can't be cut into words: {error}", "end every quote") from None
    if restart and not words:
        raise UsageError("restart", repr(restart), "has to name a program", "leave it out for a daemon that is there")
    return words


class Daemon:
    """The daemon at `path`, which `restart`, a command line, starts anew whenever it has ended.

    With `restart` it is started by us unless one listens already; else it has to be there. `pid` is its process, if it
    is not the one that SO_PEERCRED names. Raises UsageError for what is no command line.
    """

    def __init__(self, path: str, *, restart: str = "", pid: int = 0, timeout: float) -> None:
        self.path = path
        self.restart = restart
        self._command = _words(restart)
        self.pid = pid
        self.restarts = 0
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd: OwnedFd | None = None
        self._given_pid = pid

    def ensure(self) -> None:
        """Have a daemon that listens. HostError where there is none, and none can be had."""
        if self.running:
            return
        if listens(self.path):
            self.forget()  # somebody else started it, or started it again
            return
        if not self.restart:
            ended = f" ({self.ended()})" if self.watched else ""
            raise HostError(
                "socket", self.path + ended, "a daemon has to listen there", "start it, or let --restart do so"
            )
        self._start()

    def _start(self) -> None:
        self.forget()
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(Path(self.path).lstat().st_mode):
                Path(self.path).unlink()
        self.restarts += 1
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise HostError.from_os_error("restart", self.restart, "exec", error, "name a program") from error
        self.watch(self._process.pid)
        # Slow daemons take a second to start, whatever the limit is for one that runs.
        if not wait_until(lambda: listens(self.path) or not self.running, 10 + self._timeout) or not self.running:
            how = self.ended()
            self.kill()
            limit = f"has to listen at {self.path}" + (f", and ended first: {how}" if how else "")
            raise HostError("restart", self.restart, limit, "try the command by hand")

    def watch(self, pid: int) -> None:
        """Take note of which process it is."""
        if pid <= 0 or self._pidfd is not None:
            return
        self.pid = self._given_pid or pid
        with suppress(OSError):
            self._pidfd = OwnedFd(os.pidfd_open(self.pid))

    @property
    def watched(self) -> bool:
        """Whether its process is known, and can be looked at."""
        return self._pidfd is not None

    @property
    def running(self) -> bool:
        """Whether its process lives; False where it is not known."""
        if self._process is not None:
            return self._process.poll() is None
        if self._pidfd is None:
            return False
        poll = select.poll()
        poll.register(self._pidfd.fileno(), select.POLLIN)
        return not poll.poll(0)

    def ends(self, seconds: float) -> bool:
        """Whether its process ends within that time."""
        return self.watched and wait_until(lambda: not self.running, seconds)

    def ended(self) -> str:
        """How its process ended: "exited with status 1", "killed by SIGSEGV"; empty while it lives."""
        if not self.watched or self.running:
            return ""
        if self._process is None:
            return "ended, with a status that only its parent knows"
        status = self._process.returncode
        if status < 0:
            return f"killed by {signal_name(-status)}"
        return f"exited with status {status}" + (", which is a Rust program's panic" if status == PANIC else "")

    @property
    def crashed(self) -> bool:
        """Whether it ended as nobody wants: by a signal, by a panic, or though nobody would start it again."""
        if not self.watched or self.running:
            return False
        status = self._process.returncode if self._process is not None else None
        return not self.restart or (status is not None and (status < 0 or status == PANIC))

    def holdings(self) -> Counter[str] | None:
        """What it holds, or None where that can't be seen."""
        if not self.watched:
            return None
        try:
            return holdings(self.pid)
        except HostError:
            return None

    def kill(self) -> None:
        """End it, if it was started by us."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        self.forget()

    def forget(self) -> None:
        """Let go of the process; it is reaped if it was ours."""
        if self._process is not None:
            self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process = None
        if self._pidfd is not None:
            self._pidfd.close()
            self._pidfd = None

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
