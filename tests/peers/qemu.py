"""QEMU and qemu-io: front ends that connect to a back end of ours, or to a daemon's.

Both block until the back end has answered them, so one that runs in the test's own thread needs `qemu_io_started`, not
`qemu_io`. `qemu` yields as soon as the process is started, and leaves it to the test to serve it.
"""

from __future__ import annotations

import json
import math
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.host import PEERS_TREE
from tests.peers.guest import kernel_logs
from tests.peers.processes import LATE, SHOWN, Peer, running, telling, unused
from tests.peers.tree import LIBRARIES, command, kernel, version
from virtio_mem.boot.qemu import EMULATED_CLOCKS

_TOLD = 5.0
"""Seconds within which a monitor answers that answers at all."""

# What it would look for in /usr.
MODULES = {"QEMU_MODULE_DIR": str(LIBRARIES / "qemu")}
FIRMWARE = ("-L", str(PEERS_TREE / "usr/share/qemu"), "-L", str(PEERS_TREE / "usr/share/seabios"))


class Qmp:
    """QEMU's monitor: `qmp("query-status")` returns what it returns. It connects when it is first used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[dict[str, Any]] = []
        """What it told without being asked, in order, as far as it was read."""
        self._socket: socket.socket | None = None
        self._deadline = math.inf
        self._unread = b""
        self._asked = 0

    def __call__(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """RuntimeError where QEMU refuses."""
        self._connect()
        return self._ask(command, arguments or {})

    def monitor(self, line: str) -> str:
        """What a command of the monitor for people prints."""
        return str(self("human-monitor-command", {"command-line": line}))

    @contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """Wait no longer than that for all answers together meanwhile; TimeoutError."""
        self._deadline = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadline = math.inf

    def wait_for_event(self, name: str) -> dict[str, Any]:
        """The oldest event of this name, which is taken out of `events`; waits for it if need be."""
        self._connect()
        while True:
            for event in self.events:
                if event["event"] == name:
                    self.events.remove(event)
                    return event
            if "event" in (message := self._receive()):
                self.events.append(message)

    def close(self) -> None:
        if self._socket:
            self._socket.close()
            self._socket = None

    def _connect(self) -> None:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.settimeout(self._patience())
                self._socket.connect(str(self.path))
                self._receive()  # the greeting
                self._ask("qmp_capabilities", {})
            except BaseException:
                self.close()
                raise

    def _ask(self, command: str, arguments: Mapping[str, object]) -> Any:
        assert self._socket
        self._asked += 1
        question = {"execute": command, "arguments": dict(arguments), "id": self._asked}
        self._socket.sendall(json.dumps(question).encode() + b"\n")
        while (answer := self._receive()).get("id") != self._asked:
            if "event" in answer:  # else it is to a question that nobody waits for any longer
                self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"QEMU: {answer['error']['desc']}")
        return answer["return"]

    def _patience(self) -> float:
        return max(0.001, min(LATE, self._deadline - time.monotonic()))

    def _receive(self) -> dict[str, Any]:
        assert self._socket
        while b"\n" not in self._unread:
            self._socket.settimeout(self._patience())
            received = self._socket.recv(65536)
            if not received:
                raise EOFError("QEMU closed its monitor")
            self._unread += received
        line, self._unread = self._unread.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message


@dataclass
class Qemu(Peer):
    """A VMM. `output()` is the guest's console and QEMU's own messages; `send` types on the console."""

    qmp: Qmp

    def doings(self) -> Iterator[str]:
        """What its guest does, as far as that can be told within seconds: where its processors are, at three moments,
        and the end of its kernel's log, however little of that is printed."""
        try:
            with self.qmp.patience(_TOLD):
                for _ in range(3):
                    yield from re.findall(r"(?ms)^.IP=.*?HLT=\d", self.qmp.monitor("info registers -a"))
                    time.sleep(0.1)
        except (OSError, EOFError, RuntimeError, ValueError) as error:
            yield f"its monitor does not tell: {error!r}"
        yield from kernel_logs(self.pid, SHOWN)


@contextmanager
def qemu(
    directory: Path,
    *arguments: str,
    initrd: Path | None = None,
    append: str = "",
    memory: str | None = "512M",
    pass_fds: Sequence[int] = (),
) -> Iterator[Qemu]:
    """A VM of two processors, emulated, on shared memory; with `initrd` (see guest.py) it boots Linux.

    `append` is added to the kernel's command line, `arguments` to QEMU's. With memory=None they say what the machine
    and its memory are (`-machine`, `-m`, ...). `pass_fds` are inherited, as /proc/self/fd/N or by `-add-fd`.
    """
    monitor = unused(directory, "qmp", ".sock")
    options = ["-qmp", f"unix:{monitor},server=on,wait=off", "-serial", "stdio", "-cpu", "max", "-smp", "2"]
    if memory is not None:
        options += ["-machine", "q35,accel=tcg,memory-backend=ram0", "-m", memory]
        options += ["-object", f"memory-backend-memfd,id=ram0,size={memory},share=on"]
    if initrd is not None:
        options += ["-kernel", str(kernel() / "vmlinuz"), "-initrd", str(initrd)]
        options += ["-append", f"console=ttyS0 quiet panic=-1 {' '.join(EMULATED_CLOCKS)} {append}".strip()]
    line = command(
        *("bin/qemu-system-x86_64", *FIRMWARE, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *options,
        *arguments,
    )
    with running(
        "qemu", version("qemu-system-x86"), line, directory, monitor, environment=MODULES, pass_fds=pass_fds
    ) as peer:
        vm = Qemu(**vars(peer), qmp=Qmp(monitor))
        try:
            with telling("the guest", vm.doings):
                yield vm
        finally:
            vm.qmp.close()


@contextmanager
def qemu_io_started(directory: Path, socket: Path, *commands: str, options: str = "cache.direct=on") -> Iterator[Peer]:
    """qemu-io on the vhost-user-blk device at `socket`, by libblkio; each command is one such as `read -P 0 0 4k`."""
    arguments = ["--image-opts", ",".join(filter(None, [f"driver=virtio-blk-vhost-user,path={socket}", options]))]
    line = command("bin/qemu-io", *arguments, *(word for each in commands for word in ("-c", each)))
    libblkio = version("libblkio1")
    with running("qemu-io", libblkio, line, directory, socket, server=False, environment=MODULES) as peer:
        yield peer


def qemu_io(directory: Path, socket: Path, *commands: str) -> str:
    """The same, to the end; returns what it printed. AssertionError where a command failed."""
    with qemu_io_started(directory, socket, *commands) as peer:
        status = peer.wait()
        assert status == 0, f"qemu-io ended with {status}:\n{peer.output()}"
        return peer.output()
