"""The device's side of a split virtqueue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhost_user.errors import PeerError
from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress
from vhost_user.vring.batched_device import BatchedQueue
from vhost_user.vring.device import SplitState, check_in_flight
from vhost_user.vring.layout import SplitLayout

if TYPE_CHECKING:
    from vhost_user.dirty_log import DirtyLog
    from vhost_user.inflight import InflightArea

# The used ring: flags, idx, its elements, avail_event.
_IDX, _RING, _ELEMENT = 2, 4, 8


class SplitQueue(BatchedQueue):
    """The device's side of a split virtqueue at `desc`, `avail` and `used`.

    `event_idx` and `indirect`: whether VIRTIO_F_EVENT_IDX and VIRTIO_F_INDIRECT_DESC were negotiated. `next_avail` and
    `next_used` are those of a queue before, see `state()`. Raises PeerError for what can't be a queue.

    With `inflight`, an area of this queue's own, `next_used` is what the used ring says; and unless the area is a new
    one, `next_avail` is what the two say together, and `pop()` first returns again the chains that were in flight.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        *,
        desc: GuestAddress,
        avail: GuestAddress,
        used: GuestAddress,
        event_idx: bool = False,
        indirect: bool = False,
        next_avail: int = 0,
        next_used: int = 0,
        inflight: InflightArea | None = None,
    ) -> None:
        layout = SplitLayout(size, desc, avail, used)
        for field, value in (("next_avail", next_avail), ("next_used", next_used)):
            if not 0 <= value < 2**16:
                raise PeerError(field, value, "has to be a 16-bit index")
        if inflight is None:
            check_in_flight((next_avail - next_used) % 2**16, size)
        super().__init__(
            memory,
            layout,
            packed=False,
            event_idx=event_idx,
            indirect=indirect,
            avail=(next_avail, False),
            used=(next_used, False),
            inflight=inflight,
        )
        self._event_idx = event_idx

    def _mark_used(self, log: DirtyLog, base: GuestAddress, position: int) -> None:
        log.mark(base + _RING + _ELEMENT * (position % self.size), _ELEMENT)
        log.mark(base + _IDX, 2)

    def _mark_advice(self, log: DirtyLog, base: GuestAddress, *, enable: bool) -> None:
        if not self._event_idx:
            log.mark(base, 2)
        elif enable:
            log.mark(base + _RING + _ELEMENT * self.size, 2)

    def state(self) -> SplitState:  # noqa: D102
        (next_avail, _), (next_used, _) = self._ring.positions()
        return SplitState(next_avail, next_used)
