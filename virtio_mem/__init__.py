"""A virtio-mem device and the guest memory around it.

`MemoryManager` makes a machine's memory from a `VmMemoryConfig`; `MmioTransport` puts a zone's device in front of a
guest; `MemoryManager.share()` shares memory with vhost-user daemons. `VirtioMemDevice` is the device alone, without
memory, clock or socket.

Each name is imported when it is first used: a program that needs the device alone does not pay for the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhost_user.late import importer

if TYPE_CHECKING:
    from vhost_user.errors import FieldError, HostError, PeerError, UsageError
    from virtio_mem.config import ConfigError, VmMemoryConfig
    from virtio_mem.device import Effect, VirtioMemDevice
    from virtio_mem.geometry import Geometry, UsableRegion
    from virtio_mem.manager import MemoryManager
    from virtio_mem.mmio import MmioTransport
    from virtio_mem.mmio_state import MmioState
    from virtio_mem.protocol import BlockState, ConfigSpace, Feature, Request, RequestType, Response, ResponseType
    from virtio_mem.service import DeviceService, MemoryListener, Section
    from virtio_mem.sharing import HotplugSharing, MemoryShare, require_shareable
    from virtio_mem.zone import Zone, ZoneSpec

__all__ = [
    "BlockState",
    "ConfigError",
    "ConfigSpace",
    "DeviceService",
    "Effect",
    "Feature",
    "FieldError",
    "Geometry",
    "HostError",
    "HotplugSharing",
    "MemoryListener",
    "MemoryManager",
    "MemoryShare",
    "MmioState",
    "MmioTransport",
    "PeerError",
    "Request",
    "RequestType",
    "Response",
    "ResponseType",
    "Section",
    "UsableRegion",
    "UsageError",
    "VirtioMemDevice",
    "VmMemoryConfig",
    "Zone",
    "ZoneSpec",
    "require_shareable",
]

_HOMES = {
    "vhost_user.errors": ("FieldError", "HostError", "PeerError", "UsageError"),
    "virtio_mem.config": ("ConfigError", "VmMemoryConfig"),
    "virtio_mem.device": ("Effect", "VirtioMemDevice"),
    "virtio_mem.geometry": ("Geometry", "UsableRegion"),
    "virtio_mem.manager": ("MemoryManager",),
    "virtio_mem.mmio": ("MmioTransport",),
    "virtio_mem.mmio_state": ("MmioState",),
    "virtio_mem.protocol": (
        "BlockState",
        "ConfigSpace",
        "Feature",
        "Request",
        "RequestType",
        "Response",
        "ResponseType",
    ),
    "virtio_mem.service": ("DeviceService", "MemoryListener", "Section"),
    "virtio_mem.sharing": ("HotplugSharing", "MemoryShare", "require_shareable"),
    "virtio_mem.zone": ("Zone", "ZoneSpec"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__getattr__ = importer(globals(), _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
