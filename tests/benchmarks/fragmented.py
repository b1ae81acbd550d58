"""A region of 16 TiB of which half of the 2 MiB blocks is plugged, at random: two million runs of blocks.

The device is the one of `virtio-mem serve`, state file and all, in this process and without a ring. A front end's
memory is a memfd, and some of its pages are there, spread over the whole region. What takes all of it back is set
against one hole that is punched into the same file by a program in C.
"""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks.floor import Floor
from tests.benchmarks.measure import Row, in_turn, plain_row, ratio_row
from vhost_user.mapping import MAP_NORESERVE, Mapping
from vhost_user.memory import Region, RegionFile
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import GIB, MIB, TIB, ByteCount, GuestAddress, HostOffset, format_size
from virtio_mem.blocks import BlockMap, Runs
from virtio_mem.device import VirtioMemDevice
from virtio_mem.hostmem.files import punch_hole
from virtio_mem.protocol import Request, RequestType, ResponseType
from virtio_mem.serve.device import MemDevice
from virtio_mem.serve.plan import ServedZone
from virtio_mem.serve.state import state_size
from virtio_mem.snapshot.save import _save_device

ADDR = GuestAddress(4 * GIB)
_PAGE = 4096
_MAP = 4096
"""Where a state has its map of blocks: virtio_mem/serve/state.py."""


def rows(
    *, quick: bool, region_size: int = 16 * TIB, block_size: int = 2 * MIB, pages: int | None = None
) -> Iterator[Row]:
    """The table's lines. `pages` are the 4 KiB pages that there are in the region, fewer where it has to be quick."""
    pairs = 3 if quick else 20
    if pages is None:
        pages = 1 << (15 if quick else 17)
    what = f"{format_size(region_size)} of {format_size(block_size)} blocks, half plugged at random"
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory()))
        floor = Floor(directory)
        region = stack.enter_context(fragmented(region_size, block_size))
        for name, act in (("UNPLUG ALL", unplug_all), ("system reset", system_reset)):
            values = _against_punch(region, floor, act, pages, pairs)
            full = f"{name} of {what}, {pages * _PAGE // MIB} MiB held"
            yield ratio_row(full, "punching one hole in C", "ms", values, 1.2)
        values = _against_punch(region, floor, unplug_all, 0, pairs)
        yield plain_row(f"UNPLUG ALL of {what}, nothing held", "punching one hole in C", "ms", values)
        found = in_turn(pairs, lambda: _walk(region, _as_arrays), lambda: floor.walk(region.bits)[0])
        yield ratio_row(f"walking all plugged runs of {what}", "a walk in C", "ms", _ms(found), 3)
        found = in_turn(pairs, lambda: _walk(region, _one_by_one), lambda: floor.walk(region.bits)[0])
        yield plain_row(f"a Python tuple of each plugged run of {what}", "a walk in C", "ms", _ms(found))
        found = in_turn(pairs, lambda: _snapshot(region, directory), lambda: floor.save(len(region.bits), directory))
        yield plain_row(f"snapshot of the blocks of {what}", "write and fsync in C", "ms", _ms(found))


