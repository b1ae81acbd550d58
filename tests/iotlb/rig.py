"""A front end and a back end with an IOMMU between them, whose mappings are nothing like the identity."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.backend.devices import Echo, Keeper
from tests.backend.rig import DATA, EVENT_IDX, EVERYTHING, RING_PACKED, SIZE, SPLIT, Pair, Ram, Running, pair
from vhost_user.backend import Device
from vhost_user.frontend import Frontend, IovaMapping
from vhost_user.memory import GuestMemory, Region
from vhost_user.message import VIRTIO_F_IOMMU_PLATFORM, IotlbPermission
from vhost_user.units import MIB, ByteCount, GuestAddress, HostOffset
from vhost_user.vring import DriverQueue, PackedDriver, PackedLayout, SplitDriver, SplitLayout

PAGE = 0x1000
FEATURES = {"split": SPLIT | VIRTIO_F_IOMMU_PLATFORM, "packed": EVERYTHING | VIRTIO_F_IOMMU_PLATFORM}


class EchoBehind(Echo):
    """Can live behind an IOMMU."""

    features = VIRTIO_F_IOMMU_PLATFORM


class KeeperBehind(Keeper):
    """Can, too."""

    features = VIRTIO_F_IOMMU_PLATFORM


def guest_of(iova: int) -> GuestAddress:
    """Where a page of IOVAs lies: rings high, in order, and data low, the last page first."""
    if iova < DATA:
        return GuestAddress(iova + MIB)
    page, offset = divmod(iova - DATA, PAGE)
    return GuestAddress((MIB // PAGE - 1 - page) * PAGE + offset)


def seen_by_driver(ram: Ram) -> GuestMemory:
    """The memory of `ram` by IOVAs."""
    return GuestMemory(
        Region(GuestAddress(iova), ByteCount(PAGE), ram.mapping, HostOffset(guest_of(iova)))
        for iova in range(MIB, SIZE, PAGE)
    )


class Behind:
    """A front end, and what its guest maps."""

    both: Pair
    device: Device

    def __init__(self, frontend: Frontend, ram: Ram) -> None:
        self.frontend = frontend
        self.iommu = frontend.iommu
        regions = [Region(GuestAddress(0), ByteCount(MIB), ram.mapping, HostOffset(MIB))]
        self.memory = GuestMemory(regions + list(seen_by_driver(ram).regions))

    def map(
        self, iova: int, permission: IotlbPermission = IotlbPermission.READ_WRITE, *, pages: int = 1
    ) -> list[IovaMapping]:
        """Map pages one by one."""
        return [
            self.iommu.map(GuestAddress(at), ByteCount(PAGE), guest_of(at), permission)
            for at in range(iova, iova + pages * PAGE, PAGE)
        ]

    def map_ring(self, index: int = 0) -> list[IovaMapping]:
        return self.map(index * 0x10000, pages=2)

    def map_data(self, index: int = 0, permission: IotlbPermission = IotlbPermission.READ_WRITE) -> list[IovaMapping]:
        return self.map(DATA + index * 0x40000, permission, pages=64)

    def start(self, index: int = 0, size: int = 16) -> Running:
        """Start a ring at its IOVA, whether it is mapped or not."""
        at, features = GuestAddress(index * 0x10000), self.frontend.features
        event_idx = bool(features & EVENT_IDX)
        vring = self.frontend.vring(index)
        driver: DriverQueue
        layout: SplitLayout | PackedLayout
        if features & RING_PACKED:
            layout = PackedLayout.place(size, at)
            driver = PackedDriver(self.memory, layout, event_idx=event_idx)
        else:
            layout = SplitLayout.place(size, at)
            driver = SplitDriver(self.memory, layout, event_idx=event_idx)
        vring.start(layout)
        return Running(vring, driver, layout, self.memory)

    def ready(self, index: int = 0) -> Running:
        """A ring for which all is mapped."""
        self.map_ring(index)
        self.map_data(index)
        return self.start(index)

    def until(self, condition: Callable[[], bool]) -> None:
        """Look after the channel until something is so."""
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "it never came"
            assert self.frontend.channel is not None
            select.select([self.frontend.channel], [], [], 0.01)
            self.frontend.serve_channel()


@contextmanager
def behind(form: str = "split", device: Device | None = None) -> Iterator[Behind]:
    device = device or EchoBehind()
    with pair(device, features=FEATURES[form]) as both:
        rig = Behind(both.frontend, both.ram)
        rig.both, rig.device = both, device
        try:
            yield rig
        finally:
            rig.memory.replace(())
