"""A machine that `virtio-mem boot` runs, with a guest that does what it is told on its console."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.linux.console import Console
from tests.peers.processes import SHOWN, Peer, children_with, wait_until
from virtio_mem.boot.console import OBEY
from virtio_mem.boot.guest import default_initrd, find_kernel
from virtio_mem.client import Client


@dataclass
class Machine(Peer):
    """The program's process, whose input and output are the guest's console, and its API."""

    api: Client
    boots: int = 1

    @property
    def console(self) -> Console:
        return Console(self)

    def guest(self, command: str) -> str:
        """What a shell command in the guest prints. AssertionError where it fails."""
        return self.console.run(command)

    def wait_for_boot(self) -> None:
        """Until the guest is ready, for the first time or once more."""
        self.console.wait_for_boot(self.boots)

    def guest_kib(self, file: str, key: str = "MemTotal") -> int:
        """A line of a file such as /proc/meminfo, in the guest."""
        return int(self.guest(f"grep {key}: {file}").split()[-2])

    def zone(self, name: str) -> dict[str, int]:
        """What vm.info says of a zone."""
        return next(zone for zone in self.api.info()["zones"] if zone["id"] == name)

    def resize_zone(self, name: str, size: int) -> None:
        """And wait until it has that size."""
        operation = self.api.operation(self.api.resize_zone(name, size), wait=30.0)
        assert operation["state"] == "reached", operation

    def held_by_host(self, name: str, part: str = "hotplug") -> int:
        """Bytes that the kernel holds for a part of a zone, as the kernel says: nobody else is asked."""
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            if str(link.readlink()).startswith(f"/memfd:virtio-mem:{name}:{part}"):
                return link.stat().st_blocks * 512
        raise LookupError(name)

    def children(self, words: str) -> list[int]:
        """The processes that the program started, by a part of their command line."""
        return children_with(words, self.process.pid)

    def wait_for(self, true: Callable[[], object], what: str, seconds: float = 30.0) -> None:
        def come() -> bool:
            ended = self.process.poll()
            if true():
                return True
            if ended is not None:
                raise RuntimeError(f"it ended with {ended} before: {what}")
            return False

        wait_until(come, what, seconds)


@contextmanager
def machine(
    directory: Path, options: str, kernel: str | None = None, append: str = "", more: str = ""
) -> Iterator[Machine]:
    """A machine with `options`, `more` of them last; its guest is ready. It is told to end, if it has not."""
    chosen = find_kernel(kernel)
    initrd = directory / "initrd"
    initrd.write_bytes(default_initrd(chosen, OBEY))
    api_socket, log = directory / "api", directory / "boot.log"
    payload = ["--kernel", str(chosen / "vmlinuz"), "--initrd", str(initrd), "--api-socket", str(api_socket)]
    cmdline = f"console=ttyS0 quiet panic=-1 memhp_default_state=online_movable {append}"
    command = [
        sys.executable,
        "-m",
        "virtio_mem",
        "boot",
        *shlex.split(options),
        *payload,
        "--cmdline",
        cmdline,
        *shlex.split(more),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig=TERM", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(directory)},
        )
    vm = Machine("boot", process, api_socket, log, chosen.name, Client(api_socket))
    try:
        vm.wait_for_boot()
        yield vm
    finally:
        end(process)
        sys.stdout.write(f"--- boot ended with {process.returncode} after this:\n{vm.output()[-SHOWN:]}\n")


def end(process: subprocess.Popen[bytes], seconds: float = 15.0) -> float:
    """Tell it to end, and see to it; the seconds that it took."""
    began = time.monotonic()
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    finally:
        assert process.stdin is not None
        process.stdin.close()
    return time.monotonic() - began
