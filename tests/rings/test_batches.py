"""Batches against single pops and pushes: on equal rings the same becomes of the same chains, to the last byte."""

from __future__ import annotations

import ctypes
import os
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import pytest

from tests import counts
from tests.rings.answerer import PythonAnswerer
from tests.rings.bursts import (
    ANSWER,
    COMES_AND_GOES,
    REQUEST,
    Sent,
    answer_to,
    ask_for_calls,
    burst,
    everything,
    make_bench,
    memory,
    offer,
)
from tests.rings.rig import (
    BORDER,
    END,
    FORMATS,
    NEXT,
    RING,
    WRITE,
    Bench,
    PackedPen,
    Raw,
    SplitPen,
    guest_memory,
    make_queue,
)
from tests.rings.test_garbage import spoil
from vhost_user import _native
from vhost_user.chain import Chain
from vhost_user.dirty_log import DirtyLog
from vhost_user.errors import PeerError
from vhost_user.event import Event
from vhost_user.memory import GuestMemory, Region
from vhost_user.units import GuestAddress
from vhost_user.vring import Batch, BatchedQueue, PackedLayout, RingBroken

KEY = struct.Struct("=II")

PATIENCE = 1000

RING_SIZE = 0x2000
"""Bytes from RING on in which each ring of these tests lies."""


class Outcome(NamedTuple):
    """What a device says of a burst. `asked` are ids and places in the used ring of what the ring found well-formed,
    `requests` what was answered."""

    asked: list[tuple[int, int]]
    requests: list[bytes]
    notified: bool
    broken: str


def queue_of(bench: Bench) -> BatchedQueue:
    assert isinstance(bench.queue, BatchedQueue)
    return bench.queue


def place_of(queue: BatchedQueue) -> int:
    """Where the next used chain will be, as a batch's keys have it."""
    state = queue.state()
    return state[1] if len(state) == 2 else state[2] | state[3] << 15


def set_there(bench: Bench, there: bool) -> None:
    """Have the region that comes and goes, or not."""
    others = [region for region in bench.memory.regions if region.guest_address != COMES_AND_GOES]
    mine = [region for region in REGIONS[bench.memory] if region.guest_address == COMES_AND_GOES]
    bench.memory.replace(others + mine if there else others)


REGIONS: dict[object, tuple[Region, ...]] = {}


def one_by_one(bench: Bench, goes: bool) -> Outcome:
    """The chains are popped, looked at, and pushed. With `goes`, a region is missing while they are answered."""
    queue, asked, requests = queue_of(bench), list[tuple[int, int]](), list[bytes]()
    try:
        while True:
            chain = queue.pop()
            if chain is None:
                if queue.enable_notifications():
                    continue
                break
            asked.append((chain.id, place_of(queue)))
            requests += answer_alone(bench, queue, chain, goes)
    except RingBroken as error:
        return Outcome(asked, requests, False, str(error))
    return Outcome(asked, requests, queue.should_notify(), "")


def answer_alone(bench: Bench, queue: BatchedQueue, chain: Chain, goes: bool) -> list[bytes]:
    if chain.readable < REQUEST:
        queue.reject(chain, "request_too_short")
        return []
    if chain.writable < ANSWER:
        queue.reject(chain, "no_room_for_response")
        return []
    try:
        request = chain.read(0, REQUEST)
    except PeerError:
        queue.reject(chain, "memory_gone")
        return []
    set_there(bench, not goes)
    try:
        chain.write(answer_to(request))
    except PeerError:
        queue.reject(chain, "memory_gone")
    else:
        queue.push(chain, ANSWER)
    set_there(bench, True)
    return [request]


def fill_answers(batch: Batch) -> list[bytes]:
    """Answer what has not gone back; the requests."""
    requests = []
    for first, end in batch.asking():
        part = batch.part(first, end)
        for at in range(end - first):
            requests.append(bytes(part.requests[REQUEST * at : REQUEST * (at + 1)]))
            part.answers[ANSWER * at : ANSWER * (at + 1)] = answer_to(requests[-1])
    return requests


