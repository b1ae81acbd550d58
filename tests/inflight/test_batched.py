"""Back ends that serve batches: what the C core notes of them in an inflight area, and kills after each of its stores.

A split queue's area is compared with that of a queue that is served one by one, byte by byte, after each step.

And a process is stepped instruction by instruction (ptrace(2)). What the area, the ring and the answers were, each time
that one of them had changed, is what a kill there leaves behind; a back end takes each of these over, and serves to the
end. For the guest every request comes back exactly once, and the device sees none whose used entry the guest could see.
"""

from __future__ import annotations

import copy
import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pytest

from tests import counts
from tests.inflight.world import (
    BUFFERS,
    PLACE,
    Guest,
    SharedBuffer,
    answer,
    answer_to,
    make_queue,
    new_guest,
    number_of,
    shared_buffer,
)
from tests.rings.answerer import PythonAnswerer
from tests.rings.rig import FORMATS, RING, pop
from tests.stepping import left_by, stepped
from vhost_user._native import SplitInflight as SplitTold
from vhost_user.dirty_log import DirtyLog
from vhost_user.inflight import InflightBuffer
from vhost_user.units import ByteCount, HostOffset
from vhost_user.vring import Batch, BatchedQueue, PackedLayout, SplitLayout

WORD = 8
"""Bytes of a request, and of an answer."""


def answer_all(batch: Batch, check: Callable[[int], object] = lambda _: None) -> None:
    """What has not gone back; `check` is asked about each number."""
    for first, end in batch.asking():
        for member in range(first, end):
            number = int.from_bytes(batch.requests[WORD * member : WORD * (member + 1)], "little")
            check(number)
            batch.answers[WORD * member : WORD * (member + 1)] = answer_to(number)


# Compared.


@dataclass
class Side:
    """A guest, a queue, and the bytes of its area."""

    guest: Guest
    layout: SplitLayout | PackedLayout
    buffer: InflightBuffer
    queue: BatchedQueue
    area: memoryview

    def anew(self, buffer: InflightBuffer) -> None:
        """Go on with another queue, as another process would."""
        self.buffer.close()
        queue = make_queue(self.guest.memory, self.layout, buffer.queue(0))
        assert isinstance(queue, BatchedQueue)
        self.buffer, self.queue = buffer, queue


@contextmanager
def sides(size: int, seed: int, start: int) -> Iterator[tuple[Side, Side, Callable[[], None]]]:
    """Two that are the same, and how both get another queue."""
    with ExitStack() as stack:
        made, shared = [], []
        for _ in range(2):
            guest, layout = new_guest("split", size, random.Random(seed), start)
            stack.callback(guest.memory.replace, ())
            shared.append(stack.enter_context(shared_buffer("split", size)))
            view = stack.enter_context(shared[-1].open()._window.view())
            buffer = shared[-1].open()
            queue = make_queue(guest.memory, layout, buffer.queue(0), start)
            assert isinstance(queue, BatchedQueue)
            made.append(Side(guest, layout, buffer, queue, view))

        def anew() -> None:
            for side, there in zip(made, shared, strict=True):
                side.anew(there.open())

        yield made[0], made[1], anew
        for side in made:
            side.buffer.close()


def told(queue: BatchedQueue) -> tuple[int, int, int]:
    assert queue.inflight is not None
    known = queue.inflight.told
    assert isinstance(known, SplitTold)
    return known.counter, known.used_idx, known.last_batch_head


def same(batched: Side, single: Side) -> None:
    assert batched.area.tobytes() == single.area.tobytes()
    assert told(batched.queue) == told(single.queue)
    assert told(batched.queue)[1:] == struct.unpack_from("=HH", batched.area, 12)[::-1]
    assert batched.queue.state() == single.queue.state()


def send_both(both: tuple[Side, Side], number: int, *, malformed: bool) -> None:
    for side in both:
        for _ in range(number):
            side.guest.send(malformed=malformed)


