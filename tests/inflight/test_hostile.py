"""Areas that no back end left behind: refused, or taken for what they say, and never the end of the process."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable

import pytest

from tests import counts
from tests.inflight.world import SharedBuffer, layout_of, make_driver, make_queue, shared_buffer
from tests.rings.rig import AVAIL, FORMATS, USED, guest_memory, pop
from vhost_user.errors import PeerError
from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress
from vhost_user.vring import PackedLayout, SplitLayout

SIZE = 4
BUFFER = 0x100000


def used_area(form: str, shared: SharedBuffer) -> tuple[GuestMemory, SplitLayout | PackedLayout]:
    """Leaves an area with three chains in flight of four that were taken, the second of them used."""
    memory, layout = guest_memory(), layout_of(form, SIZE)
    driver = make_driver(memory, layout)
    for number in range(SIZE):
        driver.add([(BUFFER + 16 * number, 8)])
    buffer = shared.open()
    queue = make_queue(memory, layout, buffer.queue(0))
    chains = [pop(queue) for _ in range(SIZE)]
    queue.push(chains[1], 0)
    buffer.close()
    return memory, layout


def poke(shared: SharedBuffer, at: int, data: bytes) -> None:
    os.pwrite(shared.fd.fileno(), data, at)


Change = tuple[str, int, bytes, str]

U16 = struct.Struct("=H")


def split_entry(number: int) -> int:
    return 16 + 16 * number


def packed_entry(number: int) -> int:
    return 32 + 32 * number


def u16(value: int) -> bytes:
    return U16.pack(value)


CHANGES: list[Change] = [
    *((form, 0, struct.pack("=Q", 1 << bit), "inflight features") for form in FORMATS for bit in (0, 63)),
    *((form, 8, u16(version), "inflight version") for form in FORMATS for version in (2, 256, 65535)),
    *((form, 10, u16(count), "inflight desc_num") for form in FORMATS for count in (0, 3, 5, 65535)),
    # Of the split one used_idx is 1. With 0 a batch of one is looked for, which begins at last_batch_head.
    ("split", 14, u16(65532), "inflight used_idx"),
    ("split", 14, u16(2), "inflight used_idx"),
    ("split", 12, u16(4) + u16(0), "inflight last batch"),
    ("split", 12, u16(65535) + u16(0), "inflight last batch"),
    ("split", split_entry(0), b"\2", r"inflight desc\[0\].inflight"),
    ("split", split_entry(3), b"\xff", r"inflight desc\[3\].inflight"),
    # Of the packed one the list of free entries is 1, and then their number, 4.
    ("packed", 12, u16(5), "inflight free_head"),
    ("packed", 14, u16(5), "inflight old_free_head"),
    ("packed", 14, u16(2), "inflight entries"),
    ("packed", 14, u16(4), "inflight entries"),
    ("packed", 16, u16(4), "inflight used_idx"),
    ("packed", 18, u16(4), "inflight old_used_idx"),
    ("packed", 20, b"\2", "inflight used_wrap_counter"),
    ("packed", 21, b"\xff", "inflight old_used_wrap_counter"),
    ("packed", packed_entry(1) + 2, u16(1), "inflight free list"),
    ("packed", packed_entry(1) + 2, u16(5), "inflight free list"),
    ("packed", packed_entry(0), b"\0", "inflight entries"),
    ("packed", packed_entry(0), b"\3", r"inflight desc\[0\].inflight"),
    ("packed", packed_entry(0) + 6, u16(0), r"inflight desc\[0\].num"),
    ("packed", packed_entry(0) + 6, u16(2), r"inflight desc\[0\]"),
    ("packed", packed_entry(0) + 6, u16(65535), r"inflight desc\[0\]"),
    ("packed", packed_entry(2) + 4, u16(3), r"inflight desc\[2\].num, last"),
    ("packed", packed_entry(2) + 4, u16(65535), r"inflight desc\[2\].num, last"),
    ("packed", packed_entry(3) + 2, u16(3) + u16(3) + u16(2), r"inflight desc\[3\]"),
]


@pytest.mark.parametrize(("form", "at", "data", "field"), CHANGES)
def test_what_cannot_be_is_refused_and_nothing_changes(form: str, at: int, data: bytes, field: str) -> None:
    with shared_buffer(form, SIZE) as shared:
        memory, layout = used_area(form, shared)
        poke(shared, at, data)
        before = os.pread(shared.fd.fileno(), shared.mmap_size, 0)
        buffer = shared.open()
        for _ in range(2):
            with pytest.raises(PeerError, match=f"^{field}"):
                make_queue(memory, layout, buffer.queue(0))
        assert os.pread(shared.fd.fileno(), shared.mmap_size, 0) == before
        buffer.close()
        memory.replace([])


def test_a_batch_that_goes_in_circles() -> None:
    with shared_buffer("split", SIZE) as shared:
        memory, layout = used_area("split", shared)
        poke(shared, 14, u16(65535))
        buffer = shared.open()
        # The last batch would be of two, and its first one's next is itself.
        poke(shared, 12, u16(0))
        with pytest.raises(PeerError, match=r"^inflight last batch=0: 2 descriptors"):
            make_queue(memory, layout, buffer.queue(0))
        buffer.close()
        memory.replace([])


def test_a_batch_of_several_from_another_back_end() -> None:
    with shared_buffer("split", SIZE) as shared:
        memory, layout = used_area("split", shared)
        assert isinstance(layout, SplitLayout)
        # It used what is in descriptors 0 and 3 too, all at once, and was stopped before it cleared their flags.
        poke(shared, split_entry(0) + 6, u16(2))
        poke(shared, split_entry(3) + 6, u16(0))
        poke(shared, 12, u16(3))
        memory.store16(GuestAddress(layout.used + 2), 3)
        buffer = shared.open()
        queue = make_queue(memory, layout, buffer.queue(0))
        assert pop(queue).id == 1
        assert queue.pop() is None
        buffer.close()
        memory.replace([])


@pytest.mark.parametrize("shown", [True, False])
def test_a_packed_batch_of_several_from_another_back_end(shown: bool) -> None:
    """It was about to give back entries 0 and 2 at once; what counts is whether the driver can see the first one."""
    with shared_buffer("packed", SIZE) as shared:
        memory, layout = used_area("packed", shared)
        assert isinstance(layout, PackedLayout)
        poke(shared, packed_entry(0) + 2, u16(1))
        poke(shared, packed_entry(2) + 2, u16(0))
        poke(shared, 12, u16(2))
        poke(shared, 16, u16(3))
        if shown:
            memory.store16(GuestAddress(layout.desc + 16 * 2 + 14), AVAIL | USED)
            memory.store16(GuestAddress(layout.desc + 16 * 1 + 14), AVAIL | USED)
        buffer = shared.open()
        queue = make_queue(memory, layout, buffer.queue(0))
        chains = [pop(queue) for _ in range(1 if shown else 3)]
        assert [chain.entry for chain in chains] == ([3] if shown else [0, 2, 3])
        assert queue.pop() is None
        for chain in chains:
            queue.push(chain, 0)
        assert os.pread(shared.fd.fileno(), 8, 12) == u16(3) * 2 + u16(0) * 2
        assert os.pread(shared.fd.fileno(), 2, 20) == bytes(2), "in the second lap"
        buffer.close()
        memory.replace([])


@pytest.mark.parametrize("form", FORMATS)
def test_counters_at_their_end(form: str) -> None:
    counter_at = split_entry(2) + 8 if form == "split" else packed_entry(2) + 8
    with shared_buffer(form, SIZE) as shared:
        memory, layout = used_area(form, shared)
        poke(shared, counter_at, b"\xff" * 8)
        buffer = shared.open()
        queue = make_queue(memory, layout, buffer.queue(0))
        chains = [pop(queue) for _ in range(3)]
        for chain in chains:
            queue.push(chain, 0)
        assert queue.pop() is None
        buffer.close()
        memory.replace([])


def run(
    memory: GuestMemory, layout: SplitLayout | PackedLayout, shared: SharedBuffer, scribble: Callable[[], None]
) -> bool:
    """Whether a queue could be made with the area; then it is driven as far as it goes."""
    buffer = shared.open()
    try:
        queue = make_queue(memory, layout, buffer.queue(0))
        for _ in range(3 * SIZE):
            scribble()
            chain = queue.pop()
            if chain is not None:
                scribble()
                chain.read(0, 8)
                queue.push(chain, 0)
        queue.enable_notifications()
    except PeerError:
        return False
    else:
        return True
    finally:
        buffer.close()


@pytest.mark.parametrize("form", FORMATS)
def test_random_areas(form: str, rng: random.Random, figure: Callable[[str, object], None]) -> None:
    """All bytes random, or some of those of a good area, before or while it is used."""
    taken = 0
    with shared_buffer(form, SIZE) as shared:
        memory, layout = used_area(form, shared)
        good = os.pread(shared.fd.fileno(), shared.mmap_size, 0)
        ring = memory.read(layout.desc, layout.end - layout.desc)

        def scribble() -> None:
            if rng.random() < 0.3:
                poke(shared, rng.randrange(len(good)), rng.randbytes(rng.choice((1, 2, 8))))

        for number in range(counts.HOSTILE_INFLIGHT_AREAS):
            memory.write(layout.desc, ring)
            area = bytearray(good)
            if number % 4 == 0:
                area[12:] = rng.randbytes(len(area) - 12)
            else:
                for _ in range(rng.randrange(1, 4)):
                    area[rng.randrange(len(area))] = rng.choice((0, 1, 2, 3, 4, 5, 255, rng.randrange(256)))
            poke(shared, 0, bytes(area[: len(good)]))
            taken += run(memory, layout, shared, scribble)
        memory.replace([])
    assert 0 < taken < counts.HOSTILE_INFLIGHT_AREAS
    figure(f"{form} inflight areas with random bytes that could be gone on with", taken)


@pytest.mark.parametrize("form", FORMATS)
def test_the_largest_area(form: str) -> None:
    """Every descriptor in flight: of length 0 in the split ring, good ones in the packed area."""
    size = 32768
    with shared_buffer(form, size) as shared:
        memory, layout = guest_memory(), layout_of(form, size)
        make_driver(memory, layout)
        buffer = shared.open()
        make_queue(memory, layout, buffer.queue(0))
        with buffer._window.view() as view:
            for entry in range(size):
                if isinstance(layout, SplitLayout):
                    view[split_entry(entry)] = 1
                else:
                    fields = struct.pack("=BxHHHQHHIQ", 1, 0, entry, 1, size - entry, 7, 0, 1, BUFFER)
                    view[packed_entry(entry) : packed_entry(entry + 1)] = fields
            if isinstance(layout, SplitLayout):
                memory.store16(GuestAddress(layout.avail + 2), size)
            else:
                view[12:16] = u16(size) + u16(size)
        queue = make_queue(memory, layout, buffer.queue(0))
        chains = 0
        while (chain := queue.pop()) is not None:
            queue.push(chain, 0)
            chains += 1
        assert (chains, queue.malformed.total()) == ((0, size) if form == "split" else (size, 0))
        assert not queue.enable_notifications()
        buffer.close()
        memory.replace([])
