"""What `scripts/demo` shows: a small machine's memory, booted, plugged by a guest, resized, read by another process.

Three processes take part. This one is the machine: it owns the memory and serves the devices. The guest maps what is
shared and drives the devices as Linux would, through virtqueues in its memory. A reader gets one file descriptor and
reads what the guest wrote. Every figure for the host comes from the kernel, at the moment at which it is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from vhost_user.errors import FieldError, UsageError
from vhost_user.units import MIB
from virtio_mem.config import VmMemoryConfig
from virtio_mem.config.vm import only_memory
from virtio_mem.guest.memory_driver import MEMORY_BLOCK_SIZE, Outcome
from virtio_mem.guest.process import pattern
from virtio_mem.machine import Machine
from virtio_mem.managed_zone import ManagedZone, SharedPart
from virtio_mem.manager import MemoryManager
from virtio_mem.picture import ZoneBlocks, draw, human_size
from virtio_mem.picture.terminal import coloured

HUGEPAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
HUGE_ZONE_SIZE = 256 * MIB
WIDTH = 100
"""Columns of the show, in the terminal and in its picture."""

PATIENCE = 30.0
"""Seconds that the guest has to do what it was asked for."""

MEMORY = "size=0,hotplug_method=virtio-mem"
ZONES = ("id=mem0,size=64M,shared=on,hotplug_size=1G,hotplugged_size=256M",)
HUGE_ZONE = "id=huge0,size=0,hugepages=on,hugepage_size=2M,hotplug_size=512M,hotplugged_size=128M"

PICTURE = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" xml:space="preserve">
<style>
text {{ white-space: pre; }}
.{unique_id}-matrix {{ font: {char_height}px monospace; }}
.{unique_id}-title {{ font: bold 18px sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""
"""The frame around what rich draws of the terminal; it needs no font from anywhere."""

READER = """
import mmap, os, socket, sys
link = socket.socket(fileno=int(sys.argv[1]))
message, (fd,), _, _ = socket.recv_fds(link, 100, 1)
offset, size = map(int, message.split())
page = mmap.mmap(fd, size, prot=mmap.PROT_READ, offset=offset)
link.send(page[:32])
"""
"""The other process: whatever it knows of guest memory, it knows by the file descriptor that it was sent."""


class Show:
    """The terminal, and the processes on stage."""

    def __init__(self, machine: Machine, guest: subprocess.Popen[str]) -> None:
        self.console = Console(highlight=False, soft_wrap=True, record=True, width=WIDTH)
        self.machine = machine
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._plugged: dict[str, int] = {}
        threading.Thread(target=self._listen, args=(guest,), daemon=True).start()

    def _listen(self, guest: subprocess.Popen[str]) -> None:
        assert guest.stdout is not None
        for line in guest.stdout:
            self._events.put(json.loads(line))
        self._events.put({"event": "gone"})

    def headline(self, text: str) -> None:
        """Begin a part of the show."""
        self.console.print(Text(f"\n{text}", style="bold"))

    def say(self, text: str) -> None:
        """One line under the headline."""
        self.console.print(Text(f"  {text}"))

    def await_targets(self) -> None:
        """Wait until the guest says that it has done what it was asked for, in every zone."""
        deadline = time.monotonic() + PATIENCE
        targets = {
            zone_id: zone.service.device.requested_size
            for zone_id, zone in self.machine.manager.zones.items()
            if zone.service is not None
        }
        while self._plugged != targets:
            left = deadline - time.monotonic()
            try:
                event = self._events.get(timeout=max(0.0, left))
            except queue.Empty:
                raise SystemExit("the guest did not reach the target in time") from None
            if event["event"] == "damaged":
                raise SystemExit(f"the guest's memory at {event['addr']:#x} was damaged")
            if event["event"] == "gone":
                raise SystemExit("the guest is gone: what it said is above")
            if event["event"] == "outcome":
                self._plugged[event["zone"]] = event["plugged_size"]
                if event["outcome"] in ("STUCK", "BROKEN"):
                    raise SystemExit(f"zone {event['zone']}: {Outcome[event['outcome']].value}")

    def picture(self) -> None:
        """Each zone's blocks, and what the host holds for them."""
        for zone_id, zone in self.machine.manager.zones.items():
            if zone.service is None or zone.zone.hotplug is None:
                self.say(f"{zone_id}: {human_size(zone.plan.spec.size)}, no virtio-mem")
                continue
            with zone.service.lock:
                blocks = ZoneBlocks.of(zone.service.device)
            *picture, sizes = draw(zone_id, blocks)
            for line in picture:
                self.console.print(coloured(line))
            self.console.print(coloured(sizes), Text(f"the host holds {zone.zone.hotplug.held():,} bytes"), sep="; ")


@contextmanager
def _huge_pages() -> Iterator[bool]:
    """Huge pages for a zone, where this process may reserve some; what was changed is put back."""
    pages = HUGE_ZONE_SIZE // (2 * MIB)
    try:
        before = int(HUGEPAGES.read_text())
        HUGEPAGES.write_text(str(before + pages))
        added = int(HUGEPAGES.read_text()) - before
    except OSError:
        yield False
        return
    try:
        yield added >= pages
    finally:  # somebody else may have added some meanwhile
        HUGEPAGES.write_text(str(max(0, int(HUGEPAGES.read_text()) - max(0, added))))


