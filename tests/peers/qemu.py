"""QEMU and qemu-io: front ends that connect to a back end of ours, or to a daemon's.

Both block until the back end has answered them, so one that runs in the test's own thread needs `qemu_io_started`, not
`qemu_io`. `qemu` yields as soon as the process is started, and leaves it to the test to serve it.
"""

from __future__ import annotations

import json
import mmap
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.host import PEERS_TREE
from tests.peers.processes import LATE, SHOWN, Peer, running, unused
from tests.peers.tree import LIBRARIES, command, kernel, version

_LOW_MEMORY = 2 << 30
"""Where a guest has its kernel."""

_LOG = 128 << 10
"""Bytes of a kernel's log that are looked at."""

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
        self._unread = b""

    def __call__(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """RuntimeError where QEMU refuses."""
        self._connect()
        self._send({"execute": command} | ({"arguments": dict(arguments)} if arguments else {}))
        return self._answer()

    def wait_for_event(self, name: str) -> dict[str, Any]:
        """The oldest event of this name, which is taken out of `events`; waits for it if need be."""
        self._connect()
        while True:
            for event in self.events:
                if event["event"] == name:
                    self.events.remove(event)
                    return event
            self.events.append(self._receive())

    def close(self) -> None:
        if self._socket:
            self._socket.close()
            self._socket = None

    def _connect(self) -> None:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(LATE)
            self._socket.connect(str(self.path))
            self._receive()  # the greeting
            self._send({"execute": "qmp_capabilities"})
            self._answer()

    def _send(self, message: Mapping[str, object]) -> None:
        assert self._socket
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _answer(self) -> Any:
        while True:
            message = self._receive()
            if "event" not in message:
                break
            self.events.append(message)
        if "error" in message:
            raise RuntimeError(f"QEMU: {message['error']['desc']}")
        return message["return"]

    def _receive(self) -> dict[str, Any]:
        assert self._socket
        while b"\n" not in self._unread:
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

    def doings(self) -> str:
        """What its guest does: where the processors are, at three moments, and the end of the kernel's log, which is
        found in the guest's memory however little of it is printed. OSError, RuntimeError or EOFError where QEMU does
        not tell."""
        looks = []
        for _ in range(3):
            looks += re.findall(r"^.IP=.*?HLT=\d", self._monitor("info registers -a"), re.DOTALL | re.MULTILINE)
            time.sleep(0.1)
        copy = unused(self.log.parent, "memory", ".bin")
        try:
            size = self.qmp("query-memory-size-summary")["base-memory"]
            self.qmp("pmemsave", {"val": 0, "size": min(size, _LOW_MEMORY), "filename": str(copy)})
            looks.append(_kernel_log(copy)[-SHOWN:])
        finally:
            copy.unlink(missing_ok=True)
        return "\n".join(looks)

    def _monitor(self, line: str) -> str:
        return str(self.qmp("human-monitor-command", {"command-line": line}))


def _kernel_log(memory: Path) -> str:
    """The log's records, each behind a binary number; "" where no kernel has begun one."""
    with memory.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        begun = re.search(rb"(?s)Linux version \d[ -~]+[^ -~].{0,30}Command line: ", data)
        log = data[begun.start() : begun.start() + _LOG] if begun else b""
    return "\n".join(record.decode() for record in re.findall(rb"[\t -~]{8,}", log))


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
        options += ["-append", f"console=ttyS0 quiet panic=-1 no_timer_check {append}".strip()]
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
            yield vm
        except TimeoutError:
            with suppress(OSError, RuntimeError, EOFError):
                sys.stdout.write(f"--- the guest when it was not waited for any longer:\n{vm.doings()}\n")
            raise
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
