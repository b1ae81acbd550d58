"""The device's side of a packed virtqueue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhost_user.errors import PeerError
from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress
from vhost_user.vring.batched_device import BatchedQueue
from vhost_user.vring.device import PackedState, check_in_flight, slots_between
from vhost_user.vring.layout import PackedLayout

if TYPE_CHECKING:
    from vhost_user.dirty_log import DirtyLog
    from vhost_user.inflight import InflightArea

_DESCRIPTOR = 16  # bytes; the device writes its second half


class PackedQueue(BatchedQueue):
    """The device's side of a packed virtqueue at `desc`, `driver` and `device`; arguments as for `SplitQueue`.

    With `inflight`, unless the area is a new one, all positions are what it says.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        *,
        desc: GuestAddress,
        driver: GuestAddress,
        device: GuestAddress,
        event_idx: bool = False,
        indirect: bool = False,
        next_avail: int = 0,
        avail_wrap: bool = True,
        next_used: int = 0,
        used_wrap: bool = True,
        inflight: InflightArea | None = None,
    ) -> None:
        layout = PackedLayout(size, desc, driver, device)
        for field, value in (("next_avail", next_avail), ("next_used", next_used)):
            if not 0 <= value < size:
                raise PeerError(field, value, f"has to be a slot of the ring, 0 to {size - 1}")
        avail, used = (next_avail, avail_wrap), (next_used, used_wrap)
        if inflight is None:
            check_in_flight(slots_between(used, avail, size), size)
        super().__init__(
            memory,
            layout,
            packed=True,
            event_idx=event_idx,
            indirect=indirect,
            avail=avail,
            used=used,
            inflight=inflight,
        )
        if inflight is not None:
            self._ring.keep_descriptors()
        self._places = desc, device

    def _mark_used(self, log: DirtyLog, base: GuestAddress, position: int) -> None:
        # A front end may well give the Device Area's address for the used ring's, as no part of the ring has that name:
        # the descriptor is marked where it lies in guest memory too.
        for place in {base, self._places[0]}:
            log.mark(place + _DESCRIPTOR * position + _DESCRIPTOR // 2, _DESCRIPTOR // 2)

    def _mark_advice(self, log: DirtyLog, base: GuestAddress, *, enable: bool) -> None:  # noqa: ARG002
        log.mark(self._places[1], 4)

    def state(self) -> PackedState:  # noqa: D102
        (next_avail, avail_wrap), (next_used, used_wrap) = self._ring.positions()
        return PackedState(next_avail, avail_wrap, next_used, used_wrap)
