"""The clauses on the configuration space, features, start and resets."""

from __future__ import annotations

from typing import Any

import pytest

from tests.device.helpers import ADDR, BLOCK, BLOCKS, REGION, ask, make_device, plug, snapshot, states
from vhost_user.errors import PeerError, UsageError
from vhost_user.units import GIB, MIB, ByteCount
from virtio_mem.device import VirtioMemDevice
from virtio_mem.geometry import UsableRegion, default_block_size
from virtio_mem.protocol import (
    QUEUE_COUNT,
    VIRTIO_ID_MEM,
    BlockState,
    Feature,
    RequestType,
    ResponseType,
)

SLACK_POLICY = UsableRegion.REQUESTED_PLUS_SLACK


@pytest.mark.clause("MEM-ID-1", "MEM-ID-2", "MEM-WIRE-2", "MEM-WIRE-4", "MEM-WIRE-5")
def test_numbers_of_the_standard() -> None:
    assert (VIRTIO_ID_MEM, QUEUE_COUNT) == (24, 1)
    assert {kind.name: kind.value for kind in RequestType} == {"PLUG": 0, "UNPLUG": 1, "UNPLUG_ALL": 2, "STATE": 3}
    assert {kind.name: kind.value for kind in ResponseType} == {"ACK": 0, "NACK": 1, "BUSY": 2, "ERROR": 3}
    assert {kind.name: kind.value for kind in BlockState} == {"PLUGGED": 0, "UNPLUGGED": 1, "MIXED": 2}


@pytest.mark.clause("MEM-START-1")
def test_a_new_device_has_nothing_plugged() -> None:
    device = make_device()
    assert device.config.plugged_size == 0
    assert set(states(device)) == {BlockState.UNPLUGGED}


@pytest.mark.clause("MEM-FEAT-1", "MEM-FEAT-2", "MEM-FEAT-3", "MEM-INIT-5")
def test_features_that_are_offered() -> None:
    assert make_device(node_id=3).offered_features == Feature(0b111)
    assert make_device(unplugged_inaccessible=False).offered_features == Feature.PERSISTENT_SUSPEND
    assert make_device(node_id=3).config.node_id == 3
    assert make_device().config.node_id == 0


@pytest.mark.clause("MEM-CONF-9", "MEM-CONF-10", "MEM-CONF-11", "MEM-CONF-15")
@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("block_size", {"block": 0}),
        ("block_size", {"block": -BLOCK}),
        ("block_size", {"block": 6 * MIB, "region": 6 * MIB, "requested": 0, "addr": 0}),
        ("addr", {"addr": ADDR + 4096}),
        ("addr", {"addr": -BLOCK}),
        ("addr", {"addr": 2**64 - REGION}),
        ("region_size", {"region": REGION + 4096}),
        ("region_size", {"region": -BLOCK}),
        ("node_id", {"node_id": 65536}),
        ("node_id", {"node_id": -1}),
        ("requested_size", {"requested": REGION + BLOCK}),
        ("requested_size", {"requested": BLOCK + 1}),
        ("requested_size", {"requested": -BLOCK}),
        ("block_size", {"block": float(BLOCK)}),
        ("addr", {"addr": float(ADDR)}),
        ("region_size", {"region": f"{REGION}"}),
        ("node_id", {"node_id": 1.5}),
        ("node_id", {"node_id": True}),
        ("requested_size", {"requested": float(BLOCK)}),
        ("requested_size", {"requested": None}),
        ("usable_region", {"usable": "whole-region"}),
        ("usable_region", {"usable": None}),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_name(field: str, options: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        make_device(**options)  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.clause("MEM-CONF-15", "MEM-UNPLUGALL-4")
def test_a_region_without_any_block_works() -> None:
    device = make_device(region=0, requested=0)
    assert device.config.region_size == 0
    assert ask(device, RequestType.PLUG).type is ResponseType.ERROR
    assert ask(device, RequestType.STATE).type is ResponseType.ERROR
    assert ask(device, RequestType.UNPLUG_ALL).type is ResponseType.ACK


@pytest.mark.clause("MEM-CONF-8", "MEM-CONF-12", "MEM-CONF-14", "MEM-LAYOUT-3", "MEM-CONF-1", "MEM-CONF-2")
@pytest.mark.parametrize("block", [1 * MIB, BLOCK, 512 * MIB])
def test_the_usable_region_follows_the_target(block: int) -> None:
    device = make_device(region=8 * GIB, requested=0, block=block, usable=SLACK_POLICY)
    assert device.usable_region_size == 0
    for target in (block, 1 * GIB, 7 * GIB, 8 * GIB):
        device.resize(target)
        config = device.config
        assert config.requested_size == target
        assert config.usable_region_size == min(8 * GIB, target + max(256 * MIB, block))
        assert config.usable_region_size % block == 0


@pytest.mark.clause("MEM-CONF-16", "MEM-UNPLUGALL-6", "MEM-OP-10")
def test_the_usable_region_shrinks_only_by_unplug_all_and_system_reset() -> None:
    for shrink in ("UNPLUG_ALL", "system reset"):
        device = make_device(region=8 * GIB, requested=7 * GIB, usable=SLACK_POLICY)
        plug(device, 0, 3)
        device.resize(BLOCK)
        device.device_reset()
        ask(device, RequestType.UNPLUG, 0, 3)
        assert device.usable_region_size == 7 * GIB + 256 * MIB
        if shrink == "UNPLUG_ALL":
            ask(device, RequestType.UNPLUG_ALL)
        else:
            device.commit(device.system_reset())
        assert device.usable_region_size == BLOCK + 256 * MIB


@pytest.mark.clause("MEM-CONF-17", "MEM-CONF-18", "MEM-CONF-19", "MEM-CONF-20")
def test_notices_come_with_sizes_that_the_host_changes() -> None:
    device = make_device(requested=0, usable=SLACK_POLICY)
    assert not device.take_config_notice()
    device.resize(4 * BLOCK)
    assert device.take_config_notice()
    assert not device.take_config_notice()
    plug(device, 0, 4)
    assert not device.take_config_notice()
    device.resize(4 * BLOCK)
    assert not device.take_config_notice(), "the target is reached: nothing to look at"
    ask(device, RequestType.UNPLUG, 0, 1)
    assert not device.take_config_notice()
    device.resize(4 * BLOCK)
    assert device.take_config_notice(), "the same target, not reached: the driver is asked to look again"
    device.resize(0)
    device.take_config_notice()
    ask(device, RequestType.UNPLUG_ALL)
    assert device.usable_region_size == 0
    assert not device.take_config_notice(), "the driver that asked for UNPLUG ALL needs no notice"


@pytest.mark.clause("MEM-CONF-17")
def test_a_system_reset_that_shrinks_the_usable_region_gives_notice() -> None:
    device = make_device(requested=8 * BLOCK, usable=SLACK_POLICY)
    device.resize(0)
    device.take_config_notice()
    device.commit(device.system_reset())
    assert device.usable_region_size == 0
    assert device.take_config_notice()
    device.commit(device.system_reset())
    assert not device.take_config_notice()


@pytest.mark.clause("MEM-CONF-3", "MEM-CONF-4", "MEM-CONF-5", "MEM-CONF-6", "MEM-CONF-7", "MEM-CONF-13")
def test_what_cannot_change_does_not() -> None:
    device = make_device(node_id=7, requested=REGION // 2)
    before = device.config
    plug(device, 5, 6)
    assert device.config == before._replace(plugged_size=ByteCount(6 * BLOCK))
    ask(device, RequestType.UNPLUG, 6, 2)
    assert device.config == before._replace(plugged_size=ByteCount(4 * BLOCK))
    device.resize(REGION)
    device.device_reset()
    device.commit(device.system_reset())
    assert device.config == before._replace(requested_size=ByteCount(REGION))


@pytest.mark.parametrize(
    "target",
    [-BLOCK, 1, BLOCK - 1, BLOCK + 4096, REGION + BLOCK, 2**64, 2**44 * MIB, 2.0 * BLOCK, "2M", None],
)
def test_a_bad_target_changes_nothing(target: Any) -> None:
    device = make_device(requested=BLOCK)
    before = snapshot(device)
    with pytest.raises(UsageError, match="requested_size"):
        device.resize(target)
    assert snapshot(device) == before
    assert not device.take_config_notice()


@pytest.mark.clause("MEM-INIT-1")
@pytest.mark.parametrize("features", [0, Feature.ACPI_PXM | Feature.UNPLUGGED_INACCESSIBLE, 1 << 23 | 2])
def test_features_that_cannot_be_accepted(features: int) -> None:
    device = make_device()
    with pytest.raises(PeerError, match="driver features"):
        device.negotiate(features)
    assert device.acked_features == 0


def test_features_that_can_be_accepted() -> None:
    device = make_device(node_id=0)
    device.negotiate(Feature.UNPLUGGED_INACCESSIBLE | Feature.VERSION_1)
    assert device.acked_features == Feature.UNPLUGGED_INACCESSIBLE
    plain = make_device(unplugged_inaccessible=False)
    plain.negotiate(0)
    assert plain.acked_features == 0


@pytest.mark.clause("MEM-INIT-2", "MEM-OP-12", "MEM-OP-13")
def test_a_device_reset_keeps_every_block_and_size() -> None:
    device = make_device(requested=REGION // 2)
    device.negotiate(Feature.UNPLUGGED_INACCESSIBLE)
    plug(device, 3, 9)
    config, runs = device.config, list(device.blocks.plugged_runs())
    device.device_reset()
    assert (device.config, list(device.blocks.plugged_runs())) == (config, runs)
    assert device.acked_features == 0


@pytest.mark.clause("MEM-OP-10", "MEM-OP-11")
def test_a_system_reset_unplugs_everything_and_keeps_the_target() -> None:
    device = make_device(requested=REGION // 2)
    plug(device, 3, 9)
    device.negotiate(Feature.UNPLUGGED_INACCESSIBLE)
    device.commit(device.system_reset())
    assert device.plugged_size == 0
    assert device.requested_size == REGION // 2
    assert device.acked_features == 0
    assert set(states(device)) == {BlockState.UNPLUGGED}


def test_a_system_reset_that_the_host_refuses_keeps_the_blocks() -> None:
    device = make_device()
    plug(device, 3, 9)
    response = device.abandon(device.system_reset(), "the host says no")
    assert response.type is ResponseType.BUSY
    assert device.plugged_size == 9 * BLOCK
    assert not device.owes_notice, "no driver was told BUSY"


@pytest.mark.parametrize(
    ("page_size", "thp_size", "expected"),
    [
        (4096, 2 * MIB, 2 * MIB),
        (4096, 0, 1 * MIB),
        (65536, 512 * MIB, 1 * MIB),
        (2 * MIB, 2 * MIB, 2 * MIB),
        (1 * GIB, 2 * MIB, 1 * GIB),
        (65536, 64 * 1024, 1 * MIB),
    ],
)
def test_default_block_size(page_size: int, thp_size: int, expected: int) -> None:
    assert default_block_size(page_size, thp_size) == expected


def test_default_block_size_is_the_kernels_huge_page_here() -> None:
    assert default_block_size(4096) == default_block_size(4096, 2 * MIB)


def all_plugged(device: VirtioMemDevice) -> bool:
    return device.plugged_size == BLOCKS * BLOCK


@pytest.mark.clause("MEM-TARGET-1")
def test_a_device_at_its_target_refuses_more() -> None:
    device = make_device()
    plug(device, 0, BLOCKS)
    assert all_plugged(device)
    device.resize(REGION - BLOCK)
    ask(device, RequestType.UNPLUG, 7)
    before = snapshot(device)
    assert ask(device, RequestType.PLUG, 7).type is ResponseType.NACK
    assert snapshot(device) == before
