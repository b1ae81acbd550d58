"""Driver and device in two processes that run freely: nobody sees what was not stored, and nobody sleeps for ever."""

from __future__ import annotations

import os
import random
import select

import pytest

from tests import counts
from tests.rings.rig import BORDER, FORMATS, RING
from tests.rings.two_processes import Other, other_process
from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress
from vhost_user.vring import (
    DeviceQueue,
    DriverQueue,
    PackedDriver,
    PackedLayout,
    PackedQueue,
    SplitDriver,
    SplitLayout,
    SplitQueue,
)

INDEX = GuestAddress(0x100)
STORED = (0x00FF, 0xFF00)
"""Half of one and half of the other, or a cleared one, is neither."""

READY = GuestAddress(0x200)
"""Not 0 when the driver has cleared the ring."""

QUEUE_SIZE = 16

BUFFERS = BORDER - 64 * QUEUE_SIZE // 2 - 4
"""Where the buffers are: one of them across the border."""

LATE = 20.0
"""Seconds after which a notification is taken to be lost. On an idle machine it takes some microseconds."""


def test_indices_are_seen_whole() -> None:
    """With `struct.pack_into` on the mapping in place of `store16` this fails: some percent of the loads are wrong."""

    def store(memory: GuestMemory) -> None:
        while not memory.load16(READY):
            for value in STORED * 100:
                memory.store16(INDEX, value)

    seen = dict.fromkeys(STORED, 0)
    with other_process(store) as (memory, other):
        while not memory.load16(INDEX):
            other.rest()
        loads = 0
        while loads < counts.INDEX_LOADS or 0 in seen.values():
            value = memory.load16(INDEX)
            seen[value] = seen.get(value, 0) + 1
            loads += 1
        memory.store16(READY, 1)
    assert set(seen) == set(STORED)


def sample(number: int) -> bytes:
    """Eight bytes that tell their number, and look like no other's."""
    return (number * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "little")


def make_driver(form: str, memory: GuestMemory, event_idx: bool) -> DriverQueue:
    if form == "split":
        return SplitDriver(memory, SplitLayout.place(QUEUE_SIZE, RING), event_idx=event_idx)
    return PackedDriver(memory, PackedLayout.place(QUEUE_SIZE, RING), event_idx=event_idx)


def make_device(form: str, memory: GuestMemory, other: Other, event_idx: bool) -> DeviceQueue:
    while not memory.load16(READY):
        other.rest()
    if form == "split":
        return SplitQueue(memory, **vars(SplitLayout.place(QUEUE_SIZE, RING)), event_idx=event_idx)
    return PackedQueue(memory, **vars(PackedLayout.place(QUEUE_SIZE, RING)), event_idx=event_idx)


class Producer:
    """Sends numbered samples and expects each of them back, reversed."""

    def __init__(self, memory: GuestMemory, driver: DriverQueue, total: int) -> None:
        self.memory, self.driver, self.total = memory, driver, total
        self.sent = self.received = 0
        self.places = [GuestAddress(BUFFERS + 64 * at) for at in range(QUEUE_SIZE)]
        self.flying: dict[int, tuple[int, GuestAddress]] = {}

    def send(self) -> bool:
        """False where the ring is full, or all is sent."""
        if self.sent == self.total or self.driver.free < 2:
            return False
        place = self.places.pop()
        self.memory.write(place, sample(self.sent))
        token = self.driver.add([(place, 8)], [(place + 8, 8)])
        self.flying[token] = self.sent, place
        self.sent += 1
        return True

    def receive(self) -> bool:
        """False where nothing came back."""
        used = self.driver.get_used()
        if used is None:
            return False
        number, place = self.flying.pop(used[0])
        assert used[1] == 8
        assert self.memory.read(GuestAddress(place + 8), 8) == sample(number)[::-1]
        self.places.append(place)
        self.received += 1
        return True


def serve(queue: DeviceQueue, number: int) -> bool:
    """Serve one chain, which has to be sample `number`. False where there is none."""
    chain = queue.pop()
    if chain is None:
        return False
    assert (chain.readable, chain.writable) == (8, 8)
    data = chain.read()
    assert data == sample(number)
    chain.write(data[::-1])
    queue.push(chain, 8)
    return True


@pytest.mark.clause("RING-SPLIT-8")
@pytest.mark.parametrize("form", FORMATS)
def test_producer_and_consumer_run_freely(form: str) -> None:
    total = counts.RING_BUFFERS_BETWEEN_PROCESSES

    def drive(memory: GuestMemory) -> None:
        producer = Producer(memory, make_driver(form, memory, False), total)
        memory.store16(READY, 1)
        while producer.received < total:
            if not producer.send() and not producer.receive():
                os.sched_yield()

    with other_process(drive) as (memory, other):
        queue, number = make_device(form, memory, other, False), 0
        while number < total:
            if serve(queue, number):
                number += 1
            else:
                other.rest()
        other.finish()
        assert queue.pop() is None
        assert queue.malformed == {}


def wait(event: int) -> None:
    poll = select.poll()
    poll.register(event, select.POLLIN)
    assert poll.poll(LATE * 1000), "a notification was lost"
    os.eventfd_read(event)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("event_idx", [False, True])
def test_both_sleep_whenever_they_may(form: str, event_idx: bool, rng: random.Random) -> None:
    total = counts.RING_BUFFERS_WITH_SLEEPS

    def drive(memory: GuestMemory) -> None:
        driver = make_driver(form, memory, event_idx)
        producer = Producer(memory, driver, total)
        memory.store16(READY, 1)
        while producer.received < total:
            for _ in range(rng.randrange(QUEUE_SIZE)):
                producer.send()
            if driver.needs_kick():
                os.eventfd_write(kick, 1)
            driver.disable_interrupts()
            while producer.receive():
                pass
            if not driver.enable_interrupts() and producer.flying:
                wait(call)

    kick, call = os.eventfd(0), os.eventfd(0)
    try:
        with other_process(drive) as (memory, other):
            queue, number = make_device(form, memory, other, event_idx), 0
            while True:
                queue.disable_notifications()
                while serve(queue, number):
                    number += 1
                if queue.should_notify():
                    os.eventfd_write(call, 1)
                if number == total:
                    break
                if not queue.enable_notifications():
                    wait(kick)
    finally:
        os.close(kick)
        os.close(call)
