"""How fast memory goes back to the host, and comes from it: GiB a second, against the same system calls in a C loop.

Ours gets 60 requests in one kick, each of a block of 2 MiB, and all counts, from the kick to the call. The C loop makes
60 calls, one a block, in the same file, which the same processes have mapped.
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

from tests import host
from tests.benchmarks.floor import Floor
from tests.benchmarks.measure import Row, in_turn, speed_row
from tests.benchmarks.ours import BLOCK_SIZE, OurDevice, block_requests, our_device
from vhost_user.units import GIB, MIB
from virtio_mem.protocol import RequestType

BLOCKS = 60
_SIZE = BLOCKS * BLOCK_SIZE


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
        lambda: _setting(host.HugePagePool(2 * MIB).with_free(BLOCKS)),
        os.MFD_HUGETLB | os.MFD_HUGE_2MB,
    ),
)


def rows(*, quick: bool) -> Iterator[Row]:
    """The table's lines."""
    pairs = 10 if quick else 20
    with TemporaryDirectory() as directory:
        floor = Floor(Path(directory))
        for pages in KINDS:
            try:
                with pages.prepare():
                    row = _discards(floor, pages, pairs)
            except (OSError, LookupError) as error:
                sys.stderr.write(f"UNPLUG of {pages.name}: left out: {error}\n")
            else:
                yield row
        yield _prefault(floor, pairs)


def _discards(floor: Floor, pages: Pages, pairs: int) -> Row:
    with our_device(memfd_flags=pages.memfd_flags) as device:
        fill = Filled(device, pages)

        def ours() -> float:
            fill()
            return _speed(device.kick(block_requests(RequestType.UNPLUG, BLOCKS)))

        def theirs() -> float:
            fill()
            seconds = floor.punch(device.vmm.fd, BLOCK_SIZE, BLOCKS)
            device.kick(block_requests(RequestType.UNPLUG, BLOCKS))
            return _speed(seconds)

        ours(), theirs()
        found = in_turn(pairs, ours, theirs)
    what = f"UNPLUG of populated memory, {pages.name}, {BLOCKS} requests of 2 MiB"
    return speed_row(what, "punching holes in C", "GiB/s", found, 0.95)


class Filled:
    """Calling it plugs the blocks of `device`, and has the guest use them. LookupError unless its pages are `pages`."""

    def __init__(self, device: OurDevice, pages: Pages) -> None:
        self._device, self._pages = device, pages

    def __call__(self) -> None:
        self._device.kick(block_requests(RequestType.PLUG, BLOCKS))
        self._device.vmm.populate(BLOCKS)
        if self._pages.huge and (got := _mapped_huge()) < _SIZE:
            raise LookupError(f"of {_SIZE} bytes {got} are in huge pages")


def _mapped_huge() -> int:
    """Bytes of shared memory that this process has mapped as huge pages."""
    found = re.search(r"^ShmemPmdMapped: +(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return 0 if found is None else int(found[1]) * 1024


def _prefault(floor: Floor, pairs: int) -> Row:
    with our_device(prefault=True) as device:

        def ours() -> float:
            seconds = device.kick(block_requests(RequestType.PLUG, BLOCKS))
            device.kick(block_requests(RequestType.UNPLUG, BLOCKS))
            return _speed(seconds)

        def theirs() -> float:
            seconds = floor.populate(device.vmm.fd, BLOCK_SIZE, BLOCKS)
            floor.punch(device.vmm.fd, BLOCK_SIZE, BLOCKS)
            return _speed(seconds)

        ours(), theirs()
        found = in_turn(pairs, ours, theirs)
    what = f"PLUG with prefault, 4 KiB pages, {BLOCKS} requests of 2 MiB"
    return speed_row(what, "MADV_POPULATE_WRITE in C", "GiB/s", found, 0.95)


def _speed(seconds: float) -> float:
    return _SIZE / GIB / seconds