def in_steps(batched: Side, single: Side, batch: Batch, rng: random.Random) -> None:
    """Chains are taken and given back, and the areas are looked at after each."""
    count = batched.queue.take(batch, batch.most)
    chains = [pop(single.queue) for _ in range(count)]
    same(batched, single)
    answer_all(batch)
    while batch.given < count:
        first, end = batch.given, rng.randint(batch.given + 1, count)
        batched.queue.give(batch, end)
        for chain in chains[first:end]:
            chain.write(answer_to(int.from_bytes(chain.read(0, WORD), "little")))
            single.queue.push(chain, WORD)
        same(batched, single)


def at_a_time(batched: Side, single: Side, batch: Batch) -> None:
    """All that is there, malformed ones too."""
    while batched.queue.take(batch, batch.most) or batched.queue.enable_notifications():
        answer_all(batch)
        if batch.given < batch.count:
            batched.queue.give(batch, batch.count)
    while (chain := single.queue.pop()) is not None or single.queue.enable_notifications():
        if chain is not None:
            chain.write(answer_to(int.from_bytes(chain.read(0, WORD), "little")))
            single.queue.push(chain, WORD)
    same(batched, single)


@contextmanager
def some_log() -> Iterator[DirtyLog]:
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4096)
    log = DirtyLog(fd, 4096)
    os.close(fd)
    yield log
    log.close()


def test_the_area_is_the_same_after_each_step(rng: random.Random) -> None:
    """Also where a log has chains taken one by one for a while, and where another queue takes over what was taken."""
    for _ in range(counts.BATCHED_AREAS):
        size, seed = 2 ** rng.randrange(1, 7), rng.getrandbits(32)
        with sides(size, seed, rng.choice((0, 65530))) as (batched, single, anew), some_log() as log:
            batch = Batch(size, rng.randint(1, size + 2), WORD, WORD)
            for _ in range(12):
                batched.queue.log = log if rng.random() < 0.3 else None
                malformed = rng.random() < 0.5
                send_both((batched, single), rng.randint(1, size), malformed=malformed)
                if malformed:
                    at_a_time(batched, single, batch)
                else:
                    while batched.queue.enable_notifications():
                        single.queue.enable_notifications()
                        in_steps(batched, single, batch, rng)
                if rng.random() < 0.3:
                    send_both((batched, single), rng.randint(1, size), malformed=False)
                    for _ in range(batched.queue.take(batch, batch.most)):
                        pop(single.queue)
                    anew()
                    at_a_time(batched, single, batch)
                for side in (batched, single):
                    side.guest.receive_all()
            assert batched.guest.answered == single.guest.answered


# Killed.

SIZE = 8
START = 65_530


class Left(NamedTuple):
    """What outlives a back end: its area, the ring, and the guest's buffers."""

    area: bytes
    ring: bytes
    buffers: bytes


