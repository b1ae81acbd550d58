"""QEMU as a child of the supervisor.

When it ends, the supervisor stops. When the supervisor is told to end, QEMU is told first, by SIGTERM, on which it
flushes its disks and ends: a QEMU whose devices went before it would complain. Should this process be killed, QEMU ends
too: nobody could resize it any more.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from vhost_user.errors import HostError
from vhost_user.supervisor import Supervisor
from virtio_mem.boot.find import Qemu

log = logging.getLogger(__name__)

END_SECONDS = 5.0
"""How long QEMU has to end once it was told to."""

_UNDERSTOOD = re.compile(rb"more then twice the size of max-ram-below-4g|terminating on signal (1|2|15)\b")
"""What QEMU says and we know: low memory ends where boot memory does, at a whole GiB or not; we told it to end, or the
terminal told both of us."""


class QemuProcess:
    """QEMU, to be started with `arguments`, inheriting `fds` and `monitor`, which it closes here.

    A context manager: at its end QEMU has ended, and the terminal is as it was.
    """

    def __init__(self, qemu: Qemu, arguments: Sequence[str], fds: Sequence[int], monitor: socket.socket) -> None:
        ends_with_us = ("-run-with", "exit-with-parent=on") if qemu.exits_with_parent else ()
        self._command = [*qemu.command, *ends_with_us, *arguments]
        self._environment = os.environ | qemu.environment
        self._fds, self._monitor = fds, monitor
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor: Supervisor | None = None
        self._terminal = _terminal_settings()
        self._unfinished = b""

    def start(self, supervisor: Supervisor) -> None:
        """Start it, watched by the supervisor."""
        self._supervisor = supervisor
        log.info("%s", " ".join(self._command))
        try:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                pass_fds=[*self._fds, self._monitor.fileno()],
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            raise HostError.from_os_error("qemu", self._command[0], "exec", error) from error
        self._monitor.close()  # so that the worker hears of QEMU's end
        assert self._process.stderr is not None
        os.set_blocking(self._process.stderr.fileno(), False)
        supervisor.loop.watch(self._process.stderr, self._hear)
        supervisor.add_child(self._process, lambda _: supervisor.stop())
        supervisor.loop.call_soon(self._take_signals)

    def _take_signals(self) -> None:
        """In place of the supervisor's handlers, which were set before its loop began: QEMU goes first."""
        assert self._supervisor is not None
        loop = self._supervisor.loop
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: loop.call_soon(self._ask_to_end))

    def _ask_to_end(self) -> None:
        assert self._process is not None and self._supervisor is not None
        self._process.terminate()
        self._supervisor.loop.call_later(END_SECONDS, self._process.kill)

    def _hear(self) -> None:
        """Pass on what QEMU says on its standard error, but for what it need not say."""
        assert self._process is not None and self._process.stderr is not None and self._supervisor is not None
        said = self._process.stderr.read()
        if not said:
            self._supervisor.loop.forget(self._process.stderr)
        *lines, self._unfinished = (self._unfinished + (said or b"")).split(b"\n")
        if not said and self._unfinished:
            lines.append(self._unfinished)
        for line in lines:
            if not _UNDERSTOOD.search(line):
                sys.stderr.write(line.decode(errors="replace") + "\n")

    def end(self) -> int:
        """Have it end, if it has not; the exit status, 128 and the number for a signal, as a shell has it."""
        if self._process is None:
            return 1
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        status = self._process.returncode
        return status if status >= 0 else 128 - status

    def __enter__(self) -> QemuProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        if self._process is not None and self._process.stderr is not None:
            self._hear()  # its last words, such as why it could not start
            self._process.stderr.close()
        if self._terminal is not None:
            with suppress(OSError, termios.error):
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._terminal)


def _terminal_settings() -> list[Any] | None:
    try:
        return termios.tcgetattr(sys.stdin.fileno()) if sys.stdin.isatty() else None
    except (OSError, ValueError, termios.error):
        return None
