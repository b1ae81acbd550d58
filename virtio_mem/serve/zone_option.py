"""`--zone`: one virtio-mem device that is served to a front end, whose memory it manages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from vhost_user.errors import UsageError
from vhost_user.units import MIB, U64_MAX, ByteCount, GuestAddress, is_power_of_two
from vhost_user.unix_socket import MAX_PATH
from virtio_mem.config.option import Option, kind
from virtio_mem.config.values import FILE, NAME, NONZERO_SIZE, SIZE, TOGGLE, Number, show_size
from virtio_mem.serve.plan import ServedZone

DEFAULT_BLOCK_SIZE = ByteCount(2 * MIB)
"""What x86-64 has as a huge page. The memory is the front end's, so no host setting is looked at."""

MAX_ZONES = 120
"""Of one service. For each a supervisor keeps up to two things by name, of 256."""

MAX_ID = 200
"""Bytes of an id, which is a part of the names of what is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedZoneOption(Option):
    """`--zone`. `addr` is the guest-physical address of the region, sizes are in bytes."""

    OPTION: ClassVar[str] = "--zone"
    IDENTITY: ClassVar[str] = "id"

    id: str = field(metadata=kind(NAME))
    socket: Path = field(metadata=kind(FILE))
    addr: ByteCount = field(metadata=kind(SIZE))
    hotplug_size: ByteCount = field(metadata=kind(NONZERO_SIZE))
    hotplugged_size: ByteCount = field(default=ByteCount(0), metadata=kind(SIZE))
    block_size: ByteCount = field(default=DEFAULT_BLOCK_SIZE, metadata=kind(NONZERO_SIZE))
    guest_numa_id: int | None = field(default=None, metadata=kind(Number(0xFFFF)))
    prefault: bool = field(default=False, metadata=kind(TOGGLE))
    unplugged_inaccessible: bool = field(default=True, metadata=kind(TOGGLE))
    unrequested_unplug: bool = field(default=True, metadata=kind(TOGGLE))

    def _check_rules(self) -> None:
        block_size = show_size(self.block_size)
        if not is_power_of_two(self.block_size) or self.block_size < MIB:
            raise self.error("block_size", "must be a power of two, 1M or more", "choose one such as 2M")
        for key in ("addr", "hotplug_size", "hotplugged_size"):
            if getattr(self, key) % self.block_size:
                raise self.error(key, f"must be a multiple of block_size={block_size}", f"round it to {block_size}")
        if self.hotplugged_size > self.hotplug_size:
            limit = f"can't exceed hotplug_size={show_size(self.hotplug_size)}"
            raise self.error("hotplugged_size", limit, "lower hotplugged_size, or raise hotplug_size")
        if self.addr + self.hotplug_size > U64_MAX:
            raise self.error("addr", "with hotplug_size it must stay below 2**64", "place the zone lower")
        if len(self.id.encode()) > MAX_ID:
            raise self.error("id", f"has {MAX_ID} bytes at most", "choose a shorter one")
        if len(os.fsencode(self.socket)) > MAX_PATH:
            raise self.error("socket", f"a socket's path has {MAX_PATH} bytes at most", "name a shorter one")

    def planned(self) -> ServedZone:
        """The zone as the plan has it."""
        return ServedZone(
            id=self.id,
            addr=GuestAddress(self.addr),
            hotplug_size=self.hotplug_size,
            hotplugged_size=self.hotplugged_size,
            block_size=self.block_size,
            guest_numa_id=self.guest_numa_id,
            prefault=self.prefault,
            unplugged_inaccessible=self.unplugged_inaccessible,
            unrequested_unplug=self.unrequested_unplug,
        )


def check_together(zones: Sequence[ServedZoneOption]) -> None:
    """Raise UsageError unless there is a zone, and not too many, and no two share an id, a socket or an address."""
    if not zones:
        raise UsageError("--zone", None, "at least one has to be given", "add --zone id=mem0,socket=PATH,addr=4G,...")
    if len(zones) > MAX_ZONES:
        raise UsageError(
            "--zone", f"{len(zones)} zones", f"have to be at most {MAX_ZONES}", "start another service for the rest"
        )
    for key in ("id", "socket"):
        seen: dict[object, ServedZoneOption] = {}
        for zone in zones:
            value = getattr(zone, key)
            if value in seen:
                limit = f"is the one of zone {seen[value].id} too" if key == "socket" else "is there twice"
                raise zone.error(key, limit, "give each zone one of its own")
            seen[value] = zone
    for below, above in pairwise(sorted(zones, key=lambda zone: zone.addr)):
        if below.addr + below.hotplug_size > above.addr:
            limit = f"overlaps zone {below.id}, which ends at {below.addr + below.hotplug_size:#x}"
            raise above.error("addr", limit, "place it higher, or make the other one smaller")
