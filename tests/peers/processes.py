"""The processes of the tests: started, waited for until they are ready, watched, and ended.

Each function is a context manager: what it yields is ready when the `with` block begins, and dead and reaped when it
ends. What a process prints goes to a file, which pytest shows with the test if that fails.

Ready means that the socket listens, which the kernel tells in /proc/net/unix. To connect as a trial would not do: for
virtiofsd the first client is the last one, and the others would have to be seen off first.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

LATE = 100.0
"""Seconds after which something is taken not to happen. On an idle machine the slowest, a guest's boot, takes five."""

SHOWN = 20_000
"""Characters of a process's output that a failed test shows: the last ones."""


def wait_until(true: Callable[[], object], what: str, seconds: float = LATE) -> None:
    """Ask every few milliseconds. TimeoutError after `seconds`, which names `what` did not come true."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(0.003)


def listens(socket: Path) -> bool:
    """Whether some process accepts connections at this path."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        _, _, _, flags, _, _, _, *path = line.split(maxsplit=7)
        if path == [str(socket)] and int(flags, 16) & 0x10000:  # SO_ACCEPTCON of <linux/net.h>
            return True
    return False


def unused(directory: Path, name: str, suffix: str) -> Path:
    """A path that nothing has: the name and the suffix, with `-2`, `-3` and so on between them if need be."""
    candidates = (directory / f"{name}{'' if number == 1 else f'-{number}'}{suffix}" for number in count(1))
    return next(path for path in candidates if not path.exists())


def children_of(pid: int) -> list[int]:
    """The processes that the first thread of `pid` started, the oldest first; none where it has ended."""
    thread = Path(f"/proc/{pid}/task/{pid}")
    try:
        return [int(child) for child in (thread / "children").read_text().split()]
    except OSError:
        if thread.exists():
            raise
        return []


def children_with(words: str, pid: int) -> list[int]:
    """Those of them whose command lines have `words`. One that ends meanwhile has none."""
    found = []
    for child in children_of(pid):
        with suppress(FileNotFoundError, ProcessLookupError):
            if words in Path(f"/proc/{child}/cmdline").read_text():
                found.append(child)
    return found


def worker_of(pid: int) -> int | None:
    """The worker of the supervisor `pid`, if there is one at this moment."""
    return next(iter(children_of(pid)), None)


def kill_worker_of(pid: int) -> bool:
    """SIGKILL for the worker of the supervisor `pid` of this moment; whether there was one."""
    if (worker := worker_of(pid)) is None:
        return False
    try:
        os.kill(worker, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def doings(pid: int) -> str:
    """What each thread of a process does, a line each: its name, its state, and the kernel's functions that it is in,
    the innermost first, which root is told: proc(5). Nothing of what has ended."""
    lines = []
    with suppress(OSError):
        for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
            lines.append(f"{name}: {rest.split()[0]}, {' < '.join(_stack(task))}")
    return "\n".join(lines)


def _stack(task: Path) -> list[str]:
    try:
        return re.findall(r"(\w+)\+0x", (task / "stack").read_text())
    except OSError:
        return []


@contextmanager
def telling(name: str, doings: Callable[[], Iterable[str]]) -> Iterator[None]:
    """Print what somebody does at the moment when something is not waited for any longer."""
    try:
        yield
    except (TimeoutError, subprocess.TimeoutExpired):
        sys.stdout.write(f"--- {name} when it was not waited for any longer:\n")
        for told in doings():
            sys.stdout.write(f"{told}\n")
        raise


@dataclass
class Peer:
    """A running process. `socket` is where it listens, or where it connects to; `log` gets all that it prints."""

    name: str
    process: subprocess.Popen[bytes]
    socket: Path
    log: Path
    version: str

    @property
    def pid(self) -> int:
        """Of the daemon itself."""
        return self.process.pid

    def open_files(self) -> list[str]:
        """What each of its file descriptors refers to, sorted."""
        found = []
        for fd in list(Path(f"/proc/{self.pid}/fd").iterdir()):
            try:
                found.append(str(fd.readlink()))
            except FileNotFoundError:
                continue  # closed since the directory was listed
        return sorted(found)

    def mappings(self) -> list[str]:
        """The lines of /proc/PID/maps."""
        return Path(f"/proc/{self.pid}/maps").read_text().splitlines()

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def wait_for_output(self, pattern: str, seconds: float = LATE) -> str:
        """Until its output matches a regular expression; returns all of it. RuntimeError if it ends before."""

        def printed() -> bool:
            ended = self.process.poll()  # before the look at the output: what it printed last counts
            if re.search(pattern, self.output()):
                return True
            if ended is not None:
                raise RuntimeError(f"{self.name} ended with {ended} and had not printed {pattern!r}")
            return False

        wait_until(printed, f"{self.name} prints {pattern!r}", seconds)
        return self.output()

    def send(self, line: str) -> None:
        """A line for its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def wait(self, seconds: float = LATE) -> int:
        """Until it ends; returns the exit status, negative for a signal."""
        return self.process.wait(seconds)

    def terminate(self) -> int:
        """SIGTERM, which lets it clean up; returns the exit status."""
        self.process.terminate()
        return self.wait()

    def kill(self) -> None:
        """SIGKILL: it ends as if the power were cut, and is reaped."""
        self.process.kill()
        self.process.wait()


@contextmanager
def running(
    name: str,
    version: str,
    command: Sequence[str],
    directory: Path,
    socket: Path,
    *,
    server: bool = True,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> Iterator[Peer]:
    """Any program as a Peer. With `server` it listens at `socket` when this yields; RuntimeError if it ends instead."""
    log = unused(directory, name, ".log")
    if server:
        socket.unlink(missing_ok=True)  # of one that was killed
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment or {}),
            pass_fds=pass_fds,
        )
    peer = Peer(name, process, socket, log, version)
    try:
        with telling(name, lambda: [doings(process.pid)]):
            if server:
                wait_until(lambda: _listening(peer), f"{name} listens at {socket}")
            yield peer
    finally:
        peer.kill()
        assert process.stdin is not None
        process.stdin.close()
        sys.stdout.write(
            f"--- {name} {version} ended with {process.returncode} after this:\n{peer.output()[-SHOWN:]}\n"
        )


def _listening(peer: Peer) -> bool:
    if listens(peer.socket):
        return True
    if peer.process.poll() is not None:
        raise RuntimeError(f"{peer.name} ended with {peer.process.returncode} before it was ready:\n{peer.output()}")
    return False
