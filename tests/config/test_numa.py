"""--numa: one node alone."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.refusal import refused
from virtio_mem.config import ConfigError, NumaConfig, NumaDistance


def test_every_key_is_read() -> None:
    text = "guest_numa_id=0,cpus=[0-1],distances=[1@15],memory_zones=[a],sgx_epc_sections=[e],pci_segments=[0,2-3]"
    assert NumaConfig.parse(text) == NumaConfig(
        guest_numa_id=0,
        cpus=(0, 1),
        distances=(NumaDistance(1, 15),),
        memory_zones=("a",),
        sgx_epc_sections=("e",),
        pci_segments=(0, 2, 3),
    )
    assert NumaConfig.parse("guest_numa_id=2,device_id=gpu0") == NumaConfig(guest_numa_id=2, device_id="gpu0")


def test_a_node_may_be_given_its_number_alone() -> None:
    node = NumaConfig.parse("guest_numa_id=4294967295")
    assert (node.guest_numa_id, node.device_id) == (2**32 - 1, None)
    lists = [node.cpus, node.distances, node.memory_zones, node.sgx_epc_sections, node.pci_segments]
    assert lists == [()] * 5
    assert str(node) == "guest_numa_id=4294967295"


def test_names_with_special_characters_are_listed_in_quotes() -> None:
    node = NumaConfig(guest_numa_id=0, memory_zones=("a,b", "c:d", " e", "[f]"))
    assert str(node) == 'guest_numa_id=0,memory_zones=["a,b",c:d," e","[f]"]'
    assert NumaConfig.parse('guest_numa_id=0,memory_zones="a:b":c').memory_zones == ("a:b", "c")


@pytest.mark.parametrize(
    ("cpus", "shown"),
    [
        ((3,), "[3]"),
        ((0, 1), "[0-1]"),
        ((0, 2), "[0,2]"),
        ((7, 1, 2, 3, 0), "[7,1-3,0]"),
        ((3, 2, 1), "[3,2,1]"),
        ((*range(100), 255), "[0-99,255]"),
        (tuple(range(8192)), "[0-8191]"),
    ],
)
def test_cpus_are_printed_as_ranges_in_their_order(cpus: tuple[int, ...], shown: str) -> None:
    assert str(NumaConfig(guest_numa_id=0, cpus=cpus)) == f"guest_numa_id=0,cpus={shown}"


@given(st.lists(st.integers(0, 8191), min_size=1, unique=True))
def test_cpus_in_either_syntax_are_those_that_were_written(cpus: list[int]) -> None:
    for text in (":".join(map(str, cpus)), f"[{','.join(map(str, cpus))}]"):
        assert NumaConfig.parse(f"guest_numa_id=0,cpus={text}").cpus == tuple(cpus)


@pytest.mark.parametrize(
    ("text", "value", "limit"),
    [
        ("3-1", "3-1", "from a lower to a higher"),
        ("3-3", "3-3", "from a lower to a higher"),
        ("[0,3-1]", "3-1", "from a lower to a higher"),
        ("8192", 8192, "0 to 8191"),
        ("0-8192", 8192, "0 to 8191"),
        ("0-18446744073709551615", 18446744073709551615, "0 to 8191"),
        ("100000000000000000000", 10**20, "0 to 8191"),
        ("1:1", "1", "twice"),
        ("[0-4,3]", "3", "twice"),
        ("1-2-3", "2-3", "0 to 8191"),
        ("-1", "", "0 to 8191"),
        ("1-", "", "0 to 8191"),
        ("a", "a", "0 to 8191"),
        ("[1:2]", "1:2", "0 to 8191"),
        ("[]", "[]", "empty element"),
        ("1:", "1:", "empty element"),
        ("[1]2", "[1]2", "behind its list"),
    ],
)
def test_cpus_that_can_not_be_are_refused(text: str, value: object, limit: str) -> None:
    with refused("--numa guest_numa_id=0 cpus", value, limit):
        NumaConfig.parse(f"guest_numa_id=0,cpus={text}")


@pytest.mark.parametrize(("text", "remedy"), [("5-5", "write 5"), ("[0,05-5]", "write 5"), ("6-5", "swap its ends")])
def test_a_range_that_does_not_rise_is_refused_with_what_to_write(text: str, remedy: str) -> None:
    """Cloud Hypervisor refuses a range of one number too."""
    with pytest.raises(ConfigError) as caught:
        NumaConfig.parse(f"guest_numa_id=0,cpus={text}")
    assert caught.value.remedy == remedy


def test_a_list_without_brackets_is_not_cut_at_commas() -> None:
    with refused("--numa", "7", "key=value"):
        NumaConfig.parse("guest_numa_id=0,cpus=1-3,7")


@pytest.mark.parametrize("distance", [10, 11, 254, 255])
def test_distances_have_eight_bits_from_ten_on(distance: int) -> None:
    assert NumaConfig.parse(f"guest_numa_id=0,distances=1@{distance}").distances == (NumaDistance(1, distance),)


@pytest.mark.parametrize(
    ("text", "value", "limit"),
    [
        ("1@9", "1@9", "10 to 255"),
        ("1@0", "1@0", "10 to 255"),
        ("[2@15,1@256]", "1@256", "10 to 255"),
        ("4294967296@15", "4294967296@15", "0 to 4294967295"),
        ("1", "1", "node@distance"),
        ("1@", "1@", "whole number"),
        ("@15", "@15", "whole number"),
        ("1@15@20", "1@15@20", "whole number"),
        ("0@11", "[0@11]", "distance to itself is 10"),
        ("1@15:1@15", "1@15", "twice"),
        ("[1@15,1@16]", "[1@15,1@16]", "more than one distance to node 1"),
    ],
)
def test_distances_that_can_not_be_are_refused(text: str, value: object, limit: str) -> None:
    with refused("--numa guest_numa_id=0 distances", value, limit):
        NumaConfig.parse(f"guest_numa_id=0,distances={text}")


def test_a_node_may_say_that_it_is_ten_from_itself() -> None:
    assert NumaConfig.parse("guest_numa_id=3,distances=3@10").distances == (NumaDistance(3, 10),)


def test_a_distance_alone_is_checked() -> None:
    assert NumaDistance.parse("1@15") == NumaDistance(1, 15)
    with refused("distance", 256, "10 to 255"):
        NumaDistance(1, 256)
    with refused("distance", "15", "10 to 255"):
        NumaDistance(1, "15")  # type: ignore[arg-type]
    with refused("destination", -1, "0 to 4294967295"):
        NumaDistance(-1, 20)


@pytest.mark.parametrize(
    ("text", "values", "field", "value", "limit"),
    [
        (
            "guest_numa_id=4294967296",
            {"guest_numa_id": 2**32},
            "--numa guest_numa_id",
            2**32,
            "0 to 4294967295",
        ),
        (
            "guest_numa_id=0,device_id=gpu0,cpus=0",
            {"guest_numa_id": 0, "device_id": "gpu0", "cpus": (0,)},
            "--numa guest_numa_id=0 device_id",
            "gpu0",
            "neither cpus nor memory_zones",
        ),
        (
            "guest_numa_id=0,device_id=gpu0,memory_zones=a",
            {"guest_numa_id": 0, "device_id": "gpu0", "memory_zones": ("a",)},
            "--numa guest_numa_id=0 device_id",
            "gpu0",
            "neither cpus nor memory_zones",
        ),
        (
            'guest_numa_id=0,device_id=""',
            {"guest_numa_id": 0, "device_id": ""},
            "--numa guest_numa_id=0 device_id",
            None,
            "not empty",
        ),
        (
            "guest_numa_id=1,cpus=0,pci_segments=[0,1]",
            {"guest_numa_id": 1, "cpus": (0,), "pci_segments": (0, 1)},
            "--numa guest_numa_id=1 pci_segments",
            "[0-1]",
            "belongs to node 0",
        ),
        (
            "guest_numa_id=1,pci_segments=96",
            {"guest_numa_id": 1, "pci_segments": (96,)},
            "--numa guest_numa_id=1 pci_segments",
            96,
            "0 to 95",
        ),
        (
            "guest_numa_id=0,memory_zones=[a,b,a]",
            {"guest_numa_id": 0, "memory_zones": ("a", "b", "a")},
            "--numa guest_numa_id=0 memory_zones",
            "a",
            "twice",
        ),
        (
            'guest_numa_id=0,memory_zones=[""]',
            {"guest_numa_id": 0, "memory_zones": ("",)},
            "--numa guest_numa_id=0 memory_zones",
            None,
            "not empty",
        ),
        (
            "guest_numa_id=0,cpus=9000",
            {"guest_numa_id": 0, "cpus": (9000,)},
            "--numa guest_numa_id=0 cpus",
            9000,
            "0 to 8191",
        ),
    ],
)
def test_a_broken_rule_is_refused_in_text_and_in_keywords_alike(
    text: str, values: dict[str, Any], field: str, value: object, limit: str
) -> None:
    with refused(field, value, limit):
        NumaConfig.parse(text)
    with refused(field, value, limit):
        NumaConfig(**values)


def test_the_number_of_the_node_is_mandatory() -> None:
    with refused("--numa guest_numa_id", None, "mandatory"):
        NumaConfig.parse("cpus=[0-3]")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"cpus": "0"}, "--numa guest_numa_id=0 cpus"),
        ({"cpus": None}, "--numa guest_numa_id=0 cpus"),
        ({"cpus": (True,)}, "--numa guest_numa_id=0 cpus"),
        ({"distances": ((1, 15),)}, "--numa guest_numa_id=0 distances"),
        ({"memory_zones": "mem0"}, "--numa guest_numa_id=0 memory_zones"),
        ({"memory_zones": (1,)}, "--numa guest_numa_id=0 memory_zones"),
    ],
)
def test_a_keyword_argument_of_the_wrong_type_is_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        NumaConfig(guest_numa_id=0, **values)
    assert caught.value.field == field


@pytest.mark.parametrize("of", [set, frozenset, dict.fromkeys, iter])
def test_what_has_no_order_is_no_list(of: Callable[[list[int]], Any]) -> None:
    with pytest.raises(ConfigError, match="must be a tuple") as caught:
        NumaConfig(guest_numa_id=0, cpus=of([1, 2]))
    assert caught.value.field == "--numa guest_numa_id=0 cpus"


def test_lists_are_taken_as_tuples() -> None:
    cpus: Any = [1, 2]
    node = NumaConfig(guest_numa_id=0, cpus=cpus)
    cpus.append(3)
    assert node.cpus == (1, 2)
    assert hash(node) == hash(NumaConfig.parse("guest_numa_id=0,cpus=1-2"))
