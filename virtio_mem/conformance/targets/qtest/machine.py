"""A QEMU that runs no guest: started, asked by its monitor, and told dead from alive.

A process for each device: it is there in a twentieth of a second, and a device that has just been made owes nothing to
the one before.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

from vhost_user.backend.loop import EventLoop
from vhost_user.errors import HostError
from virtio_mem.boot.find import Qemu, Wanted, find_qemu
from virtio_mem.boot.qmp import QemuRefused, Qmp
from virtio_mem.conformance.target import TargetFailure
from virtio_mem.conformance.targets.qtest.client import HUNG_UP, QTest

WANTED = Wanted((7, 2), "that was tried", "qemu:BINARY")

PATIENCE = 10.0
"""Seconds that QEMU has to answer anything. It takes milliseconds, but for what it preallocates."""

_PATIENCE_WITH_HELP = 30.0
"""Seconds to say what it has."""

_END_SECONDS = 5.0
"""What a QEMU that hung up has to end by itself, so that its exit status can be told."""

_HARMLESS_PORT = 0x80
"""Firmware says there how far it got. Reading it shows that QEMU is there."""

_LAST_WORDS = 1000
"""Characters of what QEMU said on its standard error that are passed on."""


@dataclass(frozen=True)
class Program:
    """A QEMU, and which of the options that depend on its version and on how it was built it has."""

    qemu: Qemu
    has_qtest: bool
    """Whether it has the accelerator that runs no processor, and whose clock stands still."""
    device_options: frozenset[str]
    """Of virtio-mem-pci."""

    @classmethod
    def find(cls, named: str | None) -> Program:
        """The one that is named, or else one that there is. UsageError, HostError as `find_qemu`."""
        qemu = find_qemu(named, wanted=WANTED)
        options = re.findall(r"^ *([\w-]+)=", _told(qemu, "-device", "virtio-mem-pci,help"), re.MULTILINE)
        if not options:
            raise HostError("qemu", qemu.command[0], "has no virtio-mem-pci", WANTED.remedy)
        # It is in no list of accelerators; an option that it does not know is another refusal than not to be there.
        has_qtest = "invalid accelerator" not in _told(qemu, "-accel", "qtest,help")
        return cls(qemu, has_qtest, frozenset(options))


def _told(qemu: Qemu, *arguments: str) -> str:
    """What it says, on both of its outputs."""
    command = [*qemu.command, *arguments]
    try:
        return subprocess.run(
            command,
            check=False,
            env=os.environ | qemu.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_PATIENCE_WITH_HELP,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise HostError("qemu", command[0], f"does not say what it has: {error}", WANTED.remedy) from error


class Machine:
    """QEMU, started with `arguments` and what is needed to talk to it; it inherits `fds`, which stay the caller's.

    It is there once `await_start()` returns. `qtest` is the processor's side, `execute` the monitor's; either may take
    `patience` seconds, and three times that while it starts. TargetFailure where the program can't be run.
    """

    def __init__(self, program: Program, arguments: Sequence[str], fds: Sequence[int], patience: float) -> None:
        self.patience = patience
        self._reset = threading.Event()
        self._disregarded = 0
        with ExitStack() as undo:
            self._words: IO[bytes] = undo.enter_context(tempfile.TemporaryFile(prefix="qemu-"))
            ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
            for sock in ours:
                undo.callback(sock.close)
            try:
                self._process = self._start(program, arguments, fds, theirs)
            finally:
                for sock in theirs:
                    sock.close()
            undo.callback(self._process.wait)
            undo.callback(self._process.kill)
            self.qtest = QTest(ours[0], self.failure, 3 * patience)
            self._monitor = ours[1]
            self._undo = undo.pop_all()

    def _start(
        self, program: Program, arguments: Sequence[str], fds: Sequence[int], theirs: Sequence[socket.socket]
    ) -> subprocess.Popen[bytes]:
        """The process, which ends when the thread that starts it does, if there is a way to have that. QEMU's own is
        good only from where it reads its options."""
        qemu = program.qemu
        setpriv = shutil.which("setpriv")
        command = [*((setpriv, "--pdeathsig=KILL") if setpriv else ()), *qemu.command]
        command += ["-run-with", "exit-with-parent=on"] if qemu.exits_with_parent else []
        for name, sock in zip(("qtest", "qmp"), theirs, strict=True):
            command += ["-chardev", f"socket,id={name},fd={sock.fileno()}", f"-{name}", f"chardev:{name}"]
        try:
            return subprocess.Popen(
                [*command, "-qtest-log", "none", *arguments],
                env=os.environ | qemu.environment,
                stdin=subprocess.DEVNULL,
                stdout=self._words,
                stderr=self._words,
                pass_fds=[*fds, *(sock.fileno() for sock in theirs)],
                process_group=0,  # Ctrl-C is for the kit: a QEMU that ends by it would be a device that died
            )
        except OSError as error:
            raise TargetFailure(f"QEMU does not start: {error}") from error

    def await_start(self) -> None:
        """Wait until it answers. TargetFailure where it does not, with what it said."""
        self.qtest.port_in(_HARMLESS_PORT, 1)
        self.qtest.allow(self.patience)
        loop = EventLoop()
        self._undo.callback(loop.close)
        try:
            self._qmp = Qmp(loop, self._monitor, self._on_event)
        except HostError as error:
            raise self.failure(HUNG_UP) from error
        self._undo.callback(self._qmp.close)
        thread = threading.Thread(target=loop.run, name="qmp", daemon=True)
        thread.start()
        self._undo.callback(thread.join)
        self._undo.callback(loop.stop)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def failure(self, what: str) -> TargetFailure:
        """A TargetFailure that adds to `what` how QEMU ended, if it did, and what it said."""
        try:
            status = self._process.wait(_END_SECONDS if what == HUNG_UP else 0)
            what += f"; it ended with {f'signal {-status}' if status < 0 else f'status {status}'}"
        except subprocess.TimeoutExpired:
            pass
        size = os.fstat(self._words.fileno()).st_size
        start = max(self._disregarded, size - _LAST_WORDS)
        words = " ".join(os.pread(self._words.fileno(), _LAST_WORDS, start).decode(errors="replace").split())
        return TargetFailure(f"{what}; it said: {words}" if words else what)

    def disregard_words(self) -> None:
        """What was said so far is no part of a failure that is still to come."""
        self._disregarded = os.fstat(self._words.fileno()).st_size

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Have the monitor do something; what it returns. QemuRefused where it won't, else TargetFailure."""
        try:
            return self._qmp.execute(command, arguments, self.patience)
        except QemuRefused:
            raise
        except HostError as error:
            raise self.failure(str(error)) from error

    def system_reset(self) -> None:
        """Reset the machine, and wait until it is."""
        self._reset.clear()
        self.execute("system_reset")
        if not self._reset.wait(self.patience):
            raise self.failure(f"QEMU did not reset the machine within {self.patience:g} s")

    def _on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "RESET":
            self._reset.set()

    def close(self) -> None:
        """Kill it. Closing twice is allowed."""
        self._undo.close()
