"""`virtio-mem resize-zone`: the size of one zone."""

from __future__ import annotations

import argparse
from functools import partial

from virtio_mem.cli.common import add_api_socket, teach
from virtio_mem.cli.follow import EXIT_STATUS, MANNER, add_keep, add_size, ask, bytes_of
from virtio_mem.client import Client

DOES = """Ask the guest to plug or unplug memory until zone ID has SIZE in all, its boot
memory included. Under virtio-mem serve a zone has no boot memory: SIZE is what
its device plugs.

"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    teach(
        parser,
        DOES + MANNER,
        "virtio-mem resize-zone --api-socket api.sock mem0 1536M --wait 60",
        exit_status=EXIT_STATUS,
    )
    add_api_socket(parser)
    parser.add_argument("id", metavar="ID", help="the zone, as virtio-mem info lists it")
    add_size(parser)
    add_keep(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask for the size; the exit status."""
    size = bytes_of(arguments.size)
    client = Client(arguments.api_socket)
    resize = partial(client.resize_zone, arguments.id)
    return ask(client, partial(resize, size), arguments.wait, keep=resize if arguments.keep else None)
