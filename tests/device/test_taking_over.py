"""A device that goes on where another one was: the map of blocks in memory that outlives it, `adopt` and `finish`."""

from __future__ import annotations

import pytest

from tests.device.helpers import BLOCK, BLOCKS, REGION, make_device, plug, snapshot
from tests.device.test_blocks import SIZE, naive_state, run
from vhost_user.errors import UsageError
from virtio_mem.blocks import BlockMap
from virtio_mem.device import EffectType, VirtioMemDevice
from virtio_mem.geometry import UsableRegion
from virtio_mem.protocol import BlockState


def plugged(device: VirtioMemDevice) -> list[tuple[int, int]]:
    return [(first, nb_blocks) for first, nb_blocks in device.blocks.plugged_runs()]


def map_of(*runs: tuple[int, int], size: int = BLOCKS) -> BlockMap:
    blocks = BlockMap(size)
    for first, nb_blocks in runs:
        blocks.plug(run(first, nb_blocks))
    return blocks


# The map.


def test_bits_are_found_in_the_memory_where_they_were_left() -> None:
    memory = bytearray(8)
    blocks = BlockMap(50, memoryview(memory))
    assert (len(blocks), blocks.plugged) == (50, 0)
    blocks.plug(run(0, 1))
    blocks.plug(run(9, 2))
    blocks.plug(run(49, 1))
    assert memory == bytes([1, 6, 0, 0, 0, 0, 2, 0])
    blocks.release()
    memory[7] = 0xFF
    again = BlockMap(50, memoryview(memory))
    assert [tuple(one) for one in again.plugged_runs()] == [(0, 1), (9, 2), (49, 1)]
    assert again.plugged == 4, "what lies behind the last block is none"
    assert again.to_bytes() == bytes(memory[:7])
    again.release()


def test_memory_for_the_bits_may_be_just_enough_and_no_less() -> None:
    memory = bytearray(2)
    blocks = BlockMap(16, memoryview(memory))
    blocks.plug(run(15, 1))
    assert memory[1] == 0x80
    blocks.release()
    with pytest.raises(AssertionError):
        BlockMap(17, memoryview(memory))


def test_unplug_all_leaves_alone_what_is_behind_the_last_block() -> None:
    memory = bytearray(b"\xff\xff")
    blocks = BlockMap(12, memoryview(memory))
    assert blocks.plugged == 12
    blocks.unplug_all()
    assert (blocks.plugged, bytes(memory)) == (0, b"\x00\xf0")
    blocks.release()


def test_after_release_the_memory_is_the_callers_again() -> None:
    memory = bytearray(8)
    blocks = BlockMap(50, memoryview(memory))
    blocks.plug(run(3, 1))
    with pytest.raises(BufferError):
        memory.clear()
    blocks.release()
    memory.clear()
    assert (len(blocks), blocks.plugged) == (0, 0)


def test_a_copy_is_of_its_moment() -> None:
    blocks = map_of((3, 4), size=20)
    copy = blocks.copy()
    blocks.unplug(run(4, 1))
    assert (len(copy), copy.plugged) == (20, 4)
    assert [tuple(one) for one in copy.plugged_runs()] == [(3, 4)]
    copy.plug(run(19, 1))
    assert (blocks.plugged, copy.plugged) == (3, 5)


@pytest.mark.parametrize("state", [BlockState.PLUGGED, BlockState.UNPLUGGED])
@pytest.mark.parametrize("where", [run(0, 1), run(4, 10), run(60, 80), run(0, SIZE)])
def test_put_does_not_care_what_was_there(where: tuple[int, int], state: BlockState) -> None:
    bits = [number % 7 in (1, 2, 5) for number in range(SIZE)]
    blocks = BlockMap(SIZE)
    for number, bit in enumerate(bits):
        if bit:
            blocks.plug(run(number, 1))
    blocks.put(run(*where), state)
    bits[where[0] : where[0] + where[1]] = [state is BlockState.PLUGGED] * where[1]
    assert blocks.plugged == sum(bits)
    assert all(blocks.state(run(number, 1)) is naive_state(bits, run(number, 1)) for number in range(SIZE))


# The device.


def test_a_device_adopts_all_that_another_one_was() -> None:
    device = make_device(requested=0)
    blocks = map_of((2, 5), (BLOCKS - 1, 1))
    device.adopt(8 * BLOCK, REGION, blocks)
    assert device.blocks is blocks
    assert (device.requested_size, device.usable_region_size, device.plugged_size) == (8 * BLOCK, REGION, 6 * BLOCK)


