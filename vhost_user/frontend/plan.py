"""How large the slots are in which hotpluggable memory is shared, so that a back end has room for all of them.

A back end that gets only what is plugged gets it slot by slot, a region of its own for each slot that has a plugged
block. The smallest slot, one block, lets it have nothing else; but a back end takes a limited number of regions, 8 or
509 mostly, and a region of 1 TiB has half a million blocks of 2 MiB. A larger slot stays shared as long as one of its
blocks is plugged, the others with it.

So slots are as small as the limit allows, counting every slot of every region: whatever the guest plugs then fits, and
none of its requests fails for want of a slot. The slots of the region that has most of them are doubled until all fit.
With this rule no slot of any region could be half as large: undoing an earlier doubling would bring back at least as
many slots as undoing the last one, without which they did not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from vhost_user.errors import UsageError
from vhost_user.units import ByteCount, format_size, is_power_of_two


@dataclass(frozen=True)
class HotplugRegion:
    """Memory that is plugged block by block: `size` bytes, in blocks of `block_size` bytes. `name` is for people.

    Raises UsageError for a block size that is no power of two, and for a size that is not one block or more.
    """

    name: str
    size: ByteCount
    block_size: ByteCount

    def __post_init__(self) -> None:
        if not is_power_of_two(self.block_size):
            raise UsageError(f"{self.name} block_size", self.block_size, "must be a power of two")
        if self.size <= 0 or self.size % self.block_size:
            limit = f"has to be one block of {format_size(self.block_size)} or more, and whole ones"
            raise UsageError(f"{self.name} size", self.size, limit)


@dataclass(frozen=True)
class SlotSize:
    """The slots of one region, from its start on, `size` bytes each; the last one ends with the region."""

    region: HotplugRegion
    size: ByteCount

    @property
    def count(self) -> int:
        """How many slots the region has."""
        return -(-self.region.size // self.size)

    @property
    def unprotected(self) -> ByteCount:
        """The most bytes of a slot that are shared while unplugged: all but one block; 0 is full protection."""
        return ByteCount(min(self.size, self.region.size) - self.region.block_size)

    def __str__(self) -> str:
        if self.size >= self.region.size:
            return f"{self.region.name}: whole, {format_size(self.region.size)}"
        text = f"{self.region.name}: slots of {format_size(self.size)}"
        if self.unprotected:
            return f"{text}, of which {format_size(self.unprotected)} may stay shared while unplugged"
        return f"{text}, one block each"


@dataclass(frozen=True)
class SlotPlan:
    """How much of a back end's `limit` on regions is spoken for: `others` regions, and the slots of `slots`."""

    limit: int
    others: int
    slots: tuple[SlotSize, ...]

    @property
    def count(self) -> int:
        """How many regions the back end has when everything is plugged."""
        return self.others + sum(each.count for each in self.slots)

    def slot_size(self, name: str) -> ByteCount:
        """The slot size of the region of that name, in bytes. UsageError where there is none."""
        for each in self.slots:
            if each.region.name == name:
                return each.size
        raise UsageError("region", name, "has to be a region of the plan")

    def __str__(self) -> str:
        return "; ".join((f"{self.count} of {self.limit} regions", *map(str, self.slots)))


def plan_slots(max_slots: int, others: int, hotplug: Iterable[HotplugRegion], *, whole: bool = False) -> SlotPlan:
    """The smallest slots with which a back end that takes `max_slots` regions has room for everything.

    `others` is how many regions there are besides, such as boot memory. With `whole` each hotplug region is one slot.
    Slots are a power of two times their region's block size. Raises UsageError where even whole regions don't fit.
    """
    regions = tuple(hotplug)
    if max_slots < others + len(regions):
        limit = f"has to be at most {max_slots}, as the back end takes no more"
        raise UsageError("regions", others + len(regions), limit, "share fewer zones, or use another back end")
    slots = [SlotSize(region, _whole(region) if whole else region.block_size) for region in regions]
    while others + sum(each.count for each in slots) > max_slots:
        most = _most(slots)
        slots[most] = replace(slots[most], size=ByteCount(slots[most].size * 2))
    return SlotPlan(max_slots, others, tuple(slots))


def _whole(region: HotplugRegion) -> ByteCount:
    return ByteCount(region.block_size << (region.size // region.block_size - 1).bit_length())


def _most(slots: Sequence[SlotSize]) -> int:
    return max(range(len(slots)), key=lambda index: slots[index].count)
