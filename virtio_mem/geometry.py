"""Where a device's region lies, how it is cut into blocks, and how much of it the driver may use."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from vhost_user.errors import UsageError
from vhost_user.units import (
    KIB,
    MIB,
    U64_MAX,
    ByteCount,
    GuestAddress,
    align_up,
    format_size,
    is_power_of_two,
    is_whole,
)

USABLE_SLACK = ByteCount(256 * MIB)
"""What the usable region has beyond requested_size with REQUESTED_PLUS_SLACK: two of Linux's 128 MiB memory blocks,
so that a driver which needs whole memory blocks finds one even when the ends of the region are not aligned to them."""

_THP_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MIN_BLOCK_SIZE = 1 * MIB
_MAX_THP_SIZE = 16 * MIB


class UsableRegion(Enum):
    """How `usable_region_size` follows `requested_size`."""

    WHOLE_REGION = "whole-region"
    REQUESTED_PLUS_SLACK = "requested-plus-slack"


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What can't change while the device lives.

    `addr` is the region's guest address; sizes are in bytes; `node_id` is the ACPI proximity domain, or None where none
    is known. Raises UsageError where the standard's section "Device configuration layout" forbids a value.
    """

    addr: GuestAddress
    region_size: ByteCount
    block_size: ByteCount
    node_id: int | None = None
    usable_region: UsableRegion = UsableRegion.REQUESTED_PLUS_SLACK

    def __post_init__(self) -> None:
        for field in ("block_size", "addr", "region_size"):
            require_whole(field, getattr(self, field))
        require_policy(self.usable_region)
        if not is_power_of_two(self.block_size):
            limit = "must be a power of two"
            raise UsageError("block_size", self.block_size, limit, f"choose one such as {format_size(2 * MIB)}")
        for field, value in (("addr", self.addr), ("region_size", self.region_size)):
            if value % self.block_size:
                limit = f"must be a multiple of block_size, {format_size(self.block_size)}"
                raise UsageError(field, value, limit, _nearest(value, self.block_size))
        if self.addr + self.region_size > U64_MAX:
            limit = f"with region_size ({self.region_size:#x}) it must stay below 2**64"
            raise UsageError("addr", hex(self.addr), limit, "place the region lower, or make it smaller")
        if self.node_id is not None and not is_whole(self.node_id, 0xFFFF):
            limit = "has to be an int from 0 to 65535: the configuration space has 16 bits for it"
            raise UsageError("node_id", self.node_id, limit, "give the node a lower id")

    @property
    def nb_blocks(self) -> int:
        """How many memory blocks the region has."""
        return self.region_size // self.block_size

    def checked_target(self, requested_size: int) -> ByteCount:
        """`requested_size` in bytes, if the region can have that much plugged; else UsageError."""
        require_whole("requested_size", requested_size)
        if requested_size % self.block_size:
            limit = f"must be a multiple of block_size, {format_size(self.block_size)}"
            raise UsageError("requested_size", requested_size, limit, _nearest(requested_size, self.block_size))
        if requested_size > self.region_size:
            limit = f"must be at most region_size, {self.region_size}"
            raise UsageError("requested_size", requested_size, limit, "ask for less, or make the region larger")
        return ByteCount(requested_size)

    def usable_size_for(self, requested_size: ByteCount) -> ByteCount:
        """The usable region that goes with a target: never smaller than it, in whole blocks."""
        if self.usable_region is UsableRegion.WHOLE_REGION:
            return self.region_size
        if not requested_size:
            return ByteCount(0)
        return ByteCount(min(self.region_size, requested_size + align_up(USABLE_SLACK, self.block_size)))


def require_whole(field: str, value: object) -> None:
    """UsageError unless `value` is an int that 64 bits hold: the configuration space has no room for anything else."""
    if not is_whole(value):
        raise UsageError(field, repr(value), "has to be an int from 0 to 2**64 - 1, in bytes", "give one, as 512 << 20")


def require_policy(usable_region: object) -> None:
    """UsageError unless `usable_region` is a member of UsableRegion, not only its text."""
    if not isinstance(usable_region, UsableRegion):
        names = " or ".join(policy.name for policy in UsableRegion)
        raise UsageError("usable_region", repr(usable_region), f"has to be UsableRegion.{names}", "give one of these")


def _nearest(value: int, block_size: int) -> str:
    below = value // block_size * block_size
    return f"the nearest are {below} and {below + block_size}"


def default_block_size(page_size: int, thp_size: int | None = None) -> ByteCount:
    """The block size for memory of `page_size`-byte pages: one transparent huge page, or one page where that is larger.

    `thp_size` in bytes is the kernel's own unless given. Without transparent huge pages, and where they are above
    16 MiB (64 KiB base pages on arm64: 512 MiB), 1 MiB: a block is the least that can be given back, and larger ones
    would make resizing coarse for no gain.
    """
    if thp_size is None:
        thp_size = int(_THP_SIZE.read_text()) if _THP_SIZE.exists() else 0
    if not 4 * KIB <= thp_size <= _MAX_THP_SIZE:
        thp_size = _MIN_BLOCK_SIZE
    return ByteCount(max(page_size, thp_size, _MIN_BLOCK_SIZE))
