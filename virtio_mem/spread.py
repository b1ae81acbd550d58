"""One size for several zones: how much of it each is to have, and what another has in place of one that stalls.

What goes beyond boot memory is dealt out by what zones can plug, so that nodes of one size have the same. A zone that
gets no further keeps what it has, and the others share the rest by the same rule. Zones of large blocks come first: as
blocks are powers of two, what they have to leave can be made of smaller ones, if it can be made at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vhost_user.errors import UsageError
from vhost_user.units import align_up, format_size


class ZoneRange(NamedTuple):
    """What a zone can have: `boot` bytes, and up to `hotplug` more in blocks of `block` bytes."""

    id: str
    boot: int
    hotplug: int
    block: int


def spread(total: int, zones: Sequence[ZoneRange], fixed: Mapping[str, int] | None = None) -> dict[str, int]:
    """The size in bytes of each zone, `total` of all of them; those of `fixed` have what it says.

    UsageError for a total that these zones can't have, or not in whole blocks.
    """
    sizes = dict(fixed or {})
    free = [zone for zone in zones if zone.id not in sizes]
    left = total - sum(sizes.values()) - sum(zone.boot for zone in free)
    room = sum(zone.hotplug for zone in free)
    if not 0 <= left <= room:
        least = total - left
        limit = f"has to be from {format_size(least)} to {format_size(least + room)}"
        raise UsageError("SIZE", format_size(total), limit, "ask for what the zones can have")
    for zone in sorted(free, key=lambda zone: -zone.block):  # what large blocks can't have, small ones can
        behind = room - zone.hotplug
        least = align_up(max(0, left - behind), zone.block)
        most = min(zone.hotplug, left) // zone.block * zone.block
        if least > most:
            blocks = ", ".join(sorted({format_size(each.block) for each in free}))
            raise UsageError("SIZE", format_size(total), f"can't be made of whole blocks of {blocks}", "round it")
        fair = round(left * zone.hotplug / room / zone.block) * zone.block if room else 0
        plugged = min(max(fair, least), most)
        sizes[zone.id] = zone.boot + plugged
        left, room = left - plugged, behind
    return {zone.id: sizes[zone.id] for zone in zones}