@contextmanager
def _guest(machine: Machine, *, packed: bool) -> Iterator[subprocess.Popen[str]]:
    link = machine.take_guest_link()
    command = [sys.executable, "-m", "virtio_mem.guest", str(link.fileno()), *(["packed"] if packed else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=[link.fileno()]) as guest:
        link.close()
        try:
            yield guest
        finally:
            machine.close()


def _read_elsewhere(part: SharedPart, offset: int) -> bytes:
    """Have another process read 32 bytes at `offset` of a shared part."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", READER, str(theirs.fileno())]
        with subprocess.Popen(command, pass_fds=[theirs.fileno()]):
            theirs.close()  # or nobody would hear that the process ended
            size = os.fstatvfs(part.fd).f_bsize
            socket.send_fds(ours, [f"{part.offset + offset} {size}".encode()], [part.fd])
            return ours.recv(32)


def _run(show: Show) -> None:
    zones = [zone for zone in show.machine.manager.zones.values() if zone.service is not None]
    if not zones:
        limit = "no zone has a hotplug_size with hotplug_method=virtio-mem, so there is nothing to show"
        raise UsageError("--memory", show.machine.manager.config.memory, limit, "see --help for a machine that has")
    show.headline("The guest plugs what each zone has hotplugged at boot")
    show.await_targets()
    show.picture()
    _resize(show, "The host asks for more", zones, 0.75)
    _read(show)
    _resize(show, "The host asks for less", zones, 0.125)
    _verdict(show, zones)


def _read(show: Show) -> None:
    show.headline("Another process reads the guest's memory through a file descriptor that it was passed")
    part = next(part for part in show.machine.manager.shared_parts() if part.hotplug)
    text = _read_elsewhere(part, 0)
    show.say(f"guest address {part.addr:#x} holds {text!r}")
    if text != pattern(part.addr):
        raise SystemExit("that is not what the guest wrote")


def _resize(show: Show, headline: str, zones: list[ManagedZone], share: float) -> None:
    """Give each zone a share of what can be hotplugged."""
    show.headline(headline)
    for zone in zones:
        assert zone.service is not None
        spec, unit = zone.plan.spec, max(MEMORY_BLOCK_SIZE // 2, zone.service.device.geometry.block_size)
        most = (
            spec.hotplug_size // MEMORY_BLOCK_SIZE * MEMORY_BLOCK_SIZE
        )  # the guest has no use for less than a whole one
        hotplugged = min(int(most * share), HUGE_ZONE_SIZE if spec.hugepages else most)
        size = spec.size + hotplugged // unit * unit
        show.say(f"resize_zone {spec.id} to {human_size(size)}, boot memory included")
        show.machine.resize_zone(spec.id, size)
    show.await_targets()
    show.picture()


def _verdict(show: Show, zones: list[ManagedZone]) -> None:
    show.headline("What was unplugged is back with the host")
    for zone in zones:
        assert zone.service is not None and zone.zone.hotplug is not None
        plugged, held = zone.service.device.plugged_size, zone.zone.hotplug.held()
        show.say(f"{zone.plan.spec.id}: {human_size(plugged)} plugged, {human_size(held)} held by the host")
        if held != plugged:
            raise SystemExit("the host holds something else than what is plugged")
        info = zone.service.info()
        unplugged, kept = human_size(info["unplugged_bytes"]), info["unreturned_bytes"]
        show.say(f"{zone.plan.spec.id}: {unplugged} were unplugged, of which {kept} bytes did not go back at once")
        answers = ", ".join(f"{answer} {count}" for answer, count in sorted(info["answers"].items()))
        show.say(f"{zone.plan.spec.id}: answers {answers}")


def main() -> None:
    """Run the demo; the options replace the machine's."""
    epilog = "scripts/demo --linux boots a Linux guest instead, on QEMU's processors; see scripts/demo --linux --help"
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.splitlines()[0], epilog=epilog)
    parser.add_argument("--memory", action="append", default=[], help=f"default: {MEMORY}")
    parser.add_argument(
        "--memory-zone",
        nargs="+",
        action="extend",
        metavar="ZONE",
        help=f"default: {ZONES[0]}, and where huge pages can be had {HUGE_ZONE}",
    )
    parser.add_argument("--numa", nargs="+", action="extend", default=[], metavar="NODE")
    parser.add_argument("--packed", action="store_true", help="use a packed virtqueue instead of a split one")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="save what the terminal showed as an SVG")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # so that what was changed is put back
    try:
        _perform(arguments)
    except FieldError as error:
        parser.error(str(error))


def _perform(arguments: argparse.Namespace) -> None:
    with ExitStack() as stack:
        memory, zones = only_memory(arguments.memory, MEMORY), arguments.memory_zone or []
        if not zones and memory == MEMORY:
            zones = [*ZONES, HUGE_ZONE] if stack.enter_context(_huge_pages()) else list(ZONES)
        config = VmMemoryConfig.from_options(memory, zones, arguments.numa)
        manager = stack.enter_context(MemoryManager(config))
        machine = stack.enter_context(Machine(manager))
        machine.start()
        show = Show(machine, stack.enter_context(_guest(machine, packed=arguments.packed)))
        show.headline("The machine's memory")
        show.say(f"--memory {config.memory}")
        for zone in config.zones:
            show.say(f"--memory-zone {zone}")
        for node in config.numa:
            show.say(f"--numa {node}")
        _run(show)
        if arguments.picture:
            picture = str(arguments.picture)
            show.console.save_svg(picture, title="scripts/demo", code_format=PICTURE, theme=SVG_EXPORT_THEME)


if __name__ == "__main__":
    main()
