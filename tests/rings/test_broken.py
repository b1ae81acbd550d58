"""Rings that can't go on: the error comes at once and with every later call, until the queue is made anew."""

from __future__ import annotations

import pytest

from tests.rings.rig import (
    AVAIL,
    NEXT,
    RING,
    USED,
    WRITE,
    Bench,
    PackedPen,
    Raw,
    SplitPen,
    make_bench,
    make_queue,
    pop,
)
from vhost_user.chain import Chain
from vhost_user.units import GuestAddress
from vhost_user.vring import RingBroken, SplitLayout, SplitQueue

SIZE = 4
BUFFER = 0x100000


def stays_broken(bench: Bench, field: str, value: int, chain: Chain | None = None) -> None:
    """Every call says so, the ring is not written to any more, and a new queue on the same ring works."""
    queue = bench.queue
    calls = [queue.pop, queue.should_notify, queue.disable_notifications, queue.enable_notifications]
    if chain is not None:
        calls.append(lambda: queue.push(chain, 0))
    areas = bench.layout.areas.values()
    before = [bench.memory.read(area.address, area.size) for area in areas]
    for call in (*calls, *calls):
        with pytest.raises(RingBroken) as error:
            call()
        assert (error.value.field, error.value.value) == (field, value)
        assert "reset" in error.value.remedy
    assert str(queue.broken) == str(error.value)
    assert [bench.memory.read(area.address, area.size) for area in areas] == before

    for area in areas:
        bench.memory.write(area.address, bytes(area.size))
    pen = type(bench.pen)(bench.memory, bench.layout)  # type: ignore[arg-type]
    form = "split" if isinstance(pen, SplitPen) else "packed"
    _, anew = make_queue(form, SIZE, bench.memory, event_idx=False, indirect=False)
    pen.offer([Raw(BUFFER, 1, WRITE)])
    anew.push(pop(anew), 1)
    assert pen.used() == [(0, 1)]
    assert anew.broken is None


def split_bench() -> tuple[Bench, SplitPen]:
    bench = make_bench("split", SIZE)
    assert isinstance(bench.pen, SplitPen)
    return bench, bench.pen


def packed_bench() -> tuple[Bench, PackedPen]:
    bench = make_bench("packed", SIZE)
    assert isinstance(bench.pen, PackedPen)
    return bench, bench.pen


@pytest.mark.parametrize("head", [SIZE, SIZE + 1, 32768, 65535])
def test_head_beyond_the_table(head: int) -> None:
    bench, pen = split_bench()
    pen.offer_head(head)
    stays_broken(bench, "available ring's entry", head)


def test_head_beyond_the_table_behind_good_and_bad_chains() -> None:
    bench, pen = split_bench()
    pen.offer([Raw(BUFFER, 1)], 0)
    pen.offer([Raw(BUFFER, 0)], 1)
    pen.offer_head(SIZE)
    chain = pop(bench.queue)
    with pytest.raises(RingBroken):
        bench.queue.pop()
    assert pen.used() == [(1, 0)]
    stays_broken(bench, "available ring's entry", SIZE, chain)


@pytest.mark.parametrize("idx", [SIZE + 1, 32768, 65535])
def test_avail_index_ahead_by_more_than_the_queue(idx: int) -> None:
    bench, pen = split_bench()
    pen.set_avail_idx(idx)
    stays_broken(bench, "avail.idx", idx)


def test_avail_index_that_goes_back() -> None:
    bench, pen = split_bench()
    for _ in range(2):
        pen.offer([Raw(BUFFER, 1)])
        bench.queue.push(pop(bench.queue), 0)
    pen.set_avail_idx(1)
    stays_broken(bench, "avail.idx", 1)


def test_more_chains_than_descriptors_when_those_in_flight_are_counted() -> None:
    bench, pen = split_bench()
    for at in range(SIZE):
        pen.offer([Raw(BUFFER, 1)], at)
    chains = [pop(bench.queue) for _ in range(SIZE)]
    pen.offer_head(0)
    stays_broken(bench, "avail.idx", SIZE + 1, chains[0])


def test_full_ring_is_not_broken() -> None:
    bench, pen = split_bench()
    for at in range(SIZE):
        pen.offer([Raw(BUFFER, 1)], at)
    for _ in range(SIZE):
        bench.queue.push(pop(bench.queue), 0)
    assert bench.queue.pop() is None


def test_packed_list_that_never_ends() -> None:
    bench, pen = packed_bench()
    pen.offer([Raw(BUFFER, 1, NEXT)] * SIZE)
    stays_broken(bench, "length of a descriptor list", SIZE + 1)


def test_packed_list_that_runs_into_descriptors_in_flight() -> None:
    bench, pen = packed_bench()
    pen.offer([Raw(BUFFER, 1, NEXT), Raw(BUFFER, 1)])
    chain = pop(bench.queue)
    pen.offer([Raw(BUFFER, 1, NEXT)] * 2 + [Raw(BUFFER, 1)])
    stays_broken(bench, "length of a descriptor list", 3, chain)


def test_packed_descriptor_made_available_while_all_are_in_flight() -> None:
    bench, pen = packed_bench()
    for at in range(SIZE):
        pen.offer([Raw(BUFFER, 1)], at)
    chains = [pop(bench.queue) for _ in range(SIZE)]
    pen.offer([Raw(BUFFER, 1)])
    stays_broken(bench, "length of a descriptor list", 1, chains[0])


@pytest.mark.parametrize("flags", [0, AVAIL | USED, USED, NEXT])
def test_packed_list_whose_tail_is_not_available(flags: int) -> None:
    bench, pen = packed_bench()
    pen.offer([Raw(BUFFER, 1, NEXT), Raw(BUFFER, 1)])
    bench.memory.store16(GuestAddress(bench.layout.desc + 16 + 14), flags)
    stays_broken(bench, "descriptor flags", flags)


def test_other_queue_in_the_same_memory_lives_on() -> None:
    bench, pen = split_bench()
    layout = SplitLayout.place(SIZE, GuestAddress(RING + 0x8000))
    other, other_pen = SplitQueue(bench.memory, **vars(layout)), SplitPen(bench.memory, layout)
    pen.offer_head(SIZE)
    with pytest.raises(RingBroken):
        bench.queue.pop()
    other_pen.offer([Raw(BUFFER, 1)])
    other.push(pop(other), 0)
    assert other_pen.used() == [(0, 0)]
