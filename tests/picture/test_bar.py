"""The picture of the blocks says what the device says."""

from __future__ import annotations

import pytest

from tests.device.helpers import BLOCK, BLOCKS, REGION, make_device, plug
from vhost_user.units import GIB, MIB, TIB
from virtio_mem.device import VirtioMemDevice
from virtio_mem.geometry import UsableRegion
from virtio_mem.picture import ASCII, ZoneBlocks, bar, draw, human_size, human_time, plain


def letters(device: VirtioMemDevice, width: int) -> str:
    return "".join(span.text for span in bar(ZoneBlocks.of(device), width))


def text(width: int, **options: object) -> str:
    device = make_device(**options)  # type: ignore[arg-type]
    plug(device, 0, 3)
    return letters(device, width)


def test_a_cell_a_block() -> None:
    assert text(8, region=8 * BLOCK, requested=8 * BLOCK) == "███·····"


def test_many_blocks_a_cell() -> None:
    assert text(4, region=8 * BLOCK, requested=8 * BLOCK) == "█▒··"


def test_many_cells_a_block() -> None:
    assert text(16, region=8 * BLOCK, requested=8 * BLOCK) == "██████··········"


def test_the_unusable_part_is_blank() -> None:
    device = make_device(region=8 * GIB, requested=768 * MIB, usable=UsableRegion.REQUESTED_PLUS_SLACK)
    plug(device, 0, 384)
    assert letters(device, 16) == "█▒" + " " * 14
    assert letters(device, 32) == "███·" + " " * 28


@pytest.mark.parametrize("blocks", [1, 8, 8 << 20])
def test_every_scale_from_one_block_to_eight_million(blocks: int) -> None:
    device = make_device(region=blocks * BLOCK, requested=blocks * BLOCK)
    plug(device, blocks - 1)
    drawn = letters(device, 64)
    assert len(drawn) == 64
    assert drawn[-1] == ("█" if blocks <= 64 else "░")


@pytest.mark.parametrize(("plugged", "letter"), [(1, "░"), (127, "░"), (128, "▒"), (191, "▒"), (192, "▓"), (255, "▓")])
def test_quarters_of_a_cell_show(plugged: int, letter: str) -> None:
    device = make_device(region=256 * BLOCK, requested=256 * BLOCK)
    plug(device, 0, plugged)
    assert letters(device, 1) == letter


def test_no_region_is_no_cells() -> None:
    assert letters(make_device(region=0, requested=0), 3) == "   "


def test_plain_letters_tell_tenths() -> None:
    device = make_device(region=80 * BLOCK, requested=80 * BLOCK)
    plug(device, 0, 15)
    assert [plain(line) for line in draw("m", ZoneBlocks.of(device), 8, ASCII)][:2] == [
        "m [#5......] 160 MiB at 0x100000000",
        "           ^ target 160 MiB",
    ]


def test_the_lines_name_sizes_and_place_the_target() -> None:
    device = make_device(requested=REGION // 2)
    plug(device, 0, BLOCKS // 4)
    lines = [plain(line) for line in draw("mem0", ZoneBlocks.of(device), 8)]
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
        (2**64, "16 EiB"),
    ],
)
def test_sizes_for_people(size: int, expected: str) -> None:
    assert human_size(size) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (12.4, "12 s"), (60, "1 min 0 s"), (200, "3 min 20 s"), (18_060, "5 h 1 min")],
)
def test_times_for_people(seconds: float, expected: str) -> None:
    assert human_time(seconds) == expected
