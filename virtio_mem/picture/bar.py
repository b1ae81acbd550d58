"""A region's blocks as one bar: which are plugged, what is usable, where the target is.

    mem0 ▕████████████████▒···············              ▏ 1 GiB at 0x180000000
                          ▲ target 258 MiB
          plugged 258 MiB, usable 768 MiB, blocks of 2 MiB

A cell stands for as many neighbouring blocks as the width demands, or a block for as many cells.
"""

from __future__ import annotations

from virtio_mem.picture.blocks import Cell, Region
from virtio_mem.picture.sizes import human_size
from virtio_mem.picture.spans import UNICODE, Glyphs, Line, Role, Span

BAR_WIDTH = 64
"""Columns of a bar where nobody says otherwise: with a name and a size beside it, it fits a terminal of 100."""


def cell_span(cell: Cell, glyphs: Glyphs, width: int = 1) -> Span:
    """A cell as `width` letters. One that begins outside the usable region is not usable."""
    if not cell.usable:
        return Span(glyphs.unusable * width, Role.UNUSABLE)
    if cell.plugged == cell.nb_blocks:
        return Span(glyphs.plugged * width, Role.PLUGGED)
    if cell.plugged:
        return Span(glyphs.level(cell.plugged, cell.nb_blocks) * width, Role.PARTLY)
    return Span(glyphs.unplugged * width, Role.UNPLUGGED)


def joined(spans: list[Span]) -> Line:
    """The same line with neighbouring spans of one role made one."""
    line: Line = []
    for span in spans:
        if line and line[-1].role is span.role:
            line[-1] = Span(line[-1].text + span.text, span.role)
        else:
            line.append(span)
    return line


def bar(blocks: Region, width: int, glyphs: Glyphs = UNICODE) -> Line:
    """`width` letters for the whole region, in ascending order of addresses, without a frame."""
    if not blocks.nb_blocks:
        return [Span(glyphs.unusable * width, Role.UNUSABLE)]
    cells = blocks.cut(width)
    return joined([cell_span(cells[column * len(cells) // width], glyphs) for column in range(width)])


def column_of(blocks: Region, nb_blocks: int, width: int) -> int:
    """The column, from 0 to `width`, at which the first `nb_blocks` blocks of the region end."""
    return min(width, -(-nb_blocks * width // blocks.nb_blocks)) if blocks.nb_blocks else 0


def framed(line: Line, glyphs: Glyphs = UNICODE) -> Line:
    """The line between the frame's sides."""
    return [Span(glyphs.left, Role.FRAME), *line, Span(glyphs.right, Role.FRAME)]


def target_mark(blocks: Region, width: int, glyphs: Glyphs = UNICODE) -> Line:
    """What goes under a bar: a mark where the requested size ends, and that size."""
    requested = human_size(blocks.size(blocks.requested_blocks))
    blank = Span(" " * column_of(blocks, blocks.requested_blocks, width))
    return [blank, Span(glyphs.target, Role.TARGET), Span(f" target {requested}", Role.QUIET)]


def draw(name: str, blocks: Region, width: int = BAR_WIDTH, glyphs: Glyphs = UNICODE) -> list[Line]:
    """A zone in three lines: its bar, the target's mark, and the sizes."""
    margin = Span(" " * (len(name) + 2))
    plugged, usable = human_size(blocks.size(blocks.nb_plugged)), human_size(blocks.size(blocks.usable_blocks))
    place = f" {human_size(blocks.size(blocks.nb_blocks))} at {blocks.addr:#x}"
    sizes = f"plugged {plugged}, usable {usable}, blocks of {human_size(blocks.block_size)}"
    return [
        [Span(f"{name} ", Role.NAME), *framed(bar(blocks, width, glyphs), glyphs), Span(place)],
        [margin, *target_mark(blocks, width, glyphs)],
        [margin, Span(sizes, Role.QUIET)],
    ]
