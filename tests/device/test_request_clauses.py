"""The clauses on PLUG, UNPLUG, UNPLUG ALL and STATE, and what this project does where they leave room."""

from __future__ import annotations

import pytest

from tests.device.helpers import ADDR, BLOCK, BLOCKS, REGION, ask, make_device, plug, snapshot, states
from vhost_user.units import GIB, GuestAddress
from virtio_mem.device import Effect, EffectType
from virtio_mem.geometry import UsableRegion
from virtio_mem.protocol import BlockState, Request, RequestType, ResponseType

ACK, NACK, BUSY, ERROR = ResponseType
PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType

RANGED = [
    pytest.param(PLUG, marks=pytest.mark.clause("MEM-PLUG-3", "MEM-PLUG-4", "MEM-PLUG-5")),
    pytest.param(UNPLUG, marks=pytest.mark.clause("MEM-UNPLUG-3", "MEM-UNPLUG-4", "MEM-UNPLUG-5")),
    pytest.param(STATE, marks=pytest.mark.clause("MEM-STATE-3", "MEM-STATE-4", "MEM-STATE-5")),
]


@pytest.mark.parametrize("type_", RANGED)
@pytest.mark.parametrize(
    ("block", "nb_blocks", "shift"),
    [
        (4, 1, 1),
        (4, 1, BLOCK // 2),
        (4, 1, BLOCK - 1),
        (4, 0, 0),
        (-1, 1, 0),
        (-1, 2, 0),
        (BLOCKS, 1, 0),
        (BLOCKS - 1, 2, 0),
        (0, BLOCKS + 1, 0),
        (0, 65535, 0),
        (-ADDR // BLOCK, 1, 0),
        ((2**64 - ADDR) // BLOCK - 1, 1, 0),
        ((2**64 - ADDR) // BLOCK - 1, 65535, 0),
    ],
)
def test_a_bad_range_is_an_error(type_: RequestType, block: int, nb_blocks: int, shift: int) -> None:
    device = make_device()
    plug(device, 0, 10)
    before = snapshot(device)
    assert ask(device, type_, block, nb_blocks, shift=shift).type is ERROR
    assert snapshot(device) == before


@pytest.mark.clause("MEM-PLUG-5", "MEM-UNPLUG-5", "MEM-STATE-5", "MEM-REGION-1")
def test_the_usable_region_ends_exactly_where_it_says() -> None:
    device = make_device(region=8 * GIB, requested=1 * GIB, usable=UsableRegion.REQUESTED_PLUS_SLACK)
    end = device.usable_region_size // BLOCK
    for type_, last in ((STATE, ACK), (PLUG, ACK), (UNPLUG, ACK)):
        assert ask(device, type_, end).type is ERROR
        assert ask(device, type_, end - 1, 2).type is ERROR
        assert ask(device, type_, end - 1).type is last


@pytest.mark.clause("MEM-PLUG-8", "MEM-PLUG-9")
def test_plug() -> None:
    device = make_device()
    outcome = device.request(Request(PLUG, GuestAddress(ADDR + 3 * BLOCK), 4))
    assert outcome == Effect(EffectType.PLUG, outcome.run, 3 * BLOCK, 4 * BLOCK)  # type: ignore[union-attr, arg-type]
    assert device.plugged_size == 0, "nothing is plugged before the host has acted"
    assert isinstance(outcome, Effect)
    assert device.commit(outcome).type is ACK
    assert device.plugged_size == 4 * BLOCK
    assert [i for i, state in enumerate(states(device)) if state is BlockState.PLUGGED] == [3, 4, 5, 6]


@pytest.mark.clause("MEM-UNPLUG-8", "MEM-UNPLUG-9")
def test_unplug() -> None:
    device = make_device()
    plug(device, 2, 6)
    outcome = device.request(Request(UNPLUG, GuestAddress(ADDR + 3 * BLOCK), 4))
    assert isinstance(outcome, Effect)
    assert (outcome.type, outcome.offset, outcome.size) == (EffectType.UNPLUG, 3 * BLOCK, 4 * BLOCK)
    assert device.plugged_size == 6 * BLOCK
    assert device.commit(outcome).type is ACK
    assert device.plugged_size == 2 * BLOCK
    assert [i for i, state in enumerate(states(device)) if state is BlockState.PLUGGED] == [2, 7]


@pytest.mark.clause("MEM-PLUG-6")
@pytest.mark.parametrize(("block", "nb_blocks"), [(5, 1), (4, 2), (5, 4), (4, 10), (0, BLOCKS)])
def test_a_plug_over_a_plugged_block_is_an_error(block: int, nb_blocks: int) -> None:
    device = make_device()
    plug(device, 5, 2)
    before = snapshot(device)
    assert ask(device, PLUG, block, nb_blocks).type is ERROR
    assert snapshot(device) == before


@pytest.mark.clause("MEM-UNPLUG-6")
@pytest.mark.parametrize(("block", "nb_blocks"), [(4, 1), (4, 2), (6, 2), (0, BLOCKS)])
def test_an_unplug_over_an_unplugged_block_is_an_error(block: int, nb_blocks: int) -> None:
    device = make_device()
    plug(device, 5, 2)
    before = snapshot(device)
    assert ask(device, UNPLUG, block, nb_blocks).type is ERROR
    assert snapshot(device) == before


@pytest.mark.clause("MEM-TARGET-1")
def test_a_plug_above_the_target_is_a_nack_and_up_to_it_is_not() -> None:
    device = make_device(requested=4 * BLOCK)
    before = snapshot(device)
    assert ask(device, PLUG, 0, 5).type is NACK
    assert snapshot(device) == before
    assert ask(device, PLUG, 0, 4).type is ACK
    assert ask(device, PLUG, 9, 1).type is NACK


@pytest.mark.clause("MEM-PLUG-6", "MEM-PLUG-5")
def test_what_must_be_an_error_is_one_above_the_target_and_while_paused_too() -> None:
    device = make_device(requested=4 * BLOCK)
    plug(device, 0, 4)
    device.pause()
    assert ask(device, PLUG, 3, 2).type is ERROR
    assert ask(device, PLUG, BLOCKS - 1, 2).type is ERROR
    assert ask(device, PLUG, 8, 1, shift=4096).type is ERROR
    assert ask(device, PLUG, 8, 0).type is ERROR
    assert ask(device, UNPLUG, 3, 2).type is ERROR
    assert ask(device, PLUG, 8, 1).type is NACK, "the target comes before the pause"


@pytest.mark.clause("MEM-UNPLUGALL-4", "MEM-UNPLUGALL-5")
@pytest.mark.parametrize("plugged", [[], [(0, 1)], [(0, BLOCKS)], [(0, 3), (7, 1), (BLOCKS - 1, 1)]])
def test_unplug_all(plugged: list[tuple[int, int]]) -> None:
    device = make_device()
    for block, nb_blocks in plugged:
        plug(device, block, nb_blocks)
    outcome = device.request(Request(UNPLUG_ALL))
    assert isinstance(outcome, Effect)
    assert outcome.everything
    assert (outcome.offset, outcome.size) == (0, REGION)
    assert device.commit(outcome).type is ACK
    assert device.config.plugged_size == 0
    assert set(states(device)) == {BlockState.UNPLUGGED}


@pytest.mark.clause("MEM-UNPLUGALL-4", "MEM-UNPLUGALL-5")
def test_unplug_all_clears_the_last_block_of_256_gib() -> None:
    """A block count in 16 bits would clear 128 GiB only (a bug that Cloud Hypervisor had: dfee31a84)."""
    device = make_device(region=256 * GIB, requested=256 * GIB)
    last = 256 * GIB // BLOCK - 1
    plug(device, last)
    assert ask(device, UNPLUG_ALL).type is ACK
    assert ask(device, STATE, last).state is BlockState.UNPLUGGED


@pytest.mark.clause("MEM-UNPLUGALL-1", "MEM-UNPLUGALL-2")
@pytest.mark.parametrize(("addr", "nb_blocks"), [(0, 0), (2**64 - 1, 65535), (ADDR + 1, 1)])
def test_unplug_all_looks_at_its_type_only(addr: int, nb_blocks: int) -> None:
    device = make_device()
    plug(device, 1, 2)
    data = bytearray(Request(UNPLUG_ALL, GuestAddress(addr), nb_blocks).encode())
    data[2:8] = data[18:24] = b"\xff" * 6
    outcome = device.request(Request.decode(bytes(data)))
    assert isinstance(outcome, Effect)
    assert device.commit(outcome).type is ACK
    assert device.plugged_size == 0


@pytest.mark.clause("MEM-STATE-6", "MEM-STATE-7", "MEM-STATE-8", "MEM-STATE-9")
@pytest.mark.parametrize("paused", [False, True])
def test_state(paused: bool) -> None:
    device = make_device()
    plug(device, 4, 4)
    if paused:
        device.pause()
    before = snapshot(device)
    for block, nb_blocks, expected in [
        (4, 4, BlockState.PLUGGED),
        (5, 1, BlockState.PLUGGED),
        (0, 4, BlockState.UNPLUGGED),
        (8, BLOCKS - 8, BlockState.UNPLUGGED),
        (3, 2, BlockState.MIXED),
        (7, 2, BlockState.MIXED),
        (0, BLOCKS, BlockState.MIXED),
    ]:
        response = ask(device, STATE, block, nb_blocks)
        assert (response.type, response.state) == (ACK, expected)
    assert snapshot(device) == before


@pytest.mark.clause("MEM-PLUG-7", "MEM-UNPLUG-7", "MEM-UNPLUGALL-3")
def test_a_paused_device_is_busy_and_gives_notice_when_it_resumes() -> None:
    device = make_device()
    plug(device, 0, 2)
    device.pause()
    device.resume()
    assert not device.take_config_notice(), "nobody was told BUSY"
    device.pause()
    before = snapshot(device)
    for type_, block in ((PLUG, 4), (UNPLUG, 0), (UNPLUG_ALL, 0)):
        assert ask(device, type_, block).type is BUSY
        assert snapshot(device) == before
    assert not device.take_config_notice()
    device.resume()
    assert device.take_config_notice()
    plug(device, 4)


@pytest.mark.clause("MEM-PLUG-7", "MEM-UNPLUG-7", "MEM-UNPLUGALL-3", "MEM-CONF-20")
@pytest.mark.parametrize(("type_", "block"), [(PLUG, 4), (UNPLUG, 0), (UNPLUG_ALL, 0)])
def test_what_the_host_refuses_is_busy_and_changes_nothing(type_: RequestType, block: int) -> None:
    device = make_device()
    plug(device, 0, 2)
    before = snapshot(device)
    outcome = device.request(Request(type_, GuestAddress(ADDR + block * BLOCK), 1))
    assert isinstance(outcome, Effect)
    response = device.abandon(outcome, "no huge page is free")
    assert (response.type, response.reason) == (BUSY, "no huge page is free")
    assert snapshot(device) == before
    assert device.owes_notice
    assert not device.take_config_notice()
    device.retry_now()
    assert device.take_config_notice()
    assert ask(device, type_, block).type is ACK


@pytest.mark.parametrize("type_", [4, 5, 0xFFFF])
def test_an_unknown_type_is_an_error_and_the_device_goes_on(type_: int) -> None:
    device = make_device()
    before = snapshot(device)
    assert ask(device, type_).type is ERROR
    assert snapshot(device) == before
    plug(device)


def test_every_refusal_has_a_reason_in_words() -> None:
    device = make_device(requested=BLOCK)
    plug(device)
    device.pause()
    refusals = [ask(device, PLUG, shift=1), ask(device, PLUG, 0, 0), ask(device, PLUG, BLOCKS), ask(device, PLUG, 0)]
    refusals += [ask(device, PLUG, 1), ask(device, UNPLUG, 0), ask(device, UNPLUG, 1), ask(device, 9)]
    assert all(refusal.reason and refusal.type is not ACK for refusal in refusals)
    assert len({refusal.reason for refusal in refusals}) == len(refusals)


def test_effects_end_once_and_in_order() -> None:
    device = make_device()
    first = device.request(Request(PLUG, GuestAddress(ADDR), 1))
    assert isinstance(first, Effect)
    with pytest.raises(AssertionError):
        device.request(Request(STATE, GuestAddress(ADDR), 1))
    device.commit(first)
    with pytest.raises(AssertionError):
        device.commit(first)
    with pytest.raises(AssertionError):
        device.abandon(first, "too late")
