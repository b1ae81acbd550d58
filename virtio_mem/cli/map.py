"""`virtio-mem map`: which blocks are plugged, as a picture in the terminal or in a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vhost_user.errors import UsageError
from virtio_mem.cli.common import Screen, add_api_socket, teach
from virtio_mem.client import Client
from virtio_mem.picture.blocks import Region
from virtio_mem.picture.grid import GUTTER, legend, most_cells, zone_map

DOES = """Draw each zone's blocks from the lowest address on: which are plugged, which are
not, how far the usable region goes, and where the requested size would end if
blocks were plugged from the start. A cell is a block, or where there are more
than fit, a power of two of them. In colours on a terminal that knows them (with
the extra `terminal`), else in plain letters."""

FORMATS = (".svg", ".png")
_LEAST_WIDTH = GUTTER + 2 + 8
_MOST_WIDTH = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    examples = ("virtio-mem map --api-socket api.sock", "virtio-mem map --api-socket api.sock --output map.svg")
    teach(parser, DOES, *examples)
    add_api_socket(parser)
    parser.add_argument("--zone", metavar="ID", help="this zone alone")
    parser.add_argument("--width", metavar="N", help="columns; the terminal's unless given")
    parser.add_argument("--output", metavar="FILE", help="a picture in a file, .svg or .png (with the extra `plot`)")


def run(arguments: argparse.Namespace) -> int:
    """Draw; the exit status."""
    width = None if arguments.width is None else _width(arguments.width)
    output = None if arguments.output is None else Path(arguments.output)
    if output is not None and output.suffix not in FORMATS:
        raise UsageError(
            "--output", output, f"has to be a file whose name ends in {' or '.join(FORMATS)}", "name it map.svg"
        )
    if output is not None and not output.parent.is_dir():
        raise UsageError("--output", output, f"{output.parent} is no directory", "choose another place")
    client = Client(arguments.api_socket)
    zones = _zones(client, arguments.zone)
    if output is not None:
        _save(output, client, zones)
        return 0
    screen = Screen(width)
    for name, blocks in _counts(client, zones, most_cells(screen.width)):
        screen.show([*zone_map(name, blocks, screen.width, screen.glyphs), []])
    screen.show([legend(screen.glyphs)])
    return 0


def _width(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 9) or not _LEAST_WIDTH <= int(text) <= _MOST_WIDTH:
        limit = f"has to be a number of columns from {_LEAST_WIDTH} to {_MOST_WIDTH}"
        raise UsageError("--width", text, limit, "leave it out for the terminal's width")
    return int(text)


def _zones(client: Client, only: str | None) -> list[tuple[str, int]]:
    """Name and address of the zones to draw: those that have a device."""
    zones = client.info()["zones"]
    known = {zone["id"]: zone["addr"] for zone in zones if zone["block_size"]}
    if only is not None:
        return [(only, known.get(only, 0))]
    if not known:
        raise UsageError("--api-socket", client.path, "no zone there has blocks to draw", "give one a hotplug_size")
    return list(known.items())


def _counts(client: Client, zones: list[tuple[str, int]], most: int) -> list[tuple[str, Region]]:
    """The zones' blocks, as fine as they are drawn and no finer."""
    return [(name, client.counts(name, most, addr)) for name, addr in zones]


def _save(output: Path, client: Client, zones: list[tuple[str, int]]) -> None:
    try:
        from virtio_mem.picture.image import cells_shown, image  # noqa: PLC0415 - half a second, and an extra
    except ImportError as error:
        remedy = "pip install matplotlib"
        raise UsageError("--output", output, f"pictures in files need a library: {error}", remedy) from None
    picture = image(_counts(client, zones, cells_shown()), output.suffix[1:])
    try:
        output.write_bytes(picture)
    except OSError as error:
        raise UsageError("--output", output, f"can't be written: {error.strerror}", "choose another place") from None
    sys.stdout.write(f"{output}: {len(picture):,} bytes\n")
