"""What `scripts/demo --linux` shows: a Linux guest boots on our memory, and is resized before your eyes.

The machine is `virtio-mem boot`, started as anybody would start it, and resized by its API. What the guest has is what
the guest says; what the host holds is what the kernel of the host says.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console as Terminal
from rich.console import Group
from rich.live import Live
from rich.text import Text

from vhost_user.errors import FieldError, UsageError
from vhost_user.units import MIB, format_size
from virtio_mem.boot.console import OBEY, Console
from virtio_mem.boot.guest import default_initrd, find_kernel
from virtio_mem.client import Client
from virtio_mem.demo import WIDTH
from virtio_mem.operation import ENDED
from virtio_mem.picture import draw, human_size
from virtio_mem.picture.terminal import coloured

MEMORY = "size=512M,shared=on,hotplug_method=virtio-mem,hotplug_size=2G,hotplugged_size=256M"
BOOT_SIZE, BOOT_HOTPLUGGED = 512 * MIB, 256 * MIB
ZONE = "mem0"
CMDLINE = "console=ttyS0 quiet panic=-1 memhp_default_state=online_movable"

BOOT_SECONDS = 120.0
"""Emulated on a busy machine; on an idle one it takes five."""

RESIZE_SECONDS = 60.0

REDRAWN = 0.1
"""Seconds between two pictures of a zone that is being resized."""

MOST_ROWS = 50
"""Of the recorded terminal, which all of the show fits."""


class Show:
    """The terminal, the guest's console and the machine's API."""

    def __init__(self, console: Console, api: Client) -> None:
        self.terminal = Terminal(highlight=False, soft_wrap=True, width=WIDTH)
        self.console, self.api = console, api

    def headline(self, text: str) -> None:
        """Begin a part of the show."""
        self.terminal.print(Text(f"\n{text}", style="bold"))

    def say(self, text: str) -> None:
        """One line under the headline."""
        self.terminal.print(Text(f"  {text}"))

    def zone(self) -> dict[str, Any]:
        """The zone, as the API has it."""
        zone: dict[str, Any] = self.api.info()["zones"][0]
        return zone

    def picture(self) -> Group:
        """The zone's blocks now, and what the host holds for them."""
        zone = self.zone()
        *picture, sizes = draw(ZONE, self.api.blocks(ZONE, zone["addr"]))
        held = Text(f"; the host holds {zone['held']:,} bytes")
        return Group(*map(coloured, picture), coloured(sizes).append_text(held))

    def follow(self, running: Callable[[], bool]) -> None:
        """The zone's picture as long as something runs, redrawn where it is, and what the guest says that it has.

        What is no terminal has the last picture.
        """
        if self.terminal.is_terminal:
            with Live(self.picture(), console=self.terminal, auto_refresh=False) as live:
                for _ in self._while(running):
                    live.update(self.picture(), refresh=True)
        else:
            for _ in self._while(running):
                pass
            self.terminal.print(self.picture())
        self.say(f"guest: {' '.join(self.console.run('grep MemTotal /proc/meminfo').split())}")

    @staticmethod
    def _while(running: Callable[[], bool]) -> Iterator[None]:
        """Once in a while as long as something runs, and once more. SystemExit if it runs for too long."""
        deadline = time.monotonic() + RESIZE_SECONDS
        while running():
            yield
            if time.monotonic() > deadline:
                raise SystemExit("the guest did not reach the target in time")
            time.sleep(REDRAWN)
        yield

    def resize(self, size: int) -> None:
        """Resize the machine, and watch the guest do it."""
        self.say(f"virtio-mem resize {format_size(size)} --wait")
        number = self.api.resize(size)
        self.follow(lambda: self.api.operation(number)["state"] not in ENDED)  # a guest that stalls may try again
        operation = self.api.operation(number)
        self.say(f"{operation['state']} after {operation['seconds']:.1f} s")
        if operation["state"] != "reached":
            raise SystemExit("the guest did not reach the target")


