"""Every message of the protocol in two tables: what it carries, what answers it, what must have been negotiated.

A message that is not in its table does not exist. Where a negotiated feature changes a payload the entry has variants,
and postcopy changes the answer to two of them: `spec_of` resolves both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from types import MappingProxyType
from typing import TypeVar

from vhost_user.errors import PeerError
from vhost_user.message.memory_payloads import (
    Inflight,
    Iotlb,
    Log,
    MemoryTable,
    Mmap,
    ShmemConfig,
    SingleMemoryRegion,
    XenMemoryTable,
    XenSingleMemoryRegion,
)
from vhost_user.message.numbers import (
    F_PROTOCOL_FEATURES,
    MAX_FDS,
    VIRTIO_F_IOMMU_PLATFORM,
    BackendRequest,
    FrontendRequest,
    ProtocolFeature,
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
from vhost_user.message.vring_payloads import VringAddr, VringArea, VringFd, VringState

NO_FDS = (0, 0)
ONE_FD = (1, 1)
FD_OR_NONE = (0, 1)


class Reply(Enum):
    """What answers a message."""

    ACK = "ack"
    """A number, 0 for success: only if the header asks for it and REPLY_ACK was negotiated."""

    ALWAYS = "always"
    """A payload of its own, once, whether or not the header asks."""


@dataclass(frozen=True)
class MessageSpec:
    """One message.

    `fds` and `reply_fds` are how few and how many descriptors there are with each; a payload may know better, see
    `Payload.fd_bounds`. `needs` are protocol features and `needs_virtio` virtio features without which it is not sent;
    with descriptors attached it needs `needs_for_fds` too. Where `offered_suffices`, the document asks only that the
    back end offered them, and front ends send it before they acknowledge anything. Where `postcopy_reply`, the answer
    after POSTCOPY_LISTEN is always the request's kind of payload. Where `empty_reply`, one without any payload is the
    back end's way to refuse.
    """

    request: FrontendRequest | BackendRequest
    payload: type[Payload] = Empty
    reply: Reply = Reply.ACK
    reply_payload: type[Payload] = U64
    fds: tuple[int, int] = NO_FDS
    reply_fds: tuple[int, int] = NO_FDS
    needs: ProtocolFeature = ProtocolFeature.NONE
    needs_virtio: int = 0
    needs_for_fds: ProtocolFeature = ProtocolFeature.NONE
    offered_suffices: bool = False
    postcopy_reply: bool = False
    empty_reply: bool = False
    variants: tuple[tuple[ProtocolFeature, MessageSpec], ...] = ()

    @property
    def name(self) -> str:
        """The name and the number, as `name_of` has them."""
        return name_of(self.request, isinstance(self.request, BackendRequest))


F = FrontendRequest
B = BackendRequest
P = ProtocolFeature
ALWAYS = Reply.ALWAYS
CHANNEL = P.BACKEND_REQ

_Request = TypeVar("_Request", FrontendRequest, BackendRequest)


def _table(kind: type[_Request], specs: Iterable[MessageSpec]) -> Mapping[_Request, MessageSpec]:
    return MappingProxyType({kind(spec.request): spec for spec in specs})


def _with_variant(spec: MessageSpec, feature: ProtocolFeature, variant: MessageSpec) -> MessageSpec:
    return replace(spec, variants=((feature, variant),))


def _memory_table(payload: type[MemoryTable]) -> MessageSpec:
    return MessageSpec(F.SET_MEM_TABLE, payload, fds=(0, MAX_FDS), postcopy_reply=True)


def _add_region(payload: type[SingleMemoryRegion]) -> MessageSpec:
    return MessageSpec(F.ADD_MEM_REG, payload, fds=ONE_FD, needs=P.CONFIGURE_MEM_SLOTS, postcopy_reply=True)


def _remove_region(payload: type[SingleMemoryRegion]) -> MessageSpec:
    # No descriptor should come, but a back end may take one, and then closes it.
    return MessageSpec(F.REM_MEM_REG, payload, fds=FD_OR_NONE, needs=P.CONFIGURE_MEM_SLOTS)


FRONTEND_MESSAGES: Mapping[FrontendRequest, MessageSpec] = _table(
    FrontendRequest,
    (
        MessageSpec(F.GET_FEATURES, reply=ALWAYS),
        MessageSpec(F.SET_FEATURES, U64),
        MessageSpec(F.SET_OWNER),
        MessageSpec(F.RESET_OWNER),
        _with_variant(_memory_table(MemoryTable), P.XEN_MMAP, _memory_table(XenMemoryTable)),
        # Without LOG_SHMFD it is the kernel's ioctl: an address that no other process can use.
        _with_variant(
            MessageSpec(F.SET_LOG_BASE, U64),
            P.LOG_SHMFD,
            MessageSpec(F.SET_LOG_BASE, Log, ALWAYS, Opaque, fds=ONE_FD, needs=P.LOG_SHMFD),
        ),
        MessageSpec(F.SET_LOG_FD, fds=ONE_FD),
        MessageSpec(F.SET_VRING_NUM, VringState),
        MessageSpec(F.SET_VRING_ADDR, VringAddr),
        MessageSpec(F.SET_VRING_BASE, VringState),
        MessageSpec(F.GET_VRING_BASE, VringState, ALWAYS, VringState),
        MessageSpec(F.SET_VRING_KICK, VringFd, fds=FD_OR_NONE),
        MessageSpec(F.SET_VRING_CALL, VringFd, fds=FD_OR_NONE),
        MessageSpec(F.SET_VRING_ERR, VringFd, fds=FD_OR_NONE),
        MessageSpec(F.GET_PROTOCOL_FEATURES, reply=ALWAYS, needs_virtio=F_PROTOCOL_FEATURES, offered_suffices=True),
        MessageSpec(F.SET_PROTOCOL_FEATURES, U64, needs_virtio=F_PROTOCOL_FEATURES, offered_suffices=True),
        MessageSpec(F.GET_QUEUE_NUM, reply=ALWAYS, needs=P.MQ, offered_suffices=True),
        MessageSpec(F.SET_VRING_ENABLE, VringState, needs_virtio=F_PROTOCOL_FEATURES),
        MessageSpec(F.SEND_RARP, MacAddress, needs=P.RARP, offered_suffices=True),
        MessageSpec(F.NET_SET_MTU, U64, needs=P.MTU, offered_suffices=True),
        MessageSpec(F.SET_BACKEND_REQ_FD, fds=ONE_FD, needs=CHANNEL, offered_suffices=True),
        # DPDK's back end answers it only where the header asks: a front end that waits for the answer has to ask.
        MessageSpec(F.IOTLB_MSG, Iotlb, ALWAYS, needs_virtio=VIRTIO_F_IOMMU_PLATFORM),
        MessageSpec(F.SET_VRING_ENDIAN, VringState, needs=P.CROSS_ENDIAN),
        MessageSpec(F.GET_CONFIG, Config, ALWAYS, Config, needs=P.CONFIG, empty_reply=True),
        MessageSpec(F.SET_CONFIG, Config, needs=P.CONFIG),
        MessageSpec(F.CREATE_CRYPTO_SESSION, CryptoSession, ALWAYS, CryptoSession, needs=P.CRYPTO_SESSION),
        MessageSpec(F.CLOSE_CRYPTO_SESSION, U64, needs=P.CRYPTO_SESSION),
        # In the three answers that should bring a descriptor, none is how a back end fails.
        MessageSpec(F.POSTCOPY_ADVISE, Empty, ALWAYS, Empty, reply_fds=FD_OR_NONE, needs=P.PAGEFAULT),
        MessageSpec(F.POSTCOPY_LISTEN, needs=P.PAGEFAULT),
        MessageSpec(F.POSTCOPY_END, reply=ALWAYS, needs=P.PAGEFAULT),
        MessageSpec(F.GET_INFLIGHT_FD, Inflight, ALWAYS, Inflight, reply_fds=FD_OR_NONE, needs=P.INFLIGHT_SHMFD),
        MessageSpec(F.SET_INFLIGHT_FD, Inflight, fds=ONE_FD, needs=P.INFLIGHT_SHMFD),
        MessageSpec(F.GPU_SET_SOCKET, fds=ONE_FD),
        MessageSpec(F.RESET_DEVICE, needs=P.RESET_DEVICE, offered_suffices=True),
        MessageSpec(F.VRING_KICK, VringState, needs=P.INBAND_NOTIFICATIONS),
        MessageSpec(F.GET_MAX_MEM_SLOTS, reply=ALWAYS, needs=P.CONFIGURE_MEM_SLOTS),
        _with_variant(_add_region(SingleMemoryRegion), P.XEN_MMAP, _add_region(XenSingleMemoryRegion)),
        _with_variant(_remove_region(SingleMemoryRegion), P.XEN_MMAP, _remove_region(XenSingleMemoryRegion)),
        MessageSpec(F.SET_STATUS, U64, needs=P.STATUS),
        MessageSpec(F.GET_STATUS, reply=ALWAYS, needs=P.STATUS),
        MessageSpec(F.GET_SHARED_OBJECT, Shared, ALWAYS, Opaque, reply_fds=FD_OR_NONE, needs=P.SHARED_OBJECT),
        MessageSpec(
            F.SET_DEVICE_STATE_FD,
            DeviceState,
            ALWAYS,
            DeviceStateReply,
            fds=ONE_FD,
            reply_fds=FD_OR_NONE,
            needs=P.DEVICE_STATE,
        ),
        MessageSpec(F.CHECK_DEVICE_STATE, reply=ALWAYS, needs=P.DEVICE_STATE),
        MessageSpec(F.GET_SHMEM_CONFIG, Empty, ALWAYS, ShmemConfig, needs=P.SHMEM_MAP),
    ),
)
"""What the front end asks."""

BACKEND_MESSAGES: Mapping[BackendRequest, MessageSpec] = _table(
    BackendRequest,
    (
        MessageSpec(B.IOTLB_MSG, Iotlb, needs=CHANNEL, needs_virtio=VIRTIO_F_IOMMU_PLATFORM),
        MessageSpec(B.CONFIG_CHANGE_MSG, needs=CHANNEL | P.CONFIG),
        MessageSpec(
            B.VRING_HOST_NOTIFIER_MSG,
            VringArea,
            fds=FD_OR_NONE,
            needs=CHANNEL | P.HOST_NOTIFIER,
            needs_for_fds=P.BACKEND_SEND_FD,
        ),
        MessageSpec(B.VRING_CALL, VringState, needs=CHANNEL | P.INBAND_NOTIFICATIONS),
        MessageSpec(B.VRING_ERR, VringState, needs=CHANNEL | P.INBAND_NOTIFICATIONS),
        MessageSpec(B.SHARED_OBJECT_ADD, Shared, needs=CHANNEL | P.SHARED_OBJECT),
        MessageSpec(B.SHARED_OBJECT_REMOVE, Shared, needs=CHANNEL | P.SHARED_OBJECT),
        MessageSpec(B.SHARED_OBJECT_LOOKUP, Shared, ALWAYS, reply_fds=FD_OR_NONE, needs=CHANNEL | P.SHARED_OBJECT),
        MessageSpec(B.SHMEM_MAP, Mmap, fds=ONE_FD, needs=CHANNEL | P.SHMEM_MAP, needs_for_fds=P.BACKEND_SEND_FD),
        MessageSpec(B.SHMEM_UNMAP, Mmap, needs=CHANNEL | P.SHMEM_MAP),
    ),
)
"""What the back end asks."""

_BY_NUMBER: dict[bool, dict[int, MessageSpec]] = {
    False: {int(request): spec for request, spec in FRONTEND_MESSAGES.items()},
    True: {int(request): spec for request, spec in BACKEND_MESSAGES.items()},
}


def _kinds() -> Iterable[type[Payload]]:
    for spec in (*FRONTEND_MESSAGES.values(), *BACKEND_MESSAGES.values()):
        for each in (spec, *(variant for _, variant in spec.variants)):
            yield from (each.payload, each.reply_payload)


MAX_PAYLOAD = max(kind.max_size() for kind in _kinds())
"""The most bytes that may follow a header: those of the largest payload in the tables, a configuration message of 4108.

