"""What a picture is drawn from: a region's blocks, and cells that each stand for neighbouring ones.

`ZoneBlocks` knows every block, and can be cut anywhere. `ZoneCounts` knows of each so many neighbouring blocks how many
are plugged: all that a picture of that scale shows, and a thousandth of the size.

Runs are kept as two sorted lists, where each begins and how many blocks are plugged up to its end. How many blocks are
plugged below any block is then one bisection, so a cell costs the same whether it stands for one block or a million,
and a region of eight million blocks is cut into cells as fast as one of eight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import add, lt
from typing import TYPE_CHECKING, NamedTuple, TypedDict, Unpack

if TYPE_CHECKING:
    from virtio_mem.device import VirtioMemDevice


class Cell(NamedTuple):
    """`nb_blocks` neighbouring blocks from block `first`, of which `plugged` are plugged and `usable` usable."""

    first: int
    nb_blocks: int
    plugged: int
    usable: int


class Sizes(TypedDict):
    """What there is to know of a region but its blocks, as `Region` has it."""

    addr: int
    block_size: int
    nb_blocks: int
    usable_blocks: int
    requested_blocks: int


class Region(ABC):
    """A region at one moment: where its blocks are, how many, and how many of them are plugged up to where.

    `addr` is the guest address; `usable_blocks` and `requested_blocks` count from the region's start.
    """

    def __init__(
        self, *, addr: int, block_size: int, nb_blocks: int, usable_blocks: int, requested_blocks: int
    ) -> None:
        self.addr = addr
        self.block_size = block_size
        self.nb_blocks = nb_blocks
        self.usable_blocks = usable_blocks
        self.requested_blocks = requested_blocks

    @property
    @abstractmethod
    def nb_plugged(self) -> int:
        """How many blocks are plugged."""

    @property
    @abstractmethod
    def nb_runs(self) -> int:
        """How many runs the plugged blocks form."""

    @abstractmethod
    def plugged_below(self, block: int) -> int:
        """How many blocks with a number below `block` are plugged."""

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


class ZoneBlocks(Region):
    """A region of which every block is known.

    `plugged` has runs of plugged blocks as (first block, number of blocks). ValueError for runs that overlap, are not
    in ascending order, are empty, or end beyond the region.
    """

    def __init__(self, *, plugged: Iterable[Sequence[int]], **sizes: Unpack[Sizes]) -> None:
        super().__init__(**sizes)
        firsts, sizes_of_runs = [], []
        for first, size in plugged:
            firsts.append(first)
            sizes_of_runs.append(size)
        ends = list(map(add, firsts, sizes_of_runs))
        overlap = any(map(lt, firsts[1:], ends))
        empty = bool(sizes_of_runs) and min(sizes_of_runs) <= 0
        if overlap or empty or (ends and (firsts[0] < 0 or ends[-1] > self.nb_blocks)):
            raise ValueError("runs of blocks overlap, are out of order, or lie outside the region")
        self._firsts = firsts
        self._sizes = sizes_of_runs
        self._up_to = list(accumulate(sizes_of_runs, initial=0))

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


class ZoneCounts(Region):
    """A region of which it is known how many of each `per_cell` neighbouring blocks are plugged: `counts`, in order.

    The last count may be of fewer blocks. Raises ValueError for counts that can't be: too many or too few of them, one
    of more blocks than there are, or a number of runs that so many blocks don't form.
    """

    def __init__(self, *, per_cell: int, counts: Sequence[int], nb_runs: int, **sizes: Unpack[Sizes]) -> None:
        super().__init__(**sizes)
        if per_cell < 1 or len(counts) != -(-self.nb_blocks // per_cell):
            raise ValueError(f"{len(counts)} counts of {per_cell} blocks each are not a region of {self.nb_blocks}")
        last = self.nb_blocks - (len(counts) - 1) * per_cell
        if counts and (min(counts) < 0 or max(counts) > per_cell or counts[-1] > last):
            raise ValueError("a count is of more blocks than there are")
        self._per_cell = per_cell
        self._up_to = list(accumulate(counts, initial=0))
        plugged = self._up_to[-1]
        if not (plugged > 0) <= nb_runs <= min(plugged, self.nb_blocks - plugged + 1):
            raise ValueError(f"{plugged} plugged blocks of {self.nb_blocks} are not {nb_runs} runs")
        self._nb_runs = nb_runs

    @property
    def nb_plugged(self) -> int:
        """How many blocks are plugged."""
        return self._up_to[-1]

    @property
    def nb_runs(self) -> int:
        """How many runs the plugged blocks form."""
        return self._nb_runs

    def plugged_below(self, block: int) -> int:
        """How many blocks below `block` are plugged; ValueError where that is none of the counts' ends."""
        counts, rest = divmod(block, self._per_cell)
        if rest and block != self.nb_blocks:
            raise ValueError(f"what is plugged below block {block} is not known: a count is of {self._per_cell} blocks")
        return self._up_to[counts + bool(rest)]
