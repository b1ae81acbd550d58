"""What a Linux-like driver does with a virtio-mem device: which blocks it plugs, and how it takes each answer.

Learnt from Linux's virtio_mem driver. Memory is used in memory blocks of 128 MiB, or of one device block where that
is larger; plugging fills them from the bottom, unplugging empties them from the top. ACK: go on. NACK: the target has
changed; read it and start over at once. BUSY: stop, and try again on the next notice or after a while. ERROR: the
device is broken for good. A driver that finds memory plugged which it doesn't know starts with UNPLUG ALL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple, Protocol

from vhost_user.units import MIB, ByteCount, GuestAddress, align_up, is_power_of_two
from virtio_mem.blocks import BlockIndex, BlockMap, Run
from virtio_mem.protocol import ConfigSpace, Request, RequestType, Response, ResponseType

MEMORY_BLOCK_SIZE = ByteCount(128 * MIB)
"""What Linux on x86-64 adds to itself or takes away in one piece."""

_MAX_NB_BLOCKS = 0xFFFF
_MAX_NACKS = 16
"""A device that says NACK, and the same again after a fresh look at the target, is not asked for ever."""


class RequestPort(Protocol):
    """How the driver reaches its device."""

    def config(self) -> ConfigSpace:
        """Read the configuration space."""

    def request(self, request: Request) -> Response:
        """Send a request, wait for its response."""


class Outcome(Enum):
    """How a run towards the target ended."""

    REACHED = "target reached"
    STUCK = "no further block can be plugged or unplugged"
    BUSY = "the device is busy"
    BROKEN = "the device is broken"


class GuestRange(NamedTuple):
    """`size` bytes of guest memory at `addr`."""

    addr: GuestAddress
    size: ByteCount


def _use_nothing(_: GuestRange) -> None:
    """A guest that doesn't touch what it plugs."""


def _free_everything(_: GuestRange) -> bool:
    """A guest that can always do without."""
    return True


class MemoryDriver:
    """Drives one device towards its target.

    `online` is called with each range that was plugged, `offline` with each that is to be unplugged: it returns False
    where the guest can't do without. `memory_block_size` in bytes, a power of two, is for a kernel with smaller ones.
    """

    def __init__(
        self,
        port: RequestPort,
        *,
        online: Callable[[GuestRange], None] = _use_nothing,
        offline: Callable[[GuestRange], bool] = _free_everything,
        memory_block_size: int = MEMORY_BLOCK_SIZE,
    ) -> None:
        self.port = port
        self._online = online
        self._offline = offline
        config = port.config()
        self._addr = config.addr
        self._block_size = config.block_size
        self._memory_block_size = max(memory_block_size, config.block_size)
        self.broken = not is_power_of_two(config.block_size)
        self._blocks = BlockMap(0 if self.broken else config.region_size // config.block_size)
        self._unplug_all_first = config.plugged_size > 0

    @property
    def plugged_size(self) -> ByteCount:
        """Bytes that this driver has plugged."""
        return ByteCount(self._blocks.plugged * self._block_size)

    def run(self) -> Outcome:
        """Go towards the target as far as possible now."""
        for _ in range(_MAX_NACKS):
            if self.broken:
                return Outcome.BROKEN
            answer, config = self._approach()
            if answer is ResponseType.ACK:
                return Outcome.REACHED if config.requested_size == self.plugged_size else Outcome.STUCK
            if answer is ResponseType.BUSY:
                return Outcome.BUSY
            self.broken = answer is ResponseType.ERROR
        return Outcome.BUSY

    def _approach(self) -> tuple[ResponseType, ConfigSpace]:
        """One attempt; ACK also where there was nothing to ask for."""
        answer = ResponseType.ACK
        if self._unplug_all_first:
            answer = self.port.request(Request(RequestType.UNPLUG_ALL)).type
            self._unplug_all_first = answer is not ResponseType.ACK
        config = self.port.config()
        difference = (config.requested_size - self.plugged_size) // self._block_size
        if answer is ResponseType.ACK and difference > 0:
            answer = self._plug(difference, config)
        elif answer is ResponseType.ACK and difference < 0:
            answer = self._unplug(-difference)
        return answer, config

    def _plug(self, wanted: int, config: ConfigSpace) -> ResponseType:
        for memory_block in self._memory_blocks(config.usable_region_size):
            for free in list(self._blocks.unplugged_runs(memory_block)):
                run = Run(free.first, min(free.nb_blocks, wanted))
                answer = self._ask(RequestType.PLUG, run)
                if answer is not ResponseType.ACK:
                    return answer
                self._blocks.plug(run)
                self._online(self._range(run))
                wanted -= run.nb_blocks
                if not wanted:
                    return ResponseType.ACK
        return ResponseType.ACK

    def _unplug(self, unwanted: int) -> ResponseType:
        for whole in reversed(list(self._plugged_pieces())):
            nb_blocks = min(whole.nb_blocks, unwanted)
            run = Run(BlockIndex(whole.first + whole.nb_blocks - nb_blocks), nb_blocks)
            if not self._offline(self._range(run)):
                continue
            answer = self._ask(RequestType.UNPLUG, run)
            if answer is not ResponseType.ACK:
                self._online(self._range(run))
                return answer
            self._blocks.unplug(run)
            unwanted -= nb_blocks
            if not unwanted:
                break
        return ResponseType.ACK

    def _memory_blocks(self, usable_region_size: int) -> Iterator[Run]:
        """The memory blocks that lie wholly inside the usable region, lowest first."""
        size = self._memory_block_size
        start = align_up(self._addr, size)
        while start + size <= self._addr + usable_region_size:
            yield Run(
                BlockIndex((start - self._addr) // self._block_size), min(size // self._block_size, _MAX_NB_BLOCKS)
            )
            start += size

    def _plugged_pieces(self) -> Iterator[Run]:
        """The plugged blocks, cut where memory blocks end, lowest first."""
        per_memory_block = max(1, min(self._memory_block_size // self._block_size, _MAX_NB_BLOCKS))
        for run in self._blocks.plugged_runs():
            start, end = int(run.first), run.first + run.nb_blocks
            while start < end:
                border = min(end, (start // per_memory_block + 1) * per_memory_block)
                yield Run(BlockIndex(start), border - start)
                start = border

    def _ask(self, type_: RequestType, run: Run) -> ResponseType:
        return self.port.request(Request(type_, self._range(run).addr, run.nb_blocks)).type

    def _range(self, run: Run) -> GuestRange:
        addr = GuestAddress(self._addr + run.first * self._block_size)
        return GuestRange(addr, ByteCount(run.nb_blocks * self._block_size))
