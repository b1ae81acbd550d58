"""Starts the service: sockets first, then a line `ready` on stdout, and systemd is told."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from vhost_user.backend import Server
from virtio_mem.serve.device import MemDevice
from virtio_mem.serve.files import state_memfd
from virtio_mem.serve.plan import ServePlan
from virtio_mem.serve.state import state_size
from virtio_mem.serve.worker import poll_each_second


def serve(plan: ServePlan, sockets: Mapping[str, Path], *, api_socket: str | None = None) -> int:
    """Serve the plan's zones at `sockets`, by id, until SIGTERM or SIGINT; the exit status."""
    del api_socket
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(plan.verbose, 2)]
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s")
    states = [state_memfd(zone.id, state_size(zone.geometry)) for zone in plan.zones]
    devices = [MemDevice(zone, fd.fileno()) for zone, fd in zip(plan.zones, states, strict=True)]
    with Server() as server:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
        for device in devices:
            device.endpoint = server.listen(sockets[device.zone.id], device)
        poll_each_second(server, devices)
        ready()
        server.run()
    notify_systemd("STOPPING=1")
    return 0


def ready() -> None:
    """Tell whoever started us."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    notify_systemd("READY=1")


def notify_systemd(state: str) -> None:
    """Send a state to the service manager that named a socket in NOTIFY_SOCKET, sd_notify(3); none is fine."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError as error:
            sys.stderr.write(f"NOTIFY_SOCKET: {error}\n")
