"""`virtio-mem info`: the zones, their sizes, what the host holds, and the state of the last resize."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from virtio_mem.cli.common import Screen, add_api_socket, teach
from virtio_mem.cli.outcome import outcome
from virtio_mem.client import Client
from virtio_mem.picture.sizes import human_size
from virtio_mem.picture.spans import Line, Role, Span

_GAP = "  "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    teach(parser, "Show each zone's sizes and what became of its last resize.", "virtio-mem info --api-socket api.sock")
    add_api_socket(parser)
    parser.add_argument("--json", action="store_true", help="what the API says, as it says it: sizes in bytes")


def run(arguments: argparse.Namespace) -> int:
    """Print; the exit status."""
    client = Client(arguments.api_socket)
    info = client.info()
    if arguments.json:
        sys.stdout.write(json.dumps(info, indent=2) + "\n")
        return 0
    screen = Screen()
    columns = [_column(zone) for zone in info["zones"]]
    screen.show(table(TITLES, columns, screen.width))
    return 0


Cell = Callable[[dict[str, Any]], str]


def _size(key: str) -> Cell:
    return lambda zone: "?" if zone.get(key) is None else human_size(zone[key])


def _refused(zone: dict[str, Any]) -> str:
    bad = {name: count for name, count in zone["answers"].items() if not name.endswith(" ACK")}
    return ", ".join(f"{name} {count:,}" for name, count in sorted(bad.items())) or "none"


_EVERY_ZONE: tuple[tuple[str, Cell], ...] = (
    ("zone", lambda zone: zone["id"]),
    ("boot memory", _size("boot_size")),
    ("guest node", lambda zone: "none" if zone["guest_numa_id"] is None else str(zone["guest_numa_id"])),
)
_WITH_DEVICE: tuple[tuple[str, Cell], ...] = (
    ("plugged", _size("plugged_size")),
    ("requested", _size("requested_size")),
    ("usable", _size("usable_region_size")),
    ("region", _size("hotplug_size")),
    ("at address", lambda zone: f"{zone['addr']:#x}"),
    ("block size", _size("block_size")),
    ("held by the host", lambda zone: _size("held")(zone) + (" or more" if zone.get("held_more") else "")),
    (
        "  not plugged",
        lambda zone: _size("held_unplugged")(zone) + (" or more" if zone.get("held_unplugged_more") else ""),
    ),
    ("unplugged so far", _size("unplugged_bytes")),
    ("  not given back", _size("unreturned_bytes")),
    ("  not asked for", _size("unrequested_bytes")),
    ("requests refused", _refused),
    ("front end", lambda zone: "connected" if zone.get("connected") else "none"),
    ("serving", lambda zone: "paused" if zone.get("paused") else "yes"),
    ("last resize", lambda zone: outcome(zone["operation"]) if zone["operation"] else "none"),
)
"""What a person wants to know of a zone, in this order. "?" is what the host can't tell."""

TITLES = [title for title, _ in (*_EVERY_ZONE, *_WITH_DEVICE)]


def _column(zone: dict[str, Any]) -> list[str]:
    """A zone's cells; those of a device that it has not got are "-"."""
    device = [cell(zone) if zone["block_size"] else "-" for _, cell in _WITH_DEVICE]
    return [cell(zone) for _, cell in _EVERY_ZONE] + device


def table(titles: list[str], columns: list[list[str]], width: int) -> list[Line]:
    """Titles at the left, then as many columns as fit beside each other; the others follow below."""
    lines: list[Line] = []
    margin = max(map(len, titles))
    while columns:
        sizes = [max(map(len, column)) for column in columns]
        taken, room = 0, width - margin
        while taken < len(columns) and (not taken or sizes[taken] + len(_GAP) <= room):
            room -= sizes[taken] + len(_GAP)
            taken += 1
        lines += [[]] if lines else []
        for row, title in enumerate(titles):
            role = Role.TEXT if row else Role.NAME
            cells = (f"{_GAP}{column[row]:<{size}}" for column, size in zip(columns[:taken], sizes, strict=False))
            lines.append([Span(f"{title:<{margin}}", Role.QUIET), Span("".join(cells), role)])
        columns = columns[taken:]
    return lines
