"""The back end: a server that any device plugs into; server.py shows how it is used, device.py what a device is.

Each name is imported when it is first used: who needs the event loop alone does not pay for the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vhost_user.backend.device import Device
    from vhost_user.backend.server import Endpoint, Server
    from vhost_user.backend.session import PROTOCOL_FEATURES
    from vhost_user.backend.vring import Vring

__all__ = ["PROTOCOL_FEATURES", "Device", "Endpoint", "Server", "Vring"]

_HOME = {
    "PROTOCOL_FEATURES": "vhost_user.backend.session",
    "Device": "vhost_user.backend.device",
    "Endpoint": "vhost_user.backend.server",
    "Server": "vhost_user.backend.server",
    "Vring": "vhost_user.backend.vring",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value
