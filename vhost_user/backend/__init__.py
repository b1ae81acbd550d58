"""The back end: a server that any device plugs into; server.py shows how it is used, device.py what a device is."""

from vhost_user.backend.device import Device
from vhost_user.backend.server import Endpoint, Server
from vhost_user.backend.session import PROTOCOL_FEATURES
from vhost_user.backend.vring import Vring

__all__ = ["PROTOCOL_FEATURES", "Device", "Endpoint", "Server", "Vring"]
