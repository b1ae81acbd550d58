"""What there is to know of a machine's memory, as plain data: the bodies of `vm.info` and `vm.counters`.

The part that Cloud Hypervisor has too carries its names; `zones` is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from virtio_mem.blocks import BlockIndex, BlockMap, Run, Runs
from virtio_mem.control.zone import ControlledZone

if TYPE_CHECKING:
    from virtio_mem.control.control import Control

_MEMORY_DEFAULTS = {"mergeable": False, "thp": True, "hotplug_method": "VirtioMem"}
_ZONE_DEFAULTS = {"mergeable": False, "shared": True, "hugepages": False, "prefault": False, "reserve": False}
_ZONE_ONLY = ("file", "host_numa_node")
"""Options that a zone has and --memory does not."""


def machine_info(control: Control) -> dict[str, Any]:
    """All that there is to know; sizes in bytes."""
    zones = list(control.zones.values())
    return {
        "config": {"payload": {}, **control.config, "memory": _memory(control)},
        "state": _state(control),
        "memory_actual_size": sum(zone.size for zone in zones),
        "zones": [zone_info(control, zone) for zone in zones],
    }


def _state(control: Control) -> str:
    if control.paused:
        return "Paused"
    return "Running" if any(zone.connected() for zone in control.zones.values()) else "Created"


def _memory(control: Control) -> dict[str, Any]:
    """Cloud Hypervisor's MemoryConfig: one size, or 0 and the zones."""
    options = _MEMORY_DEFAULTS | control.memory_options
    if control.user_zones:
        return {**options, "size": 0, "zones": [{"id": zone.id, **_zone(zone)} for zone in control.zones.values()]}
    (zone,) = control.zones.values()
    described = {name: value for name, value in _zone(zone).items() if name not in _ZONE_ONLY}
    return {**described, **options}


def _zone(zone: ControlledZone) -> dict[str, Any]:
    sizes = {"size": zone.boot_size}
    if zone.service is not None:
        sizes |= {"hotplug_size": zone.hotplug_size, "hotplugged_size": zone.target - zone.boot_size}
    return {**_ZONE_DEFAULTS, **zone.options, **sizes}


def zone_info(control: Control, zone: ControlledZone) -> dict[str, Any]:
    """One zone with its device. What a zone without a device lacks is None."""
    device = zone.service.info() if zone.service else {}
    held, more = zone.held()
    strays, more_strays = zone.held_unplugged()
    return {
        "id": zone.id,
        "boot_size": zone.boot_size,
        "hotplug_size": zone.hotplug_size,
        "guest_numa_id": zone.guest_numa_id,
        "held": held,
        "held_more": more,
        "held_unplugged": strays,
        "held_unplugged_more": more_strays,
        "connected": zone.connected(),
        "operation": control.operations.last(zone.id),
        **{name: device.get(name) for name in _DEVICE_FACTS},
    }


_DEVICE_FACTS = (
    "addr",
    "block_size",
    "requested_size",
    "usable_region_size",
    "plugged_size",
    "features",
    "prefault",
    "paused",
    "answers",
    "failed_undos",
    "unplugged_bytes",
    "unreturned_bytes",
    "unrequested_bytes",
    "unrequested_unplug",
)


_TOTALS = ("failed_undos", "unplugged_bytes", "unreturned_bytes", "unrequested_bytes")


def machine_counters(control: Control) -> dict[str, dict[str, int]]:
    """What only ever grows while the process lives, by zone: requests by kind and answer, and bytes."""
    counters: dict[str, dict[str, int]] = {}
    for zone in control.zones.values():
        if zone.service is None:
            continue
        device = zone.service.info()
        answers = {name.lower().replace(" ", "_"): count for name, count in device["answers"].items()}
        totals = {name: device[name] for name in _TOTALS}
        counters[zone.id] = answers | totals
    return counters


class ZoneBlocks:
    """Which blocks of a zone are plugged, at one moment: counts of blocks, and runs that are found as they are asked
    for, in a copy that holds up nobody."""

    def __init__(self, zone: ControlledZone) -> None:
        self.block_size = self.nb_blocks = self.usable_blocks = self.requested_blocks = 0
        self._blocks = BlockMap(0)
        if zone.service is None:
            return
        with zone.service.lock:
            device = zone.service.device
            self._blocks = device.blocks.copy()
            self.block_size, self.nb_blocks = device.geometry.block_size, device.geometry.nb_blocks
            self.usable_blocks = device.usable_region_size // self.block_size
            self.requested_blocks = device.requested_size // self.block_size

    def plugged_runs(self) -> Runs:
        """The plugged blocks."""
        return self._blocks.plugged_runs()

    def counts(self, most: int) -> tuple[int, list[int]]:
        """The region cut into `most` cells or fewer, of the smallest power of two of blocks that does it: that number
        of blocks, and how many of each cell's are plugged. The last cell may have fewer blocks."""
        per_cell = 1
        while self.nb_blocks > most * per_cell:
            per_cell *= 2
        ends = range(per_cell, self.nb_blocks + per_cell, per_cell)
        runs = (Run(BlockIndex(end - per_cell), min(end, self.nb_blocks) - end + per_cell) for end in ends)
        return per_cell, [self._blocks.count(run) for run in runs]
