"""How fast memory goes back to the host, and comes from it: GiB a second, against the same system calls in a C loop.

Ours gets some requests in one kick, and all counts, from the kick to the call. The C loop makes a call for each
request, in the same file, which the same processes have mapped. Requests are of 64 blocks, 128 MiB, as Linux makes
them, which adds and removes memory in such pieces; or of one block, 2 MiB, where to be woken takes longer than to give
back one huge page.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tests import host
from tests.benchmarks.floor import Floor
from tests.benchmarks.measure import Row, in_turn, speed_row
from tests.benchmarks.ours import ADDR, BLOCK_SIZE, OurDevice, our_device
from vhost_user.units import GIB, MIB, GuestAddress, format_size
from virtio_mem.protocol import Request, RequestType


class Volume(NamedTuple):
    """So many requests in a kick, each of so many blocks."""

    requests: int
    blocks: int

    @property
    def size(self) -> int:
        """Bytes of all."""
        return self.requests * self.blocks * BLOCK_SIZE

    def __str__(self) -> str:
        return f"{self.requests} requests of {format_size(self.blocks * BLOCK_SIZE)}"

    def of(self, type_: RequestType) -> list[Request]:
        """The requests, from the region's first block on."""
        step = self.blocks * BLOCK_SIZE
        return [Request(type_, GuestAddress(ADDR + at * step), self.blocks) for at in range(self.requests)]


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
    Pages("THP", lambda: _setting(host.changed(host.SHMEM_THP, "always")), huge=True),
    Pages(
        "hugetlb",
        lambda: _setting(host.HugePagePool(2 * MIB).with_free(LINUX.requests * LINUX.blocks)),
        os.MFD_HUGETLB | os.MFD_HUGE_2MB,
    ),
)


def rows(*, quick: bool) -> Iterator[Row]:
    """The table's lines."""
    with TemporaryDirectory() as directory:
        floor = Floor(Path(directory))
        for pages in KINDS:
            try:
                with pages.prepare():
                    for volume in (LINUX, SMALL):
                        yield _discards(floor, pages, volume, 5 if quick else 20)
            except (OSError, LookupError) as error:
                sys.stderr.write(f"UNPLUG of {pages.name}: left out: {error}\n")
        for volume in (LINUX, SMALL):
            yield _prefault(floor, volume, 5 if quick else 20)


def _discards(floor: Floor, pages: Pages, volume: Volume, pairs: int) -> Row:
    with our_device(memfd_flags=pages.memfd_flags) as device:
        fill = Filled(device, pages, volume)

        def ours() -> float:
            fill()
            return _speed(volume, device.kick(volume.of(RequestType.UNPLUG)))

        def theirs() -> float:
            fill()
            seconds = floor.punch(device.vmm.fd, volume.blocks * BLOCK_SIZE, volume.requests)
            device.kick(volume.of(RequestType.UNPLUG))
            return _speed(volume, seconds)

        ours(), theirs()
        found = in_turn(pairs, ours, theirs)
    what = f"UNPLUG of populated memory, {pages.name}, {volume}"
    return speed_row(what, "punching holes in C", "GiB/s", found, 0.95)


class Filled:
    """Calling it plugs the blocks of `device`, and has the guest use them. LookupError unless its pages are `pages`."""

    def __init__(self, device: OurDevice, pages: Pages, volume: Volume) -> None:
        self._device, self._pages, self._volume = device, pages, volume

    def __call__(self) -> None:
        volume = self._volume
        self._device.kick(volume.of(RequestType.PLUG))
        self._device.vmm.populate(volume.requests * volume.blocks)
        if self._pages.huge and (got := _mapped_huge()) < volume.size:
            raise LookupError(f"of {volume.size} bytes {got} are in huge pages")


def _mapped_huge() -> int:
    """Bytes of shared memory that this process has mapped as huge pages."""
    found = re.search(r"^ShmemPmdMapped: +(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return 0 if found is None else int(found[1]) * 1024


def _prefault(floor: Floor, volume: Volume, pairs: int) -> Row:
    with our_device(prefault=True) as device:

        def ours() -> float:
            seconds = device.kick(volume.of(RequestType.PLUG))
            device.kick(volume.of(RequestType.UNPLUG))
            return _speed(volume, seconds)

        def theirs() -> float:
            seconds = floor.populate(device.vmm.fd, volume.blocks * BLOCK_SIZE, volume.requests)
            floor.punch(device.vmm.fd, volume.blocks * BLOCK_SIZE, volume.requests)
            return _speed(volume, seconds)

        ours(), theirs()
        found = in_turn(pairs, ours, theirs)
    what = f"PLUG with prefault, 4 KiB pages, {volume}"
    return speed_row(what, "MADV_POPULATE_WRITE in C", "GiB/s", found, 0.95)


def _speed(volume: Volume, seconds: float) -> float:
    return volume.size / GIB / seconds
