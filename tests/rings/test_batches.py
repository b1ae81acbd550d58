"""Batches of chains from rings that hold anything at all, against the same chains one at a time."""

from __future__ import annotations

import random
import struct

import pytest

from tests import counts
from tests.rings.rig import END, FORMATS, RING, guest_memory, make_queue
from tests.rings.test_garbage import spoil
from vhost_user import _native
from vhost_user.chain import Chain
from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress
from vhost_user.vring import Batch, BatchedQueue, RingBroken

REQUEST, ANSWER = 16, 16
ANSWERS = bytes(range(1, 1 + ANSWER))


def ring_of(form: str, size: int, memory: GuestMemory, flags: tuple[bool, bool]) -> BatchedQueue:
    _, queue = make_queue(form, size, memory, event_idx=flags[0], indirect=flags[1])
    assert isinstance(queue, BatchedQueue)
    return queue


def take_alone(queue: BatchedQueue, memory: GuestMemory) -> Chain:
    """The next chain, by the ring's own step. Nothing is read from a malformed one, or written."""
    result = queue._ring.take(memory.table)
    assert result > 0 or result == _native.RING_MALFORMED, result
    chain = Chain(queue, memory, queue._ring.chain(max(result, 0)))
    if result < 0:
        chain.readable = chain.writable = 0
    return chain


def give_alone(queue: BatchedQueue, chain: Chain) -> None:
    written = ANSWER if chain.readable >= REQUEST and chain.writable >= ANSWER else 0
    if written:
        chain.write(ANSWERS)
    queue.push(chain, written)


@pytest.mark.parametrize("form", FORMATS)
def test_what_comes_together_is_what_comes_alone(form: str, rng: random.Random) -> None:
    mine, other = guest_memory(), guest_memory()
    asked = empty = broken = 0
    for _ in range(counts.GARBAGE_RINGS // 2):
        size = 2 ** rng.randrange(6) if form == "split" else rng.randrange(1, 40)
        flags = rng.random() < 0.5, rng.random() < 0.8
        queue, single = (ring_of(form, size, memory, flags) for memory in (mine, other))
        batch = Batch(size, rng.choice([1, 3, 64]), REQUEST, ANSWER)
        batch.answers[:] = ANSWERS * batch.most
        for _ in range(10):
            seed = rng.random()
            spoil(random.Random(seed), mine, queue)
            spoil(random.Random(seed), other, single)
            try:
                count = queue.take(batch, batch.most)
            except RingBroken:
                assert single._ring.take(other.table) == _native.RING_BROKEN
                broken += 1
                break
            if not count:
                assert single._ring.take(other.table) == 0
                continue
            chains = [take_alone(single, other) for _ in range(count)]
            for member, chain in enumerate(chains):
                if chain.readable >= REQUEST and chain.writable >= ANSWER:
                    asked += 1
                    assert batch.part(member, member + 1).requests == chain.read(0, REQUEST)
                else:
                    empty += 1
            first = rng.randrange(count + 1)
            queue.give(batch, first)
            queue.give(batch, count)
            for member, chain in enumerate(chains):
                _, (position, wrap) = single._ring.positions()
                assert batch.keys[8 * member :][:8] == struct.pack("=II", chain.id, position | wrap << 15)
                give_alone(single, chain)
            assert queue.state() == single.state()
            assert queue.should_notify() == single.should_notify()
        for start, end in ((RING, RING + 0x2000), (0, END)) if rng.random() < 0.02 else ((RING, RING + 0x2000),):
            assert mine.read(GuestAddress(start), end - start) == other.read(GuestAddress(start), end - start)
        assert queue._ring.malformed() == single._ring.malformed()
    assert min(asked, empty, broken) > 0, (asked, empty, broken)
