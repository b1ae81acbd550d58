"""Pictures of a zone's blocks: as a bar, as a map, in letters or in colours, on the terminal or in a file.

`blocks` is what is drawn, `spans` what it is drawn with; `bar` and `grid` draw; `terminal` and `image` need a library
each (rich, matplotlib), and are imported by those alone who have a use for them.
"""

from __future__ import annotations

from virtio_mem.picture.bar import bar, column_of, draw, framed, target_mark
from virtio_mem.picture.blocks import Cell, Region, ZoneBlocks, ZoneCounts
from virtio_mem.picture.grid import grid, legend, zone_map
from virtio_mem.picture.sizes import counted, human_size, human_time
from virtio_mem.picture.spans import ASCII, UNICODE, Glyphs, Line, Role, Span, plain

__all__ = [
    "ASCII",
    "UNICODE",
    "Cell",
    "Glyphs",
    "Line",
    "Region",
    "Role",
    "Span",
    "ZoneBlocks",
    "ZoneCounts",
    "bar",
    "column_of",
    "counted",
    "draw",
    "framed",
    "grid",
    "human_size",
    "human_time",
    "legend",
    "plain",
    "target_mark",
    "zone_map",
]
