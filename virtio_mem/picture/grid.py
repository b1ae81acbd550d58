"""A region's blocks as a map: rows of cells from the lowest address on, as a page of text is read.

    +0 B       ▕████████████████████████████████▓▒░·····························▏
    +128 MiB   ▕··············                                                  ▏
                 ▲ requested 130 MiB
                              ┊ usable 156 MiB
    +256 MiB   ▕                           not usable                           ▏

A cell stands for a power of two of blocks, so that rows begin at round addresses; a region of fewer blocks than columns
is one row in which each block is as wide as it can be. Marks go under the row in which a size ends.
"""

from __future__ import annotations

from typing import NamedTuple

from virtio_mem.picture.bar import cell_span, framed, joined
from virtio_mem.picture.blocks import Cell, Region
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


def scale_for(nb_blocks: int, width: int, *, rows: int = MOST_ROWS) -> Scale:
    """The scale for a map of at most `rows` rows, and at most `width` columns if that leaves room for 8 cells."""
    room = _room(width)
    if nb_blocks <= room:
        columns = max(1, nb_blocks)
        return Scale(columns, 1, room // columns)
    columns = 1 << room.bit_length() - 1
    per_cell = 1
    while nb_blocks > columns * per_cell * rows:
        per_cell *= 2
    return Scale(columns, per_cell, 1)


def most_cells(width: int, *, rows: int = MOST_ROWS) -> int:
    """How many cells such a map has at most, whatever the region: what to ask a server for that cuts regions by powers
    of two as well, so that its cells are the map's or parts of them."""
    return (1 << _room(width).bit_length() - 1) * rows


def _room(width: int) -> int:
    return min(MOST_COLUMNS, max(8, width - GUTTER - 2))


def cells_of(blocks: Region, scale: Scale) -> list[Cell]:
    """All cells of the region; the last one may have fewer blocks."""
    ends = range(scale.per_cell, blocks.nb_blocks + scale.per_cell, scale.per_cell)
    return blocks.cells(min(end, blocks.nb_blocks) for end in ends)


def grid(blocks: Region, width: int, glyphs: Glyphs = UNICODE) -> list[Line]:
    """The map's lines. Rows that are not usable at all are one line, which says so."""
    scale = scale_for(blocks.nb_blocks, width)
    cells = cells_of(blocks, scale)
    lines: list[Line] = []
    for row in range(max(1, -(-len(cells) // scale.columns))):
        within = cells[row * scale.columns : (row + 1) * scale.columns]
        usable = any(cell.usable for cell in within)
        if usable:
            letters = joined([span for cell in within for span in _letters(cell, scale, glyphs)])
        else:
            letters = [Span(f"{'not usable':^{scale.columns * scale.cell_width}}", Role.QUIET)]
        offset = f"{row_offset(blocks, scale, row):<{GUTTER}}"
        lines += [[Span(offset, Role.QUIET), *framed(letters, glyphs)], *_marks(blocks, scale, row, glyphs)]
        if not usable:
            break
    return lines


def _letters(cell: Cell, scale: Scale, glyphs: Glyphs) -> list[Span]:
    """A cell's letters. Where a cell has room for it, a blank at its end sets it apart from the next."""
    gap = scale.cell_width >= 3
    span = cell_span(cell, glyphs, scale.cell_width - gap)
    return [span, Span(" ", span.role)] if gap else [span]


def _marks(blocks: Region, scale: Scale, row: int, glyphs: Glyphs) -> list[Line]:
    """The marks of the sizes that end within a row."""
    marks = []
    for name, end, glyph, role in (
        ("requested", blocks.requested_blocks, glyphs.target, Role.TARGET),
        ("usable", blocks.usable_blocks, glyphs.border, Role.BORDER),
    ):
        if max(0, end - 1) // scale.per_row == row:
            column = -(-(end - row * scale.per_row) // scale.per_cell) * scale.cell_width
            marks.append(_mark(column, scale, Span(glyph, role), f"{name} {human_size(blocks.size(end))}"))
    return marks


def _mark(column: int, scale: Scale, glyph: Span, label: str) -> Line:
    """A glyph under a column, and what it marks: to the right of it or, where the map ends before that, to the left."""
    blank = GUTTER + 1 + column
    if column + len(label) + 2 <= scale.columns * scale.cell_width or blank < len(label) + 1:
        return [Span(" " * blank), glyph, Span(f" {label}", Role.QUIET)]
    return [Span(" " * (blank - len(label) - 1)), Span(f"{label} ", Role.QUIET), glyph]


def row_offset(blocks: Region, scale: Scale, row: int) -> str:
    """Where a row begins, from the region's start."""
    return f"+{human_size(blocks.size(row * scale.per_row))}"


def zone_heading(blocks: Region, scale: Scale) -> tuple[str, str]:
    """A zone in words: its place, and its figures."""
    size, each = human_size(blocks.size(blocks.nb_blocks)), human_size(blocks.block_size)
    runs = f" in {counted(blocks.nb_runs, 'run')}" if blocks.nb_runs > 1 else ""
    unit = "a cell is a block" if scale.per_cell == 1 else f"a cell is {scale.per_cell:,} blocks"
    return (
        f"{size} at {blocks.addr:#x}, {counted(blocks.nb_blocks, 'block')} of {each}",
        f"{human_size(blocks.size(blocks.nb_plugged))} plugged{runs}; {unit}",
    )


def zone_map(name: str, blocks: Region, width: int, glyphs: Glyphs = UNICODE) -> list[Line]:
    """A zone: a heading with its name, place and figures, and the map."""
    place, figures = zone_heading(blocks, scale_for(blocks.nb_blocks, width))
    heading = [Span(name, Role.NAME), Span(f"  {place}")]
    return [heading, [Span(figures, Role.QUIET)], *grid(blocks, width, glyphs)]


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
        Span(" unplugged  "),
        Span(glyphs.target, Role.TARGET),
        Span(" requested  "),
        Span(glyphs.border, Role.BORDER),
        Span(" usable up to here"),
    ]
