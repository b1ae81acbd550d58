"""The wire format of vhost-user: numbers, layouts, bounds. No socket, no state.

    spec = spec_of(header.request, acked)
    payload = decode_payload(spec, body, len(fds))
    ...
    encode_message(header.request, U64(0).encode(), reply=True)

The parts: the protocol's numbers (numbers.py), what is common to payloads (payload.py), the payloads (payloads.py,
vring_payloads.py, memory_payloads.py), which message has which (table.py), headers (header.py), messages (message.py).

Each name is imported when it is first used: a process that has no front end yet needs numbers, and no payloads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhost_user.late import importer

if TYPE_CHECKING:
    from vhost_user.message.header import HEADER, Header
    from vhost_user.message.memory_payloads import (
        Inflight,
        Iotlb,
        Log,
        MemoryRegion,
        MemoryTable,
        Mmap,
        ShmemConfig,
        SingleMemoryRegion,
        XenMemoryRegion,
        XenMemoryTable,
        XenSingleMemoryRegion,
    )
    from vhost_user.message.message import decode_payload, decode_reply, encode_message
    from vhost_user.message.numbers import (
        CONFIG_LIVE_MIGRATION,
        CONFIG_WRITABLE,
        F_LOG_ALL,
        F_PROTOCOL_FEATURES,
        LOG_PAGE,
        MAP_READ_WRITE,
        MAX_CONFIG_SIZE,
        MAX_FDS,
        MAX_REGIONS,
        PHASE_STOPPED,
        SHMEM_REGIONS,
        VERSION,
        VHOST_VRING_F_LOG,
        VIRTIO_F_IOMMU_PLATFORM,
        VIRTIO_F_RING_PACKED,
        BackendRequest,
        FrontendRequest,
        IotlbPermission,
        IotlbType,
        ProtocolFeature,
        TransferDirection,
        without_support,
    )
    from vhost_user.message.payload import Payload
    from vhost_user.message.payloads import (
        U64,
        Config,
        CryptoSession,
        DeviceState,
        DeviceStateReply,
        Empty,
        MacAddress,
        Opaque,
        Shared,
    )
    from vhost_user.message.table import (
        BACKEND_MESSAGES,
        FRONTEND_MESSAGES,
        MAX_PAYLOAD,
        MessageSpec,
        Reply,
        name_of,
        spec_of,
        specs_of,
    )
    from vhost_user.message.vring_payloads import PackedBase, SplitBase, VringAddr, VringArea, VringFd, VringState

__all__ = [
    "BACKEND_MESSAGES",
    "CONFIG_LIVE_MIGRATION",
    "CONFIG_WRITABLE",
    "FRONTEND_MESSAGES",
    "F_LOG_ALL",
    "F_PROTOCOL_FEATURES",
    "HEADER",
    "LOG_PAGE",
    "MAP_READ_WRITE",
    "MAX_CONFIG_SIZE",
    "MAX_FDS",
    "MAX_PAYLOAD",
    "MAX_REGIONS",
    "PHASE_STOPPED",
    "SHMEM_REGIONS",
    "U64",
    "VERSION",
    "VHOST_VRING_F_LOG",
    "VIRTIO_F_IOMMU_PLATFORM",
    "VIRTIO_F_RING_PACKED",
    "BackendRequest",
    "Config",
    "CryptoSession",
    "DeviceState",
    "DeviceStateReply",
    "Empty",
    "FrontendRequest",
    "Header",
    "Inflight",
    "Iotlb",
    "IotlbPermission",
    "IotlbType",
    "Log",
    "MacAddress",
    "MemoryRegion",
    "MemoryTable",
    "MessageSpec",
    "Mmap",
    "Opaque",
    "PackedBase",
    "Payload",
    "ProtocolFeature",
    "Reply",
    "Shared",
    "ShmemConfig",
    "SingleMemoryRegion",
    "SplitBase",
    "TransferDirection",
    "VringAddr",
    "VringArea",
    "VringFd",
    "VringState",
    "XenMemoryRegion",
    "XenMemoryTable",
    "XenSingleMemoryRegion",
    "decode_payload",
    "decode_reply",
    "encode_message",
    "name_of",
    "spec_of",
    "specs_of",
    "without_support",
]

_NAMES = {
    "header": (
        "HEADER",
        "Header",
    ),
    "memory_payloads": (
        "Inflight",
        "Iotlb",
        "Log",
        "MemoryRegion",
        "MemoryTable",
        "Mmap",
        "ShmemConfig",
        "SingleMemoryRegion",
        "XenMemoryRegion",
        "XenMemoryTable",
        "XenSingleMemoryRegion",
    ),
    "message": (
        "decode_payload",
        "decode_reply",
        "encode_message",
    ),
    "numbers": (
        "CONFIG_LIVE_MIGRATION",
        "CONFIG_WRITABLE",
        "F_LOG_ALL",
        "F_PROTOCOL_FEATURES",
        "LOG_PAGE",
        "MAP_READ_WRITE",
        "MAX_CONFIG_SIZE",
        "MAX_FDS",
        "MAX_REGIONS",
        "PHASE_STOPPED",
        "SHMEM_REGIONS",
        "VERSION",
        "VHOST_VRING_F_LOG",
        "VIRTIO_F_IOMMU_PLATFORM",
        "VIRTIO_F_RING_PACKED",
        "BackendRequest",
        "FrontendRequest",
        "IotlbPermission",
        "IotlbType",
        "ProtocolFeature",
        "TransferDirection",
        "without_support",
    ),
    "payload": ("Payload",),
    "payloads": (
        "U64",
        "Config",
        "CryptoSession",
        "DeviceState",
        "DeviceStateReply",
        "Empty",
        "MacAddress",
        "Opaque",
        "Shared",
    ),
    "table": (
        "BACKEND_MESSAGES",
        "FRONTEND_MESSAGES",
        "MAX_PAYLOAD",
        "MessageSpec",
        "Reply",
        "name_of",
        "spec_of",
        "specs_of",
    ),
    "vring_payloads": (
        "PackedBase",
        "SplitBase",
        "VringAddr",
        "VringArea",
        "VringFd",
        "VringState",
    ),
}

__getattr__ = importer(globals(), {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names})