class Fragmented:
    """A region of which each block is plugged or not, as chance has it, at each `device()` anew."""

    def __init__(self, region_size: int, block_size: int, part: float = 0.5) -> None:
        self.size, self.block_size = ByteCount(region_size), ByteCount(block_size)
        self.nb_blocks = region_size // block_size
        self.bits = random_bits(self.nb_blocks, part)
        self.zone = ServedZone(
            id="mem0", addr=ADDR, hotplug_size=self.size, block_size=self.block_size, hotplugged_size=self.size
        )
        with ExitStack() as undo:
            self._state = os.memfd_create("state", os.MFD_CLOEXEC)
            undo.callback(os.close, self._state)
            os.ftruncate(self._state, state_size(self.zone.geometry))
            self.fd = os.memfd_create("region", os.MFD_CLOEXEC)
            undo.callback(os.close, self.fd)
            os.ftruncate(self.fd, self.size)
            self._mapping = Mapping(self.size, mmap.MAP_SHARED | MAP_NORESERVE, self.fd)
            undo.callback(self._mapping.close)
            MemDevice(self.zone, self._state).close()
            self._undo = undo.pop_all()

    @contextmanager
    def device(self) -> Iterator[MemDevice]:
        """The device, which finds its blocks as a process before it left them; a front end shares the memory."""
        os.pwrite(self._state, self.bits, _MAP)
        device = MemDevice(self.zone, self._state)
        try:
            with OwnedFd.duplicate_of(self.fd) as fd:
                region = Region(ADDR, self.size, self._mapping, file=RegionFile(fd, HostOffset(0)))
                device.memory.attach([region])
                yield device
        finally:
            device.close()

    def hold(self, pages: int) -> None:
        """Have the host hold so many pages, one in every so many blocks; whatever else there is goes."""
        punch_hole(self.fd, HostOffset(0), self.size)
        for page in range(pages):
            os.pwrite(self.fd, b"\1", page * self.nb_blocks // pages * self.block_size)

    def close(self) -> None:
        """Let go of the memory."""
        self._undo.close()


@contextmanager
def fragmented(region_size: int, block_size: int, part: float = 0.5) -> Iterator[Fragmented]:
    """A region of its own."""
    region = Fragmented(region_size, block_size, part)
    try:
        yield region
    finally:
        region.close()


def random_bits(nb_blocks: int, part: float) -> bytes:
    """A map of blocks; `part` of them, a multiple of 1/8, is set."""
    rng, eighths = random.Random(0), round(8 * part)
    size = -(-nb_blocks // 8)
    # Chance by chance: each step halves what is set or what is clear, the bits of `eighths` from the lowest on.
    bits = (1 << 8 * size) - 1 if eighths == 8 else 0
    for step in range(3 if eighths < 8 else 0):
        other = rng.getrandbits(8 * size)
        bits = bits | other if eighths >> step & 1 else bits & other
    return (bits & ((1 << nb_blocks) - 1)).to_bytes(size, "little")


def unplug_all(device: MemDevice) -> None:
    """As the guest's driver asks for."""
    response = device.service.request(Request(RequestType.UNPLUG_ALL))
    assert response.type is ResponseType.ACK, response
    device.state.done()


def system_reset(device: MemDevice) -> None:
    """As the machine's owner says."""
    assert device.service.system_reset()


def timed(region: Fragmented, act: Callable[[MemDevice], None], pages: int) -> float:
    """Seconds that the device takes to give back all of the region, of which so many pages are held."""
    region.hold(pages)
    with region.device() as device:
        assert device.device.blocks.plugged == int.from_bytes(region.bits, "little").bit_count()
        start = time.perf_counter()
        act(device)
        seconds = time.perf_counter() - start
        assert device.device.blocks.plugged == 0 == os.fstat(region.fd).st_blocks
    return seconds


def _against_punch(
    region: Fragmented, floor: Floor, act: Callable[[MemDevice], None], pages: int, pairs: int
) -> list[tuple[float, float]]:
    def punch() -> float:
        region.hold(pages)
        return floor.punch(region.fd, region.size, 1)

    timed(region, act, pages), punch()
    return _ms(in_turn(pairs, lambda: timed(region, act, pages), punch))


def _ms(pairs: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(1e3 * ours, 1e3 * theirs) for ours, theirs in pairs]


def _walk(region: Fragmented, count: Callable[[Runs], int]) -> float:
    blocks = BlockMap(region.nb_blocks, memoryview(bytearray(region.bits)))
    start = time.perf_counter()
    nb_runs = count(blocks.plugged_runs())
    seconds = time.perf_counter() - start
    assert nb_runs == len(blocks.plugged_runs())
    return seconds


def _as_arrays(runs: Runs) -> int:
    return sum(len(some) for some in runs.arrays())


def _one_by_one(runs: Runs) -> int:
    return sum(1 for _ in runs)


def _snapshot(region: Fragmented, directory: Path) -> float:
    """Of the blocks alone: memory that is saved with them costs what its content costs."""
    device = VirtioMemDevice(region.zone.geometry, requested_size=region.size)
    device.adopt(region.size, region.size, BlockMap(region.nb_blocks, memoryview(bytearray(region.bits))))
    path = directory / "blocks"
    start = time.perf_counter()
    _save_device(device, path)
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds
