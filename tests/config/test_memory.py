"""--memory, --memory-zone and --sgx-epc: defaults, values and every rule of one option alone."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.refusal import refused
from vhost_user.units import GIB, KIB, MIB, TIB, U64_MAX, ByteCount
from virtio_mem.config import ConfigError, HotplugMethod, MemoryConfig, MemoryZoneConfig, SgxEpcConfig

Config = MemoryConfig | MemoryZoneConfig | SgxEpcConfig

GIB_1 = ByteCount(GIB)
MEMORY: dict[str, Any] = {"size": GIB_1}
ZONE: dict[str, Any] = {"id": "z", "size": GIB_1}
ACPI, VIRTIO_MEM = HotplugMethod.ACPI, HotplugMethod.VIRTIO_MEM


def test_memory_is_private_small_pages_with_thp_and_acpi_unless_told_otherwise() -> None:
    assert MemoryConfig.parse("size=1G") == MemoryConfig(
        size=GIB_1,
        mergeable=False,
        shared=False,
        hugepages=False,
        hugepage_size=None,
        hotplug_method=HotplugMethod.ACPI,
        hotplug_size=None,
        hotplugged_size=None,
        prefault=False,
        reserve=False,
        thp=True,
    )


def test_every_key_of_memory_is_read() -> None:
    text = (
        "size=1,shared=on,hugepages=on,hugepage_size=2M,hotplug_method=virtio-mem,hotplug_size=3K,hotplugged_size=2K,"
        "prefault=on,reserve=on,thp=off"
    )
    assert MemoryConfig.parse(text) == MemoryConfig(
        size=ByteCount(1),
        shared=True,
        hugepages=True,
        hugepage_size=ByteCount(2 * MIB),
        hotplug_method=VIRTIO_MEM,
        hotplug_size=ByteCount(3 * KIB),
        hotplugged_size=ByteCount(2 * KIB),
        prefault=True,
        reserve=True,
        thp=False,
    )
    assert MemoryConfig.parse("size=1,mergeable=on") == MemoryConfig(size=ByteCount(1), mergeable=True)


def test_every_key_of_a_zone_is_read() -> None:
    text = (
        "id=z,size=1,file=/foo,hugepages=on,hugepage_size=1G,host_numa_node=7,hotplug_size=3K,hotplugged_size=2K,"
        "prefault=on,reserve=on,mergeable=on"
    )
    assert MemoryZoneConfig.parse(text) == MemoryZoneConfig(
        id="z",
        size=ByteCount(1),
        file=Path("/foo"),
        hugepages=True,
        hugepage_size=ByteCount(GIB),
        host_numa_node=7,
        hotplug_size=ByteCount(3 * KIB),
        hotplugged_size=ByteCount(2 * KIB),
        prefault=True,
        reserve=True,
        mergeable=True,
    )
    assert MemoryZoneConfig.parse("shared=on,size=1,id=z") == MemoryZoneConfig(id="z", size=ByteCount(1), shared=True)


def test_a_zone_has_nothing_on_unless_told_otherwise() -> None:
    zone = MemoryZoneConfig.parse("id=z,size=1G")
    assert (zone.shared, zone.hugepages, zone.prefault, zone.reserve) == (False, False, False, False)
    assert (zone.file, zone.hugepage_size, zone.host_numa_node, zone.mergeable) == (None, None, None, None)
    assert (zone.hotplug_size, zone.hotplugged_size) == (None, None)


def test_an_epc_section_is_read() -> None:
    assert SgxEpcConfig.parse("id=epc0,size=32M") == SgxEpcConfig(id="epc0", size=ByteCount(32 * MIB), prefault=False)
    assert SgxEpcConfig.parse("prefault=on,id=epc0,size=4K").prefault


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1", 1),
        ("00017", 17),
        ("1K", KIB),
        ("1024M", GIB),
        ("3G", 3 * GIB),
        ("2T", 2 * TIB),
        ('"1G"', GIB),
        (" 1G ", GIB),
        ("18446744073709551615", U64_MAX),
        ("17179869183G", U64_MAX // GIB * GIB),
        ("16777215T", U64_MAX // TIB * TIB),
        ("000018014398509481983K", U64_MAX // KIB * KIB),
    ],
)
def test_sizes_are_bytes_or_have_a_suffix(text: str, size: int) -> None:
    assert MemoryConfig.parse(f"size={text}").size == size


@pytest.mark.parametrize(
    "text",
    ["1g", "1m", "1k", "1t", "1KK", "1GB", "G", "-1", "+1", "1.5G", "1 G", "0x10", "1_000", "\u0664", "1P", '""'],
)
def test_a_size_that_is_no_number_is_refused(text: str) -> None:
    with refused("--memory size", text, "whole number with at most one suffix"):
        MemoryConfig.parse(f"size={text}")


@pytest.mark.parametrize(
    "text", ["18446744073709551616", "17179869184G", "16777216T", "100000000000000000000", "1" + "0" * 5000, "9" * 5000]
)
def test_a_size_beyond_64_bits_is_refused(text: str) -> None:
    with refused("--memory size", text, "18446744073709551615"):
        MemoryConfig.parse(f"size={text}")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0"), (1, "1"), (1500, "1500"), (3 * KIB, "3K"), (1536 * MIB, "1536M"), (2 * GIB, "2G"), (TIB, "1024G")],
)
def test_sizes_are_printed_with_a_suffix_that_cloud_hypervisor_reads(size: int, text: str) -> None:
    assert str(MemoryConfig(size=ByteCount(size))) == f"size={text}"


@given(st.integers(0, U64_MAX))
def test_a_number_of_bytes_is_a_size(size: int) -> None:
    assert MemoryConfig.parse(f"size={size}").size == size


@pytest.mark.parametrize(
    ("text", "value"), [("on", True), ("ON", True), ("true", True), ("off", False), ("False", False)]
)
def test_switches_are_on_or_off_in_any_case(text: str, value: bool) -> None:
    assert MemoryConfig.parse(f"size=1G,thp={text}").thp is value


@pytest.mark.parametrize("text", ["yes", "1", "0", "onn", '"on"', "[on]"])
def test_a_switch_that_is_neither_is_refused(text: str) -> None:
    with refused("--memory shared", text, "on or off"):
        MemoryConfig.parse(f"size=1G,shared={text}")


@pytest.mark.parametrize(
    ("text", "method"), [("acpi", ACPI), ("ACPI", ACPI), ("virtio-mem", VIRTIO_MEM), ("Virtio-Mem", VIRTIO_MEM)]
)
def test_hotplug_methods_are_read_in_any_case(text: str, method: HotplugMethod) -> None:
    assert MemoryConfig.parse(f"size=1G,hotplug_method={text}").hotplug_method is method


def test_an_unknown_hotplug_method_is_refused() -> None:
    with refused("--memory hotplug_method", "foo", "acpi or virtio-mem"):
        MemoryConfig.parse("size=1G,hotplug_method=foo")
    with pytest.raises(ConfigError) as written:
        MemoryConfig.parse("size=1G,hotplug_method=foo")
    assert written.value.remedy == "write acpi or virtio-mem"
    with pytest.raises(ConfigError) as given:
        MemoryConfig(size=GIB_1, hotplug_method="acpi")  # type: ignore[arg-type]
    assert given.value.remedy == "give a HotplugMethod"


@pytest.mark.parametrize(
    ("of", "text", "field"),
    [
        (MemoryConfig, "", "--memory size"),
        (MemoryConfig, "mergeable=on", "--memory size"),
        (MemoryZoneConfig, "size=1G", "--memory-zone id"),
        (MemoryZoneConfig, "id=z", "--memory-zone id=z size"),
        (SgxEpcConfig, "size=1G", "--sgx-epc id"),
        (SgxEpcConfig, "id=e", "--sgx-epc id=e size"),
    ],
)
def test_a_missing_mandatory_key_is_refused(of: type[Config], text: str, field: str) -> None:
    with refused(field, None, "mandatory"):
        of.parse(text)


def test_a_key_without_a_value_is_refused() -> None:
    with refused("--memory size", "", "no value"):
        MemoryConfig.parse("size=,shared=on")
    with refused("--memory-zone id=z file", "", "no value"):
        MemoryZoneConfig.parse("id=z,size=1G,file=")
    with refused("--memory-zone id", "", "no value"):
        MemoryZoneConfig.parse("id=,size=1G")


def test_a_key_of_another_option_is_refused() -> None:
    with refused("--memory file", "/foo", "no such key"):
        MemoryConfig.parse("size=1G,file=/foo")
    with refused("--memory-zone thp", "on", "no such key"):
        MemoryZoneConfig.parse("id=z,size=1G,thp=on")


@pytest.mark.parametrize("text", ['""', '"'])
def test_an_empty_path_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        MemoryZoneConfig.parse(f"id=z,size=1G,file={text}")


def test_paths_may_hold_what_cuts_options() -> None:
    assert MemoryZoneConfig.parse('id=z,size=1G,file="/a,b=[c]"').file == Path("/a,b=[c]")
    zone = MemoryZoneConfig(id="z", size=GIB_1, file=Path('/a,"b" '))
    assert str(zone) == 'id=z,size=1G,file="/a,""b"" "'


RULES: list[tuple[type[Config], str, dict[str, Any], str, object, str]] = [
    (
        MemoryConfig,
        "size=1G,hotplug_size=0",
        {**MEMORY, "hotplug_size": 0},
        "--memory hotplug_size",
        0,
        "0 is invalid",
    ),
    (
        MemoryConfig,
        "size=1G,hotplug_method=virtio-mem,hotplug_size=1G,hotplugged_size=0",
        {**MEMORY, "hotplug_method": VIRTIO_MEM, "hotplug_size": GIB_1, "hotplugged_size": 0},
        "--memory hotplugged_size",
        0,
        "0 is invalid",
    ),
    (
        MemoryConfig,
        "size=1G,hotplug_method=virtio-mem,hotplugged_size=1G",
        {**MEMORY, "hotplug_method": VIRTIO_MEM, "hotplugged_size": GIB_1},
        "--memory hotplugged_size",
        "1G",
        "needs hotplug_size",
    ),
    (
        MemoryConfig,
        "size=1G,hotplug_method=virtio-mem,hotplug_size=1G,hotplugged_size=1025M",
        {**MEMORY, "hotplug_method": VIRTIO_MEM, "hotplug_size": GIB_1, "hotplugged_size": 1025 * MIB},
        "--memory hotplugged_size",
        "1025M",
        "can't exceed hotplug_size=1G",
    ),
    (
        MemoryConfig,
        "size=1G,hotplug_size=1G,hotplugged_size=512M",
        {**MEMORY, "hotplug_size": GIB_1, "hotplugged_size": 512 * MIB},
        "--memory hotplugged_size",
        "512M",
        "hotplug_method=virtio-mem",
    ),
    (
        MemoryConfig,
        "size=1G,hugepage_size=2M",
        {**MEMORY, "hugepage_size": 2 * MIB},
        "--memory hugepage_size",
        "2M",
        "needs hugepages=on",
    ),
    (
        MemoryConfig,
        "size=1G,hugepages=on,hugepage_size=3M",
        {**MEMORY, "hugepages": True, "hugepage_size": 3 * MIB},
        "--memory hugepage_size",
        "3M",
        "power of two",
    ),
    (
        MemoryConfig,
        "size=1G,hugepages=on,hugepage_size=0",
        {**MEMORY, "hugepages": True, "hugepage_size": 0},
        "--memory hugepage_size",
        0,
        "0 is invalid",
    ),
    (
        MemoryConfig,
        "size=1G,shared=on,mergeable=on",
        {**MEMORY, "shared": True, "mergeable": True},
        "--memory mergeable",
        "on",
        "shared=on",
    ),
    (
        MemoryZoneConfig,
        "id=z,size=0",
        {"id": "z", "size": 0},
        "--memory-zone id=z size",
        "0",
        "a hotplug_size or both",
    ),
    (
        MemoryZoneConfig,
        'id="",size=1G',
        {**ZONE, "id": ""},
        "--memory-zone id",
        None,
        "not empty",
    ),
    (
        MemoryZoneConfig,
        "id=__z,size=1G",
        {**ZONE, "id": "__z"},
        "--memory-zone id",
        "__z",
        "reserved",
    ),
    (
        MemoryZoneConfig,
        "id=z,size=1G,host_numa_node=4294967296",
        {**ZONE, "host_numa_node": 2**32},
        "--memory-zone id=z host_numa_node",
        2**32,
        "0 to 4294967295",
    ),
    (
        MemoryZoneConfig,
        "id=z,size=1G,shared=on,mergeable=on",
        {**ZONE, "shared": True, "mergeable": True},
        "--memory-zone id=z mergeable",
        "on",
        "shared=on",
    ),
    (
        MemoryZoneConfig,
        "id=z,size=1G,hotplug_size=0",
        {**ZONE, "hotplug_size": 0},
        "--memory-zone id=z hotplug_size",
        0,
        "0 is invalid",
    ),
    (
        MemoryZoneConfig,
        "id=z,size=1G,hotplug_size=1G,hotplugged_size=0",
        {**ZONE, "hotplug_size": GIB_1, "hotplugged_size": 0},
        "--memory-zone id=z hotplugged_size",
        0,
        "0 is invalid",
    ),
    (
        MemoryZoneConfig,
        "id=z,size=1G,hotplugged_size=1G",
        {**ZONE, "hotplugged_size": GIB_1},
        "--memory-zone id=z hotplugged_size",
        "1G",
        "needs hotplug_size",
    ),
    (
        MemoryZoneConfig,
        "id=z,size=1G,hotplug_size=1G,hotplugged_size=2G",
        {**ZONE, "hotplug_size": GIB_1, "hotplugged_size": 2 * GIB},
        "--memory-zone id=z hotplugged_size",
        "2G",
        "can't exceed hotplug_size=1G",
    ),
    (
        MemoryZoneConfig,
        "id=z,size=1G,hugepage_size=2M",
        {**ZONE, "hugepage_size": 2 * MIB},
        "--memory-zone id=z hugepage_size",
        "2M",
        "needs hugepages=on",
    ),
    (
        MemoryZoneConfig,
        "id=z,size=1G,hugepages=on,hugepage_size=6M",
        {**ZONE, "hugepages": True, "hugepage_size": 6 * MIB},
        "--memory-zone id=z hugepage_size",
        "6M",
        "power of two",
    ),
    (
        SgxEpcConfig,
        "id=e,size=0",
        {"id": "e", "size": 0},
        "--sgx-epc id=e size",
        0,
        "0 is invalid",
    ),
    (
        SgxEpcConfig,
        "id=e,size=4097",
        {"id": "e", "size": 4097},
        "--sgx-epc id=e size",
        "4097",
        "multiple of the enclave page size, 4K",
    ),
]


@pytest.mark.parametrize(("of", "text", "values", "field", "value", "limit"), RULES)
def test_a_broken_rule_is_refused_in_text_and_in_keywords_alike(
    of: type[Config], text: str, values: dict[str, Any], field: str, value: object, limit: str
) -> None:
    with refused(field, value, limit):
        of.parse(text)
    with refused(field, value, limit):
        of(**values)


def test_limits_themselves_are_allowed() -> None:
    assert (
        MemoryConfig.parse("size=1G,hotplug_method=virtio-mem,hotplug_size=1G,hotplugged_size=1G").hotplugged_size
        == GIB
    )
    assert MemoryZoneConfig.parse("id=z,size=0,hotplug_size=1,hotplugged_size=1").size == 0
    assert MemoryZoneConfig.parse("id=z,size=1G,host_numa_node=4294967295").host_numa_node == 2**32 - 1
    assert MemoryConfig.parse("size=0").size == 0
    assert MemoryConfig.parse("size=1,hugepages=on,hugepage_size=1").hugepage_size == 1


def test_huge_pages_may_be_said_to_be_shared() -> None:
    assert MemoryConfig.parse("size=1G,hugepages=on,shared=on").shared


def test_a_shared_zone_without_a_file_may_be_placed() -> None:
    assert MemoryZoneConfig.parse("id=z,size=1G,shared=on,host_numa_node=1").host_numa_node == 1
    assert MemoryZoneConfig.parse("id=z,size=1G,file=/foo,host_numa_node=1").host_numa_node == 1


@pytest.mark.parametrize(
    ("of", "values", "field"),
    [
        (MemoryConfig, {"size": "1G"}, "--memory size"),
        (MemoryConfig, {"size": True}, "--memory size"),
        (MemoryConfig, {"size": None}, "--memory size"),
        (MemoryConfig, {"size": 1.5}, "--memory size"),
        (MemoryConfig, {"size": -1}, "--memory size"),
        (MemoryConfig, {"size": 2**64}, "--memory size"),
        (MemoryConfig, {**MEMORY, "shared": 1}, "--memory shared"),
        (MemoryConfig, {**MEMORY, "thp": None}, "--memory thp"),
        (MemoryConfig, {**MEMORY, "hotplug_method": "virtio-mem"}, "--memory hotplug_method"),
        (MemoryZoneConfig, {**ZONE, "id": 5}, "--memory-zone id"),
        (MemoryZoneConfig, {**ZONE, "id": None}, "--memory-zone id"),
        (MemoryZoneConfig, {**ZONE, "id": "a\0b"}, "--memory-zone id"),
        (MemoryZoneConfig, {**ZONE, "id": "\ud800"}, "--memory-zone id"),
        (MemoryZoneConfig, {**ZONE, "id": "a\udcff"}, "--memory-zone id"),
        (MemoryZoneConfig, {**ZONE, "file": "/foo"}, "--memory-zone id=z file"),
        (MemoryZoneConfig, {**ZONE, "file": Path("/f\0")}, "--memory-zone id=z file"),
        (MemoryZoneConfig, {**ZONE, "file": Path("/\ud800")}, "--memory-zone id=z file"),
        (MemoryZoneConfig, {**ZONE, "host_numa_node": -1}, "--memory-zone id=z host_numa_node"),
        (MemoryZoneConfig, {**ZONE, "host_numa_node": "0"}, "--memory-zone id=z host_numa_node"),
        (MemoryZoneConfig, {**ZONE, "mergeable": "on"}, "--memory-zone id=z mergeable"),
    ],
)
def test_a_keyword_argument_of_the_wrong_type_is_refused(of: type[Config], values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        of(**values)
    assert caught.value.field == field
    assert caught.value.limit in str(caught.value)


def test_text_that_no_system_call_takes_is_refused() -> None:
    for name in ("a\0b", "\ud800", "a\udcff"):
        with refused("--memory-zone id", repr(name), "has to be UTF-8 without a zero byte"):
            MemoryZoneConfig.parse(f"size=1G,id={name}")
    for path in (Path("/a\0b"), Path("/\ud800")):
        with refused("--memory-zone id=z file", repr(path), "without a zero byte"):
            MemoryZoneConfig.parse(f"id=z,size=1G,file={path}")
    # What os.fsdecode() makes of a path that is no UTF-8.
    assert MemoryZoneConfig.parse("id=z,size=1G,file=/\udcff").file == Path("/\udcff")


def test_configurations_can_not_be_changed() -> None:
    config = MemoryConfig.parse("size=1G")
    with pytest.raises(AttributeError):
        config.size = ByteCount(0)  # type: ignore[misc]
    assert hash(config) == hash(MemoryConfig(size=GIB_1))


def test_a_default_that_was_written_is_printed_again_and_makes_no_difference_else() -> None:
    written = MemoryConfig.parse("thp=on,size=1G,shared=off")
    assert str(written) == "size=1G,shared=off,thp=on"
    assert written.explicit == {"size", "shared", "thp"}
    assert written == MemoryConfig.parse("size=1G")
    assert str(MemoryConfig(size=GIB_1, thp=True, prefault=True)) == "size=1G,prefault=on"
