"""The options of one machine together: the rules between them, the zones to build, distances and warnings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from tests.config import strategies
from tests.config.refusal import refused
from vhost_user.units import GIB, MIB, ByteCount
from virtio_mem.config import (
    ConfigError,
    HotplugMethod,
    MemoryConfig,
    MemoryZoneConfig,
    NumaConfig,
    SgxEpcConfig,
    VmMemoryConfig,
)
from virtio_mem.zone import ZoneSpec

ZONES = "--memory size=0,hotplug_method=virtio-mem --memory-zone id=a,size=1G id=b,size=1G"
EPC = f"{ZONES} --sgx-epc id=e,size=4K"
NODE_0 = f"{ZONES} --numa guest_numa_id=0,memory_zones=a"


def test_memory_alone_is_one_zone() -> None:
    text = (
        "size=1G,hugepages=on,hugepage_size=2M,shared=on,prefault=on,reserve=on,thp=off,"
        "hotplug_method=virtio-mem,hotplug_size=2G,hotplugged_size=512M"
    )
    config = VmMemoryConfig.from_options(text, numa=["guest_numa_id=3,memory_zones=mem0"])
    assert not config.user_zones
    (plan,) = config.zone_plans()
    assert plan.spec == ZoneSpec(
        id="mem0",
        size=ByteCount(GIB),
        hotplug_size=ByteCount(2 * GIB),
        file=None,
        shared=True,
        hugepages=True,
        hugepage_size=ByteCount(2 * MIB),
        host_numa_node=None,
        prefault=True,
        reserve=True,
        mergeable=False,
        thp=False,
        explicit=frozenset(item.split("=")[0] for item in text.split(",")),
    )
    assert (plan.hotplugged_size, plan.hotplug_method, plan.guest_numa_id) == (512 * MIB, HotplugMethod.VIRTIO_MEM, 3)


def test_memory_alone_without_hotplug() -> None:
    (plan,) = VmMemoryConfig.from_options("size=1G,mergeable=on").zone_plans()
    assert plan.spec == ZoneSpec("mem0", ByteCount(GIB), mergeable=True, explicit=frozenset({"size", "mergeable"}))
    assert (plan.hotplugged_size, plan.hotplug_method, plan.guest_numa_id) == (0, HotplugMethod.ACPI, None)


def test_zones_take_thp_and_the_hotplug_method_over_from_memory() -> None:
    zone = (
        "id=b,size=0,file=/f,host_numa_node=3,hotplug_size=8G,hotplugged_size=1G,mergeable=on,prefault=on,reserve=on,"
        "hugepages=on,hugepage_size=1G"
    )
    config = VmMemoryConfig.from_options(
        "size=0,thp=off,hotplug_method=virtio-mem",
        ["id=a,size=1G,shared=on", zone],
        ["guest_numa_id=4,memory_zones=b"],
    )
    assert config.user_zones
    first, second = config.zone_plans()
    assert first.spec == ZoneSpec(
        "a", ByteCount(GIB), shared=True, thp=False, explicit=frozenset({"id", "size", "shared", "thp"})
    )
    assert (first.hotplugged_size, first.hotplug_method, first.guest_numa_id) == (0, HotplugMethod.VIRTIO_MEM, None)
    assert second.spec == ZoneSpec(
        id="b",
        size=ByteCount(0),
        hotplug_size=ByteCount(8 * GIB),
        file=Path("/f"),
        shared=False,
        hugepages=True,
        hugepage_size=ByteCount(GIB),
        host_numa_node=3,
        prefault=True,
        reserve=True,
        mergeable=True,
        thp=False,
        explicit=frozenset(item.split("=")[0] for item in zone.split(",")) | {"thp"},
    )
    assert (second.hotplugged_size, second.hotplug_method, second.guest_numa_id) == (GIB, HotplugMethod.VIRTIO_MEM, 4)


def test_a_zone_is_mergeable_as_memory_says_unless_it_says_otherwise() -> None:
    zones = ["id=a,size=1G", "id=b,size=1G,mergeable=off", "id=c,size=1G,mergeable=on", "id=d,size=1G,shared=on"]
    on = VmMemoryConfig.from_options("size=0,mergeable=on", zones[:3]).zone_plans()
    assert [plan.spec.mergeable for plan in on] == [True, False, True]
    assert all("mergeable" in plan.spec.explicit for plan in on)
    off = VmMemoryConfig.from_options("size=0", zones).zone_plans()
    assert [plan.spec.mergeable for plan in off] == [False, False, True, False]
    assert ["mergeable" in plan.spec.explicit for plan in off] == [False, True, True, False]


def test_the_way_out_for_a_shared_zone_of_mergeable_memory_is_one() -> None:
    line = "--memory size=0,mergeable=on --memory-zone id=a,size=1G,shared=on"
    with pytest.raises(ConfigError, match="add mergeable=off to the zone"):
        VmMemoryConfig.parse(line)
    (plan,) = VmMemoryConfig.parse(f"{line},mergeable=off").zone_plans()
    assert (plan.spec.shared, plan.spec.mergeable) == (True, False)
    assert plan.spec.explicit == {"id", "size", "shared", "mergeable"}


def test_no_memory_option_at_all_is_what_cloud_hypervisor_takes() -> None:
    assert VmMemoryConfig.parse("") == VmMemoryConfig(memory=MemoryConfig(size=ByteCount(512 * MIB)))


@pytest.mark.parametrize(
    ("line", "field", "value", "limit"),
    [
        ("--memory size=0", "--memory size", "0", "needs memory zones"),
        ("--memory size=2G --memory-zone id=a,size=1G", "--memory size", "2G", "must be 0"),
        ("--memory-zone id=a,size=1G", "--memory size", "512M", "must be 0"),
        (
            "--memory size=0,hotplug_size=1G --memory-zone id=a,size=1G",
            "--memory hotplug_size",
            "1G",
            "no zone to go to",
        ),
        (
            "--memory size=0,hotplug_method=virtio-mem --memory-zone id=a,size=0,hotplug_size=1G",
            "--memory-zone size",
            0,
            "no memory to start with",
        ),
        (
            "--memory size=0 --memory-zone id=a,size=1G,hotplug_size=1G",
            "--memory-zone id=a hotplug_size",
            "1G",
            "needs hotplug_method=virtio-mem",
        ),
        ("--memory size=0 --memory-zone id=a,size=1G id=a,size=2G", "--memory-zone id", "a", "more than once"),
        (
            "--memory size=0 --memory-zone id=a,size=1G --sgx-epc id=a,size=4K",
            "--sgx-epc id",
            "a",
            "more than once",
        ),
        ("--memory size=1G --sgx-epc id=a,size=4K id=a,size=4K", "--sgx-epc id", "a", "more than once"),
        (
            "--memory size=0,mergeable=on --memory-zone id=a,size=1G,shared=on",
            "--memory-zone id=a shared",
            "on",
            "mergeable=on",
        ),
        (
            "--memory size=18446744073709551615,hotplug_size=1",
            "sum of sizes",
            "17179869184G",
            "exceeds 2**64 - 1",
        ),
        (f"{ZONES} --numa guest_numa_id=1,cpus=0 guest_numa_id=1,cpus=1", "--numa guest_numa_id", "1", "more than one"),
        (f"{ZONES} --numa guest_numa_id=1", "--numa guest_numa_id", "1", "nothing in it"),
        (f"{ZONES} --numa guest_numa_id=1,pci_segments=1", "--numa guest_numa_id", "1", "nothing in it"),
        (
            f"{ZONES} --numa guest_numa_id=1,memory_zones=[a,c]",
            "--numa guest_numa_id=1 memory_zones",
            "c",
            "does not exist",
        ),
        (
            f"{ZONES} --numa guest_numa_id=1,memory_zones=mem0",
            "--numa guest_numa_id=1 memory_zones",
            "mem0",
            "does not exist",
        ),
        (
            f"{ZONES} --numa guest_numa_id=1,sgx_epc_sections=e",
            "--numa guest_numa_id=1 sgx_epc_sections",
            "e",
            "does not exist",
        ),
        (
            f"{ZONES} --numa guest_numa_id=1,cpus=0,distances=2@20",
            "--numa guest_numa_id=1 distances",
            2,
            "does not exist",
        ),
        (
            f"{ZONES} --numa guest_numa_id=1,memory_zones=a guest_numa_id=2,memory_zones=a:b",
            "--numa guest_numa_id=2 memory_zones",
            "a",
            "belongs to node 1 already",
        ),
        (
            f"{ZONES} --numa guest_numa_id=1,cpus=0-3 guest_numa_id=2,cpus=4:2",
            "--numa guest_numa_id=2 cpus",
            2,
            "belongs to node 1 already",
        ),
        (
            f"{EPC} --numa guest_numa_id=1,sgx_epc_sections=e guest_numa_id=2,sgx_epc_sections=e",
            "--numa guest_numa_id=2 sgx_epc_sections",
            "e",
            "belongs to node 1 already",
        ),
        (
            f"{ZONES} --numa guest_numa_id=1,cpus=0,pci_segments=1 guest_numa_id=2,cpus=1,pci_segments=1",
            "--numa guest_numa_id=2 pci_segments",
            1,
            "belongs to node 1 already",
        ),
        (
            "--memory size=1G,hotplug_method=virtio-mem,hotplug_size=1G --numa guest_numa_id=65536,memory_zones=mem0",
            "--numa guest_numa_id",
            65536,
            "above 65535",
        ),
    ],
)
def test_a_broken_rule_is_refused(line: str, field: str, value: object, limit: str) -> None:
    with refused(field, value, limit):
        VmMemoryConfig.parse(line)


def test_hotplugged_size_too_goes_to_a_zone() -> None:
    memory = "size=0,hotplug_method=virtio-mem,hotplug_size=1G,hotplugged_size=1G"
    with refused("--memory hotplug_size", "1G", "no zone to go to"):
        VmMemoryConfig.from_options(memory, ["id=a,size=1G"])


def test_the_same_rules_hold_for_objects() -> None:
    memory = MemoryConfig(size=ByteCount(0))
    zone = MemoryZoneConfig(id="a", size=ByteCount(GIB))
    assert VmMemoryConfig(memory=memory, zones=(zone,)) == VmMemoryConfig.parse(
        "--memory size=0 --memory-zone id=a,size=1G"
    )
    with refused("--memory size", "0", "needs memory zones"):
        VmMemoryConfig(memory=memory)
    with refused("--memory-zone id", "a", "more than once"):
        VmMemoryConfig(memory=memory, zones=(zone, zone))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"memory": "size=1G"}, "memory"),
        ({"zones": "id=a,size=1G"}, "zones"),
        ({"zones": ("id=a,size=1G",)}, "zones"),
        ({"numa": None}, "numa"),
        ({"sgx_epc": (NumaConfig(guest_numa_id=0),)}, "sgx_epc"),
    ],
)
def test_a_keyword_argument_of_the_wrong_type_is_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        VmMemoryConfig(**{"memory": MemoryConfig(size=ByteCount(GIB)), **values})
    assert caught.value.field == field


@pytest.mark.parametrize("of", [set, frozenset, dict.fromkeys, iter])
def test_what_has_no_order_is_no_list_of_options(of: Callable[[list[object]], Any]) -> None:
    zone = MemoryZoneConfig(id="a", size=ByteCount(GIB))
    with pytest.raises(ConfigError, match="must be a tuple of MemoryZoneConfig"):
        VmMemoryConfig(memory=MemoryConfig(size=ByteCount(0)), zones=of([zone]))


def test_lists_of_options_are_taken_as_tuples() -> None:
    sections: Any = [SgxEpcConfig.parse("id=e,size=4K")]
    config = VmMemoryConfig(memory=MemoryConfig(size=ByteCount(GIB)), sgx_epc=sections)
    sections.clear()
    assert [section.id for section in config.sgx_epc] == ["e"]
    assert hash(config) == hash(VmMemoryConfig.parse(str(config)))


def test_a_high_node_is_fine_where_no_device_names_it() -> None:
    config = VmMemoryConfig.parse("--memory size=1G --numa guest_numa_id=65536,memory_zones=mem0")
    assert config.zone_plans()[0].guest_numa_id == 65536
    line = "--memory size=1G,hotplug_method=virtio-mem,hotplug_size=1G --numa guest_numa_id=65535,memory_zones=mem0"
    assert VmMemoryConfig.parse(line).zone_plans()[0].guest_numa_id == 65535


def matrix(*nodes: str) -> dict[int, dict[int, int]]:
    numa = [
        f"guest_numa_id={number},cpus={number},{rest}".rstrip(",")
        for number, _, rest in (n.partition(" ") for n in nodes)
    ]
    return VmMemoryConfig.from_options("size=1G", numa=numa).distance_matrix()


def test_distances_are_completed() -> None:
    assert matrix() == {}
    assert matrix("5") == {5: {5: 10}}
    assert matrix("0", "1") == {0: {0: 10, 1: 20}, 1: {0: 20, 1: 10}}
    assert matrix("0 distances=1@15", "1") == {0: {0: 10, 1: 15}, 1: {0: 15, 1: 10}}
    assert matrix("0", "1 distances=0@255") == {0: {0: 10, 1: 255}, 1: {0: 255, 1: 10}}


def test_one_direction_means_the_same_as_both() -> None:
    both = matrix("0 distances=[1@15,2@25]", "1 distances=[0@15,2@20]", "2 distances=[0@25,1@20]")
    assert both == {0: {0: 10, 1: 15, 2: 25}, 1: {0: 15, 1: 10, 2: 20}, 2: {0: 25, 1: 20, 2: 10}}
    assert matrix("0 distances=[1@15,2@25]", "1 distances=[2@20]", "2") == both
    assert matrix("2 distances=0@25:1@20", "1 distances=1@10:0@15", "0") == both


def test_two_directions_that_differ_stay_as_they_are_given() -> None:
    assert matrix("0 distances=1@15", "1 distances=0@20") == {0: {0: 10, 1: 15}, 1: {0: 20, 1: 10}}


@given(strategies.machines())
def test_distances_agree_with_what_was_given(config: VmMemoryConfig) -> None:
    given_distances = {
        (node.guest_numa_id, entry.destination): entry.distance for node in config.numa for entry in node.distances
    }
    ids = sorted(node.guest_numa_id for node in config.numa)
    table = config.distance_matrix()
    assert list(table) == ids
    for a in ids:
        assert list(table[a]) == ids
        for b in ids:
            if (a, b) in given_distances:
                assert table[a][b] == given_distances[a, b]
            elif a == b:
                assert table[a][b] == 10
            elif (b, a) in given_distances:
                assert table[a][b] == table[b][a]
            else:
                assert table[a][b] == table[b][a] == 20


@given(strategies.machines())
def test_every_zone_is_built_once_and_on_the_node_that_names_it(config: VmMemoryConfig) -> None:
    plans = config.zone_plans()
    assert [plan.spec.id for plan in plans] == ([zone.id for zone in config.zones] or ["mem0"])
    assert sum(plan.spec.size for plan in plans) == config.memory.size + sum(zone.size for zone in config.zones)
    owners = {zone: node.guest_numa_id for node in config.numa for zone in node.memory_zones}
    assert [plan.guest_numa_id for plan in plans] == [owners.get(plan.spec.id) for plan in plans]
    assert all(plan.hotplugged_size <= plan.spec.hotplug_size for plan in plans)


def unusable(what: str) -> str:
    return f"a Linux guest can't use {what}, as it plugs multiples of 128M"


PAGE_STRUCTURES = "a Linux guest that has all of it in a movable zone"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--memory size=1G", []),
        ("--memory size=1G,shared=on,hugepages=on,prefault=on,reserve=on", []),
        ("--memory size=1G --numa guest_numa_id=0,memory_zones=mem0", []),
        ("--memory size=1G --numa guest_numa_id=1,memory_zones=mem0", ["the PCI bus belongs to node 0"]),
        ("--memory size=1G --numa guest_numa_id=0,cpus=0-3", ["zone mem0 is on no node"]),
        (f"{ZONES} --numa guest_numa_id=0,memory_zones=b", ["zone a is on no node"]),
        (
            f"{ZONES} --numa guest_numa_id=1,cpus=0 guest_numa_id=2,cpus=1",
            ["the PCI bus belongs to node 0", "zone a is on no node", "zone b is on no node"],
        ),
        (
            f"{NODE_0},distances=1@15 guest_numa_id=1,memory_zones=b,distances=0@20",
            ["15 from node 0 to node 1, but 20 back"],
        ),
        (
            f"{NODE_0},distances=1@10 guest_numa_id=1,memory_zones=b",
            ["10 between nodes 0 and 1"],
        ),
        (
            f"{NODE_0},distances=1@15 guest_numa_id=1,memory_zones=b,distances=0@15",
            [],
        ),
        (
            "--memory size=0,shared=on,hugepages=on,hugepage_size=2M,prefault=on,reserve=on --memory-zone id=a,size=1G",
            [
                f"--memory {key}: has no effect"
                for key in ("shared", "hugepages", "hugepage_size", "prefault", "reserve")
            ],
        ),
        ("--memory size=0,shared=off --memory-zone id=a,size=1G", ["--memory shared: has no effect"]),
        ("--memory size=0,mergeable=on,thp=off,hotplug_method=virtio-mem --memory-zone id=a,size=1G", []),
        ("--memory size=1G,hotplug_method=virtio-mem,hotplug_size=1G", []),
        ("--memory size=1G,hotplug_method=acpi,hotplug_size=200M", []),
        (
            "--memory size=1G,hotplug_method=virtio-mem,hotplug_size=1000M",
            [f"--memory hotplug_size: {unusable('the last 104M of 1000M')}; use 896M or 1G"],
        ),
        ("--memory size=1G,hotplug_method=virtio-mem,hotplug_size=32G", []),
        (
            f"--memory size=1G,hotplug_method=virtio-mem,hotplug_size={32 * 1024 + 128}M",
            [f"hotplug_size={32 * 1024 + 128}M: {PAGE_STRUCTURES} needs 514M for page structures, of its 1G of"],
        ),
        (
            f"{ZONES},hotplug_size=64G id=c,size=0,hotplug_size=16T",
            [f"hotplug_size={16 * 1024 + 64}G: {PAGE_STRUCTURES} needs 257G for page structures, of its 2G of"],
        ),
        ("--memory size=1G,hotplug_method=acpi,hotplug_size=1T", []),
        (
            f"{ZONES},hotplug_size=64M id=c,size=0,hotplug_size=129M id=d,size=0,hotplug_size=256M",
            [
                f"--memory-zone id=b hotplug_size: {unusable('64M')}; use 128M",
                f"--memory-zone id=c hotplug_size: {unusable('the last 1M of 129M')}; use 128M or 256M",
            ],
        ),
    ],
)
def test_warnings_say_what_may_not_do_what_was_meant(line: str, expected: list[str]) -> None:
    warnings = VmMemoryConfig.parse(line).warnings
    assert len(warnings) == len(expected)
    for warning, words in zip(warnings, expected, strict=True):
        assert words in warning
    lost = [warning for warning in warnings if "hotplug_size" in warning and "page structures" not in warning]
    assert not [warning for warning in lost if warning not in expected]


def test_options_may_be_repeated_or_have_several_values() -> None:
    expected = VmMemoryConfig.from_options(
        "size=0",
        ["id=a,size=1G", "id=b,size=1G", "id=c,size=1G"],
        ["guest_numa_id=0,memory_zones=a:b", "guest_numa_id=1,memory_zones=c"],
        ["id=e,size=4K", "id=f,size=4K"],
    )
    together = [
        "--memory size=0 --memory-zone id=a,size=1G id=b,size=1G --memory-zone id=c,size=1G",
        "--numa guest_numa_id=0,memory_zones=a:b guest_numa_id=1,memory_zones=c --sgx-epc id=e,size=4K id=f,size=4K",
    ]
    repeated = [
        "--sgx-epc id=e,size=4K --memory-zone id=a,size=1G --numa guest_numa_id=0,memory_zones=[a,b] --memory size=0",
        "--memory-zone=id=b,size=1G --sgx-epc=id=f,size=4K --memory-zone id=c,size=1G",
        "--numa guest_numa_id=1,memory_zones=[c]",
    ]
    for line in (" ".join(together), " ".join(repeated)):
        assert VmMemoryConfig.parse(line) == expected
        assert VmMemoryConfig.from_args(line.split()) == expected


@pytest.mark.parametrize(
    ("arguments", "field", "value", "limit"),
    [
        (["size=1G"], "arguments", "size=1G", "before any option"),
        (["--cpus", "boot=8"], "arguments", "--cpus", "not an option of memory"),
        (["--memory=size=1G", "--kernel=x"], "arguments", "--kernel", "not an option of memory"),
        (["--memory"], "--memory", None, "no value"),
        (["--memory-zone", "--memory", "size=0"], "--memory-zone", None, "no value"),
        (["--memory", "size=1G", "size=2G"], "--memory", "size=1G size=2G", "may be given only once"),
        (["--memory", "size=1G", "--memory", "size=1G"], "--memory", "size=1G size=1G", "may be given only once"),
        (["--memory", ""], "--memory size", None, "mandatory"),
        (["--memory="], "--memory size", None, "mandatory"),
        (["--memory", "size=1G", "--numa", "--numa"], "--numa", None, "no value"),
    ],
)
def test_arguments_that_can_not_be_are_refused(arguments: list[str], field: str, value: object, limit: str) -> None:
    with refused(field, value, limit):
        VmMemoryConfig.from_args(arguments)


@pytest.mark.parametrize("line", ["--memory 'size=1G", '--memory "', "--memory size=1G\\"])
def test_a_line_whose_quotes_do_not_end_is_refused(line: str) -> None:
    with refused("arguments", line, "cut into words"):
        VmMemoryConfig.parse(line)


@pytest.mark.parametrize("words", [["--memory", "size=1G"], b"--memory size=1G", None])
def test_what_is_no_line_is_refused_with_who_takes_words(words: object) -> None:
    with pytest.raises(ConfigError, match=r"must be one line of text; .*from_args\(\)$") as caught:
        VmMemoryConfig.parse(words)  # type: ignore[arg-type]
    assert (caught.value.field, caught.value.value) == ("arguments", words)


def test_a_reference_to_nothing_is_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"choose among those that do: a, b$"):
        VmMemoryConfig.parse(f"{ZONES} --numa guest_numa_id=0,memory_zones=c")
    with pytest.raises(ConfigError, match=r"choose among those that do: none$"):
        VmMemoryConfig.parse(f"{ZONES} --numa guest_numa_id=0,sgx_epc_sections=e")


def test_sizes_may_add_up_to_all_that_has_an_address() -> None:
    config = VmMemoryConfig.parse("--memory size=18446744073709551614,hotplug_size=1")
    assert sum(plan.spec.size + plan.spec.hotplug_size for plan in config.zone_plans()) == 2**64 - 1
