"""What a queue does with the chains that an earlier one held."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.inflight.world import answer, layout_of, make_driver, make_queue, shared_buffer
from tests.rings.rig import BORDER, FORMATS, guest_memory, pop
from vhost_user.errors import PeerError
from vhost_user.inflight import InflightArea, InflightBuffer
from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress
from vhost_user.vring import BatchedQueue, DeviceQueue, DriverQueue, PackedLayout, PackedQueue, SplitLayout, SplitQueue

BUFFER = 0x100000
TABLE = GuestAddress(0x180000)


class Bench:
    """A driver and an area; queues come and go."""

    def __init__(self, form: str, size: int, buffer: InflightBuffer) -> None:
        self.memory = guest_memory()
        self.layout: SplitLayout | PackedLayout = layout_of(form, size)
        self.driver: DriverQueue = make_driver(self.memory, self.layout)
        self.area: InflightArea = buffer.queue(0)

    def queue(self) -> DeviceQueue:
        return make_queue(self.memory, self.layout, self.area)


@contextmanager
def bench(form: str, size: int, entries: int | None = None) -> Iterator[Bench]:
    with shared_buffer(form, entries or size) as shared:
        buffer = shared.open()
        found = Bench(form, size, buffer)
        yield found
        buffer.close()
        found.memory.replace([])


def go_on(
    memory: GuestMemory, layout: SplitLayout | PackedLayout, area: InflightArea, state: tuple[int, ...]
) -> BatchedQueue:
    """A queue that begins where `state` says."""
    if isinstance(layout, SplitLayout):
        next_avail, next_used = state
        return SplitQueue(memory, **vars(layout), next_avail=next_avail, next_used=next_used, inflight=area)
    return PackedQueue(
        memory,
        **vars(layout),
        next_avail=state[0],
        avail_wrap=bool(state[1]),
        next_used=state[2],
        used_wrap=bool(state[3]),
        inflight=area,
    )


pytestmark = pytest.mark.parametrize("form", FORMATS)


def test_they_come_first_and_in_the_old_order(form: str) -> None:
    with bench(form, 8) as at:
        tokens = [at.driver.add([(BUFFER + 16 * number, 8)]) for number in range(6)]
        queue = at.queue()
        held = [pop(queue) for _ in range(4)]
        queue.push(held[1], 0)
        for _ in range(3):
            queue = at.queue()
            assert [pop(queue).id for _ in range(3)] == [tokens[0], tokens[2], tokens[3]]
        assert [pop(queue).id for _ in range(2)] == tokens[4:]
        assert queue.pop() is None
        queue = at.queue()
        for token in (tokens[0], *tokens[2:]):
            chain = pop(queue)
            assert chain.id == token
            queue.push(chain, 0)
        assert queue.pop() is None
        assert sorted(tokens) == sorted(each[0] for each in iter(at.driver.get_used, None))
        assert at.driver.free == 8


def test_the_area_may_be_larger_than_the_ring(form: str) -> None:
    with bench(form, 2, 7) as at:
        for number in range(20):
            tokens = [at.driver.add([(BUFFER, 1)], []), at.driver.add([], [(BUFFER + 8, number + 1)])]
            queue = at.queue()
            pop(queue)
            chains = [pop(queue)]
            queue = at.queue()
            chains = [pop(queue), pop(queue)]
            assert [chain.id for chain in chains] == tokens
            queue.push(chains[1], number + 1)
            assert at.driver.get_used() == (tokens[1], number + 1)
            queue.push(chains[0], 0)
            assert at.driver.get_used() == (tokens[0], 0)


def test_a_retaken_chain_is_whole(form: str) -> None:
    with bench(form, 8) as at:
        readable, writable = [(BUFFER, 5), (BORDER - 2, 4)], [(BUFFER + 64, 7), (BUFFER + 128, 1)]
        plain = at.driver.add(readable, writable)
        indirect = at.driver.add(readable, writable, indirect_table=TABLE)
        queue = at.queue()
        before = [pop(queue), pop(queue)]
        queue = at.queue()
        for old, token in zip(before, (plain, indirect), strict=True):
            new = pop(queue)
            assert (new.id, new.slots, new.readable, new.writable) == (token, old.slots, 9, 8)
            assert new.readable_ranges == old.readable_ranges == readable
            assert new.writable_ranges == old.writable_ranges == writable
            new.write(b"12345678")
            queue.push(new, 8)
            assert at.driver.get_used() == (token, 8)


def test_slots_that_others_used_meanwhile(form: str) -> None:
    """The first chain stays, while the ring goes round many times: nothing but the area knows it any more."""
    with bench(form, 4) as at:
        first = at.driver.add([(BUFFER, 3)], [(BUFFER + 8, 5)])
        queue = at.queue()
        pop(queue)
        for _ in range(21):
            token = at.driver.add([(BUFFER + 16, 1)])
            queue.push(pop(queue), 0)
            assert at.driver.get_used() == (token, 0)
        queue = at.queue()
        chain = pop(queue)
        assert (chain.id, chain.readable_ranges, chain.writable_ranges) == (first, [(BUFFER, 3)], [(BUFFER + 8, 5)])
        queue.push(chain, 5)
        assert at.driver.get_used() == (first, 5)


def test_one_that_is_malformed_now_goes_back(form: str) -> None:
    """Its table is the driver's memory, and is read anew."""
    with bench(form, 4) as at:
        bad = at.driver.add([(BUFFER, 8)], indirect_table=TABLE)
        good = at.driver.add([(BUFFER, 8)])
        queue = at.queue()
        pop(queue)
        at.memory.write(TABLE, struct.pack("<QI", 2**60, 8))
        queue = at.queue()
        assert pop(queue).id == good
        assert queue.malformed == {"outside_memory": 1}
        assert at.driver.get_used() == (bad, 0)
        queue = at.queue()
        assert pop(queue).id == good
        assert queue.malformed == {}


