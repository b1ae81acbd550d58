"""Random populating, touching and discarding, side by side with a set of page numbers."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest

from tests import counts
from tests.zones.helpers import (
    HUGETLB,
    KINDS,
    Kind,
    Maker,
    each,
    in_child,
    touch,
)
from vhost_user import _native
from vhost_user.mapping import PAGE_SIZE
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import ByteCount, HostOffset
from virtio_mem.hostmem.backing import Hugetlb
from virtio_mem.hostmem.files import data_size
from virtio_mem.hostmem.memory import HostMemory

PRIVATE_KINDS = [kind for kind in KINDS if not kind.shared]
SMALL_PAGES = 96
HUGE_PAGES = 16


class Model:
    """The pages that the host holds, by a set."""

    def __init__(self, memory: HostMemory, pages: int) -> None:
        self.memory = memory
        self.pages = pages
        self.held: set[int] = set()

    def range(self, rng: random.Random) -> tuple[range, HostOffset, ByteCount]:
        first = rng.randrange(self.pages)
        last = rng.randrange(first, min(first + self.pages // 3, self.pages))
        page = self.memory.page_size
        return range(first, last + 1), HostOffset(first * page), ByteCount((last + 1 - first) * page)

    def step(self, rng: random.Random, *, shared: bool) -> None:
        some, offset, size = self.range(rng)
        # Another process is dear, so it comes rarely.
        match rng.choices(["populate", "touch", "discard", "elsewhere"], [3, 4, 4, 0.1 if shared else 0])[0]:
            case "populate":
                self.memory.populate(offset, size)
                self.held.update(some)
            case "touch":
                touch(self.memory, offset)
                self.held.add(some.start)
            case "discard":
                # Of huge pages it is known at once, where all of them were there.
                known = isinstance(self.memory.backing, Hugetlb) and self.held.issuperset(some)
                assert self.memory.discard(offset, size) == known
                assert self.memory.held(offset, size) == 0
                self.held.difference_update(some)
            case _:
                assert in_child(lambda: touch(self.memory, offset)) == 0
                self.held.add(some.start)

    def check(self, rng: random.Random) -> None:
        some, offset, size = self.range(rng)
        page = self.memory.page_size
        assert self.memory.held(offset, size) == len(self.held.intersection(some)) * page
        assert self.memory.held() == len(self.held) * page


@pytest.mark.usefixtures("before_pagemap_scan")
@each(*PRIVATE_KINDS)
def test_so_it_does_on_a_kernel_that_can_not_scan(make: Maker, kind: Kind, rng: random.Random) -> None:
    test_what_is_held_agrees_with_a_set_of_pages(make, kind, rng)


SCATTERED = 1200
"""Pages, every other one of which is touched: more runs than two rounds of 256, which is what one scan returns."""


def touch_every_other_page(memory: HostMemory) -> None:
    with memory.view() as view:
        for page in range(0, SCATTERED, 2):
            view[page * PAGE_SIZE] = 1


@each(*PRIVATE_KINDS)
def test_scattered_pages_are_all_counted(make: Maker, kind: Kind) -> None:
    memory = make.memory(kind, SCATTERED * PAGE_SIZE, thp=False)
    touch_every_other_page(memory)
    assert memory.held() == SCATTERED // 2 * PAGE_SIZE


@pytest.mark.usefixtures("before_pagemap_scan")
@each(*PRIVATE_KINDS)
def test_scattered_pages_are_all_counted_without_a_scan(make: Maker, kind: Kind) -> None:
    memory = make.memory(kind, SCATTERED * PAGE_SIZE, thp=False)
    touch_every_other_page(memory)
    assert memory.held() == SCATTERED // 2 * PAGE_SIZE


PRESENT, SWAPPED, FILE = 1 << 63, 1 << 62, 1 << 61
"""Bits of a pagemap entry; see proc(5)."""


@pytest.mark.parametrize(
    ("entry", "held"),
    [(0, 0), (PRESENT, 1), (SWAPPED, 1), (PRESENT | FILE, 0), (SWAPPED | FILE, 1), (FILE, 0), (PRESENT - 1, 1)],
)
def test_each_entry_of_a_pagemap_counts_as_what_it_is(tmp_path: Path, entry: int, held: int) -> None:
    file = tmp_path / "pagemap"
    file.write_bytes(struct.pack("=3Q", PRESENT, entry, PRESENT))
    with file.open("rb") as pagemap:
        assert _native.private_held(pagemap.fileno(), PAGE_SIZE, PAGE_SIZE, scan=False) == held * PAGE_SIZE
        assert _native.private_held(pagemap.fileno(), 0, 3 * PAGE_SIZE, scan=False) == (2 + held) * PAGE_SIZE
        with pytest.raises(OSError, match="Input/output error"):
            _native.private_held(pagemap.fileno(), 0, 4 * PAGE_SIZE, scan=False)


@each(*KINDS)
def test_what_is_held_agrees_with_a_set_of_pages(make: Maker, kind: Kind, rng: random.Random) -> None:
    pages = HUGE_PAGES if kind is HUGETLB else SMALL_PAGES
    memory = make.memory(kind, pages * kind.page_size, thp=False)
    model = Model(memory, pages)
    for _ in range(counts.ZONE_STEPS_PER_BACKING):
        model.step(rng, shared=kind.shared)
        model.check(rng)


def test_what_lies_behind_the_range_is_not_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel looks for a hole through all data that follows: milliseconds for gigabytes, at each UNPLUG."""
    asked = []
    lseek = os.lseek

    def noted(fd: int, position: int, whence: int) -> int:
        asked.append(whence)
        return lseek(fd, position, whence)

    with OwnedFd(os.memfd_create("zone", os.MFD_CLOEXEC)) as fd:
        os.ftruncate(fd.fileno(), 64 * PAGE_SIZE)
        os.pwrite(fd.fileno(), bytes(32 * PAGE_SIZE), 16 * PAGE_SIZE)
        monkeypatch.setattr(os, "lseek", noted)
        assert data_size(fd.fileno(), HostOffset(0), ByteCount(16 * PAGE_SIZE)) == 0
        assert asked == [os.SEEK_DATA]
        assert data_size(fd.fileno(), HostOffset(0), ByteCount(17 * PAGE_SIZE)) == PAGE_SIZE
