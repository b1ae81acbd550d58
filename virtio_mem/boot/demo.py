"""What `scripts/demo --linux` shows: a Linux guest boots on our memory, and is resized before your eyes.

The machine is `virtio-mem boot`, started as anybody would start it, and resized by its API. What the guest has is what
the guest says; what the host holds is what the kernel of the host says.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console as Terminal
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from vhost_user.errors import FieldError
from vhost_user.units import MIB
from virtio_mem.boot.console import OBEY, Console
from virtio_mem.boot.guest import default_initrd, find_kernel
from virtio_mem.client import Client
from virtio_mem.demo import PICTURE, WIDTH
from virtio_mem.picture import draw, human_size
from virtio_mem.picture.terminal import coloured

MEMORY = "size=512M,shared=on,hotplug_method=virtio-mem,hotplug_size=2G,hotplugged_size=256M"
BOOT_SIZE = 512 * MIB
ZONE = "mem0"
CMDLINE = "console=ttyS0 quiet panic=-1 memhp_default_state=online_movable"

BOOT_SECONDS = 120.0
"""Emulated on a busy machine; on an idle one it takes five."""

RESIZE_SECONDS = 60.0


class Show:
    """The terminal, the guest's console and the machine's API."""

    def __init__(self, console: Console, api: Client) -> None:
        self.terminal = Terminal(highlight=False, soft_wrap=True, record=True, width=WIDTH)
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

    def picture(self) -> None:
        """The zone's blocks, what the host holds for them, and what the guest says that it has."""
        zone = self.zone()
        *picture, sizes = draw(ZONE, self.api.blocks(ZONE, zone["addr"]))
        for line in picture:
            self.terminal.print(coloured(line))
        self.terminal.print(coloured(sizes), Text(f"the host holds {zone['held']:,} bytes"), sep="; ")
        self.say(f"guest: {' '.join(self.console.run('grep MemTotal /proc/meminfo').split())}")

    def resize(self, size: int) -> None:
        """Resize the machine, and wait for the guest."""
        self.say(f"virtio-mem resize {human_size(size)} --wait")
        operation = self.api.operation(self.api.resize(size), wait=RESIZE_SECONDS)
        self.say(f"{operation['state']} after {operation['seconds']:.1f} s")
        if operation["state"] != "reached":
            raise SystemExit("the guest did not reach the target in time")
        self.picture()

    def wait_for_plugged(self, size: int) -> None:
        """What is hotplugged at boot comes without being asked for."""
        deadline = time.monotonic() + RESIZE_SECONDS
        while self.zone()["plugged_size"] != size:
            if time.monotonic() > deadline:
                raise SystemExit("the guest did not plug what is hotplugged at boot")
            time.sleep(0.1)


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
    show.say(f"virtio-mem boot --cpus boot=2 --memory {MEMORY}")
    show.console.wait_for_boot(BOOT_SECONDS)
    show.say(f"guest: Linux {show.console.run('uname -r').strip()}")
    show.wait_for_plugged(256 * MIB)
    show.picture()
    show.headline("The host gives more")
    show.resize(BOOT_SIZE + 1536 * MIB)
    show.headline("The guest uses it: a file of 300 MiB in memory")
    write = "dd if=/dev/zero of=/tmp/file bs=1M count=300 2>/dev/null"
    show.console.run(f"mount -t tmpfs -o size=100% tmp /tmp; {write}", BOOT_SECONDS)
    show.picture()
    show.headline("The guest is done with the file; the host takes memory back")
    show.console.run("rm /tmp/file")
    show.resize(BOOT_SIZE + 128 * MIB)
    zone = show.zone()
    unplugged, kept = human_size(zone["unplugged_bytes"]), zone["unreturned_bytes"]
    show.say(f"{unplugged} were unplugged, of which {kept} bytes did not go back at once")
    if kept:
        raise SystemExit("the host still holds memory that was unplugged")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="scripts/demo --linux", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", metavar="VERSION", help="the guest's Linux, such as 6.1 (the newest that is there)")
    parser.add_argument("--verbose", action="store_true", help="show the command line that boots the guest")
    parser.add_argument("--picture", metavar="FILE.svg", help="save what the terminal showed as an SVG")
    arguments = parser.parse_args()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="virtio-mem-demo-") as directory,
            _machine(Path(directory), arguments.kernel, arguments.verbose) as (console, api),
        ):
            show = Show(console, api)
            _run(show)
            if arguments.picture:
                title = "scripts/demo --linux"
                show.terminal.save_svg(arguments.picture, title=title, code_format=PICTURE, theme=SVG_EXPORT_THEME)
    except FieldError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