def test_malformed_chains_are_given_back_and_noted(form: str) -> None:
    with bench(form, 8) as at:
        tokens = [at.driver.add([(BUFFER, number % 2)]) for number in range(8)]
        queue = at.queue()
        held = [pop(queue) for _ in range(2)]
        assert [chain.id for chain in held] == [tokens[1], tokens[3]]
        assert queue.malformed == {"zero_length": 2}
        queue = at.queue()
        assert [pop(queue).id for _ in range(4)] == tokens[1::2]
        assert queue.pop() is None
        assert [each[0] for each in iter(at.driver.get_used, None)] == tokens[::2]


def test_a_pop_has_an_end_and_says_that_there_is_more(form: str) -> None:
    """Chains that are long, in flight, and malformed by now: a ringful of descriptors is read, then the caller runs."""
    size = 16
    with bench(form, size) as at:
        for number in range(size):
            table = GuestAddress(TABLE + 16 * size * number)
            at.driver.add([(BUFFER, 1)] * size, indirect_table=table)
        queue = at.queue()
        for number in range(size):
            pop(queue)
            at.memory.write(GuestAddress(TABLE + 16 * size * number + 16 * (size - 1)), bytes(16))
        queue = at.queue()
        pops = 0
        while queue.enable_notifications():
            assert queue.pop() is None
            pops += 1
        assert queue.malformed.total() == size
        assert pops > 4
        assert len(list(iter(at.driver.get_used, None))) == size


def test_a_push_that_finds_no_ring_changes_nothing(form: str) -> None:
    with bench(form, 4) as at:
        tokens = [at.driver.add([(BUFFER, 8)]), at.driver.add([(BUFFER, 8)])]
        queue = at.queue()
        chains = [pop(queue), pop(queue)]
        regions = at.memory.regions
        at.memory.replace(regions[1:])
        for chain in chains:
            with pytest.raises(PeerError, match="each part has to lie in one region"):
                queue.push(chain, 0)
        at.memory.replace(regions)
        queue = at.queue()
        chains = [pop(queue), pop(queue)]
        assert [chain.id for chain in chains] == tokens
        at.memory.replace(regions[1:])
        with pytest.raises(PeerError):
            queue.push(chains[0], 0)
        at.memory.replace(regions)
        queue.push(chains[1], 0)
        queue.push(chains[0], 0)
        assert [each[0] for each in iter(at.driver.get_used, None)] == tokens[::-1]
        assert at.queue().pop() is None


def test_a_pop_that_finds_no_ring_loses_nothing(form: str) -> None:
    with bench(form, 4) as at:
        token = at.driver.add([(BUFFER, 8)])
        pop(at.queue())
        queue = at.queue()
        regions = at.memory.regions
        at.memory.replace(regions[1:])
        with pytest.raises(PeerError):
            queue.pop()
        at.memory.replace(regions)
        assert pop(queue).id == token


def test_rejected_chains_are_given_back(form: str) -> None:
    with bench(form, 4) as at:
        token = at.driver.add([(BUFFER, 8)])
        queue = at.queue()
        queue.reject(pop(queue), "senseless")
        assert at.driver.get_used() == (token, 0)
        assert at.queue().pop() is None


def test_a_new_area_begins_where_the_ring_is(form: str) -> None:
    """A ring that ran without an area gets one: what was in flight then nobody knows, so nothing is."""
    memory, layout = guest_memory(), layout_of(form, 4)
    driver = make_driver(memory, layout)
    queue = make_queue(memory, layout, None)
    for _ in range(7):
        driver.add([(BUFFER, 8)], [(BUFFER + 8, 8)])
        answer(queue, pop(queue))
        assert driver.get_used() is not None
    with shared_buffer(form, 4) as shared:
        buffer = shared.open()
        token = driver.add([(BUFFER, 8)])
        queue = go_on(memory, layout, buffer.queue(0), queue.state())
        assert pop(queue).id == token
        queue = make_queue(memory, layout, buffer.queue(0))
        assert pop(queue).id == token
        buffer.close()
    memory.replace([])


def test_a_base_that_cannot_be_is_refused_for_a_new_area(form: str) -> None:
    with bench(form, 4) as at:
        base = (5, 0) if form == "split" else (1, False, 0, True)
        with pytest.raises(PeerError, match="next_avail=5 ahead"):
            go_on(at.memory, at.layout, at.area, base)
        at.queue()
        # With the area in use it is not asked.
        go_on(at.memory, at.layout, at.area, base)
