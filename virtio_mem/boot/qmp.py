"""QEMU's monitor, as a worker has it that may be killed at any moment.

The connection is the supervisor's, and outlives the worker: what QEMU says is in the socket until somebody reads it. So
a line is looked at (MSG_PEEK), acted on, and only then read. A worker that dies before leaves the line to the next one,
which acts on it, maybe for the second time: each action has to bear that. Answers are for the worker that asked; the
next one finds numbers that it doesn't know, and passes over them. A command is one small send, which the kernel takes
whole or not at all. The monitor accepts commands once it was asked to, which each worker does; but for the first, they
are refused, which does no harm.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from vhost_user.backend.loop import EventLoop
from vhost_user.errors import HostError

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that QEMU has to answer a command."""

LONGEST_LINE = 64 << 10
"""Bytes of a line. It has to fit the socket's buffer, or it could never be seen whole; QEMU's answers to what is asked
here, and its events, have some hundred."""

_PARTIAL_SECONDS = 0.01
"""How soon to look again at a line that has not arrived whole."""


class QemuRefused(HostError):  # noqa: N818
    """QEMU answered a command with a refusal, which it says in its own words. Nothing else is wrong."""


class Qmp:
    """The monitor at `sock`, a connected stream socket. `on_event` is called with each event in `loop`'s thread, and
    `on_end` once QEMU has closed it.

    `execute` is for any other thread. The socket is closed by `close()`.
    """

    def __init__(
        self,
        loop: EventLoop,
        sock: socket.socket,
        on_event: Callable[[dict[str, Any]], None],
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop, self._sock = loop, sock
        self._on_event, self._on_end = on_event, on_end
        self._asked: dict[str, _Answer] = {}
        self._numbers = count(1)
        self._lock = threading.Lock()
        self._over = False
        loop.watch(sock, self._readable)
        self._send("qmp_capabilities", None, "hello")

    def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        timeout: float = PATIENCE,
        fds: Sequence[int] = (),
    ) -> Any:
        """Have QEMU do something, and return what it returns; `fds` go with it. HostError where it refuses or does not
        answer in time."""
        with self._lock:
            name, answer = f"{os.getpid()}-{next(self._numbers)}", _Answer()
            self._asked[name] = answer
        try:
            if self._over:
                raise HostError("qemu", command, "QEMU has ended", "boot another machine")
            self._send(command, arguments, name, fds)
            return answer.wait(command, timeout)
        finally:
            with self._lock:
                del self._asked[name]

    def _send(self, command: str, arguments: dict[str, Any] | None, name: str, fds: Sequence[int] = ()) -> None:
        message = {"execute": command, "id": name} | ({"arguments": arguments} if arguments else {})
        line, flags = json.dumps(message).encode() + b"\n", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        try:
            socket.send_fds(self._sock, [line], fds, flags) if fds else self._sock.send(line, flags)
        except OSError as error:
            raise HostError.from_os_error("qemu", command, "send", error, "QEMU has ended, or does not read") from error

    def _readable(self) -> None:
        """Deal with one line; the loop calls again where there are more."""
        try:
            seen = self._sock.recv(LONGEST_LINE, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            seen = b""
        if not seen:
            self._end()
            return
        line, newline, _ = seen.partition(b"\n")
        if newline:
            try:
                self._deal_with(line)
            finally:  # also where it failed: it would fail again
                self._sock.recv(len(line) + 1)
        elif len(line) == LONGEST_LINE:
            log.error("QEMU says more in one line than it can: %d bytes of it are passed over", len(line))
            self._sock.recv(len(line))
        else:
            self._loop.forget(self._sock)
            self._loop.call_later(_PARTIAL_SECONDS, self._watch_again)

    def _watch_again(self) -> None:
        if not self._over:
            self._loop.watch(self._sock, self._readable)

    def _deal_with(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        match message:
            case {"event": str()}:
                log.info("QEMU: %s", line.decode(errors="replace").strip())
                self._on_event(message)
            case {"id": str(name)}:
                with self._lock:
                    answer = self._asked.get(name)
                if answer is not None:
                    answer.give(message)
            case {"QMP": _}:
                pass  # its greeting
            case _:
                log.warning("QEMU says what was not expected: %r", line[:200])

    def _end(self) -> None:
        self.close()
        self._on_end()

    def close(self) -> None:
        """Listen no more. Twice is fine."""
        if self._over:
            return
        self._over = True
        self._loop.forget(self._sock)
        self._sock.close()
        with self._lock:
            asked = list(self._asked.values())
        for answer in asked:
            answer.give(None)


class _Answer:
    """What a thread waits for; None where QEMU ended instead."""

    def __init__(self) -> None:
        self._came = threading.Event()
        self._message: dict[str, Any] | None = None

    def give(self, message: dict[str, Any] | None) -> None:
        self._message = message
        self._came.set()

    def wait(self, command: str, timeout: float) -> Any:
        if not self._came.wait(timeout):
            raise HostError("qemu", command, f"no answer within {timeout:g} s", "see whether QEMU still runs")
        match self._message:
            case None:
                raise HostError("qemu", command, "QEMU has ended", "boot another machine")
            case {"return": value}:
                return value
            case {"error": {"desc": str(why)}}:
                raise QemuRefused("qemu", command, f"QEMU refused: {why}")
            case other:
                raise HostError("qemu", command, f"QEMU answered {other!r}")
