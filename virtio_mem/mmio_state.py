"""What a transport has beside its device: how far the driver has come with the registers, and where the ring is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vhost_user.device_status import Status
from vhost_user.errors import UsageError
from vhost_user.units import is_whole
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


def require_state(state: object) -> None:
    """UsageError for what no transport can be like, whatever its device."""
    if not isinstance(state, MmioState):
        raise UsageError("state", repr(state), "has to be an MmioState", "make one, as MmioState(*numbers)")
    for field, value in zip(state._fields, state, strict=True):
        bits = _BITS.get(field, 32)
        if field != "queue" and not is_whole(value, (1 << bits) - 1):
            raise UsageError(field, repr(value), f"has to be a number of {bits} bits", "take the state anew")
    if state.status & Status.DRIVER_OK and not state.status & Status.FEATURES_OK:
        raise UsageError("status", f"{state.status:#x}", "has to have FEATURES_OK with DRIVER_OK", "take it anew")
    if state.queue is not None:
        packed = bool(state.driver_features & Feature.RING_PACKED)
        _require_queue(state.queue, (0xFFFF, 1, 0xFFFF, 1) if packed else (0xFFFF, 0xFFFF))


def _require_queue(queue: object, most: Sequence[int]) -> None:
    """Positions in the ring, of a packed one each with its wrap counter."""
    if not (
        isinstance(queue, list | tuple)
        and len(queue) == len(most)
        and all(isinstance(each, int) and 0 <= each <= limit for each, limit in zip(queue, most, strict=True))
    ):
        limit = f"has to be {len(most)} numbers up to {', '.join(map(str, most))}, or None where no queue is ready"
        raise UsageError("queue", repr(queue), limit, "take the state anew")
