"""Giving back what the host holds for blocks that are not plugged, as an operator asks for it."""

from __future__ import annotations

from collections.abc import Callable

from virtio_mem import unplugged
from virtio_mem.control.control import Control
from virtio_mem.control.watch import ZoneWatch


def reclaim(control: Control, zone_id: str, given_up: Callable[[], bool] = lambda: False) -> tuple[int, int]:
    """Have the host take back what it holds for unplugged blocks of a zone, and tell who listens: how many bytes that
    was, and how many it holds still.

    UnknownZone; UsageError and HostError as of `virtio_mem.unplugged.reclaim`.
    """
    zone = control.zone(zone_id)
    service = zone.service
    if service is None:
        return 0, 0

    def tell(freed: int, left: int) -> None:
        with service.lock:
            watches = [observer for observer in service.observers if isinstance(observer, ZoneWatch)]
        for watch in watches:
            watch.reclaimed(left)
        control.events.publish("freed", zone.id, size=freed + left, held=left)

    return unplugged.reclaim(service, given_up=given_up, tell=tell)