@contextmanager
def _machine(directory: Path, version: str | None, show_command: bool) -> Iterator[tuple[Console, Client]]:
    kernel, initrd, api_socket = find_kernel(version), directory / "initrd", directory / "api"
    initrd.write_bytes(default_initrd(kernel, OBEY))
    command = ["virtio-mem", "boot", "--cpus", "boot=2", "--memory", MEMORY, "--api-socket", str(api_socket)]
    payload = ["--kernel", str(kernel / "vmlinuz"), "--initrd", str(initrd), "--cmdline", CMDLINE]
    if show_command:
        sys.stdout.write(f"{shlex.join([*command, *payload])}\n")
    with subprocess.Popen(
        [sys.executable, "-m", "virtio_mem", *command[1:], *payload], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield Console(process.stdin, process.stdout), Client(api_socket)
        finally:
            process.terminate()


def _run(show: Show) -> None:
    show.headline("A Linux guest boots; its memory is this machine's, its processors are QEMU's")
    show.say("virtio-mem boot --cpus boot=2")
    show.say(f"  --memory {MEMORY}")
    show.console.wait_for_boot(BOOT_SECONDS)
    show.say(f"guest: Linux {show.console.run('uname -r').strip()}")
    show.follow(lambda: show.zone()["plugged_size"] != BOOT_HOTPLUGGED)
    show.headline("The host gives more")
    show.resize(BOOT_SIZE + 1536 * MIB)
    show.headline("The guest uses it: a file of 300 MiB in memory")
    write = "dd if=/dev/zero of=/tmp/file bs=1M count=300 2>/dev/null"
    with ThreadPoolExecutor(1) as thread:
        written = thread.submit(show.console.run, f"mount -t tmpfs -o size=100% tmp /tmp; {write}", BOOT_SECONDS)
        show.follow(lambda: not written.done())
    written.result()
    show.headline("The guest is done with the file; the host takes memory back")
    show.console.run("rm /tmp/file")
    show.resize(BOOT_SIZE + 128 * MIB)
    zone = show.zone()
    unplugged, kept = human_size(zone["unplugged_bytes"]), zone["unreturned_bytes"]
    show.say(f"{unplugged} were unplugged, of which {kept} bytes did not go back at once")
    if kept:
        raise SystemExit("the host still holds memory that was unplugged")


def _perform(kernel: str | None, verbose: bool) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="virtio-mem-demo-") as directory,
        _machine(Path(directory), kernel, verbose) as (console, api),
    ):
        _run(Show(console, api))


def _film(output: Path, arguments: list[str]) -> None:
    """Run the demo in a terminal of its own, and save what that showed."""
    try:
        from virtio_mem.picture.film import film  # noqa: PLC0415 - an extra
        from virtio_mem.picture.recording import record  # noqa: PLC0415
    except ImportError as error:
        remedy = "pip install rich pyte"
        raise UsageError("--picture", output, f"recordings need a library: {error}", remedy) from None
    echo = _echo if sys.stdout.isatty() else None
    recording = record([sys.executable, "-m", __spec__.name, *arguments], columns=WIDTH, rows=MOST_ROWS, echo=echo)
    if echo is None:
        sys.stdout.write(f"{recording.frames[-1].text}\n")
    if recording.status:
        raise SystemExit(recording.status)
    output.write_text(film(recording, "scripts/demo --linux"))


def _echo(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="scripts/demo --linux", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", metavar="VERSION", help="the guest's Linux, such as 6.1 (the newest that is there)")
    parser.add_argument("--verbose", action="store_true", help="show the command line that boots the guest")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="save what the terminal showed, as it moved")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # so that the machine ends, too
    try:
        if arguments.picture:
            same = ["--kernel", arguments.kernel] * bool(arguments.kernel) + ["--verbose"] * arguments.verbose
            _film(arguments.picture, same)
        else:
            _perform(arguments.kernel, arguments.verbose)
    except FieldError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
