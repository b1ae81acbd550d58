"""The protocol's numbers: requests, feature bits, and the values of fields that have names.

The names are the document's, without VHOST_USER_ and without the BACKEND_ of the back end's own requests, whose numbers
are a space of their own. "The document" is docs/interop/vhost-user.rst of QEMU 11.1, here and in the modules beside.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

VERSION = 1
"""The header's lower two bits in every message."""

MAX_FDS = 8
"""Descriptors in one message: a memory table has eight slots, and a back end sends at most eight."""

MAX_REGIONS = 8
"""Slots of a memory table. What a back end holds in all may be more: GET_MAX_MEM_SLOTS."""

MAX_CONFIG_SIZE = 4096
"""Bytes of configuration space in one message.

The document sets no bound. QEMU and DPDK stop at 256 bytes, rust-vmm at 4096: the device part of virtio-mmio's one page
of registers, and far beyond the largest configuration structure of the standard.
"""

MAX_OPAQUE_SIZE = 4096
"""Bytes of a payload whose layout the document leaves open: the largest known, QEMU's crypto session, is below 1200."""

SHMEM_REGIONS = 256
"""Shared memory regions of a device: a shmid has eight bits."""

F_LOG_ALL = 1 << 26
"""Virtio feature bit: log every write to guest memory."""

F_PROTOCOL_FEATURES = 1 << 30
"""Virtio feature bit that no virtio device uses: there are protocol features to negotiate."""

VIRTIO_F_IOMMU_PLATFORM = 1 << 33
"""Virtio feature bit: addresses in rings are I/O virtual ones (the standard now says ACCESS_PLATFORM)."""

VIRTIO_F_RING_PACKED = 1 << 34
"""Virtio feature bit: rings are packed ones, and split ones otherwise."""

VHOST_VRING_F_LOG = 1 << 0
"""In the flags of SET_VRING_ADDR: log writes to the used ring too."""

LOG_PAGE = 0x1000
"""Bytes of guest memory for each bit of the dirty log."""

VRING_INDEX_MASK = 0xFF
"""The ring's index in the 64-bit payload of SET_VRING_KICK, _CALL, _ERR and in a vring area."""

NO_FD = 1 << 8
"""In the same payloads and in the reply to SET_DEVICE_STATE_FD: no descriptor comes with the message."""

CONFIG_WRITABLE = 0
"""Flags of a configuration message: the driver writes fields that are the driver's to write.

rust-vmm's front ends write 1 here and 2 for migration, against the document.
"""

CONFIG_LIVE_MIGRATION = 1
"""Flags of a configuration message: a migration restores the space, read-only fields and all."""

PHASE_STOPPED = 0
"""The one migration phase that there is: the guest stopped, the device suspended."""

MAP_READ_WRITE = 1
"""Flags of a mapping in a shared memory region; without it pages are read-only."""

XEN_FOREIGN = 1 << 0
"""Xen mapping flags: a foreign memory mapping."""

XEN_GRANT = 1 << 1
"""Xen mapping flags: a grant memory mapping."""

XEN_NO_ADVANCE_MAP = 1 << 8
"""Xen mapping flags: parts are mapped when they are needed, never the whole region."""


class FrontendRequest(IntEnum):
    """What a front end asks, on the main socket."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class BackendRequest(IntEnum):
    """What a back end asks, on the socket that SET_BACKEND_REQ_FD gave it."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


class ProtocolFeature(IntFlag):
    """What GET_ and SET_PROTOCOL_FEATURES negotiate. Bits that have no name here are kept."""

    NONE = 0
    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM_MAP = 1 << 22

    def __contains__(self, features: ProtocolFeature) -> bool:
        """Whether all of `features` are among these: enum's rule. It is asked for each message, and enum is slow."""
        return int.__and__(self, features) == features


_RESTS_ON = (
    (ProtocolFeature.GET_VRING_BASE_INFLIGHT, ProtocolFeature.INFLIGHT_SHMFD),
    (ProtocolFeature.INBAND_NOTIFICATIONS, ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK),
)


def without_support(features: ProtocolFeature) -> ProtocolFeature:
    """Those of `features` that the document allows only together with others, which are not among them."""
    lacking = ProtocolFeature.NONE
    for feature, needed in _RESTS_ON:
        if feature in features and needed not in features:
            lacking |= feature
    return lacking


class IotlbType(IntEnum):
    """What an IOTLB message is: the back end sends the first and the last, the front end the other two."""

    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4


class IotlbPermission(IntEnum):
    """What an IOTLB entry allows."""

    NO_ACCESS = 0
    READ = 1
    WRITE = 2
    READ_WRITE = 3


class TransferDirection(IntEnum):
    """Which way device state goes: from the back end at the source, to the back end at the destination."""

    SAVE = 0
    LOAD = 1
