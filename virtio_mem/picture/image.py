"""Maps of zones as an SVG or a PNG, by matplotlib.

A zone's rows are as in the terminal's map, only more of them. Where a size ends is a staircase: all above and to the
left of the line is within that size.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from io import BytesIO
from itertools import groupby
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from virtio_mem.picture.blocks import Cell, Region
from virtio_mem.picture.grid import (
    GUTTER,
    MOST_COLUMNS,
    Scale,
    cells_of,
    most_cells,
    row_offset,
    scale_for,
    zone_heading,
)
from virtio_mem.picture.sizes import human_size
from virtio_mem.picture.spans import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("svg", "png")
MOST_ROWS = 32
_COLUMNS = MOST_COLUMNS + GUTTER + 2
"""Of a terminal in which the widest map fits: a row of the picture is as long as that map's."""

_WIDTH = 11.0
_ROW = 0.17
_ONLY_ROW = 0.4
_AROUND = 1.0
"""Inches: of the picture, of a row, of one that is alone, and of a zone's heading and the room around its map."""

_PLUGGED, _UNPLUGGED = "#2f81f7", "#dde3ea"
_FEW, _MOST = "#fbe3bd", "#c77712"
"""Between which a cell's colour lies that is partly plugged."""

_HATCH, _HATCHING = "#dfe4ea", "////"
_TARGET, _BORDER, _INK, _QUIET = "#c2257f", "#0b7a70", "#1f2328", "#59636e"

STYLE: Any = {
    "svg.hashsalt": "virtio-mem",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,
}
"""What the same picture needs to come out the same everywhere, and our lettering."""


def cells_shown() -> int:
    """How many cells a zone's map has at most; see `grid.most_cells`."""
    return most_cells(_COLUMNS, rows=MOST_ROWS)


def image(zones: Sequence[tuple[str, Region]], format_: str) -> bytes:
    """The zones' maps below each other, in one of FORMATS. The same blocks give the same bytes."""
    scales = [scale_for(blocks.nb_blocks, _COLUMNS, rows=MOST_ROWS) for _, blocks in zones]
    heights = [_inches(blocks, scale) for (_, blocks), scale in zip(zones, scales, strict=True)]
    with rc_context(STYLE), warnings.catch_warnings(action="ignore"):  # of glyphs that the font lacks
        height = sum(heights) + _AROUND * len(zones) + 0.45
        figure = Figure(figsize=(_WIDTH, height), facecolor="white")
        top = height
        for (name, blocks), scale, rows in zip(zones, scales, heights, strict=True):
            top -= rows + _AROUND
            axes = figure.add_axes((0.085, (top + 0.3) / height, 0.885, rows / height))
            _draw(axes, name, blocks, scale)
        _legend(figure)
        file = BytesIO()
        figure.savefig(file, format=format_, dpi=144, metadata={"Date": None} if format_ == "svg" else None)
    return file.getvalue()