A header that announces more is refused before anything is read or allocated for it.
"""


def spec_of(
    request: int, acked: ProtocolFeature, *, backend_channel: bool = False, postcopy: bool = False
) -> MessageSpec:
    """The message of this number as it is after `acked` was negotiated, and after POSTCOPY_LISTEN where `postcopy`.

    Raises PeerError for a number that the document doesn't have. Whether what it needs was negotiated is not looked at.
    """
    if (spec := specs_of(acked, backend_channel=backend_channel, postcopy=postcopy).get(request)) is None:
        raise PeerError("request", request, "has to be a request that the protocol has")
    return spec


@lru_cache(maxsize=64)
def specs_of(
    acked: ProtocolFeature, *, backend_channel: bool = False, postcopy: bool = False
) -> Mapping[int, MessageSpec]:
    """All messages by number, as `spec_of` has them. Kept for what a process's peers negotiated."""
    return {number: _resolve(spec, acked, postcopy) for number, spec in _BY_NUMBER[backend_channel].items()}


def _resolve(spec: MessageSpec, acked: ProtocolFeature, postcopy: bool) -> MessageSpec:
    for feature, variant in spec.variants:
        if feature in acked:
            spec = variant
    if postcopy and spec.postcopy_reply:
        return replace(spec, reply=ALWAYS, reply_payload=spec.payload)
    return spec


def name_of(request: int, backend_channel: bool = False) -> str:
    """How a log names it: "SET_MEM_TABLE (5)", or "unknown request 77"."""
    if (spec := _BY_NUMBER[backend_channel].get(request)) is None:
        return f"unknown request {request}"
    return f"{spec.request.name} ({request})"
