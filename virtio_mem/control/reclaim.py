"""Giving back what the host holds for blocks that are not plugged, as an operator asks for it."""

from __future__ import annotations

from virtio_mem import unplugged
from virtio_mem.control.control import Control


def reclaim(control: Control, zone_id: str) -> tuple[int, int]:
    """Have the host take back what it holds for unplugged blocks of a zone, and tell who listens: how many bytes that
    was, and how many it holds still.

    UnknownZone; UsageError and HostError as of `virtio_mem.unplugged.reclaim`.
    """
    zone = control.zone(zone_id)
    if zone.service is None:
        return 0, 0
    freed, left = unplugged.reclaim(zone.service)
    if freed or left:
        control.events.publish("freed", zone.id, size=freed + left, held=left)
    return freed, left
