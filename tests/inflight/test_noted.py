"""What the C core notes of a batch in a split queue's area: what Python notes of chains one by one, byte by byte."""

from __future__ import annotations

import ctypes
import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from tests import counts
from tests.inflight.test_killed import RETAKEN, STARTED, alive, answered, process, receive, tell_answered
from tests.inflight.world import (
    Guest,
    SharedBuffer,
    answer_to,
    layout_of,
    make_driver,
    make_queue,
    new_guest,
    shared_buffer,
)
from tests.rings.answerer import PythonAnswerer
from tests.rings.rig import END, pop
from tests.rings.two_processes import map_memory
from vhost_user._native import SplitInflight as SplitTold
from vhost_user.dirty_log import DirtyLog
from vhost_user.inflight import InflightBuffer
from vhost_user.memory import GuestMemory
from vhost_user.vring import Batch, BatchedQueue, PackedLayout, SplitLayout

WORD = 8
"""Bytes of a request, and of an answer."""


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


def answer_all(batch: Batch) -> None:
    for first, end in batch.asking():
        for member in range(first, end):
            number = int.from_bytes(batch.requests[WORD * member : WORD * (member + 1)], "little")
            batch.answers[WORD * member : WORD * (member + 1)] = answer_to(number)


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

SIZE = 256

MOST = 60
"""Chains in a batch: a ring has room for 85, at three descriptors each."""


def serve(
    memory: GuestMemory, layout: SplitLayout | PackedLayout, shared: SharedBuffer, rng: random.Random, at_once: bool
) -> None:
    """Serve in batches, and never end."""
    area = shared.open().queue(0)
    queue = make_queue(memory, layout, area)
    assert isinstance(queue, BatchedQueue)
    memory.store32(RETAKEN, len(area.retakes))
    memory.store32(STARTED, 1)
    batch, last = Batch(SIZE, MOST, WORD, WORD), -1

    def check(requests: bytes) -> bytes:
        nonlocal last
        answers = b""
        for (number,) in struct.iter_unpack("<Q", requests):
            assert number > last, f"{number} after {last}"
            assert not answered(memory, number), f"{number} again"
            last = number
            answers += answer_to(number)
        return answers

    def answer(_: int, requests: int, count: int, answers: int) -> int:
        try:
            ctypes.memmove(answers, check(ctypes.string_at(requests, WORD * count)), WORD * count)
        except AssertionError as error:
            os.write(2, f"{error}\n".encode())
            os._exit(1)
        return count

    answerer = PythonAnswerer(answer)
    while True:
        if at_once:
            queue.serve(batch, SIZE, answerer, -1, rng.choice((0, 1000)))
        else:
            queue.take(batch, MOST)
        for first, end in batch.asking():
            part = batch.part(first, end)
            part.answers[:] = check(bytes(part.requests))
        while batch.given < batch.count:
            queue.give(batch, rng.randint(batch.given + 1, batch.count))


def fill(guest: Guest) -> None:
    """Send as much as the ring has room for."""
    tell_answered(guest.memory, guest.number, False)
    while guest.send():
        tell_answered(guest.memory, guest.number, False)


@pytest.mark.parametrize("at_once", [False, True])
def test_no_request_of_a_batch_is_lost_and_none_comes_back_twice(
    at_once: bool, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, END)
    memory, layout = map_memory(fd), layout_of("split", SIZE)
    os.close(fd)
    guest, retaken = Guest(memory, make_driver(memory, layout), rng), 0
    with shared_buffer("split", SIZE) as shared, shared.open()._window.view() as area:
        for _ in range(counts.INFLIGHT_KILLS):
            memory.store32(STARTED, 0)
            fill(guest)
            with process(lambda: serve(memory, layout, shared, rng, at_once)) as pid:
                while not memory.load32(STARTED) and alive(pid):
                    pass
                for _ in range(rng.randrange(4)):
                    fill(guest)
                    receive(guest)
                # Wherever it is; or when it has something, or had a moment ago.
                seen = rng.random() < 0.3
                fill(guest)
                while not seen and guest.flying and alive(pid):
                    seen = any(area[16::16][:SIZE])
                    receive(guest)
            retaken += memory.load32(RETAKEN)
            receive(guest)
        with process(lambda: serve(memory, layout, shared, rng, at_once)) as pid:
            while guest.flying and alive(pid):
                receive(guest)
    assert not guest.flying
    assert sorted(guest.answered) == list(range(guest.number))
    assert retaken
    figure(f"requests to back ends that were killed{' while they answered at once' * at_once}", guest.number)
    figure(f"of these, taken over from the area{' while they answered at once' * at_once}", retaken)
    memory.replace([])
