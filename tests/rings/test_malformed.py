"""Chains that a driver must not make: returned with length 0 and counted, the queue alive, the next chain good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest

from tests.rings.rig import BORDER, END, FORMATS, INDIRECT, NEXT, WRITE, Bench, Raw, anonymous, make_bench, pop
from vhost_user.memory import Region
from vhost_user.units import ByteCount, GuestAddress

SIZE = 4
BUFFER = 0x100000
TABLE = GuestAddress(0x180000)

GOOD = [Raw(BUFFER, 24, NEXT), Raw(BUFFER + 32, 10, WRITE)]


class Case(NamedTuple):
    """A chain that is not well-formed: its descriptors, and those of its indirect table at TABLE."""

    reason: str
    form: str
    descriptors: Sequence[Raw]
    table: Sequence[Raw] = ()


def both(reason: str, descriptors: Sequence[Raw], table: Sequence[Raw] = ()) -> list[Case]:
    return [Case(reason, form, descriptors, table) for form in FORMATS]


def refer(entries: int, flags: int = INDIRECT) -> Raw:
    return Raw(TABLE, 16 * entries, flags)


CASES = [
    *both("zero_length", [Raw(BUFFER, 0)]),
    *both("zero_length", [Raw(BUFFER, 1, NEXT), Raw(BUFFER, 0, WRITE)]),
    *both("zero_length", [refer(2)], [Raw(BUFFER, 1, NEXT), Raw(BUFFER, 0)]),
    *both("outside_memory", [Raw(END, 1)]),
    *both("outside_memory", [Raw(END - 1, 2)]),
    *both("outside_memory", [Raw(BORDER - 1, END - BORDER + 2, WRITE)]),
    *both("outside_memory", [Raw(2**64 - 1, 1)]),
    *both("outside_memory", [Raw(2**64 - 1, 2)]),
    *both("outside_memory", [Raw(2**64 - 16, 2**32 - 1)]),
    *both("outside_memory", [Raw(BUFFER, 1, NEXT), Raw(BUFFER, 2**32 - 1, WRITE)]),
    *both("outside_memory", [refer(1)], [Raw(END, 1)]),
    *both("outside_memory", [Raw(END, 16, INDIRECT)]),
    *both("outside_memory", [Raw(END - 16, 32, INDIRECT)]),
    *both("outside_memory", [Raw(2**64 - 16, 32, INDIRECT)]),
    *both("readable_after_writable", [Raw(BUFFER, 1, NEXT | WRITE), Raw(BUFFER, 1)]),
    *both("readable_after_writable", [refer(2)], [Raw(BUFFER, 1, NEXT | WRITE), Raw(BUFFER, 1)]),
    *both("too_long", [refer(SIZE + 1)], [*[Raw(BUFFER, 1, NEXT)] * SIZE, Raw(BUFFER, 1)]),
    *both("indirect_length", [Raw(TABLE, 0, INDIRECT)]),
    *both("indirect_length", [Raw(TABLE, 15, INDIRECT)]),
    *both("indirect_length", [Raw(TABLE, 24, INDIRECT)]),
    *both("indirect_chained", [refer(1, INDIRECT | NEXT), Raw(BUFFER, 1)], [Raw(BUFFER, 1)]),
    Case("indirect_chained", "packed", [Raw(BUFFER, 1, NEXT), refer(1)], [Raw(BUFFER, 1)]),
    Case("indirect_nested", "split", [refer(1)], [refer(1)]),
    Case("indirect_nested", "split", [refer(2)], [Raw(BUFFER, 1, NEXT), refer(1)]),
    Case("loop", "split", [Raw(BUFFER, 1, NEXT, 0)]),
    Case("loop", "split", [Raw(BUFFER, 1, NEXT), Raw(BUFFER, 1, NEXT), Raw(BUFFER, 1, NEXT, 1)]),
    Case("loop", "split", [refer(2)], [Raw(BUFFER, 1, NEXT), Raw(BUFFER, 1, NEXT, 0)]),
    Case("too_long", "split", [refer(SIZE + 1)], [Raw(BUFFER, 1, NEXT, 0)] * (SIZE + 1)),
    Case("too_long", "split", [Raw(BUFFER, 1, NEXT), refer(SIZE)], [*[Raw(BUFFER, 1, NEXT)] * 3, Raw(BUFFER, 1)]),
    Case("next_out_of_range", "split", [Raw(BUFFER, 1, NEXT, SIZE)]),
    Case("next_out_of_range", "split", [Raw(BUFFER, 1, NEXT, 65535)]),
    Case("next_out_of_range", "split", [refer(2)], [Raw(BUFFER, 1, NEXT, 2), Raw(BUFFER, 1)]),
]


def offer(bench: Bench, case: Case) -> int:
    bench.memory.write(TABLE, bench.pen.table(case.table))
    return bench.pen.offer(case.descriptors)


def name(case: Case) -> str:
    return f"{case.form}-{case.reason}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_goes_back_with_length_0_and_is_counted(case: Case) -> None:
    bench = make_bench(case.form, SIZE)
    bad = offer(bench, case)
    assert bench.queue.pop() is None
    assert bench.pen.used() == [(bad, 0)]
    assert bench.queue.malformed == {case.reason: 1}
    assert bench.queue.should_notify()
    assert bench.queue.broken is None

    good = bench.pen.offer(GOOD)
    chain = pop(bench.queue)
    assert (chain.readable, chain.writable) == (24, 10)
    bench.queue.push(chain, 10)
    assert bench.pen.used() == [(good, 10)]
    assert bench.queue.malformed == {case.reason: 1}


@pytest.mark.parametrize("form", FORMATS)
def test_pop_goes_on_to_the_good_chain_behind(form: str) -> None:
    bench = make_bench(form, 8)
    bad = [bench.pen.offer([Raw(BUFFER, 0)], at) for at in range(3)]
    good = bench.pen.offer([Raw(BUFFER, 1)], 5)
    assert pop(bench.queue).id == good
    assert bench.pen.used() == [(each, 0) for each in bad]
    assert bench.queue.malformed == {"zero_length": 3}


@pytest.mark.parametrize("form", FORMATS)
def test_indirect_table_without_the_feature(form: str) -> None:
    bench = make_bench(form, SIZE, indirect=False)
    bad = offer(bench, Case("", form, [refer(1)], [Raw(BUFFER, 1)]))
    assert bench.queue.pop() is None
    assert bench.pen.used() == [(bad, 0)]
    assert bench.queue.malformed == {"indirect_not_negotiated": 1}
    bench.pen.offer(GOOD)
    assert pop(bench.queue).readable == 24


@pytest.mark.parametrize("form", FORMATS)
def test_chain_of_more_than_4_gib(form: str) -> None:
    bench = make_bench(form, SIZE)
    start, size = 1 << 40, 1 << 31
    bench.memory.add(Region(GuestAddress(start), ByteCount(size), anonymous(size)))
    bad = bench.pen.offer([Raw(start, size, NEXT), Raw(start, size, NEXT | WRITE), Raw(start, 1, WRITE)])
    assert bench.queue.pop() is None
    assert bench.pen.used() == [(bad, 0)]
    assert bench.queue.malformed == {"too_many_bytes": 1}


def test_all_flags_but_write_are_ignored_in_an_indirect_table_of_a_packed_ring() -> None:
    bench = make_bench("packed", SIZE)
    table = [Raw(BUFFER, 1, 0xFFFF & ~WRITE), Raw(BUFFER, 2, 0xFFFF)]
    bench.memory.write(TABLE, bench.pen.table(table))
    bench.pen.offer([refer(2)])
    chain = pop(bench.queue)
    assert (chain.readable, chain.writable) == (1, 2)


@pytest.mark.parametrize("form", FORMATS)
def test_other_chains_in_flight_are_left_alone(form: str) -> None:
    bench = make_bench(form, 8)
    first = bench.pen.offer([Raw(BUFFER, 1, WRITE)], 0)
    chain = pop(bench.queue)
    bad = bench.pen.offer([Raw(BUFFER, 0)], 1)
    assert bench.queue.pop() is None
    bench.queue.push(chain, 1)
    assert bench.pen.used() == [(bad, 0), (first, 1)]


@pytest.mark.parametrize("form", FORMATS)
def test_one_pop_reads_about_three_ringfuls_at_most(form: str) -> None:
    """Every one of 64 chains is a table of 65 entries: 4,224 descriptors that a pop would have to read in vain."""
    size = 64
    bench = make_bench(form, size)
    bench.memory.write(TABLE, bench.pen.table([Raw(BUFFER, 1, NEXT)] * (size + 1)))
    for at in range(size):
        bench.pen.offer([refer(size + 1)], at)
    returned = 0
    while returned < size:
        assert bench.queue.pop() is None
        batch = len(bench.pen.used())
        assert 1 <= batch <= 2
        returned += batch
        assert bench.queue.enable_notifications() == (returned < size)
    assert bench.queue.malformed == {"too_long": size}


@pytest.mark.parametrize("form", FORMATS)
def test_pop_gives_up_after_exactly_two_ringfuls(form: str) -> None:
    """Each chain is read for SIZE descriptors: the one in the ring, and its table up to the entry that is wrong."""
    bench = make_bench(form, SIZE)
    table = [*[Raw(BUFFER, 1, NEXT)] * (SIZE - 2), Raw(BUFFER, 0)]
    bench.memory.write(TABLE, bench.pen.table(table))
    bad = [bench.pen.offer([refer(len(table))], at) for at in range(SIZE)]
    for batch in (bad[:2], bad[2:]):
        assert bench.queue.pop() is None
        assert bench.pen.used() == [(each, 0) for each in batch]
    assert bench.queue.malformed == {"zero_length": SIZE}
