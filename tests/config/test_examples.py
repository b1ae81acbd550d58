"""Cloud Hypervisor's own examples: each option reads and prints back; the machines that can be are built."""

import shlex

import pytest

from tests.config.examples import EPC, NEW, OLD, REFUSED
from virtio_mem.config import ConfigError, MemoryConfig, MemoryZoneConfig, NumaConfig, SgxEpcConfig, VmMemoryConfig

ALL = sorted({*NEW, *EPC, *OLD})
OPTIONS = {of.OPTION: of for of in (MemoryConfig, MemoryZoneConfig, NumaConfig, SgxEpcConfig)}


def single_options(line: str) -> list[tuple[str, str]]:
    """(option, text) for every value of every option of a line, without the help of the code under test."""
    pairs = []
    for word in shlex.split(line):
        if word in OPTIONS:
            option = word
        else:
            pairs.append((option, word))
    return pairs


@pytest.mark.parametrize(("option", "text"), sorted({pair for line in ALL for pair in single_options(line)}))
def test_every_option_parses_and_prints_back(option: str, text: str) -> None:
    config = OPTIONS[option].parse(text)
    assert OPTIONS[option].parse(str(config)) == config
    written = {item.split("=")[0] for item in text.split(",") if "=" in item}
    printed = {item.split("=")[0] for item in str(config).split(",") if "=" in item}
    assert printed == written == config.explicit


@pytest.mark.parametrize("line", [line for line in ALL if line not in REFUSED])
def test_the_machines_that_can_be_print_back(line: str) -> None:
    config = VmMemoryConfig.parse(line)
    assert VmMemoryConfig.parse(str(config)) == config
    assert VmMemoryConfig.from_args(config.to_args()) == config


@pytest.mark.parametrize(("line", "field"), REFUSED.items())
def test_the_machines_that_can_not_be_are_refused(line: str, field: str) -> None:
    assert line in ALL
    with pytest.raises(ConfigError) as caught:
        VmMemoryConfig.parse(line)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("guest_numa_id=0,cpus=0-99:255", "guest_numa_id=0,cpus=[0-99,255]"),
        ("guest_numa_id=0,cpus=0:1:2:3:4", "guest_numa_id=0,cpus=[0-4]"),
        ("guest_numa_id=0,distances=1@15:2@25", "guest_numa_id=0,distances=[1@15,2@25]"),
        ("guest_numa_id=0,memory_zones=mem0:mem2", "guest_numa_id=0,memory_zones=[mem0,mem2]"),
        ("guest_numa_id=1,sgx_epc_sections=epc0:epc2", "guest_numa_id=1,sgx_epc_sections=[epc0,epc2]"),
        ("guest_numa_id=1,memory_zones=mem1", "guest_numa_id=1,memory_zones=[mem1]"),
    ],
)
def test_the_two_list_syntaxes_mean_the_same_and_brackets_are_printed(old: str, new: str) -> None:
    assert NumaConfig.parse(old) == NumaConfig.parse(new)
    assert str(NumaConfig.parse(old)) == str(NumaConfig.parse(new)) == new


def test_the_lists_hold_what_they_say() -> None:
    node = NumaConfig.parse("guest_numa_id=3,cpus=0-99:255,distances=1@15:2@25,memory_zones=mem0:mem2")
    assert node.cpus == (*range(100), 255)
    assert [(entry.destination, entry.distance) for entry in node.distances] == [(1, 15), (2, 25)]
    assert node.memory_zones == ("mem0", "mem2")
