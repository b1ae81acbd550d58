"""How fast memory goes back to the host, and comes from it: GiB a second, against the same system calls in a C loop.

Ours gets some requests in one kick. The C loop makes a call for each request, in the same file, which the same
processes have mapped. Requests are of 64 blocks, 128 MiB, as Linux makes them, which adds and removes memory in such
pieces; or of one block, 2 MiB. What comes after a sleep is slower, and so is what another processor has filled: so
both are woken up by the process that filled the memory, on the processor that it doesn't have.

To wake a device up and to be called by it takes as long as to give back much of a gibibyte of huge pages. What that
costs is measured by itself (requests.py). So, as there, a kick with all of the requests and one with the first of them
are set against each other, and so are the calls in C: speed is what the other requests took. As much is plugged and
filled before either kick: huge pages the service clears as it plugs them, and what it does beside its call to the host
takes the longer the more it has cleared. What all of it takes from the kick to the call is in the table as well.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tests import host
from tests.benchmarks.floor import Floor
from tests.benchmarks.measure import Row, in_turn, plain_row, speed_row
from tests.benchmarks.ours import ADDR, BLOCK_SIZE, OurDevice, our_device
from tests.benchmarks.processors import a_processor_each
from vhost_user.units import GIB, MIB, GuestAddress, format_size
from virtio_mem.protocol import Request, RequestType


class Volume(NamedTuple):
    """So many requests in a kick, each of so many blocks."""

    requests: int
    blocks: int

    @property
    def size(self) -> int:
        """Bytes of all."""
        return self.requests * self.piece

    @property
    def piece(self) -> int:
        """Bytes of one."""
        return self.blocks * BLOCK_SIZE

    def __str__(self) -> str:
        return f"{self.requests} requests of {format_size(self.piece)}"

    def of(self, type_: RequestType) -> list[Request]:
        """The requests, from the region's first block on."""
        return [Request(type_, GuestAddress(ADDR + at * self.piece), self.blocks) for at in range(self.requests)]


Side = Callable[[Volume, int], float]
"""Does the first so many requests of a volume: seconds."""

LINUX = Volume(7, 64)
SMALL = Volume(60, 1)


@dataclass(frozen=True)
class Pages:
    """A kind of pages: what has to be so for a region to be of them, and of which kind its memfd is."""

    name: str
    prepare: Callable[[], AbstractContextManager[None]]
    memfd_flags: int = 0
    huge: bool = False
    """Whether they are huge by luck, and that is to be looked at."""
    times: int = 3
    """How often each kick is made, for its median. Where memory goes back in no time, what is left is how long the
    device takes to wake up, which differs by as much."""


@contextmanager
def _setting(made: AbstractContextManager[None]) -> Iterator[None]:
    """`made`, unless another run changes the host's settings at this time: then LookupError, instead of a long wait."""
    if not host.settings_lock.acquire(wait=False):
        raise LookupError("another run changes the host's settings")
    try:
        with made:
            yield
    finally:
        host.settings_lock.release()


KINDS = (
    Pages("4 KiB pages", nullcontext),
    Pages("THP", lambda: _setting(host.changed(host.SHMEM_THP, "always")), huge=True, times=9),
    Pages(
        "hugetlb",
        lambda: _setting(host.HugePagePool(2 * MIB).with_free(LINUX.requests * LINUX.blocks)),
        os.MFD_HUGETLB | os.MFD_HUGE_2MB,
        times=9,
    ),
)


def rows(*, quick: bool) -> Iterator[Row]:
    """The table's lines."""
    with TemporaryDirectory() as directory:
        floor = Floor(Path(directory))
        for pages in KINDS:
            try:
                with pages.prepare():
                    yield from _discards(floor, pages, quick=quick)
            except (OSError, LookupError) as error:
                sys.stderr.write(f"UNPLUG of {pages.name}: left out: {error}\n")
        yield from _prefault(floor, quick=quick)


class Took(NamedTuple):
    """Seconds for all requests of a volume, and for the first of them alone."""

    all: float
    one: float


