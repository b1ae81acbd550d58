"""`virtio-mem resize`: the size of all of a machine's memory, where the machine has no zones of the user's."""

from __future__ import annotations

import argparse

from virtio_mem.cli.common import add_api_socket, teach
from virtio_mem.cli.follow import EXIT_STATUS, MANNER, add_keep, add_size, ask, bytes_of
from virtio_mem.client import Client

DOES = """Ask the guest to plug or unplug memory until the machine has SIZE in all, boot
memory included. A machine with --memory-zone has no size of its own to set: see
virtio-mem resize-zone.

"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    teach(parser, DOES + MANNER, "virtio-mem resize --api-socket api.sock 1536M --wait 60", exit_status=EXIT_STATUS)
    add_api_socket(parser)
    add_size(parser)
    add_keep(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask for the size; the exit status."""
    size = bytes_of(arguments.size)
    client = Client(arguments.api_socket)
    return ask(client, lambda: client.resize(size), arguments.wait, keep=client.resize if arguments.keep else None)
