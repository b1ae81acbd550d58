"""The process that serves: devices, rings and the API. It may be killed at any moment; another one goes on."""

from __future__ import annotations

import time
from collections.abc import Iterable

from vhost_user.backend import Server
from virtio_mem.serve.device import MemDevice

POLL_INTERVAL = 1.0
"""Seconds between two looks whether a driver that was told BUSY can be asked to try again."""


def poll_each_second(server: Server, devices: Iterable[MemDevice]) -> None:
    """Have the devices polled as long as the server runs."""
    now = time.monotonic()
    for device in devices:
        device.poll(now)
    server.loop.call_later(POLL_INTERVAL, lambda: poll_each_second(server, devices))
