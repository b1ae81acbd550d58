"""Random populating, touching and discarding, side by side with a set of page numbers."""

from __future__ import annotations

import random

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
from vhost_user.units import ByteCount, HostOffset
from virtio_mem.hostmem.memory import HostMemory

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
                assert self.memory.discard_verified(offset, size) == 0
                self.held.difference_update(some)
            case _:
                assert in_child(lambda: touch(self.memory, offset)) == 0
                self.held.add(some.start)

    def check(self, rng: random.Random) -> None:
        some, offset, size = self.range(rng)
        page = self.memory.page_size
        assert self.memory.held(offset, size) == len(self.held.intersection(some)) * page
        assert self.memory.held() == len(self.held) * page


@each(*KINDS)
def test_what_is_held_agrees_with_a_set_of_pages(make: Maker, kind: Kind, rng: random.Random) -> None:
    pages = HUGE_PAGES if kind is HUGETLB else SMALL_PAGES
    memory = make.memory(kind, pages * kind.page_size, thp=False)
    model = Model(memory, pages)
    for _ in range(counts.ZONE_STEPS_PER_BACKING):
        model.step(rng, shared=kind.shared)
        model.check(rng)