def _two_rows(what: str, against: str, volume: Volume, found: list[tuple[Took, Took]]) -> Iterator[Row]:
    """How fast the requests behind the first one are, and how fast all are with what comes before and after."""
    rest = volume.size - volume.piece
    behind = [(_speed(rest, ours.all - ours.one), _speed(rest, theirs.all - theirs.one)) for ours, theirs in found]
    yield speed_row(f"{what}, {volume}", against, "GiB/s", behind, 0.95)
    whole = [(_speed(volume.size, ours.all), _speed(volume.size, theirs.all)) for ours, theirs in found]
    yield plain_row(f"{what}, {volume}, kick to interrupt", against, "GiB/s", whole)


def _discards(floor: Floor, pages: Pages, *, quick: bool) -> Iterator[Row]:
    with our_device(memfd_flags=pages.memfd_flags) as device, a_processor_each(device.vmm.service) as processor:

        def ours(volume: Volume, first: int) -> float:
            fill(device, pages, volume)
            device.rouse()  # to fill more takes longer
            requests = volume.of(RequestType.UNPLUG)
            seconds = device.kick(requests[:first])
            if rest := requests[first:]:
                device.kick(rest)
            return seconds

        def theirs(volume: Volume, first: int) -> float:
            fill(device, pages, volume)
            seconds = floor.kicked("punch", device.vmm.fd, volume.piece, first, processor)
            device.kick(volume.of(RequestType.UNPLUG))
            return seconds

        for volume in (LINUX, SMALL):
            found = _in_turn(volume, ours, theirs, times=pages.times, quick=quick)
            yield from _two_rows(f"UNPLUG of populated memory, {pages.name}", "punching holes in C", volume, found)


def fill(device: OurDevice, pages: Pages, volume: Volume) -> None:
    """Plug the blocks, and have the guest use them. LookupError unless its pages are `pages`."""
    device.kick(volume.of(RequestType.PLUG))
    device.vmm.populate(volume.requests * volume.blocks)
    if pages.huge and (got := _mapped_huge()) < volume.size:
        raise LookupError(f"of {volume.size} bytes {got} are in huge pages")


def _mapped_huge() -> int:
    """Bytes of shared memory that this process has mapped as huge pages."""
    found = re.search(r"^ShmemPmdMapped: +(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return 0 if found is None else int(found[1]) * 1024


def _prefault(floor: Floor, *, quick: bool) -> Iterator[Row]:
    with our_device(prefault=True) as device, a_processor_each(device.vmm.service) as processor:

        def ours(volume: Volume, first: int) -> float:
            device.rouse()  # it has waited for C's turn
            seconds = device.kick(volume.of(RequestType.PLUG)[:first])
            device.kick(volume.of(RequestType.UNPLUG)[:first])
            return seconds

        def theirs(volume: Volume, first: int) -> float:
            seconds = floor.kicked("populate", device.vmm.fd, volume.piece, first, processor)
            floor.punch(device.vmm.fd, volume.piece, first)
            return seconds

        for volume in (LINUX, SMALL):
            found = _in_turn(volume, ours, theirs, times=3, quick=quick)
            yield from _two_rows("PLUG with prefault, 4 KiB pages", "MADV_POPULATE_WRITE in C", volume, found)


def _in_turn(volume: Volume, ours: Side, theirs: Side, *, times: int, quick: bool) -> list[tuple[Took, Took]]:
    """Pairs of medians of `times`; of a third of them when quick."""
    pairs, times = (3, times // 3) if quick else (20, times)

    def took(act: Side) -> Took:
        kicks = [(act(volume, volume.requests), act(volume, 1)) for _ in range(times)]
        return Took(*map(statistics.median, zip(*kicks, strict=True)))

    ours(volume, volume.requests), theirs(volume, 1)
    return in_turn(pairs, lambda: took(ours), lambda: took(theirs))


def _speed(size: int, seconds: float) -> float:
    """GiB a second."""
    return size / GIB / seconds