def asked_in(batch: Batch) -> list[tuple[int, int]]:
    kinds = batch.raw.kinds
    return [
        KEY.unpack_from(batch.keys, KEY.size * member)
        for member in range(batch.count)
        if kinds[member] != _native.MALFORMED
    ]


def in_batches(bench: Bench, goes: bool, batch: Batch, rng: random.Random) -> Outcome:
    """The same by batches, given back in as many steps as chance wants."""
    queue, asked, requests = queue_of(bench), list[tuple[int, int]](), list[bytes]()
    try:
        while True:
            count = queue.take(batch, rng.randint(1, 2 * batch.most))
            if not count:
                if queue.enable_notifications():
                    continue
                break
            assert count == batch.count <= batch.most
            asked += asked_in(batch)
            requests += fill_answers(batch)
            set_there(bench, not goes)
            while batch.given < count:
                queue.give(batch, rng.randint(batch.given + 1, count))
            set_there(bench, True)
    except RingBroken as error:
        return Outcome(asked, requests, False, str(error))
    return Outcome(asked, requests, queue.should_notify(), "")


class AtOnce(PythonAnswerer):
    """Answers the first requests of what it is given, as many as chance wants, and notes them in `written`."""

    def __init__(self, rng: random.Random, written: list[bytes]) -> None:
        def answer(device: int, keys: int, requests: int, count: int, answers: int) -> int:
            answered = rng.choice((0, count, count, count, rng.randint(0, count)))
            for at in range(answered):
                written.append(ctypes.string_at(requests + REQUEST * at, REQUEST))
                ctypes.memmove(answers + ANSWER * at, answer_to(written[-1]), ANSWER)
            return answered

        super().__init__(answer)


def at_once(bench: Bench, batch: Batch, rng: random.Random) -> Outcome:
    """The same where some are answered in the C core; what is answered there calls the driver there."""
    requests: list[bytes] = []
    queue, answerer, notified = queue_of(bench), AtOnce(rng, requests), False
    with Event.create() as call:
        try:
            while True:
                most = rng.randint(1, 3 * batch.most)
                answerer.raw.ask_once(rng.random() < 0.3)
                count = queue.serve(batch, most, answerer, call.fileno(), rng.choice((0, 0, PATIENCE)))
                assert answerer.raw.answered <= most
                if count:
                    requests += fill_answers(batch)
                    if batch.given < count:
                        queue.give(batch, count)
                    notified |= queue.should_notify()
                elif not queue.enable_notifications():
                    break
        except RingBroken as error:
            return Outcome([], requests, False, str(error))
        return Outcome([], requests, notified | call.take(), "")


def same(bench: Bench, reference: Bench) -> None:
    same_chains(bench, reference)
    assert everything(bench) == everything(reference)


def same_chains(bench: Bench, reference: Bench) -> None:
    assert bench.pen.used() == reference.pen.used()
    assert bench.queue.malformed == reference.queue.malformed
    assert bench.queue.state() == reference.queue.state()


def random_size(form: str, rng: random.Random) -> int:
    return 2 ** rng.randrange(6) if form == "split" else rng.randrange(1, 40)


@contextmanager
def benches(form: str, rng: random.Random) -> Iterator[tuple[Bench, Bench]]:
    """Two that are the same."""
    size = random_size(form, rng)
    event_idx, indirect = rng.random() < 0.5, rng.random() < 0.8
    start = rng.choice((0, 65530, rng.randrange(65536)))
    with ExitStack() as stack:
        made = []
        for _ in range(2):
            there = stack.enter_context(memory())
            made.append(make_bench(form, size, there, event_idx=event_idx, indirect=indirect, start=start))
            REGIONS[there] = there.regions
            stack.callback(REGIONS.pop, there)
        yield made[0], made[1]


