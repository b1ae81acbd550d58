"""Rings that hold anything at all, and change at any moment: chains, length 0, or RingBroken, and nothing else."""

from __future__ import annotations

import random

import pytest

from tests import counts
from tests.rings.rig import BORDER, END, FORMATS, RING, guest_memory, make_queue
from tests.rings.two_processes import other_process
from vhost_user.chain import Chain
from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress
from vhost_user.vring import DeviceQueue, RingBroken

DONE = GuestAddress(0x200)

LIKELY_ADDRESSES = (0, RING, BORDER - 8, BORDER, END - 16, END, 2**64 - 16, 0x100000)
LIKELY_LENGTHS = (0, 1, 16, 32, 48, 17, 0x1000, 0x200000, 2**32 - 1)


def garbage(rng: random.Random, size: int) -> bytes:
    """Descriptors of which some could be right, so that not every chain fails at its first."""
    descriptors = bytearray(rng.randbytes(16 * size))
    for at in range(0, 16 * size, 16):
        if rng.random() < 0.9:
            address = rng.choice(LIKELY_ADDRESSES) + rng.randrange(-2, 64)
            descriptors[at : at + 8] = (address % 2**64).to_bytes(8, "little")
        if rng.random() < 0.9:
            descriptors[at + 8 : at + 12] = rng.choice(LIKELY_LENGTHS).to_bytes(4, "little")
        if rng.random() < 0.9:
            descriptors[at + 12 : at + 14] = rng.choice((0, 1, 2, 3, 4, 0x80, 0x81)).to_bytes(2, "little")
            descriptors[at + 14 : at + 16] = rng.choice((0, 1, 2, 3, 0x80, 0x81, 0x82, 0x84)).to_bytes(2, "little")
    return bytes(descriptors)


def spoil(rng: random.Random, memory: GuestMemory, queue: DeviceQueue) -> None:
    """What a guest may do to its ring at any time."""
    areas = queue.layout.areas
    desc = areas["desc"]
    memory.write(desc.address, garbage(rng, queue.size))
    memory.write(BORDER, garbage(rng, 8))  # what some descriptors take for an indirect table
    if "avail" in areas:
        avail = areas["avail"].address
        for at in range(queue.size):
            memory.store16(GuestAddress(avail + 4 + 2 * at), rng.randrange(queue.size + (rng.random() < 0.02)))
        idx = queue.state()[0] + rng.randrange(queue.size + (rng.random() < 0.1) + 1)
        memory.store16(GuestAddress(avail + 2), idx % 2**16)
    else:
        memory.store32(areas["driver"].address, rng.getrandbits(32))


def use(rng: random.Random, chain: Chain, size: int) -> None:
    """Whatever came through can be worked with: it lies in memory, and is no larger than it may be."""
    ranges = chain.readable_ranges + chain.writable_ranges
    assert 1 <= len(ranges) <= size
    assert 0 < chain.readable + chain.writable <= 2**32
    assert sum(length for _, length in ranges) == chain.readable + chain.writable
    assert len(chain.read(0, 64)) == min(chain.readable, 64)
    chain.write(rng.randbytes(min(chain.writable, 64)), max(0, chain.writable - 64))
    assert sum(len(view) for view in chain.readable_views() + chain.writable_views()) == chain.readable + chain.writable


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_but_chains_and_broken_rings(form: str, rng: random.Random) -> None:
    memory = guest_memory()
    good = malformed = broken = 0
    for _ in range(counts.GARBAGE_RINGS):
        size = 2 ** rng.randrange(6) if form == "split" else rng.randrange(1, 40)
        _, queue = make_queue(form, size, memory, event_idx=rng.random() < 0.5, indirect=rng.random() < 0.8)
        held: list[Chain] = []
        try:
            for _ in range(20):
                if rng.random() < 0.5:
                    spoil(rng, memory, queue)
                if (chain := queue.pop()) is not None:
                    good += 1
                    use(rng, chain, size)
                    held.append(chain)
                if held and rng.random() < 0.7:
                    chain = held.pop(rng.randrange(len(held)))
                    queue.push(chain, rng.randrange(chain.writable + 1))
                rng.choice((queue.should_notify, queue.enable_notifications, queue.disable_notifications))()
                assert len(held) <= size
        except RingBroken:
            broken += 1
            assert queue.broken is not None
        malformed += queue.malformed.total()
    assert min(good, malformed, broken) > 0


@pytest.mark.parametrize("form", FORMATS)
def test_ring_that_changes_while_it_is_read(form: str, rng: random.Random) -> None:
    """Another process scribbles over the ring without a pause."""

    def scribble(memory: GuestMemory) -> None:
        _, queue = make_queue(form, 32, memory, event_idx=True, indirect=True)
        while not memory.load16(DONE):
            spoil(rng, memory, queue)

    with other_process(scribble) as (memory, other):
        while not any(memory.read(BORDER, 128)):
            other.rest()
        for _ in range(counts.GARBAGE_RINGS):
            _, queue = make_queue(form, 32, memory, event_idx=True, indirect=True)
            try:
                for _ in range(20):
                    if (chain := queue.pop()) is not None:
                        use(rng, chain, 32)
                        queue.push(chain, 0)
                    queue.should_notify()
            except RingBroken:
                pass
        memory.store16(DONE, 1)
