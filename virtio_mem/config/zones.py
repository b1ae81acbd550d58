"""The zones to build: one view of both ways to describe memory, with nothing left to decide."""

from __future__ import annotations

from dataclasses import dataclass

from vhost_user.units import ByteCount
from virtio_mem.config.memory import HotplugMethod, MemoryConfig, MemoryZoneConfig
from virtio_mem.zone import ZoneSpec

DEFAULT_ZONE = "mem0"
"""The identifier of the one zone that --memory alone makes, as in Cloud Hypervisor; --numa may name it."""

_INHERITED = {"thp", "mergeable"}
"""The keys of --memory that zones take over. Of a zone with a `mergeable` of its own that key is explicit anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZonePlan:
    """One zone to build, and what becomes of it: `spec` is its host memory, the rest concerns its device.

    `hotplugged_size` is in bytes, 0 for none. `guest_numa_id` is the node that the guest sees the zone on, or None.
    """

    spec: ZoneSpec
    hotplugged_size: ByteCount
    hotplug_method: HotplugMethod
    guest_numa_id: int | None


def default_plan(memory: MemoryConfig, guest_numa_id: int | None) -> ZonePlan:
    """The zone that --memory describes where there are no others."""
    spec = ZoneSpec(
        id=DEFAULT_ZONE,
        size=memory.size,
        hotplug_size=memory.hotplug_size or ByteCount(0),
        shared=memory.shared,
        hugepages=memory.hugepages,
        hugepage_size=memory.hugepage_size,
        prefault=memory.prefault,
        reserve=memory.reserve,
        mergeable=memory.mergeable,
        thp=memory.thp,
        explicit=memory.explicit,
    )
    return _plan(memory, memory, spec, guest_numa_id)


def zone_plan(memory: MemoryConfig, zone: MemoryZoneConfig, guest_numa_id: int | None) -> ZonePlan:
    """A zone of --memory-zone, with what it takes over from --memory."""
    spec = ZoneSpec(
        id=zone.id,
        size=zone.size,
        hotplug_size=zone.hotplug_size or ByteCount(0),
        file=zone.file,
        shared=zone.shared,
        hugepages=zone.hugepages,
        hugepage_size=zone.hugepage_size,
        host_numa_node=zone.host_numa_node,
        prefault=zone.prefault,
        reserve=zone.reserve,
        mergeable=memory.mergeable if zone.mergeable is None else zone.mergeable,
        thp=memory.thp,
        explicit=zone.explicit | (memory.explicit & _INHERITED),
    )
    return _plan(memory, zone, spec, guest_numa_id)


def _plan(
    memory: MemoryConfig, described: MemoryConfig | MemoryZoneConfig, spec: ZoneSpec, guest_numa_id: int | None
) -> ZonePlan:
    return ZonePlan(
        spec=spec,
        hotplugged_size=described.hotplugged_size or ByteCount(0),
        hotplug_method=memory.hotplug_method,
        guest_numa_id=guest_numa_id,
    )