def _rows(blocks: Region, scale: Scale) -> int:
    return max(1, -(-blocks.nb_blocks // scale.per_row))


def _inches(blocks: Region, scale: Scale) -> float:
    return max(_ONLY_ROW, _ROW * _rows(blocks, scale))


def _draw(axes: Axes, name: str, blocks: Region, scale: Scale) -> None:
    rows = _rows(blocks, scale)
    ground = Rectangle((0, 0), scale.columns, rows, facecolor="none", edgecolor=_HATCH, hatch=_HATCHING, linewidth=0)
    axes.add_patch(ground)  # what no cell covers is not usable
    rectangles, colours = _rectangles(cells_of(blocks, scale), scale)
    axes.add_collection(PolyCollection(rectangles, facecolors=colours, linewidths=0), autolim=False)
    gaps = [[(column, 0), (column, rows)] for column in range(1, scale.columns)]
    axes.add_collection(LineCollection(gaps, colors="white", linewidths=0.5), autolim=False)
    gaps = [[(0, row), (scale.columns, row)] for row in range(1, rows)]
    axes.add_collection(LineCollection(gaps, colors="white", linewidths=1.2), autolim=False)
    axes.set_xlim(0, scale.columns)
    axes.set_ylim(rows, 0)
    axes.set_xticks([])
    shown = range(0, rows, 1 if rows <= 16 else 2)
    axes.set_yticks([row + 0.5 for row in shown], [row_offset(blocks, scale, row) for row in shown])
    axes.tick_params(length=0, colors=_QUIET, labelsize=8)
    for side in axes.spines.values():
        side.set_color("#c5ccd4")
    _staircase(axes, blocks.usable_blocks, scale, rows, _BORDER, "--")
    _staircase(axes, blocks.requested_blocks, scale, rows, _TARGET, "-")
    heading, figures = zone_heading(blocks, scale)
    sizes = (
        f"{figures}; requested {human_size(blocks.size(blocks.requested_blocks))}, "
        f"usable {human_size(blocks.size(blocks.usable_blocks))}"
    )
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(printable(name), (0, 1), (0, 22), color=_INK, fontweight="bold", fontsize=11, **place)  # type: ignore[arg-type]
    axes.annotate(heading, (1, 1), (0, 22), color=_INK, ha="right", **place)  # type: ignore[arg-type]
    axes.annotate(sizes, (0, 1), (0, 8), color=_QUIET, **place)  # type: ignore[arg-type]


def _rectangles(cells: list[Cell], scale: Scale) -> tuple[list[list[tuple[float, float]]], list[str]]:
    """Corners and colours. Neighbouring cells of one row and colour are one rectangle."""
    rectangles, colours = [], []
    place = 0
    for (row, colour), group in groupby(enumerate(cells), lambda each: (each[0] // scale.columns, _colour(each[1]))):
        size = len(list(group))
        left = place - row * scale.columns
        place += size
        if colour is not None:
            rectangles.append([(left, row), (left + size, row), (left + size, row + 1), (left, row + 1)])
            colours.append(colour)
    return rectangles, colours


def _colour(cell: Cell) -> str | None:
    if not cell.usable:
        return None
    if cell.plugged in (0, cell.nb_blocks):
        return _PLUGGED if cell.plugged else _UNPLUGGED
    share = cell.plugged / cell.nb_blocks
    red, green, blue = (few + (most - few) * share for few, most in zip(to_rgb(_FEW), to_rgb(_MOST), strict=True))
    return to_hex((red, green, blue))


def _staircase(axes: Axes, end: int, scale: Scale, rows: int, colour: str, style: str) -> None:
    """Where the first `end` blocks end."""
    row, rest = divmod(end, scale.per_row)
    column = rest / scale.per_cell
    line: list[tuple[float, float]]
    if rows == 1:
        line = [(min(end, scale.columns), 0), (min(end, scale.columns), 1)]
    elif rest:
        line = [(0, row + 1), (column, row + 1), (column, row), (scale.columns, row)]
    else:
        line = [(0, row), (scale.columns, row)]
    axes.plot(*zip(*line, strict=True), color=colour, linestyle=style, linewidth=2, clip_on=False)


def _legend(figure: Figure) -> None:
    handles = [
        Patch(facecolor=_PLUGGED, label="plugged"),
        Patch(facecolor=_MOST, label="partly: most"),
        Patch(facecolor=_FEW, label="few"),
        Patch(facecolor=_UNPLUGGED, label="unplugged"),
        Patch(facecolor="none", edgecolor="#c5ccd4", hatch=_HATCHING, linewidth=0, label="not usable"),
        Line2D([], [], color=_TARGET, linewidth=2, label="requested size ends"),
        Line2D([], [], color=_BORDER, linewidth=2, linestyle="--", label="usable region ends"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, labelcolor=_INK, fontsize=8)
