"""A virtio-mem device and the guest memory around it.

`MemoryManager` makes a machine's memory from a `VmMemoryConfig`; `MmioTransport` puts a zone's device in front of a
guest; `MemoryManager.share()` shares memory with vhost-user daemons. `VirtioMemDevice` is the device alone, without
memory, clock or socket.
"""

from vhost_user.errors import FieldError, HostError, PeerError, UsageError
from virtio_mem.config import ConfigError, VmMemoryConfig
from virtio_mem.device import Effect, VirtioMemDevice
from virtio_mem.geometry import Geometry, UsableRegion
from virtio_mem.manager import MemoryManager
from virtio_mem.mmio import MmioTransport
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
