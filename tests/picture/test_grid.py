"""The map of the blocks: every block is in one cell, whatever the region's size and the width."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.device.helpers import ADDR, BLOCK
from virtio_mem.picture import ASCII, UNICODE, Glyphs, ZoneBlocks, ZoneCounts, grid, legend, plain, zone_map
from virtio_mem.picture.blocks import Sizes
from virtio_mem.picture.grid import MOST_ROWS, cells_of, most_cells, scale_for
from virtio_mem.picture.spans import width_of

MANY = 8 << 20

BITMAPS = st.lists(st.booleans(), min_size=1, max_size=3000)
WIDTHS = st.integers(min_value=1, max_value=300)


def runs_of(bitmap: list[bool]) -> list[tuple[int, int]]:
    runs, first = [], 0
    for plugged, group in groupby(bitmap):
        size = len(list(group))
        if plugged:
            runs.append((first, size))
        first += size
    return runs


def blocks(nb_blocks: int, plugged: list[tuple[int, int]], *, usable: int = -1, requested: int = 0) -> ZoneBlocks:
    return ZoneBlocks(
        addr=ADDR,
        block_size=BLOCK,
        nb_blocks=nb_blocks,
        usable_blocks=nb_blocks if usable < 0 else usable,
        requested_blocks=requested,
        plugged=plugged,
    )


def drawn(zone: ZoneBlocks, width: int, glyphs: Glyphs = UNICODE) -> list[str]:
    return [plain(line) for line in grid(zone, width, glyphs)]


@given(bitmap=BITMAPS, width=WIDTHS, data=st.data())
def test_cells_have_each_block_once(bitmap: list[bool], width: int, data: st.DataObject) -> None:
    usable = data.draw(st.integers(0, len(bitmap)))
    zone = blocks(len(bitmap), runs_of(bitmap), usable=usable)
    assert zone.nb_plugged == sum(bitmap)
    for cells in (zone.cut(width), cells_of(zone, scale_for(len(bitmap), width))):
        assert [cell.first for cell in cells[1:]] == [cell.first + cell.nb_blocks for cell in cells[:-1]]
        assert sum(cell.nb_blocks for cell in cells) == len(bitmap)
        assert sum(cell.usable for cell in cells) == usable
        for cell in cells:
            assert cell.plugged == sum(bitmap[cell.first : cell.first + cell.nb_blocks])


@given(bitmap=BITMAPS, width=WIDTHS, requested=st.integers(0, 3000))
def test_every_map_fits_its_width(bitmap: list[bool], width: int, requested: int) -> None:
    zone = blocks(len(bitmap), runs_of(bitmap), requested=min(requested, len(bitmap)))
    lines = grid(zone, width)
    rows = [line for line in lines if "▕" in plain(line)]
    assert 1 <= len(rows) <= MOST_ROWS
    assert all(width_of(line) <= max(width, 21) for line in rows)
    for glyph, size in (("▲", "requested"), ("┊", "usable")):
        (mark,) = (plain(line) for line in lines if glyph in plain(line))
        assert f"{glyph} {size} " in mark or mark.endswith(f"B {glyph}")
        assert mark.index(glyph) <= width_of(rows[0])


def counted(zone: ZoneBlocks, per_cell: int) -> ZoneCounts:
    """The same region, of which no more is known than counts."""
    ends = range(per_cell, zone.nb_blocks + per_cell, per_cell)
    return ZoneCounts(
        addr=zone.addr,
        block_size=zone.block_size,
        nb_blocks=zone.nb_blocks,
        usable_blocks=zone.usable_blocks,
        requested_blocks=zone.requested_blocks,
        per_cell=per_cell,
        counts=[cell.plugged for cell in zone.cells(min(end, zone.nb_blocks) for end in ends)],
        nb_runs=zone.nb_runs,
    )


@given(bitmap=BITMAPS, width=WIDTHS, usable=st.integers(0, 3000))
def test_counts_draw_what_runs_draw(bitmap: list[bool], width: int, usable: int) -> None:
    """With as many counts as such a map has cells at most, cut by powers of two."""
    zone = blocks(len(bitmap), runs_of(bitmap), usable=min(usable, len(bitmap)))
    per_cell = 1
    while len(bitmap) > per_cell * most_cells(width):
        per_cell *= 2
    assert zone_map("mem0", counted(zone, per_cell), width) == zone_map("mem0", zone, width)


def test_counts_cannot_be_cut_elsewhere() -> None:
    zone = counted(blocks(10, [(1, 3)]), 4)
    assert [zone.plugged_below(block) for block in (0, 4, 8, 10)] == [0, 3, 3, 3]
    with pytest.raises(ValueError, match="a count is of 4 blocks"):
        zone.plugged_below(9)


@pytest.mark.parametrize(
    ("per_cell", "counts", "nb_runs", "error"),
    [
        (0, [1], 1, "not a region"),
        (4, [1, 1], 1, "not a region"),
        (4, [1, 1, 1, 0], 1, "not a region"),
        (4, [5, 0, 0], 1, "more blocks than there are"),
        (4, [-1, 0, 0], 0, "more blocks than there are"),
        (4, [0, 0, 3], 1, "more blocks than there are"),
        (4, [0, 0, 0], 1, "are not 1 runs"),
        (4, [0, 2, 0], 0, "are not 0 runs"),
        (4, [0, 2, 0], 3, "are not 3 runs"),
        (4, [4, 4, 1], 3, "are not 3 runs"),
    ],
)
def test_counts_that_cannot_be(per_cell: int, counts: list[int], nb_runs: int, error: str) -> None:
    sizes = Sizes(addr=ADDR, block_size=BLOCK, nb_blocks=10, usable_blocks=10, requested_blocks=0)
    with pytest.raises(ValueError, match=error):
        ZoneCounts(per_cell=per_cell, counts=counts, nb_runs=nb_runs, **sizes)


@pytest.mark.parametrize("nb_blocks", [128, 129, 200, 1000])
def test_a_wide_terminal_has_a_map_of_some_letters(nb_blocks: int) -> None:
    letters = "".join(drawn(blocks(nb_blocks, [(0, nb_blocks)]), 1100))
    assert letters.count("█") == nb_blocks * 128 // nb_blocks if nb_blocks <= 128 else -(-nb_blocks // 2)


@pytest.mark.parametrize("runs", [[(0, 0)], [(0, 9)], [(-1, 2)], [(3, 1), (0, 1)], [(0, 3), (2, 1)], [(8, 1)]], ids=str)
def test_runs_that_cannot_be(runs: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="overlap, are out of order, or lie outside"):
        blocks(8, runs)


def test_eight_blocks_are_wide_and_set_apart() -> None:
    zone = blocks(8, [(0, 2), (3, 1)], usable=6, requested=4)
    assert drawn(zone, 48, ASCII) == [
        "+0 B       [### ### ... ### ... ...         ]",
        "            requested 8 MiB ^",
        "                      usable 12 MiB |",
    ]


def test_what_is_not_usable_is_one_line() -> None:
    zone = blocks(128, [(0, 2)], usable=40, requested=2)
    assert drawn(zone, 45, ASCII) == [
        "+0 B       [##..............................]",
        "              ^ requested 4 MiB",
        "+64 MiB    [........                        ]",
        "                    | usable 80 MiB",
        "+128 MiB   [           not usable           ]",
    ]


def test_nothing_requested_and_nothing_usable() -> None:
    assert drawn(blocks(64, [], usable=0), 80, ASCII) == [
        "+0 B       [" + " " * 27 + "not usable" + " " * 27 + "]",
        " " * 12 + "^ requested 0 B",
        " " * 12 + "| usable 0 B",
    ]


def test_rows_begin_at_round_offsets() -> None:
    zone = blocks(100, [(0, 40)], requested=40)
    assert drawn(zone, 60) == [
        "+0 B       ▕" + "█" * 32 + "▏",
        "+64 MiB    ▕" + "█" * 8 + "·" * 24 + "▏",
        " " * 20 + "▲ requested 80 MiB",
        "+128 MiB   ▕" + "·" * 32 + "▏",
        "+192 MiB   ▕····▏",
        " " * 16 + "┊ usable 200 MiB",
    ]


def test_a_zone_in_words() -> None:
    heading, figures, *_ = map(plain, zone_map("mem0", blocks(MANY, [(0, 1), (4, 1)], requested=2), 80))
    assert heading == "mem0  16 TiB at 0x100000000, 8,388,608 blocks of 2 MiB"
    assert figures == "4 MiB plugged in 2 runs; a cell is 8,192 blocks"


def test_no_region_at_all() -> None:
    assert drawn(blocks(0, []), 40)[0].startswith("+0 B")


def test_the_legend_has_every_letter() -> None:
    assert plain(legend()).startswith("█ plugged  ░▒▓ partly  · unplugged")
    assert plain(legend(ASCII)).startswith("# plugged  1-9 tenths plugged  . unplugged")


class Looked(int):
    """A number of a block that counts how often it is compared."""

    looks = 0

    def __lt__(self, other: int) -> bool:
        Looked.looks += 1
        return int(self) < other


def looked(nb_blocks: int, size: int = 7) -> list[tuple[int, int]]:
    """A run in each 64 blocks."""
    return [(Looked(first), size) for first in range(0, nb_blocks, 64)]


def looks(runs: int) -> int:
    """How often it takes at most to find a place among so many."""
    return runs.bit_length()


@pytest.mark.parametrize("nb_blocks", [8, MANY])
def test_eight_million_are_drawn_by_a_bisection_a_cell(nb_blocks: int) -> None:
    zone = blocks(nb_blocks, runs := looked(nb_blocks))
    Looked.looks = 0
    lines = drawn(zone, 100)
    assert 0 < Looked.looks <= most_cells(100) * looks(len(runs))
    assert len(lines) <= MOST_ROWS + 2
