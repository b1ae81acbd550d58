"""What a front end and its back end have agreed on so far, for every part of a session to see."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vhost_user.iotlb import Iotlb
from vhost_user.memory import GuestMemory
from vhost_user.message import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    VIRTIO_F_IOMMU_PLATFORM,
    VIRTIO_F_RING_PACKED,
    ProtocolFeature,
)
from vhost_user.shared_memory import SharedMemory

if TYPE_CHECKING:
    from vhost_user.dirty_log import DirtyLog
    from vhost_user.inflight import InflightBuffer

VIRTIO_F_INDIRECT_DESC = 1 << 28
VIRTIO_F_EVENT_IDX = 1 << 29
VIRTIO_F_VERSION_1 = 1 << 32

RING_FEATURES = VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX | VIRTIO_F_VERSION_1 | VIRTIO_F_RING_PACKED
"""What every device has, because the rings are the back end's."""


@dataclass
class Negotiated:
    """The state of one connection that is not one ring's. Bits are 0, and structures None, until the front end comes
    with them."""

    memory: SharedMemory
    features: int = 0
    protocol_features: ProtocolFeature = ProtocolFeature.NONE
    owned: bool = False
    features_set: bool = False
    status: int = 0
    """As the driver wrote it, without DEVICE_NEEDS_RESET, which is the device's to set."""
    log: DirtyLog | None = None
    inflight: InflightBuffer | None = None
    postcopy: bool = False
    iotlb: Iotlb = field(init=False)

    def __post_init__(self) -> None:
        self.iotlb = Iotlb(self.memory)

    @property
    def agreed(self) -> tuple[ProtocolFeature, int, bool, bool]:
        """All that decides which messages may be sent, and what they look like."""
        return self.protocol_features, self.features, self.features_set, self.postcopy

    def has(self, feature: ProtocolFeature) -> bool:
        """Whether a protocol feature, or each of several, was negotiated."""
        return feature in self.protocol_features

    @property
    def packed(self) -> bool:
        """Whether the rings are packed ones."""
        return bool(self.features & VIRTIO_F_RING_PACKED)

    @property
    def translated(self) -> bool:
        """Whether an IOMMU is in between: what rings hold, and their own addresses, are IOVAs."""
        return bool(self.features & VIRTIO_F_IOMMU_PLATFORM)

    @property
    def ring_memory(self) -> GuestMemory:
        """Memory by the addresses that rings hold."""
        return self.iotlb if self.translated else self.memory.guest_memory

    @property
    def starts_enabled(self) -> bool:
        """Whether rings need no SET_VRING_ENABLE: the front end did without protocol features."""
        return self.features_set and not self.features & F_PROTOCOL_FEATURES

    @property
    def active_log(self) -> DirtyLog | None:
        """Where writes to guest memory are to be logged now."""
        return self.log if self.features & F_LOG_ALL else None
