"""Where zones and hotplug regions lie in guest-physical space.

Boot memory starts at 0 and leaves out the 32-bit hole from 3 to 4 GiB, where firmware and PCI devices live. Behind it,
and never below 4 GiB, come the hotplug regions in the order of their zones. Each starts at a multiple of 128 MiB, the
size of a Linux memory block on x86-64: of a region that starts or ends inside a memory block, Linux could not use the
rest of that block.

A zone's boot memory is cut at the hole only where one of its pages ends, and starts at a multiple of its page size:
a piece that starts inside a huge page can't be mapped by another process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vhost_user.errors import UsageError
from vhost_user.units import GIB, MIB, ByteCount, GuestAddress, HostOffset, align_up, format_size

HOLE_START = GuestAddress(3 * GIB)
HOLE_END = GuestAddress(4 * GIB)
HOTPLUG_ALIGNMENT = ByteCount(128 * MIB)
ADDRESS_LIMIT = GuestAddress(1 << 52)
"""Guest-physical addresses end below this: x86-64 has at most 52 physical address bits."""


class ZoneSize(NamedTuple):
    """What the layout needs to know of a zone; sizes in bytes, 0 for none. `page_size` is that of its host memory,
    `block_size` that of its device."""

    id: str
    size: ByteCount
    hotplug_size: ByteCount
    page_size: ByteCount
    block_size: ByteCount


class Placement(NamedTuple):
    """`size` bytes of a zone at guest address `addr`, from `offset` of the zone's boot memory or hotplug region on."""

    zone: str
    addr: GuestAddress
    size: ByteCount
    offset: HostOffset

    @property
    def end(self) -> int:
        """The first guest address behind it."""
        return self.addr + self.size


class Layout(NamedTuple):
    """Both kinds of placement, each in ascending order of addresses."""

    boot: tuple[Placement, ...]
    hotplug: tuple[Placement, ...]


def lay_out(zones: Iterable[ZoneSize]) -> Layout:
    """Place every zone. UsageError where guest-physical space is too small."""
    zones = list(zones)
    boot: list[Placement] = []
    cursor = 0
    for zone in zones:
        boot += _cut(zone, align_up(cursor, zone.page_size))
        cursor = boot[-1].end if boot else 0
    hotplug: list[Placement] = []
    cursor = max(cursor, HOLE_END)
    for zone in zones:
        if zone.hotplug_size:
            addr = align_up(cursor, max(HOTPLUG_ALIGNMENT, zone.page_size, zone.block_size))
            hotplug.append(Placement(zone.id, GuestAddress(addr), zone.hotplug_size, HostOffset(0)))
            cursor = hotplug[-1].end
    for placement in boot + hotplug:
        if placement.end > ADDRESS_LIMIT:
            limit = f"ends at {placement.end:#x}; guest-physical space ends at {ADDRESS_LIMIT:#x}"
            raise UsageError(f"zone {placement.zone}", format_size(placement.size), limit, "make the zones smaller")
    return Layout(tuple(boot), tuple(hotplug))


def _cut(zone: ZoneSize, start: int) -> Iterator[Placement]:
    """The zone's boot memory from guest address `start` on, in the one or two pieces that the hole leaves."""
    low = min(zone.size, max(0, HOLE_START - start) // zone.page_size * zone.page_size)
    if low:
        yield Placement(zone.id, GuestAddress(start), ByteCount(low), HostOffset(0))
    if low < zone.size:
        high = max(start, HOLE_END)
        yield Placement(zone.id, GuestAddress(high), ByteCount(zone.size - low), HostOffset(low))