def offer_both(both: tuple[Bench, Bench], chains: list[Sent], rng: random.Random) -> None:
    requests, word = rng.randbytes(REQUEST * len(chains)), rng.getrandbits(16)
    for bench in both:
        offer(bench, chains, requests)
        ask_for_calls(bench, word)


WAYS = pytest.mark.parametrize("way", ["batches", "at once"])


@WAYS
@pytest.mark.parametrize("form", FORMATS)
def test_batches_do_what_single_chains_do(
    form: str, way: str, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    seen: Counter[str] = Counter()
    answered = 0
    for _ in range(counts.BATCHED_RINGS):
        with benches(form, rng) as both:
            bench, reference = both
            size = bench.layout.size
            batch = Batch(size, rng.randint(1, size + 3), REQUEST, ANSWER)
            for _ in range(6):
                chains, goes = burst(rng, size, indirect=rng.random() < 0.5), rng.random() < 0.3
                offer_both(both, chains, rng)
                if way == "batches":
                    assert in_batches(bench, goes, batch, rng) == one_by_one(reference, goes)
                else:
                    assert at_once(bench, batch, rng) == one_by_one(reference, False)._replace(asked=[])
                same(bench, reference)
                answered += len(chains)
            seen += bench.queue.malformed
    assert all(seen[reason] for reason in ("memory_gone", "request_too_short", "no_room_for_response", "zero_length"))
    figure(f"chains through {form} rings, {way}, and one by one", answered)


def take_alone(queue: BatchedQueue, memory: GuestMemory) -> Chain:
    """The next chain, by the ring's own step, which gives no malformed one back."""
    result = queue._ring.take(memory.table)
    assert result > 0 or result == _native.RING_MALFORMED, result
    chain = Chain(queue, memory, queue._ring.chain(max(result, 0)))
    if result < 0:
        chain.readable = chain.writable = 0
    return chain


def mend(memory: GuestMemory, queue: BatchedQueue) -> None:
    """Have two descriptors be a chain that asks; in a packed ring the next one."""
    layout, pair = queue.layout, [Raw(0x100000, 8, NEXT), Raw(0x100100, 8, WRITE)]
    if isinstance(layout, PackedLayout):
        pen, (slot, wrap) = PackedPen(memory, layout), queue.state()[:2]
        pen.position = slot + (0 if wrap else layout.size)
        pen.offer(pair)
    else:
        memory.write(layout.areas["desc"].address, SplitPen.table(pair))


def copy(start: int, size: int, source: GuestMemory, target: GuestMemory) -> None:
    target.write(GuestAddress(start), source.read(GuestAddress(start), size))


@pytest.mark.parametrize("form", FORMATS)
def test_rings_that_hold_anything(form: str, rng: random.Random) -> None:
    """All of a batch is taken before any of it is answered: an answer may lie where the ring is."""
    seen: Counter[str] = Counter()
    mine, other = guest_memory(), guest_memory()
    for _ in range(counts.GARBAGE_RINGS // 4):
        size = random_size(form, rng)
        flags = {"event_idx": rng.random() < 0.5, "indirect": rng.random() < 0.8}
        queue, single = (make_queue(form, size, memory, **flags)[1] for memory in (mine, other))
        assert isinstance(queue, BatchedQueue)
        assert isinstance(single, BatchedQueue)
        batch = Batch(size, rng.choice((1, 3, 64)), 1, 1)
        batch.answers[:] = b"\x5a" * batch.most
        for _ in range(10):
            spoil(rng, mine, queue)
            if size > 1 and rng.random() < 0.5:
                mend(mine, queue)
            copy(RING, RING_SIZE, mine, other)
            copy(BORDER, 128, mine, other)
            try:
                count = queue.take(batch, batch.most)
            except RingBroken:
                assert single._ring.take(other.table) == _native.RING_BROKEN
                seen["broken"] += 1
                break
            chains = [take_alone(single, other) for _ in range(count)]
            assert count or not single._ring.take(other.table)
            asks = [chain.readable > 0 and chain.writable > 0 for chain in chains]
            for member, chain in enumerate(chains):
                assert not asks[member] or batch.part(member, member + 1).requests == chain.read(0, 1)
            for end in (rng.randrange(count + 1), count):
                queue.give(batch, end)
            for member, chain in enumerate(chains):
                assert KEY.unpack_from(batch.keys, KEY.size * member) == (chain.id, place_of(single))
                if asks[member]:
                    chain.write(b"\x5a")
                single.push(chain, asks[member])
                seen["asking" if asks[member] else "empty"] += 1
            assert queue.state() == single.state()
            assert queue.should_notify() == single.should_notify()
            start, end = (0, END) if rng.random() < 0.01 else (RING, RING + RING_SIZE)
            assert mine.read(GuestAddress(start), end - start) == other.read(GuestAddress(start), end - start)
        assert queue._ring.malformed() == single._ring.malformed()
    assert all(seen[each] for each in ("asking", "empty", "broken")), seen


def break_ring(bench: Bench, descriptors: int) -> None:
    """Behind what was offered: a head that is none, or a list that does not end."""
    if isinstance(bench.pen, SplitPen):
        bench.pen.offer_head(bench.layout.size)
    else:
        left = bench.layout.size - descriptors
        bench.pen.offer([Raw(0, 8, NEXT)] * left, 99)


@WAYS
@pytest.mark.parametrize("form", FORMATS)
def test_good_chains_before_a_broken_one_are_answered_first(form: str, way: str, rng: random.Random) -> None:
    for _ in range(counts.BATCHED_RINGS):
        with benches(form, rng) as both:
            bench, reference = both
            size = bench.layout.size
            chains = burst(rng, size, indirect=rng.random() < 0.5)
            descriptors = sum(sent.slots() for sent in chains)
            if descriptors == size or len(chains) == size:
                continue
            offer_both(both, chains, rng)
            for each in both:
                break_ring(each, descriptors)
            batch = Batch(size, rng.randint(1, size), REQUEST, ANSWER)
            expected = one_by_one(reference, False)
            outcome = in_batches(bench, False, batch, rng) if way == "batches" else at_once(bench, batch, rng)
            assert expected.broken
            assert outcome.broken == expected.broken == str(bench.queue.broken)
            assert outcome.requests == expected.requests
            same_chains(bench, reference)
            with pytest.raises(RingBroken):
                queue_of(bench).take(batch, 1)


@pytest.mark.parametrize("form", FORMATS)
def test_the_longest_chains_have_room_and_what_has_none_waits(form: str) -> None:
    """A batch for short chains has room for two of the longest, and for more it is asked again."""
    size = 16
    with memory() as there:
        bench = make_bench(form, size, there, event_idx=False, indirect=True)
        longest = [(0x100000 + at, 1, 0) for at in range(size - 1)]
        sent = Sent([*longest[:-1], (0x100000, REQUEST, 0), (0x100100, ANSWER, 2)], True)
        assert len(sent.pieces) == size
        offer(bench, [sent] * size, bytes(REQUEST * size))
        queue, batch = queue_of(bench), Batch(size, size, REQUEST, ANSWER)
        taken = []
        while count := queue.take(batch, size):
            taken.append(count)
            for member in range(count):
                assert queue.chain_of(batch, member).readable == size - 2 + REQUEST
            fill_answers(batch)
            queue.give(batch, count)
        assert sum(taken) == size
        # Room for descriptors: two rings and four for each member. What is left must have room for a longest chain.
        assert taken[0] == 2 + 4
        assert bench.pen.used() == [(at, ANSWER) for at in range(size)]


@pytest.mark.parametrize("form", FORMATS)
def test_a_batch_is_never_read_for_ever(form: str) -> None:
    """Each chain is a table of more entries than the ring has, so that all are malformed, and each read in vain."""
    size = 16
    with memory() as there:
        bench = make_bench(form, size, there, event_idx=False, indirect=True)
        offer(bench, [Sent([(0x100000, 1, 0)] * (size + 1), True)] * size, bytes(REQUEST * size))
        queue, batch = queue_of(bench), Batch(size, 8, REQUEST, ANSWER)
        taken = []
        while count := queue.take(batch, size):
            taken.append(count)
            queue.give(batch, count)
        assert sum(taken) == size
        # Two rings of descriptors, and four for each of eight; a chain takes more than one ring.
        assert max(taken) <= -(-(2 * size + 4 * 8) // size)
        assert bench.queue.malformed == {"too_long": size}


@pytest.mark.parametrize("form", FORMATS)
def test_a_ring_without_memory_breaks_and_says_so(form: str) -> None:
    """The used ring is on a page that the file no longer has when chains are given back."""
    with memory() as there:
        bench = make_bench(form, 8, there, event_idx=False, indirect=True)
        offer(bench, [Sent([(0x100000, REQUEST, 0), (0x100100, ANSWER, 2)], False)] * 3, bytes(REQUEST * 3))
        queue, batch = queue_of(bench), Batch(8, 8, REQUEST, ANSWER)
        assert queue.take(batch, 8) == 3
        there.replace([region for region in there.regions if region.guest_address != 0])
        with pytest.raises(PeerError, match="one region of guest memory"):
            queue.give(batch, 3)
        assert batch.given == 0
        assert queue.broken is None


@pytest.mark.parametrize("form", FORMATS)
def test_where_writes_are_logged_a_batch_has_one_member(form: str, rng: random.Random) -> None:
    """And the log has the same bits as if batches were none, also where it comes and goes between two bursts."""
    for _ in range(counts.BATCHED_RINGS // 4):
        with benches(form, rng) as both, memory_log() as bits, memory_log() as expected_bits:
            bench, reference = both
            batch = Batch(bench.layout.size, 8, REQUEST, ANSWER)
            for _ in range(6):
                logs = rng.random() < 0.7
                for each, log in zip(both, (bits, expected_bits), strict=True):
                    each.queue.log = log.log if logs else None
                    each.queue.log_used = GuestAddress(0x3000)
                offer_both(both, burst(rng, bench.layout.size, indirect=True), rng)
                assert in_batches(bench, False, batch, rng) == one_by_one(reference, False)
                assert not logs or batch.count <= 1
                same(bench, reference)
                assert bits.take() == expected_bits.take()


class Log(NamedTuple):
    log: DirtyLog
    fd: int

    def take(self) -> bytes:
        found = os.pread(self.fd, LOG_SIZE, 0)
        os.pwrite(self.fd, bytes(LOG_SIZE), 0)
        return found


LOG_SIZE = 0x10000
"""Bits for addresses below 2 GiB."""


@contextmanager
def memory_log() -> Iterator[Log]:
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(fd, LOG_SIZE)
    log = DirtyLog(fd, LOG_SIZE)
    try:
        yield Log(log, fd)
    finally:
        log.close()
        os.close(fd)


def test_a_chain_of_a_batch_that_is_looked_at_reads_what_its_request_was(rng: random.Random) -> None:
    with memory() as there:
        bench = make_bench("split", 8, there, event_idx=False, indirect=True)
        requests = rng.randbytes(2 * REQUEST)
        pieces = [[(0x100000 + 0x100 * at, REQUEST, 0), (0x101000, ANSWER, 2)] for at in range(2)]
        offer(bench, [Sent(each, False) for each in pieces], requests)
        queue, batch = queue_of(bench), Batch(8, 8, REQUEST, ANSWER)
        assert queue.take(batch, 8) == 2
        assert [queue.chain_of(batch, member).read() for member in range(2)] == [requests[:24], requests[24:]]
        assert [queue.chain_of(batch, member).writable for member in range(2)] == [ANSWER, ANSWER]
