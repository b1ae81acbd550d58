"""Which memory blocks are plugged: one bit a block, so 16 TiB of 2 MiB blocks cost 1 MiB.

The bits may lie in memory of the caller's that outlives the process, block n in bit n % 8 of byte n // 8.

Range questions scan the bitmap a machine word at a time; the number of plugged blocks is kept, never counted again.
A range outside the map is our own bug: the device has checked the guest's numbers before it asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, NewType

from bitarray import bitarray

from virtio_mem import _native
from virtio_mem._native import RunArrays
from virtio_mem.protocol import BlockState

BlockIndex = NewType("BlockIndex", int)
"""A memory block's number within its device, from 0."""


class Run(NamedTuple):
    """`nb_blocks` neighbouring blocks from block `first`."""

    first: BlockIndex
    nb_blocks: int


_as_run: Callable[[tuple[int, int]], Run] = partial(tuple.__new__, Run)
"""`Run._make` without its look at the length: a map can have millions of runs."""


class Runs:
    """The plugged blocks of a part of a map, or the unplugged ones, as maximal runs, in order. The map must not change
    while one looks for them.

    They are found anew each time that one asks, and never kept all at once: 64 TiB of 1 MiB blocks can have 32 million.
    To iterate makes a `Run` of each, and costs 20 times what `arrays()` costs; `len()` makes none.
    """

    def __init__(self, bits: bitarray, memory: _native.Bits, wanted: bool, start: int, end: int) -> None:
        self._bits, self._memory, self._wanted, self._start, self._end = bits, memory, wanted, start, end

    def arrays(self) -> Iterator[RunArrays]:
        """The first blocks of some runs and their numbers of blocks, then those of some more: 4096 runs at most."""
        return self._memory.runs(self._wanted, self._start, self._end)

    def __iter__(self) -> Iterator[Run]:
        for some in self.arrays():
            yield from map(_as_run, some)

    def __len__(self) -> int:
        bits = self._bits[self._start : self._end]
        if not self._wanted:
            bits.invert()
        # As many as there are blocks of theirs after one that is not.
        return (bits & ~(bits >> 1)).count()


class BlockMap:
    """The state of `size` memory blocks, all of them unplugged at first.

    With `memory`, writable, the bits are there, and as they are found; it can't be unmapped before `release()`.
    """

    def __init__(self, size: int, memory: memoryview | None = None) -> None:
        self._size = size
        if memory is None:
            self._bits = bitarray(size, endian="little")
            self._bits.setall(0)
        else:
            assert len(memory) * 8 >= size
            self._bits = bitarray(buffer=memory, endian="little")
        self._plugged = self._bits.count(1, 0, size)
        self.memory = _native.Bits(self._bits)
        """The bits, for the rules."""

    def __len__(self) -> int:
        return self._size

    def to_bytes(self) -> bytes:
        """The bits, block n in bit n % 8 of byte n // 8, as `memory` has them."""
        return self._bits[: self._size].tobytes()

    def release(self) -> None:
        """Let go of the caller's memory. The map is of no use any more."""
        self.memory.release()
        self._bits, self._size, self._plugged = bitarray(), 0, 0

    @property
    def plugged(self) -> int:
        """How many blocks are plugged. O(1)."""
        return self._plugged

    def state(self, run: Run) -> BlockState:
        """PLUGGED or UNPLUGGED where all blocks of `run` are, else MIXED."""
        first, end = self._bounds(run)
        if self._bits.find(0, first, end) < 0:
            return BlockState.PLUGGED
        if self._bits.find(1, first, end) < 0:
            return BlockState.UNPLUGGED
        return BlockState.MIXED

    def plug(self, run: Run) -> None:
        """Mark the blocks of `run` plugged; all of them were unplugged."""
        assert self.state(run) is BlockState.UNPLUGGED
        first, end = self._bounds(run)
        self._bits[first:end] = 1
        self._plugged += run.nb_blocks

    def came(self, nb_blocks: int) -> None:
        """So many blocks were plugged by the C core, which has set their bits."""
        self._plugged += nb_blocks

    def unplug(self, run: Run) -> None:
        """Mark the blocks of `run` unplugged; all of them were plugged."""
        assert self.state(run) is BlockState.PLUGGED
        first, end = self._bounds(run)
        self._bits[first:end] = 0
        self._plugged -= run.nb_blocks

    def unplug_all(self) -> None:
        """Mark every block unplugged."""
        self._bits[: self._size] = 0
        self._plugged = 0

    def put(self, run: Run, state: BlockState) -> None:
        """Mark the blocks of `run` PLUGGED or UNPLUGGED, whatever they were."""
        first, end = self._bounds(run)
        self._plugged -= self.count(run)
        self._bits[first:end] = plugged = int(state is BlockState.PLUGGED)
        self._plugged += plugged * run.nb_blocks

    def copy(self) -> BlockMap:
        """The map as it is at this moment, for who takes its time to look at it."""
        copied = BlockMap(self._size)
        copied._bits[: self._size] = self._bits[: self._size]
        copied._plugged = self._plugged
        return copied

    def count(self, run: Run) -> int:
        """How many blocks of `run` are plugged."""
        return self._bits.count(1, *self._bounds(run))

    def plugged_runs(self) -> Runs:
        """The plugged blocks."""
        return Runs(self._bits, self.memory, True, 0, self._size)

    def few_plugged_runs(self, many: int) -> list[Run] | None:
        """All of `plugged_runs()` where they are fewer than `many`; else None, and none of them is made."""
        some = next(self.memory.runs(True, 0, self._size, many), ())
        return list(map(_as_run, some)) if len(some) < many else None

    def unplugged_runs(self, within: Run) -> Runs:
        """The unplugged blocks of `within`."""
        return Runs(self._bits, self.memory, False, *self._bounds(within))

    def _bounds(self, run: Run) -> tuple[int, int]:
        first, nb_blocks = run
        assert first >= 0 and nb_blocks > 0 and first + nb_blocks <= self._size, (run, self._size)
        return first, first + nb_blocks
