"""The back end: a server that any device plugs into; server.py shows how it is used, device.py what a device is.

Each name is imported when it is first used: who needs the event loop alone does not pay for the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhost_user.late import importer

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

__getattr__ = importer(globals(), _HOME)
