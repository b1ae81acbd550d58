"""The picture of the blocks says what the device says."""

from __future__ import annotations

import pytest

from tests.device.helpers import BLOCK, BLOCKS, REGION, make_device, plug
from vhost_user.units import GIB, MIB, TIB
from virtio_mem.geometry import UsableRegion
from virtio_mem.picture import Cell, cells, draw, human_size


def text(width: int, **options: object) -> str:
    device = make_device(**options)  # type: ignore[arg-type]
    plug(device, 0, 3)
    return "".join(cell.value for cell in cells(device, width))


def test_a_cell_a_block() -> None:
    assert text(8, region=8 * BLOCK, requested=8 * BLOCK) == "███·····"


def test_many_blocks_a_cell() -> None:
    assert text(4, region=8 * BLOCK, requested=8 * BLOCK) == "█▒··"


def test_many_cells_a_block() -> None:
    assert text(16, region=8 * BLOCK, requested=8 * BLOCK) == "██████··········"


def test_the_unusable_part_is_blank() -> None:
    device = make_device(region=8 * GIB, requested=768 * MIB, usable=UsableRegion.REQUESTED_PLUS_SLACK)
    plug(device, 0, 384)
    assert "".join(cell.value for cell in cells(device, 16)) == "█▒" + " " * 14
    assert "".join(cell.value for cell in cells(device, 32)) == "███·" + " " * 28


@pytest.mark.parametrize("blocks", [1, 8, 8 << 20])
def test_every_scale_from_one_block_to_eight_million(blocks: int) -> None:
    device = make_device(region=blocks * BLOCK, requested=blocks * BLOCK)
    plug(device, blocks - 1)
    drawn = cells(device, 64)
    assert len(drawn) == 64
    assert drawn[-1] is (Cell.PLUGGED if blocks <= 64 else Cell.MIXED)


def test_no_region_is_no_cells() -> None:
    assert cells(make_device(region=0, requested=0), 3) == [Cell.UNUSABLE] * 3


def test_the_lines_name_sizes_and_place_the_target() -> None:
    device = make_device(requested=REGION // 2)
    plug(device, 0, BLOCKS // 4)
    lines = draw("mem0", device, 8)
    assert lines == [
        "mem0 ▕██······▏ 1 GiB at 0x100000000",
        "          ▲ target 512 MiB",
        "      plugged 256 MiB, usable 1 GiB, blocks of 2 MiB",
    ]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (258 * MIB, "258 MiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (TIB, "1 TiB"),
    ],
)
def test_sizes_for_people(size: int, expected: str) -> None:
    assert human_size(size) == expected
