"""A region's blocks as a map: rows of cells from the lowest address on, as a page of text is read.

    +0 B      ▕████████████████████████████████████████▓▒░░····················▏
    +128 MiB  ▕································                                ▏
                                               ▲ requested 192 MiB
                                               ┊ usable 192 MiB

A cell stands for a power of two of blocks, so that rows begin at round addresses; a region of fewer blocks than columns
is one row in which each block is as wide as it can be. Marks go under the row in which a size ends.
"""

from __future__ import annotations

from typing import NamedTuple

from virtio_mem.picture.bar import cell_span, framed, joined
from virtio_mem.picture.blocks import Cell, ZoneBlocks
from virtio_mem.picture.sizes import counted, human_size
from virtio_mem.picture.spans import UNICODE, Glyphs, Line, Role, Span

GUTTER = 11
"""Columns for a row's offset and a blank: `+1023 MiB ` and one more, for pebibytes."""

MOST_COLUMNS = 128
MOST_ROWS = 16
"""More would not fit a terminal of usual height together with the zone's other lines."""


class Scale(NamedTuple):
    """How a region is cut: `columns` cells a row, `per_cell` blocks a cell, `cell_width` letters a cell."""

    columns: int
    per_cell: int
    cell_width: int

    @property
    def per_row(self) -> int:
        """Blocks that a row stands for."""
        return self.columns * self.per_cell


def scale_for(nb_blocks: int, width: int) -> Scale:
    """The scale for a picture that is at most `width` columns wide, if that leaves room for 8 cells."""
    room = max(8, width - GUTTER - 2)
    if nb_blocks <= room:
        columns = max(1, nb_blocks)
        return Scale(columns, 1, min(room, MOST_COLUMNS) // columns)
    columns = min(MOST_COLUMNS, 1 << room.bit_length() - 1)
    per_cell = 1
    while nb_blocks > columns * per_cell * MOST_ROWS:
        per_cell *= 2
    return Scale(columns, per_cell, 1)


def cells_of(blocks: ZoneBlocks, scale: Scale) -> list[Cell]:
    """All cells of the region; the last one may have fewer blocks."""
    ends = range(scale.per_cell, blocks.nb_blocks + scale.per_cell, scale.per_cell)
    return blocks.cells(min(end, blocks.nb_blocks) for end in ends)


def grid(blocks: ZoneBlocks, width: int, glyphs: Glyphs = UNICODE) -> list[Line]:
    """The map's lines."""
    scale = scale_for(blocks.nb_blocks, width)
    cells = cells_of(blocks, scale)
    lines: list[Line] = []
    for row in range(0, max(1, len(cells)), scale.columns):
        offset = f"+{human_size(blocks.size(row * scale.per_cell))}"
        letters = joined([span for cell in cells[row : row + scale.columns] for span in _letters(cell, scale, glyphs)])
        lines.append([Span(f"{offset:<{GUTTER}}", Role.QUIET), *framed(letters, glyphs)])
        lines += _marks(blocks, scale, row // scale.columns, glyphs)
    return lines


def _letters(cell: Cell, scale: Scale, glyphs: Glyphs) -> list[Span]:
    """A cell's letters. Where a cell has room for it, a blank at its end sets it apart from the next."""
    gap = scale.cell_width >= 3
    span = cell_span(cell, glyphs, scale.cell_width - gap)
    return [span, Span(" ", span.role)] if gap else [span]


def _marks(blocks: ZoneBlocks, scale: Scale, row: int, glyphs: Glyphs) -> list[Line]:
    """The marks of the sizes that end within a row."""
    marks = []
    for name, end, glyph, role in (
        ("requested", blocks.requested_blocks, glyphs.target, Role.TARGET),
        ("usable", blocks.usable_blocks, glyphs.border, Role.BORDER),
    ):
        if max(0, end - 1) // scale.per_row == row:
            column = -(-(end - row * scale.per_row) // scale.per_cell) * scale.cell_width
            label = f" {name} {human_size(blocks.size(end))}"
            marks.append([Span(" " * (GUTTER + 1 + column)), Span(glyph, role), Span(label, Role.QUIET)])
    return marks


def zone_map(name: str, blocks: ZoneBlocks, width: int, glyphs: Glyphs = UNICODE, remark: str = "") -> list[Line]:
    """A zone: a heading with its name, place and figures, and the map. `remark` ends the heading."""
    scale = scale_for(blocks.nb_blocks, width)
    size, each = human_size(blocks.size(blocks.nb_blocks)), human_size(blocks.block_size)
    plugged = human_size(blocks.size(blocks.nb_plugged))
    runs = f" in {counted(blocks.nb_runs, 'run')}" if blocks.nb_runs > 1 else ""
    unit = "a cell is a block" if scale.per_cell == 1 else f"a cell is {scale.per_cell:,} blocks"
    return [
        [Span(name, Role.NAME), Span(f"  {size} at {blocks.addr:#x}, {counted(blocks.nb_blocks, 'block')} of {each}")],
        [Span(f"{plugged} plugged{runs}{remark}; {unit}", Role.QUIET)],
        *grid(blocks, width, glyphs),
    ]


def legend(glyphs: Glyphs = UNICODE) -> Line:
    """What the letters mean."""
    levels = glyphs.levels if len(glyphs.levels) < 5 else f"{glyphs.levels[0]}-{glyphs.levels[-1]}"
    partly = "partly" if len(glyphs.levels) < 5 else "tenths plugged"
    return [
        Span(glyphs.plugged, Role.PLUGGED),
        Span(" plugged  "),
        Span(levels, Role.PARTLY),
        Span(f" {partly}  "),
        Span(glyphs.unplugged, Role.UNPLUGGED),
        Span(" unplugged  blank: not usable  "),
        Span(glyphs.target, Role.TARGET),
        Span(" requested size  "),
        Span(glyphs.border, Role.BORDER),
        Span(" usable border"),
    ]
