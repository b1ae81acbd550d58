"""The layout against what QEMU does with it: one backend behind the other, cut where low memory ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhost_user.errors import UsageError
from vhost_user.units import GIB, MIB, TIB, ByteCount
from virtio_mem.boot.layout import HIGH_START, LOW_END, MachineLayout, lay_out_machine
from virtio_mem.config import ConfigError, NumaConfig, NumaDistance
from virtio_mem.layout import HOTPLUG_ALIGNMENT, ZoneSize


def zone(name: str, size: int, hotplug_size: int = 0, page_size: int = 4096) -> ZoneSize:
    return ZoneSize(name, ByteCount(size), ByteCount(hotplug_size), ByteCount(page_size), ByteCount(2 * MIB))


def node(number: int, **keys: object) -> NumaConfig:
    return NumaConfig(guest_numa_id=number, **keys)  # type: ignore[arg-type]


def as_qemu_does(layout: MachineLayout) -> Iterator[tuple[str, bool, int, int, int]]:
    """Each piece of RAM: zone, whether it is hotplugged, guest address, size, and offset in the backend."""
    offset = 0
    for each in layout.nodes:
        if each.backend is None:
            continue
        name, hotplug, size = each.backend
        low = min(size, max(0, layout.low_size - offset))
        if low:
            yield name, hotplug, offset, low, 0
        if low < size:
            yield name, hotplug, HIGH_START + offset + low - layout.low_size, size - low, low
        offset += size


SIZES = st.integers(0, 40).map(lambda count: count * 100 * MIB)
ZONES = st.lists(st.tuples(SIZES, SIZES).filter(any), min_size=1, max_size=5).filter(
    lambda zones: any(size for size, _ in zones)
)


@given(ZONES, st.data())
def test_zones_are_where_qemu_puts_them(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    zones = [zone(f"z{number}", *pair) for number, pair in enumerate(sizes)]
    alone = data.draw(st.permutations(range(len(zones)))) if data.draw(st.booleans()) else []
    numa = [node(number, memory_zones=(f"z{of}",)) for number, of in enumerate(alone)]
    layout = lay_out_machine(zones, numa, 1)
    pieces = [piece for piece in as_qemu_does(layout) if piece[0]]
    placed = [(place.zone, False, place.addr, place.size, place.offset) for place in layout.placements.boot]
    placed += [(place.zone, True, place.addr, place.size, place.offset) for place in layout.placements.hotplug]
    assert sorted(pieces) == sorted(placed)
    for name, hotplug, addr, size, _ in pieces:
        assert not hotplug or addr >= layout.boot_end
        assert not hotplug or addr % HOTPLUG_ALIGNMENT == 0
        assert hotplug or addr + size <= layout.boot_end
        assert addr + size <= LOW_END or addr >= HIGH_START, name
    last = max(addr + size for _, _, addr, size, _ in as_qemu_does(layout))
    assert last == layout.end


def test_what_is_little_has_no_extra_nodes() -> None:
    layout = lay_out_machine([zone("mem0", 512 * MIB)], [node(0, memory_zones=("mem0",))], 2)
    assert [each.cpus for each in layout.nodes] == [(0, 1)]
    assert {int(layout.low_size), int(layout.boot_end), int(layout.size), int(layout.end)} == {512 * MIB}


def test_without_numa_the_guest_sees_none() -> None:
    layout = lay_out_machine([zone("mem0", GIB, GIB)], [], 1)
    assert not layout.numa
    assert layout.zone_nodes == {"mem0": None}
    assert layout.distances == {}


def test_the_users_nodes_come_first_and_keep_their_numbers() -> None:
    numa = [node(2, cpus=(1,), memory_zones=("a",)), node(0, cpus=(0,), memory_zones=("b",))]
    layout = lay_out_machine([zone("a", GIB, GIB), zone("b", GIB, GIB), zone("c", GIB)], numa, 3)
    assert [(each.cpus, each.backend and each.backend[:2]) for each in layout.nodes] == [
        ((0, 2), ("b", False)),  # and the processor that the user left out
        ((), None),  # the number that the user left out
        ((1,), ("a", False)),
        ((), ("c", False)),
        ((), ("a", True)),
        ((), ("b", True)),
    ]
    assert layout.zone_nodes == {"a": 2, "b": 0, "c": 3}


def test_a_node_with_nothing_but_a_hotplug_region_has_an_initiator() -> None:
    numa = [node(0, memory_zones=("a",)), node(1, memory_zones=("b",)), node(2, cpus=(1,), memory_zones=("c",))]
    layout = lay_out_machine([zone("a", GIB), zone("b", 0, GIB), zone("c", 0, GIB)], numa, 2)
    assert [each.initiator for each in layout.nodes] == ["", "b", "", "", ""]


def test_distances_are_the_users_and_extra_nodes_are_where_their_owner_is() -> None:
    numa = [
        node(0, memory_zones=("a",), distances=(NumaDistance(1, 15),)),
        node(1, memory_zones=("b",), distances=(NumaDistance(0, 40),)),
    ]
    layout = lay_out_machine([zone("a", GIB, GIB), zone("b", GIB)], numa, 1)
    assert layout.distances == {
        0: {0: 10, 1: 15, 2: 11},
        1: {0: 40, 1: 10, 2: 40},
        2: {0: 11, 1: 15, 2: 10},
    }


def test_two_zones_with_boot_memory_on_a_node_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"one memory backend a node; give one of them a node of its own"):
        lay_out_machine([zone("a", GIB), zone("b", GIB)], [node(0, memory_zones=("a", "b"))], 1)


def test_a_second_zone_without_boot_memory_is_fine() -> None:
    layout = lay_out_machine([zone("a", GIB), zone("b", 0, GIB)], [node(0, memory_zones=("a", "b"))], 1)
    assert layout.zone_nodes == {"a": 0, "b": 0}


def test_a_huge_page_never_begins_in_the_middle_of_one() -> None:
    zones = [zone("a", 3 * MIB), zone("b", 4 * MIB, page_size=2 * MIB)]
    with pytest.raises(UsageError, match="in the middle of a page of 2M"):
        lay_out_machine(zones, [], 1)


@pytest.mark.parametrize(
    ("numa", "says"),
    [
        (node(0, cpus=(2,)), r"cpus=2: does not exist: --cpus boot=2 makes 0 to 1"),
        (node(200, cpus=(0,)), r"QEMU's nodes are 0 to 127"),
        (node(1, device_id="vfio0"), "QEMU has not"),
        (node(1, cpus=(0,), sgx_epc_sections=("epc0",)), "QEMU has not"),
        (node(1, cpus=(0,), pci_segments=(1,)), "segment 0 only"),
    ],
)
def test_what_qemu_has_not(numa: NumaConfig, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        lay_out_machine([zone("a", GIB)], [numa], 2)


def test_too_large() -> None:
    with pytest.raises(UsageError, match="RAM ends at 0x400000000000"):
        lay_out_machine([zone("a", GIB, 64 * TIB)], [], 1)


def test_too_many_nodes() -> None:
    with pytest.raises(UsageError, match="take 129 NUMA nodes"):
        lay_out_machine([zone(f"z{number}", MIB, 128 * MIB) for number in range(64)], [], 1)


def test_linux_numbers_nodes_as_it_hears_of_them() -> None:
    numa = [
        node(0, cpus=(1,), memory_zones=("a",)),
        node(1, cpus=(0,), memory_zones=("b",)),
        node(4, memory_zones=("c",)),
    ]
    layout = lay_out_machine([zone("a", GIB, GIB), zone("b", GIB), zone("c", 0, GIB)], numa, 2)
    assert layout.numbers_in_linux == {1: 0, 0: 1, 4: 2, 5: 3, 6: 4}
    (warning,) = layout.warnings
    assert warning.endswith("node 0 is its node1, node 1 is its node0, node 4 is its node2")
    assert lay_out_machine([zone("a", GIB, GIB)], [node(0, memory_zones=("a",))], 2).warnings == ()
