"""One ring of a front end: what it tells the back end about it, and the descriptors that kick and call.

The front end doesn't touch the ring; a driver does, in the guest, or one of `vhost_user.vring` in this process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhost_user.errors import PeerError, UsageError
from vhost_user.event import Event
from vhost_user.frontend.regions import SharedRegions
from vhost_user.frontend.requests import Requests
from vhost_user.message import (
    F_PROTOCOL_FEATURES,
    VHOST_VRING_F_LOG,
    VIRTIO_F_RING_PACKED,
    FrontendRequest,
    PackedBase,
    VringAddr,
    VringFd,
    VringState,
)
from vhost_user.units import GuestAddress, UserAddress
from vhost_user.vring import PackedLayout, SplitLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from vhost_user.frontend.iotlb import Iommu


class FrontendVring:
    """Ring `index`. `kick` wakes the back end; `call` and `err` are rung by it."""

    def __init__(self, index: int, requests: Requests, regions: SharedRegions, *, features: Callable[[], int]) -> None:
        self.index = index
        self.started = False
        self.enabled = False
        self.base = 0
        self.layout: SplitLayout | PackedLayout | None = None
        self.log_address: GuestAddress | None = None
        self.iommu: Iommu | None = None
        """What the layout's addresses go through; None where they are guest addresses."""
        self._requests = requests
        self._regions = regions
        self._features = features
        self.kick, self.call, self.err = Event.create(), Event.create(), Event.create()

    def start(self, layout: SplitLayout | PackedLayout, base: int | None = None, *, enabled: bool = True) -> None:
        """Have the back end serve the ring at `layout` from `base` on: what `stop()` returned, or None for a new ring.

        Raises UsageError where the ring lies in no shared region, and for a layout of the other kind than was
        negotiated, split or packed; Refused where the back end doesn't take it.
        """
        if self.started:
            raise UsageError("ring", self.index, "has to be stopped before it is started", "stop it first")
        packed = bool(self._features() & VIRTIO_F_RING_PACKED)
        if isinstance(layout, PackedLayout) is not packed:
            kind, acked = ("PackedLayout", "was acked") if packed else ("SplitLayout", "was not acked")
            limit = f"has to be a {kind}, as VIRTIO_F_RING_PACKED {acked}"
            remedy = f"give it a {kind}, or connect with other features"
            raise UsageError(f"layout of ring {self.index}", type(layout).__name__, limit, remedy)
        with self._requests.ending.call():
            self._start(layout, base, enabled=enabled)

    def _start(self, layout: SplitLayout | PackedLayout, base: int | None, *, enabled: bool) -> None:
        address = self._address(layout)  # before anything is changed or said
        self.layout, self.base = layout, _first_base(layout) if base is None else base
        state = VringState(self.index, layout.size)
        self._requests.tell(FrontendRequest.SET_VRING_NUM, state)
        self._requests.tell(FrontendRequest.SET_VRING_BASE, VringState(self.index, self.base))
        self._requests.tell(FrontendRequest.SET_VRING_ADDR, address)
        # Anew at each start: there are back ends that close them when a ring is stopped.
        ring = VringFd(self.index)
        self._requests.tell(FrontendRequest.SET_VRING_CALL, ring, [self.call.fileno()])
        self._requests.tell(FrontendRequest.SET_VRING_ERR, ring, [self.err.fileno()])
        self._requests.tell(FrontendRequest.SET_VRING_KICK, ring, [self.kick.fileno()])
        self.started = True
        if enabled:
            self.enable()
        # Back ends of the old rule start a ring at its first kick.
        self.kick.signal()

    def _address(self, layout: SplitLayout | PackedLayout) -> VringAddr:
        areas = layout.areas.values()
        if self.iommu is None:
            users = [self._regions.to_user(area.address, area.size) for area in areas]
        else:
            users = [UserAddress(area.address) for area in areas]  # the document: ring addresses are IOVAs then
        desc, avail, used = users
        logged = self.log_address is not None
        flags, log = (VHOST_VRING_F_LOG, self.log_address) if logged else (0, None)
        return VringAddr(self.index, flags, desc, used, avail, log or GuestAddress(0))

    def enable(self, enabled: bool = True) -> None:
        """Have the back end process the ring, or leave it alone. Without protocol features a ring is always enabled."""
        if self._features() & F_PROTOCOL_FEATURES:
            self._requests.tell(FrontendRequest.SET_VRING_ENABLE, VringState(self.index, int(enabled)))
        self.enabled = enabled

    def stop(self) -> int:
        """Have the back end complete what it has of the ring, and stop; returns where it goes on, for `start()`."""
        answer = self._requests.ask(FrontendRequest.GET_VRING_BASE, VringState, VringState(self.index, 0))
        if answer.index != self.index:
            raise PeerError("GET_VRING_BASE", answer.index, f"has to answer for ring {self.index}")
        self.started = False
        self.base = answer.num
        return answer.num

    def position(self) -> int:
        """Where a back end that knows nothing of the ring goes on, as the ring itself says: the base for `start()`.

        That is the used ring's index, and right where chains were used in order. A packed ring has no such word, and
        goes on at `base`: set that to the driver's own position first, unless inflight areas tell it.
        """
        if isinstance(self.layout, SplitLayout):
            idx = GuestAddress(self.layout.used + 2)
            where = idx if self.iommu is None else self.iommu.to_guest(idx)
            return int.from_bytes(self._regions.read(where, 2), "little")
        return self.base

    def resume(self) -> None:
        """Start the ring again at its `position()` if it was started, on another connection."""
        if self.started:
            assert self.layout is not None
            self.started = False
            try:
                self._start(self.layout, self.position(), enabled=self.enabled)
            except BaseException:
                self.started = True  # for the next connection
                raise

    def set_log(self, address: GuestAddress | None) -> None:
        """Have writes to the used ring logged as if it were at guest `address`, or not; while it runs, too."""
        self.log_address = address
        if self.layout is not None and self.started:
            self._requests.tell(FrontendRequest.SET_VRING_ADDR, self._address(self.layout))

    def wait(self, timeout: float) -> bool:
        """Wait for a call, `timeout` seconds at most; whether there was one. What else the back end wants is looked
        after meanwhile.

        Raises Disconnected when the front end is closed, and when the back end is gone: after its last call, but it may
        have died between a used element and the call for it, so the ring is worth one more look.
        """
        with self._requests.ending.call():
            return self._requests.wait_ready(self.call.fileno(), timeout) and self.call.take()

    @property
    def failed(self) -> bool:
        """Whether the back end signalled an error of this ring since the last look."""
        with self._requests.ending.call():
            return self.err.take()

    def close(self) -> None:
        """Close the descriptors. The back end has its own."""
        for event in (self.kick, self.call, self.err):
            event.close()


def _first_base(layout: SplitLayout | PackedLayout) -> int:
    """Of a new ring. A packed one begins in slot 0 with both wrap counters at 1."""
    return PackedBase(0, True, 0, True).to_num() if isinstance(layout, PackedLayout) else 0