class World:
    """A guest with a ring, and the file that its front end keeps for it."""

    def __init__(self, form: str, rng: random.Random, shared: SharedBuffer) -> None:
        self.rng, self.shared = rng, shared
        self.guest, self.layout = new_guest(form, SIZE, rng, START)
        lowest = self.guest.memory.regions[0].mapping
        ring_size = max(area.address + area.size for area in self.layout.areas.values()) - RING
        self._buffer = shared.open()
        self._views = (
            self._buffer._window.view(),
            lowest.view(HostOffset(RING), ByteCount(ring_size)),
            lowest.view(HostOffset(BUFFERS), ByteCount(PLACE * (2 * SIZE + 2))),
        )

    def close(self) -> None:
        for view in self._views:
            view.release()
        self._buffer.close()
        self.guest.memory.replace([])

    def left(self) -> Left:
        area, ring, buffers = self._views
        return Left(bytes(area), bytes(ring), bytes(buffers))

    def goes_on(self, left: Left) -> None:
        """A back end takes this over, and serves to the end; the guest is as it was again afterwards."""
        for view, data in zip(self._views, left, strict=True):
            view[:] = data
        guest = copy.deepcopy(self.guest, {id(self.guest.memory): self.guest.memory})
        guest.receive_all()
        serve(guest, self.layout, self.shared, self.rng.randrange(SIZE))
        assert not guest.flying

    def stores(self, at_once: bool) -> list[Left]:
        """What is left after each store of a back end that serves all that there is, within one call or by three."""
        numbers = sorted(number for number, _, _ in self.guest.flying.values())
        pid = os.fork()
        if pid == 0:
            try:
                self._serve_batch(b"".join(map(answer_to, numbers)), at_once)
            finally:
                os._exit(1)
        found = left_by(pid, self.left)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        return found

    def _serve_batch(self, answers: bytes, at_once: bool) -> None:
        queue = make_queue(self.guest.memory, self.layout, self.shared.open().queue(0), START)
        batch, count = Batch(SIZE, SIZE, WORD, WORD), len(answers) // WORD
        batch.answers[: len(answers)] = answers
        # What the queue calls, so that few instructions are Python's. The answers are there already.
        raw, ring, table, told = batch.raw, queue._ring, self.guest.memory.table, queue._told
        answerer = PythonAnswerer(lambda _device, _keys, _requests, count, _answers: count)
        calls: list[Callable[[], object]] = [partial(raw.serve, ring, table, SIZE, told, answerer.raw, -1, 0)]
        if not at_once:
            gives = (partial(raw.give, ring, table, end, told) for end in (1, count))
            calls = [partial(raw.take, ring, table, SIZE, told), *gives]
        stepped(lambda: [call() for call in calls])
        os._exit((answerer.raw.answered if at_once else raw.given) != count)


def serve(guest: Guest, layout: SplitLayout | PackedLayout, shared: SharedBuffer, most: int = 0) -> None:
    """A back end of this process takes over, and gives everything back: by batches of so many, or one by one."""
    buffer, last = shared.open(), -1

    def check(number: int) -> None:
        nonlocal last
        assert number > last, "in order, and none twice"
        assert not guest.answered[number], "the guest has its answer already"
        last = number

    try:
        queue = make_queue(guest.memory, layout, buffer.queue(0), START)
        batch = Batch(SIZE, max(most, 1), WORD, WORD)
        while most and (queue.take(batch, most) or queue.enable_notifications()):
            answer_all(batch, check)
            if batch.given < batch.count:
                queue.give(batch, batch.count)
        while (chain := queue.pop()) is not None or queue.enable_notifications():
            if chain is not None:
                check(number_of(chain))
                answer(queue, chain)
        guest.receive_all()
    finally:
        buffer.close()


@pytest.mark.parametrize("at_once", [False, True], ids=["in steps", "at once"])
@pytest.mark.parametrize("form", FORMATS[: counts.RINGS_TRIED_AT_LENGTH])
def test_killed_after_each_store_of_the_core(
    form: str, at_once: bool, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    kills = 0
    with shared_buffer(form, SIZE) as shared:
        world = World(form, rng, shared)
        try:
            for _ in range(counts.STEPPED_RINGFULS):
                for _ in range(rng.randrange(12)):  # anywhere in the ring, with the free entries in any order
                    world.guest.send()
                serve(world.guest, world.layout, shared)
                # What is malformed is for the caller to give back.
                while world.guest.send(malformed=not at_once):
                    pass
                found = world.stores(at_once)
                assert len(found) > 5 * len(world.guest.flying)  # less those that change nothing
                for left in found:
                    world.goes_on(left)
                kills += len(found)
                world.guest.receive_all()
        finally:
            world.close()
    how = "at once" if at_once else "in steps"
    figure(f"stores of the C core after which a back end was killed, {form} ring, {how}", kills)
