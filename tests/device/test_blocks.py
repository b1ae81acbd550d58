"""The block bitmap against a plain list of booleans."""

import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.device.helpers import BLOCK, ask, make_device
from virtio_mem.blocks import BlockIndex, BlockMap, Run
from virtio_mem.protocol import BlockState, RequestType

SIZE = 200


def run(first: int, nb_blocks: int) -> Run:
    return Run(BlockIndex(first), nb_blocks)


runs = st.integers(0, SIZE - 1).flatmap(lambda first: st.builds(run, st.just(first), st.integers(1, SIZE - first)))


def naive_state(bits: list[bool], wanted: Run) -> BlockState:
    part = bits[wanted.first : wanted.first + wanted.nb_blocks]
    if all(part):
        return BlockState.PLUGGED
    return BlockState.MIXED if any(part) else BlockState.UNPLUGGED


@given(st.lists(runs, max_size=40), runs)
def test_the_map_agrees_with_a_list_of_booleans(changes: list[Run], question: Run) -> None:
    blocks, bits = BlockMap(SIZE), [False] * SIZE
    for change in changes:
        state = naive_state(bits, change)
        assert blocks.state(change) is state
        if state is BlockState.MIXED:
            continue
        new = state is BlockState.UNPLUGGED
        (blocks.plug if new else blocks.unplug)(change)
        bits[change.first : change.first + change.nb_blocks] = [new] * change.nb_blocks
    assert blocks.state(question) is naive_state(bits, question)
    assert blocks.count(question) == sum(bits[question.first : question.first + question.nb_blocks])
    assert blocks.plugged == sum(bits)
    plugged, unplugged = blocks.plugged_runs(), blocks.unplugged_runs(question)
    flat = [index for first, nb_blocks in plugged for index in range(first, first + nb_blocks)]
    assert flat == [index for index, bit in enumerate(bits) if bit]
    free = [i for first, nb_blocks in unplugged for i in range(first, first + nb_blocks)]
    inside = range(question.first, question.first + question.nb_blocks)
    assert free == [index for index in inside if not bits[index]]
    assert [len(plugged), len(unplugged)] == [len(list(iter(runs))) for runs in (plugged, unplugged)]


def test_runs_are_maximal_and_reach_the_last_block() -> None:
    blocks = BlockMap(10)
    for change in (run(0, 2), run(2, 1), run(5, 1), run(8, 2)):
        blocks.plug(change)
    assert list(blocks.plugged_runs()) == [run(0, 3), run(5, 1), run(8, 2)]


def test_a_range_from_the_very_first_block_may_be_mixed() -> None:
    blocks = BlockMap(10)
    blocks.plug(run(0, 1))
    assert [blocks.state(run(0, nb_blocks)) for nb_blocks in (1, 2)] == [BlockState.PLUGGED, BlockState.MIXED]
    blocks.plug(run(1, 9))
    blocks.unplug(run(0, 1))
    assert [blocks.state(run(0, nb_blocks)) for nb_blocks in (1, 2)] == [BlockState.UNPLUGGED, BlockState.MIXED]


def test_the_first_block_is_the_lowest_bit_of_the_first_byte() -> None:
    blocks = BlockMap(10)
    blocks.plug(run(0, 1))
    blocks.plug(run(9, 1))
    assert blocks.to_bytes() == b"\x01\x02"


def test_unplugged_runs_end_with_the_range_that_was_asked_about() -> None:
    blocks = BlockMap(10)
    blocks.plug(run(2, 4))
    assert list(blocks.unplugged_runs(run(0, 10))) == [run(0, 2), run(6, 4)]
    assert list(blocks.unplugged_runs(run(1, 6))) == [run(1, 1), run(6, 1)]
    assert list(blocks.unplugged_runs(run(2, 4))) == []


