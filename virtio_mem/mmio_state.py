"""What a transport has beside its device: how far the driver has come with the registers, and where the ring is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vhost_user.device_status import Status
from vhost_user.errors import UsageError
from virtio_mem.protocol import Feature

_BITS = {"status": 8, "interrupt_status": 2, "driver_features": 64, "desc": 64, "driver": 64, "device": 64}
"""Of the fields that have not 32."""


class MmioState(NamedTuple):
    """Plain data: `MmioState(*json.loads(json.dumps(state)))` is as good as `state`. `queue` is where the ring is, as
    `DeviceQueue.state` tells it, None where no queue is ready."""

    status: int
    driver_features: int
    device_features_sel: int
    driver_features_sel: int
    queue_sel: int
    queue_size: int
    desc: int
    driver: int
    device: int
    queue: Sequence[int] | None
    interrupt_status: int
    generation: int

    def check(self) -> None:
        """UsageError for what no transport can be like, whatever its device."""
        for field, value in zip(self._fields, self, strict=True):
            bits = _BITS.get(field, 32)
            if field != "queue" and not (isinstance(value, int) and 0 <= value < 1 << bits):
                raise UsageError(field, repr(value), f"has to be a number of {bits} bits", "take the state anew")
        if self.status & Status.DRIVER_OK and not self.status & Status.FEATURES_OK:
            raise UsageError("status", f"{self.status:#x}", "has to have FEATURES_OK with DRIVER_OK", "take it anew")
        count = 4 if self.driver_features & Feature.RING_PACKED else 2
        numbers = isinstance(self.queue, Sequence) and all(isinstance(each, int) for each in self.queue)
        if self.queue is not None and not (numbers and len(self.queue) == count):
            limit = f"has to be {count} numbers, or None where no queue is ready"
            raise UsageError("queue", repr(self.queue), limit, "take the state anew")
