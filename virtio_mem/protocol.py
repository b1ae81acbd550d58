"""virtio-mem on the wire: requests, responses, the configuration space and the feature bits.

Layouts and numbers are those of the virtio standard's section "Memory Device". Everything is little-endian. Decoding
checks sizes only; whether a request may be granted is the device's business.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

from vhost_user.errors import PeerError
from vhost_user.units import ByteCount, GuestAddress

VIRTIO_ID_MEM = 24
"""The device type, section "Device ID"."""

QUEUE_COUNT = 1
"""Virtqueue 0, `guest-request`, is the only one."""


class RequestType(IntEnum):
    """The types of `struct virtio_mem_req`."""

    PLUG = 0
    UNPLUG = 1
    UNPLUG_ALL = 2
    STATE = 3


class ResponseType(IntEnum):
    """The types of `struct virtio_mem_resp`."""

    ACK = 0
    NACK = 1
    BUSY = 2
    ERROR = 3


class BlockState(IntEnum):
    """What a STATE response says of a range of blocks."""

    PLUGGED = 0
    UNPLUGGED = 1
    MIXED = 2


class Feature(IntFlag):
    """Device feature bits, sections "Memory Device / Feature bits" and "Reserved Feature Bits"."""

    ACPI_PXM = 1 << 0
    UNPLUGGED_INACCESSIBLE = 1 << 1
    PERSISTENT_SUSPEND = 1 << 2
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    RING_PACKED = 1 << 34


_REQUEST = struct.Struct("<H6xQH6x")
_RESPONSE = struct.Struct("<H6xH")
_CONFIG = struct.Struct("<QH6xQQQQQ")

REQUEST_SIZE = _REQUEST.size
RESPONSE_SIZE = _RESPONSE.size
CONFIG_SIZE = _CONFIG.size
assert (REQUEST_SIZE, RESPONSE_SIZE, CONFIG_SIZE) == (24, 10, 56)


class Request(NamedTuple):
    """`struct virtio_mem_req`. `type` is a plain integer: a guest may send any. UNPLUG_ALL ignores the other two."""

    type: int
    addr: GuestAddress = GuestAddress(0)
    nb_blocks: int = 0

    def encode(self) -> bytes:
        """The 24 bytes of the request, padding zero."""
        return _REQUEST.pack(*self)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Request:
        """The request in the first 24 bytes of `data`; padding and what follows are ignored. PeerError if shorter."""
        if len(data) < REQUEST_SIZE:
            raise PeerError("request length", len(data), f"has to be at least {REQUEST_SIZE} bytes")
        type_, addr, nb_blocks = _REQUEST.unpack_from(data)
        return cls(type_, GuestAddress(addr), nb_blocks)


class Response(NamedTuple):
    """`struct virtio_mem_resp`. `state` has meaning in the ACK to a STATE request. `reason` stays on this side: it
    says in words why the answer is not ACK."""

    type: ResponseType
    state: BlockState = BlockState.PLUGGED
    reason: str = ""

    def encode(self) -> bytes:
        """The 10 bytes of the response, padding zero."""
        return _RESPONSE.pack(self.type, self.state)

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Response:
        """The response in the first 10 bytes of `data`. PeerError if shorter, or if the type has no name.

        The state of anything but an ACK is not looked at (section "STATE request", driver requirements).
        """
        if len(data) < RESPONSE_SIZE:
            raise PeerError("response length", len(data), f"has to be at least {RESPONSE_SIZE} bytes")
        type_, state = _RESPONSE.unpack_from(data)
        if type_ > max(ResponseType):
            raise PeerError("response type", type_, "has to be one of 0 (ACK) to 3 (ERROR)")
        if type_ != ResponseType.ACK:
            return cls(ResponseType(type_))
        if state > max(BlockState):
            raise PeerError("state type", state, "has to be one of 0 (PLUGGED) to 2 (MIXED)")
        return cls(ResponseType(type_), BlockState(state))


class ConfigSpace(NamedTuple):
    """`struct virtio_mem_config`; `addr` and sizes in bytes. `node_id` has a meaning with ACPI_PXM only."""

    block_size: ByteCount
    node_id: int
    addr: GuestAddress
    region_size: ByteCount
    usable_region_size: ByteCount
    plugged_size: ByteCount
    requested_size: ByteCount

    def encode(self) -> bytes:
        """The 56 bytes of the configuration space, padding zero."""
        return _CONFIG.pack(*self)

    @classmethod
    def decode(cls, data: bytes) -> ConfigSpace:
        """The configuration space in the first 56 bytes of `data`. PeerError if shorter."""
        if len(data) < CONFIG_SIZE:
            raise PeerError("configuration space length", len(data), f"has to be at least {CONFIG_SIZE} bytes")
        return cls(*_CONFIG.unpack_from(data))