def test_more_runs_than_are_looked_for_at_once() -> None:
    size = 3 * 10_001
    blocks = BlockMap(size, memoryview(bytearray(b"\x49\x92\x24" * (size // 24 + 1))))
    wanted = [run(block, 1) for block in range(0, size, 3)]
    assert list(blocks.plugged_runs()) == wanted
    assert list(blocks.unplugged_runs(run(1, size - 2))) == [
        *(run(block + 1, 2) for block, _ in wanted[:-1]),
        run(size - 2, 1),
    ]
    assert all(type(each) is Run for each in blocks.plugged_runs())


def test_runs_are_flat_arrays_of_which_none_is_long() -> None:
    size = 3 * 10_001
    blocks = BlockMap(size, memoryview(bytearray(b"\x6d\xdb\xb6" * (size // 24 + 1))))
    pieces = list(blocks.plugged_runs().arrays())
    arrays = [array for piece in pieces for array in (piece.firsts, piece.sizes)]
    assert {(array.format, array.ndim, array.contiguous) for array in arrays} == {("Q", 1, True)}
    assert [block for piece in pieces for block in piece.firsts] == [0, *range(2, size, 3)]
    assert [size for piece in pieces for size in piece.sizes] == [1, *[2] * 10_000, 1]
    assert max(map(len, pieces)) == 4096
    assert list(BlockMap(size).plugged_runs().arrays()) == []


def test_few_runs_are_all_or_none() -> None:
    blocks = BlockMap(100)
    assert blocks.few_plugged_runs(3) == []
    wanted = [run(0, 1), run(50, 2), run(98, 2)]
    for change in wanted:
        blocks.plug(change)
    assert [blocks.few_plugged_runs(many) for many in (3, 4, 5)] == [None, wanted, wanted]


@pytest.mark.parametrize("size", [1, 8, 9, 56, 63, 64, 65, 120, 128])
@pytest.mark.parametrize("bits", [b"\x00", b"\xff"])
def test_what_lies_behind_the_map_is_not_looked_at(size: int, bits: bytes) -> None:
    """It may be no memory at all."""
    with in_front_of_nothing((size + 7) // 8) as memory:
        memory[:] = bits * len(memory)
        blocks = BlockMap(size, memory)
        every = run(0, size)
        expected = [every] if bits == b"\xff" else []
        assert list(blocks.plugged_runs()) == expected
        assert list(blocks.unplugged_runs(every)) == ([] if expected else [every])
        device = make_device(region=size * BLOCK, requested=0)
        device.adopt(size * BLOCK, size * BLOCK, blocks)
        states = ask(device, RequestType.STATE, 0, size), ask(device, RequestType.STATE, size - 1, 1)
        assert {each.state for each in states} == {BlockState.PLUGGED if expected else BlockState.UNPLUGGED}
        blocks.release()


@contextmanager
def in_front_of_nothing(size: int) -> Iterator[memoryview]:
    """Memory whose end is that of a file, inside of a mapping: behind it a touch is a SIGBUS."""
    fd = os.memfd_create("map", os.MFD_CLOEXEC)
    os.ftruncate(fd, 2 * mmap.PAGESIZE)
    with mmap.mmap(fd, 2 * mmap.PAGESIZE) as mapping, memoryview(mapping) as view:
        os.ftruncate(fd, mmap.PAGESIZE)
        os.close(fd)
        with view[mmap.PAGESIZE - size : mmap.PAGESIZE] as memory:
            yield memory


def test_unplug_all_leaves_nothing() -> None:
    blocks = BlockMap(10)
    blocks.plug(run(3, 7))
    blocks.unplug_all()
    assert blocks.plugged == 0
    assert list(blocks.plugged_runs()) == []


@pytest.mark.parametrize("bad", [run(-1, 2), run(0, 0), run(9, 2), run(10, 1)])
def test_a_range_outside_the_map_is_an_assertion(bad: Run) -> None:
    with pytest.raises(AssertionError):
        BlockMap(10).state(bad)


def test_sixteen_tib_of_two_mib_blocks_take_about_one_mib() -> None:
    blocks = BlockMap((16 << 40) // (2 << 20))
    assert len(blocks) == 8 << 20
    assert 1 << 20 <= sys.getsizeof(blocks._bits) < 1.1 * (1 << 20)
