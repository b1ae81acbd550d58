"""Configurations of every class that can be, and texts that come close to being options."""

from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from vhost_user.units import U64_MAX, ByteCount
from virtio_mem.config import (
    HotplugMethod,
    MemoryConfig,
    MemoryZoneConfig,
    NumaConfig,
    NumaDistance,
    SgxEpcConfig,
    VmMemoryConfig,
)

SHIFTS = (0, 10, 20, 30, 40)


def awkward_text() -> SearchStrategy[str]:
    """Text that is not empty, often with the characters that cut options."""
    return st.text(st.sampled_from('",[]=:@-\t ') | st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


def names() -> SearchStrategy[str]:
    texts = st.text("ab1", min_size=1, max_size=3) | awkward_text()
    return texts.filter(lambda name: not name.startswith("__") and "\0" not in name)


def paths() -> SearchStrategy[Path]:
    return awkward_text().filter(lambda text: "\0" not in text).map(Path)


def sizes(smallest: int, largest: int = U64_MAX) -> SearchStrategy[ByteCount]:
    """Sizes between these, many of them with a suffix."""

    def with_suffix(shift: int) -> SearchStrategy[int]:
        return st.integers(-(-smallest >> shift), largest >> shift).map(lambda size: size << shift)

    plain = st.integers(smallest, largest)
    return st.one_of(plain, *(with_suffix(shift) for shift in SHIFTS if (1 << shift) <= largest)).map(ByteCount)


@st.composite
def backings(draw: DrawFn, method: HotplugMethod, largest: int = U64_MAX // 64) -> dict[str, Any]:
    """Keyword arguments that --memory and a zone share, but size and mergeable, which depend on the others."""
    hugepages = draw(st.booleans())
    values: dict[str, Any] = {key: draw(st.booleans()) for key in ("shared", "prefault", "reserve")}
    values |= {"hugepages": hugepages}
    if hugepages and draw(st.booleans()):
        values["hugepage_size"] = 1 << draw(st.integers(0, 63))
    if draw(st.booleans()):
        values["hotplug_size"] = draw(sizes(1, largest))
        if method is HotplugMethod.VIRTIO_MEM and draw(st.booleans()):
            values["hotplugged_size"] = draw(sizes(1, values["hotplug_size"]))
    return values


@st.composite
def memory_configs(draw: DrawFn) -> MemoryConfig:
    method = draw(st.sampled_from(HotplugMethod))
    values = draw(backings(method))
    return MemoryConfig(
        size=draw(sizes(0, U64_MAX // 64)),
        mergeable=not values["shared"] and draw(st.booleans()),
        hotplug_method=method,
        thp=draw(st.booleans()),
        **values,
    )


@st.composite
def zone_configs(draw: DrawFn, *, hotplug: bool = True) -> MemoryZoneConfig:
    values = draw(backings(HotplugMethod.VIRTIO_MEM))
    if not hotplug:
        values.pop("hotplug_size", None)
        values.pop("hotplugged_size", None)
    file = draw(st.none() | paths())
    return MemoryZoneConfig(
        id=draw(names()),
        size=draw(sizes(0 if "hotplug_size" in values else 1, U64_MAX // 64)),
        file=file,
        host_numa_node=draw(st.none() | st.integers(0, 2**32 - 1)),
        mergeable=draw(st.sampled_from([None, False] if values["shared"] else [None, False, True])),
        **values,
    )


def epc_configs() -> SearchStrategy[SgxEpcConfig]:
    pages = sizes(1, U64_MAX >> 12).map(lambda pages: ByteCount(pages << 12))
    return st.builds(SgxEpcConfig, id=names(), size=pages, prefault=st.booleans())


def distances(destinations: SearchStrategy[int]) -> SearchStrategy[NumaDistance]:
    return st.builds(NumaDistance, destinations, st.integers(10, 255))


def unique(elements: SearchStrategy[Any], largest: int) -> SearchStrategy[tuple[Any, ...]]:
    return st.lists(elements, max_size=largest, unique=True).map(tuple)


@st.composite
def numa_configs(draw: DrawFn) -> NumaConfig:
    """A node alone: what it refers to need not exist."""
    node = draw(st.integers(0, 2**32 - 1))
    others = st.integers(0, 2**32 - 1).filter(lambda other: other != node)
    values: dict[str, Any] = {}
    if draw(st.booleans()):
        values["device_id"] = draw(names())
    else:
        values["cpus"] = draw(unique(st.integers(0, 8191), 9))
        values["memory_zones"] = draw(unique(names(), 3))
    return NumaConfig(
        guest_numa_id=node,
        distances=tuple(draw(st.lists(distances(others), max_size=3, unique_by=lambda entry: entry.destination))),
        sgx_epc_sections=draw(unique(names(), 2)),
        pci_segments=draw(unique(st.integers(1 if node else 0, 95), 3)),
        **values,
    )


@st.composite
def machines(draw: DrawFn) -> VmMemoryConfig:
    """Whole machines, with one zone or several, and nodes that share CPUs, zones and sections among them."""
    zones: list[MemoryZoneConfig] = []
    memory = draw(memory_configs().filter(lambda memory: memory.size > 0))
    if draw(st.booleans()):
        method = draw(st.sampled_from(HotplugMethod))
        zone = zone_configs(hotplug=method is HotplugMethod.VIRTIO_MEM)
        zones = draw(st.lists(zone, min_size=1, max_size=3, unique_by=lambda zone: zone.id))
        mergeable = draw(st.booleans()) and not any(zone.shared for zone in zones)
        memory = MemoryConfig(size=ByteCount(0), hotplug_method=method, mergeable=mergeable, thp=draw(st.booleans()))
        if not any(zone.size for zone in zones):
            zones = [MemoryZoneConfig(id="first", size=draw(sizes(1, 2**40)))]
    taken = {zone.id for zone in zones} | {"mem0"}
    sections = draw(st.lists(epc_configs(), max_size=2, unique_by=lambda section: section.id))
    sections = [section for section in sections if section.id not in taken]
    return VmMemoryConfig(
        memory=memory, zones=tuple(zones), sgx_epc=tuple(sections), numa=draw(node_sets(zones, sections))
    )


@st.composite
def node_sets(
    draw: DrawFn, zones: list[MemoryZoneConfig], sections: list[SgxEpcConfig], largest: int = 3
) -> tuple[NumaConfig, ...]:
    """Nodes that can be together in one machine."""
    ids = draw(st.lists(st.integers(0, 9), max_size=largest, unique=True))
    if not ids:
        return ()
    owner = st.none() | st.sampled_from(ids)
    zone_owners = {name: draw(owner) for name in [zone.id for zone in zones] or ["mem0"]}
    section_owners = {section.id: draw(owner) for section in sections}
    nodes = []
    for index, node in enumerate(ids):
        given_to = (
            draw(st.lists(st.sampled_from([other for other in ids if other != node]), unique=True)) if ids[1:] else []
        )
        nodes.append(
            NumaConfig(
                guest_numa_id=node,
                cpus=tuple(draw(st.lists(st.integers(16 * index, 16 * index + 15), min_size=1, unique=True))),
                memory_zones=tuple(name for name, owner in zone_owners.items() if owner == node),
                sgx_epc_sections=tuple(name for name, owner in section_owners.items() if owner == node),
                distances=tuple(draw(distances(st.just(other))) for other in given_to),
            )
        )
    return tuple(nodes)


FRAGMENTS = [
    *'=,[]":@- \t0K',
    *("=1G", "=on", "=off", "=0", "=a", "=[0-3,7]", "=0-3:7", "=1@15", "=[1@15]", '="', "=acpi", "=virtio-mem", "=2M"),
    *("size", "shared", "mergeable", "hugepages", "hugepage_size", "hotplug_method", "hotplug_size", "hotplugged_size"),
    *("id", "file", "host_numa_node", "guest_numa_id", "cpus", "distances", "memory_zones", "sgx_epc_sections"),
    *("prefault", "reserve", "thp", "pci_segments", "device_id", "99999999999999999999", "\u0664", "\u00b2", "1G,"),
]


def near_options() -> SearchStrategy[str]:
    """Text, and text made of pieces of options."""
    items = st.lists(st.sampled_from(FRAGMENTS), max_size=4).map("".join)
    return st.text() | items | st.lists(items, max_size=5).map(",".join)
