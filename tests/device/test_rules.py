"""The rules in C where runs begin and end: anywhere in a word, with one block that is not as the others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vhost_user.units import MIB, ByteCount, GuestAddress
from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.device import VirtioMemDevice
from virtio_mem.geometry import Geometry, UsableRegion
from virtio_mem.protocol import RESPONSE_SIZE, BlockState, Request, RequestType, Response, ResponseType

ADDR = GuestAddress(1 << 32)
BLOCK_SIZE = ByteCount(2 * MIB)
NB_BLOCKS = 203
MOST = 64

FIRSTS = (*range(18), 55, 56, 57, 63, 64, 65, 71, 72, 127, 128, 135, 136, 195, 202)
LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 71, 72, 73, 128, 129, 136, 203)
RANGES = [(first, length) for first in FIRSTS for length in LENGTHS if first + length <= NB_BLOCKS]


def make_device() -> VirtioMemDevice:
    size = ByteCount(NB_BLOCKS * BLOCK_SIZE)
    geometry = Geometry(addr=ADDR, region_size=size, block_size=BLOCK_SIZE, usable_region=UsableRegion.WHOLE_REGION)
    return VirtioMemDevice(geometry, requested_size=size)


def states(device: VirtioMemDevice) -> Iterator[BlockState]:
    """What STATE says of each of RANGES."""
    for start in range(0, len(RANGES), MOST):
        asked = RANGES[start : start + MOST]
        requests = b"".join(
            Request(RequestType.STATE, GuestAddress(ADDR + first * BLOCK_SIZE), length).encode()
            for first, length in asked
        )
        answers = memoryview(bytearray(RESPONSE_SIZE * len(asked)))
        decision = device.decide(requests, answers, len(asked))
        assert len(decision.verdicts) == len(asked)
        for at in range(len(asked)):
            response = Response.decode(answers[RESPONSE_SIZE * at :])
            assert response.type is ResponseType.ACK
            yield response.state


@pytest.mark.parametrize("others", [BlockState.UNPLUGGED, BlockState.PLUGGED], ids=lambda state: state.name.lower())
def test_one_block_is_not_as_the_others(others: BlockState) -> None:
    odd = BlockState.PLUGGED if others is BlockState.UNPLUGGED else BlockState.UNPLUGGED
    device = make_device()
    device.blocks.put(Run(BlockIndex(0), NB_BLOCKS), others)
    for block in range(NB_BLOCKS):
        device.blocks.put(Run(BlockIndex(block), 1), odd)
        for (first, length), state in zip(RANGES, states(device), strict=True):
            inside = first <= block < first + length
            expected = others if not inside else odd if length == 1 else BlockState.MIXED
            assert state is expected, (block, first, length)
        device.blocks.put(Run(BlockIndex(block), 1), others)


@pytest.mark.parametrize("odd", [0, 1, 7, 8, 9, 62, 63, 64, 65, 126, 127, 128, 191, 192, 200, 202])
def test_runs_around_one_block(odd: int) -> None:
    device = make_device()
    device.blocks.put(Run(BlockIndex(0), NB_BLOCKS), BlockState.PLUGGED)
    device.blocks.put(Run(BlockIndex(odd), 1), BlockState.UNPLUGGED)
    around = [(0, odd), (odd + 1, NB_BLOCKS - odd - 1)]
    assert list(device.blocks.plugged_runs()) == [run for run in around if run[1]]
    assert list(device.blocks.unplugged_runs(Run(BlockIndex(0), NB_BLOCKS))) == [(odd, 1)]
