"""What a picture is drawn from: a region's blocks as runs, and cells that each stand for neighbouring blocks.

Runs are kept as two sorted lists, where each begins and how many blocks are plugged up to its end. How many blocks are
plugged below any block is then one bisection, so a cell costs the same whether it stands for one block or a million,
and a region of eight million blocks is cut into cells as fast as one of eight.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import add, lt
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from virtio_mem.device import VirtioMemDevice


class Cell(NamedTuple):
    """`nb_blocks` neighbouring blocks from block `first`, of which `plugged` are plugged and `usable` usable."""

    first: int
    nb_blocks: int
    plugged: int
    usable: int


class ZoneBlocks:
    """A region's blocks at one moment.

    `plugged` has runs of plugged blocks as (first block, number of blocks); `addr` is the guest address. Raises
    ValueError for runs that overlap, are not in ascending order, are empty, or end beyond `nb_blocks`.
    """

    def __init__(
        self,
        *,
        addr: int,
        block_size: int,
        nb_blocks: int,
        usable_blocks: int,
        requested_blocks: int,
        plugged: Iterable[Sequence[int]],
    ) -> None:
        self.addr = addr
        self.block_size = block_size
        self.nb_blocks = nb_blocks
        self.usable_blocks = usable_blocks
        self.requested_blocks = requested_blocks
        firsts, sizes = [], []
        for first, size in plugged:
            firsts.append(first)
            sizes.append(size)
        ends = list(map(add, firsts, sizes))
        overlap = any(map(lt, firsts[1:], ends))
        if overlap or (sizes and min(sizes) <= 0) or (ends and (firsts[0] < 0 or ends[-1] > nb_blocks)):
            raise ValueError("runs of blocks overlap, are out of order, or lie outside the region")
        self._firsts = firsts
        self._sizes = sizes
        self._up_to = list(accumulate(sizes, initial=0))

    @classmethod
    def of(cls, device: VirtioMemDevice) -> ZoneBlocks:
        """A device's blocks as they are now; hold its service's lock where others serve it."""
        geometry = device.geometry
        return cls(
            addr=geometry.addr,
            block_size=geometry.block_size,
            nb_blocks=geometry.nb_blocks,
            usable_blocks=device.usable_region_size // geometry.block_size,
            requested_blocks=device.requested_size // geometry.block_size,
            plugged=device.blocks.plugged_runs(),
        )

    @property
    def nb_plugged(self) -> int:
        """How many blocks are plugged."""
        return self._up_to[-1]

    @property
    def nb_runs(self) -> int:
        """How many runs the plugged blocks form."""
        return len(self._firsts)

    def plugged_below(self, block: int) -> int:
        """How many blocks with a number below `block` are plugged."""
        runs = bisect_left(self._firsts, block)
        if not runs:
            return 0
        last = runs - 1
        return self._up_to[last] + min(self._sizes[last], block - self._firsts[last])

    def size(self, nb_blocks: int) -> int:
        """The size of that many blocks, in bytes."""
        return nb_blocks * self.block_size

    def cells(self, ends: Iterable[int]) -> list[Cell]:
        """One cell up to each of `ends`, which ascend; the first begins at block 0."""
        cells = []
        first = below = 0
        for end in ends:
            now = self.plugged_below(end)
            usable = min(max(self.usable_blocks - first, 0), end - first)
            cells.append(Cell(first, end - first, now - below, usable))
            first, below = end, now
        return cells

    def cut(self, nb_cells: int) -> list[Cell]:
        """The whole region as cells of sizes that differ by a block at most; a block is never cut."""
        nb_cells = min(nb_cells, self.nb_blocks)
        return self.cells((index + 1) * self.nb_blocks // nb_cells for index in range(nb_cells))