@pytest.mark.parametrize("usable", [4, 5, 9])
def test_the_usable_region_that_is_adopted_may_be_any_that_holds_target_and_blocks(usable: int) -> None:
    device = make_device(requested=0, usable=UsableRegion.REQUESTED_PLUS_SLACK)
    device.adopt(4 * BLOCK, usable * BLOCK, map_of((0, 4)))
    assert (device.usable_region_size, plugged(device)) == (usable * BLOCK, [(0, 4)])


@pytest.mark.parametrize(
    ("requested", "usable", "runs", "message"),
    [
        (REGION + BLOCK, REGION, [], "requested_size=.*at most region_size"),
        (BLOCK + 4096, REGION, [], "requested_size=.*multiple of block_size"),
        (
            BLOCK,
            2 * BLOCK + 4096,
            [],
            "^usable_region_size=4198400: blocks of 2097152, from req",
        ),
        (
            2 * BLOCK,
            BLOCK,
            [],
            "^usable_region_size=2097152: .* from requested_size, 4194304, to region",
        ),
        (BLOCK, REGION + BLOCK, [], "usable_region_size=.* to region_size, 1073741824$"),
        (BLOCK, 8 * BLOCK, [(6, 3)], "^plugged=1 blocks: within usable_region_size, 16777216$"),
        (0, 0, [(0, 1)], "^plugged=1 blocks: within usable_region_size, 0$"),
    ],
)
def test_a_state_that_no_device_can_be_in_is_not_adopted(
    requested: int, usable: int, runs: list[tuple[int, int]], message: str
) -> None:
    device = make_device(requested=4 * BLOCK)
    before, blocks = snapshot(device), device.blocks
    with pytest.raises(UsageError, match=message):
        device.adopt(requested, usable, map_of(*runs))
    assert device.blocks is blocks
    assert snapshot(device) == before


def test_a_device_that_is_in_use_adopts_nothing() -> None:
    used = make_device()
    plug(used)
    with pytest.raises(AssertionError):
        used.adopt(0, REGION, BlockMap(BLOCKS))
    busy = make_device()
    busy.system_reset()
    with pytest.raises(AssertionError):
        busy.adopt(0, REGION, BlockMap(BLOCKS))
    with pytest.raises(AssertionError):
        make_device().adopt(0, REGION, BlockMap(BLOCKS - 1))


@pytest.mark.parametrize("before", [[], [(0, 8)], [(3, 2)]])
@pytest.mark.parametrize(
    ("type_", "after"), [(EffectType.PLUG, [(2, 4)]), (EffectType.UNPLUG, []), (EffectType.UNPLUG_ALL, [])]
)
def test_an_effect_is_finished_however_far_it_had_come(
    type_: EffectType, after: list[tuple[int, int]], before: list[tuple[int, int]]
) -> None:
    device = make_device()
    for one in before:
        plug(device, *one)
    device.finish(type_, run(2, 4))
    assert device.plugged_size == sum(nb_blocks for _, nb_blocks in plugged(device)) * BLOCK
    assert [device.blocks.state(run(block, 1)) is BlockState.PLUGGED for block in range(2, 6)] == [bool(after)] * 4
    if type_ is EffectType.UNPLUG_ALL:
        assert plugged(device) == []


@pytest.mark.parametrize(
    ("type_", "notice"), [(EffectType.UNPLUG_ALL, False), (EffectType.SYSTEM_RESET, True), (EffectType.UNPLUG, False)]
)
def test_only_what_unplugs_everything_sets_the_usable_region_anew(type_: EffectType, notice: bool) -> None:
    device = make_device(requested=0, usable=UsableRegion.REQUESTED_PLUS_SLACK)
    device.adopt(0, 8 * BLOCK, map_of((1, 2)))
    device.finish(type_, run(0, BLOCKS))
    assert plugged(device) == []
    assert device.usable_region_size == (8 * BLOCK if type_ is EffectType.UNPLUG else 0)
    assert device.take_config_notice() is notice


def test_nothing_is_finished_while_an_effect_is_open() -> None:
    device = make_device()
    device.system_reset()
    with pytest.raises(AssertionError):
        device.finish(EffectType.PLUG, run(0, 1))
