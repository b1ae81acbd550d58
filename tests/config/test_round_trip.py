"""What is printed is read back as the same, and no text does anything but give a configuration or a ConfigError."""

from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.config import strategies
from virtio_mem.config import (
    ConfigError,
    MemoryConfig,
    MemoryZoneConfig,
    NumaConfig,
    NumaDistance,
    SgxEpcConfig,
    VmMemoryConfig,
)


@given(strategies.memory_configs())
def test_memory_is_read_back(config: MemoryConfig) -> None:
    assert MemoryConfig.parse(str(config)) == config


@given(strategies.zone_configs())
def test_a_zone_is_read_back(config: MemoryZoneConfig) -> None:
    assert MemoryZoneConfig.parse(str(config)) == config


@given(strategies.numa_configs())
def test_a_node_is_read_back(config: NumaConfig) -> None:
    assert NumaConfig.parse(str(config)) == config


@given(strategies.epc_configs())
def test_an_epc_section_is_read_back(config: SgxEpcConfig) -> None:
    assert SgxEpcConfig.parse(str(config)) == config


@given(strategies.distances(st.integers(0, 2**32 - 1)))
def test_a_distance_is_read_back(config: NumaDistance) -> None:
    assert NumaDistance.parse(str(config)) == config


@given(strategies.machines())
def test_a_machine_is_read_back_from_its_line_and_from_its_arguments(config: VmMemoryConfig) -> None:
    assert VmMemoryConfig.parse(str(config)) == config
    assert VmMemoryConfig.from_args(config.to_args()) == config


@pytest.mark.parametrize("of", [MemoryConfig, MemoryZoneConfig, NumaConfig, SgxEpcConfig, NumaDistance, VmMemoryConfig])
@given(text=strategies.near_options())
@example(text="size=" + "9" * 5000)
@example(text="size=" + "0" * 5000 + "1G")
@example(text="id=a,size=1G,file=\0")
@example(text="1@" + "9" * 5000)
@example(text="guest_numa_id=1,cpus=0-" + "9" * 5000)
@example(text="--memory 'size=1G")
@example(text="--memory size=1G\\")
def test_any_text_gives_a_configuration_or_a_config_error(of: type[MemoryConfig | VmMemoryConfig], text: str) -> None:
    with suppress(ConfigError):
        config = of.parse(text)
        assert of.parse(str(config)) == config
        assert str(of.parse(str(config))) == str(config)


@given(
    words=st.lists(st.sampled_from(["--memory", "--memory-zone", "--numa", "--sgx-epc"]) | strategies.near_options())
)
def test_any_arguments_give_a_configuration_or_a_config_error(words: list[str]) -> None:
    with suppress(ConfigError):
        config = VmMemoryConfig.from_args(words)
        assert VmMemoryConfig.from_args(config.to_args()) == config
