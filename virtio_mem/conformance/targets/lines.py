"""A process that is asked by lines on its standard input, and answers by lines on its standard output.

Nothing that it does holds the kit up: lines are bounded, and each step has a time limit, whether the process doesn't
read, doesn't answer, answers without an end, or closes one of the two. What it says on standard error is kept, the last
of it, for the message that tells of its end. When it is closed, the process and all that it started are ended.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress

from vhost_user.errors import UsageError
from vhost_user.signal_name import signal_name
from virtio_mem.conformance.target import TargetFailure

LONGEST_LINE = 1 << 20
"""Bytes of a line: what the kit asks for at one time takes half of that in hexadecimal digits."""

_LAST_WORDS = 2000
"""Bytes of standard error that are kept."""

_TO_END = 1.0
"""Seconds that a process has to end by itself, once its standard input is closed."""

_AT_ONCE = 1 << 16

_MAYBE = ": does it flush its standard output?"
"""What is mostly wrong with a program that says nothing: C's library keeps what goes into a pipe."""


def words_of(command: str) -> list[str]:
    """The program of a command line and its arguments, as a shell would have them. UsageError where there is none."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError("exec", command, f"can't be split into words: {error}") from None
    if not words:
        raise UsageError("exec", command, "names a program", "exec:./shim")
    return words


class LineProcess:
    """The process that `command` starts. UsageError where there is no such program, or it can't be run.

    Every method raises TargetFailure, after which it is `broken` and only `close()` is left; `silent` says that it let
    its time go by.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.name = command[0]
        self.broken = self.silent = False
        try:
            self._process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise UsageError("exec", self.name, f"can't be run: {error.strerror}", "name a program") from error
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._pipes = (self._process.stdin, self._process.stdout, self._process.stderr)
        self._stdin, self._stdout, self._stderr = (pipe.fileno() for pipe in self._pipes)
        for fd in (self._stdin, self._stdout, self._stderr):
            os.set_blocking(fd, False)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._unsent = b""
        self._unread = b""
        self._last_words = b""
        self._hears = self._mutters = True

    def failure(self, what: str) -> TargetFailure:
        """What to raise where the program `what`; it is given up by that."""
        self.broken = True
        return TargetFailure(f"{self.name} {what}")

    def ask(self, line: bytes, timeout: float) -> bytes:
        """Send a line, and return the next one that comes, without its end; `timeout` in seconds is for both."""
        self._exchange(0)
        if self._unread:
            raise self.failure(f"says what nobody asked for: {printable(self._unread[:100])}")
        self._unsent += line + b"\n"
        return self.receive(timeout)

    def receive(self, timeout: float) -> bytes:
        """The next line."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._unread:
            if len(self._unread) > LONGEST_LINE:
                raise self.failure(f"has a line of more than {LONGEST_LINE} bytes")
            left = deadline - time.monotonic()
            if left <= 0:
                self.silent = True
                did, hint = ("does not read", "") if self._unsent else ("says nothing", _MAYBE)
                failure = self.failure(f"{did} within {timeout:g} s{hint}{self._muttered()}")
                failure.silent = True
                raise failure
            self._exchange(left)
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _exchange(self, seconds: float) -> None:
        """Wait until something can be read or written, and do that."""
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        if self._mutters:
            poll.register(self._stderr, select.POLLIN)
        if self._unsent and self._hears:
            poll.register(self._stdin, select.POLLOUT)
        for fd, _ in poll.poll(seconds * 1000):
            if fd == self._stdin:
                self._write()
            elif fd == self._stderr:
                self._listen()
            else:
                answer = os.read(fd, _AT_ONCE)
                if not answer:
                    raise self.failure(f"{self._end()}{self._muttered()}")
                self._unread += answer

    def _write(self) -> None:
        try:
            written = os.write(self._stdin, self._unsent)
        except BrokenPipeError:
            self._hears = False  # it may have answered before: the end of its output, or the time limit, tells
        else:
            self._unsent = self._unsent[written:]

    def _listen(self) -> None:
        """Take what is there of standard error, once: somebody may write there without an end."""
        words = os.read(self._stderr, _AT_ONCE)
        self._mutters = bool(words)
        self._last_words = (self._last_words + words)[-_LAST_WORDS:]

    def _muttered(self) -> str:
        """What it said last on standard error, as the end of a message."""
        with suppress(BlockingIOError):
            self._listen()
        words = self._last_words.strip()
        return f", after this: {printable(words)}" if words else ""

    def _ended(self) -> bool:
        """Whether it ends within a moment. It is not reaped, so that its number stays its own."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(_TO_END * 1000))

    def _end(self) -> str:
        """What became of a process that closed its output."""
        if not self._ended():
            return "closed its standard output"
        about = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        assert about is not None
        if about.si_code == os.CLD_EXITED:
            return f"ended with status {about.si_status}"
        return f"was ended by {signal_name(about.si_status)}"

    def close(self) -> None:
        """Close its input, wait a moment for it to end, end what is left of it. Closing twice is allowed."""
        if self._process.returncode is not None:
            return
        self._pipes[0].close()
        self._ended()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._pidfd)
        for pipe in self._pipes:
            pipe.close()


def printable(text: bytes) -> str:
    """The text, but for what a terminal or a page would take for something else. Lines stay lines."""
    decoded = text.decode(errors="backslashreplace")
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode() for each in decoded
    )
