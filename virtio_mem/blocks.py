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
from virtio_mem.protocol import BlockState

BlockIndex = NewType("BlockIndex", int)
"""A memory block's number within its device, from 0."""


class Run(NamedTuple):
    """`nb_blocks` neighbouring blocks from block `first`."""

    first: BlockIndex
    nb_blocks: int


_as_run: Callable[[tuple[int, int]], Run] = partial(tuple.__new__, Run)
"""`Run._make` without its look at the length: a map can have millions of runs."""


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

    def plugged_runs(self) -> Iterator[Run]:
        """The plugged blocks as maximal runs, in order. The map must not change meanwhile."""
        return self._runs(1, 0, self._size)

    def few_plugged_runs(self, most: int) -> list[Run] | None:
        """All of `plugged_runs()` where they are `most` at most; None where they are more, of which none is made."""
        firsts, sizes = next(self.memory.runs(True, 0, self._size, most + 1), ([], []))
        return None if len(firsts) > most else list(map(_as_run, zip(firsts, sizes, strict=True)))

    def unplugged_runs(self, within: Run) -> Iterator[Run]:
        """The unplugged blocks of `within` as maximal runs, in order. The map must not change meanwhile."""
        return self._runs(0, *self._bounds(within))

    def _runs(self, bit: int, start: int, stop: int) -> Iterator[Run]:
        for firsts, sizes in self.memory.runs(bool(bit), start, stop):
            yield from map(_as_run, zip(firsts, sizes, strict=True))

    def _bounds(self, run: Run) -> tuple[int, int]:
        first, nb_blocks = run
        assert first >= 0 and nb_blocks > 0 and first + nb_blocks <= self._size, (run, self._size)
        return first, first + nb_blocks
