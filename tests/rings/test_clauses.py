"""The standard's clauses on rings, from the device's side, byte by byte; what else holds is in the files beside."""

from __future__ import annotations

import struct

import pytest

from tests.rings.rig import (
    AVAIL,
    FORMATS,
    INDIRECT,
    NEXT,
    RING,
    USED,
    WRITE,
    Bench,
    Raw,
    SplitPen,
    guest_memory,
    make_bench,
    pop,
)
from vhost_user.errors import PeerError
from vhost_user.units import GuestAddress
from vhost_user.vring import PackedLayout, PackedQueue, SplitLayout, SplitQueue

ASK, ANSWER, TABLE = 0x1000, 0x2000, 0x3000
"""Where a request, the room for its answer and an indirect table lie."""


def serve(bench: Bench, answer: bytes = b"answer") -> None:
    """Serve one chain: write `answer`, as much of it as there is room for."""
    chain = pop(bench.queue)
    data = answer[: chain.writable]
    chain.write(data)
    bench.queue.push(chain, len(data))


def words(bench: Bench, area: str, count: int) -> list[int]:
    """The first 16-bit fields of a part of the ring."""
    return [bench.memory.load16(GuestAddress(getattr(bench.layout, area) + 2 * at)) for at in range(count)]


def part(bench: Bench, area: str) -> bytes:
    address, size, _ = bench.layout.areas[area]
    return bench.memory.read(address, size)


@pytest.mark.clause("RING-SPLIT-1", "RING-PACKED-1")
def test_sizes() -> None:
    memory = guest_memory()
    for size, split, packed in ((1, True, True), (3, False, True), (32768, True, True), (32769, False, False)):
        for fits, layout_of, queue_of in ((split, SplitLayout, SplitQueue), (packed, PackedLayout, PackedQueue)):
            if fits:
                queue_of(memory, **vars(layout_of.place(size, RING)))
            else:
                with pytest.raises(PeerError):
                    layout_of.place(size, RING)


@pytest.mark.clause("RING-SPLIT-2", "RING-SPLIT-3", "RING-SPLIT-4", "RING-SPLIT-7")
def test_split_layout_by_hand() -> None:
    memory = guest_memory()
    desc, avail, used = 0x10000, 0x11000, 0x12000
    queue = SplitQueue(
        memory, 4, desc=GuestAddress(desc), avail=GuestAddress(avail), used=GuestAddress(used), event_idx=True
    )
    memory.write(GuestAddress(ASK), b"question")
    memory.write(GuestAddress(desc + 16 * 2), struct.pack("<QIHH", ASK, 8, NEXT, 1))
    memory.write(GuestAddress(desc + 16 * 1), struct.pack("<QIHH", ANSWER, 6, WRITE, 0))
    memory.write(GuestAddress(avail), struct.pack("<HH4HH", 0, 1, 2, 9, 9, 9, 0))
    chain = pop(queue)
    assert chain.read() == b"question"
    chain.write(b"answer")
    queue.push(chain, 6)
    assert memory.read(GuestAddress(ANSWER), 6) == b"answer"
    assert memory.read(GuestAddress(used), 4 + 8) == struct.pack("<HHII", 0, 1, 2, 6)
    assert queue.should_notify(), "used_event, behind the heads, names the first entry"
    assert not queue.enable_notifications()
    assert memory.read(GuestAddress(used + 4 + 8 * 4), 2) == struct.pack("<H", 1), "avail_event is behind the entries"


@pytest.mark.clause("RING-SPLIT-5", "RING-SPLIT-11", "RING-PACKED-3", "RING-PACKED-21", "RING-PACKED-12")
@pytest.mark.parametrize("form", FORMATS)
def test_positions_run_round_in_order_and_need_no_notification(form: str) -> None:
    bench = make_bench(form, 4)
    for _ in range(2**16 + 10):
        bench.pen.offer([Raw(ASK, 8)])
        serve(bench)
        assert bench.pen.used() == [(0, 0)]
    if isinstance(bench.pen, SplitPen):
        assert words(bench, "used", 2) == [0, 10]


@pytest.mark.clause("RING-SPLIT-6", "RING-SPLIT-9", "RING-SPLIT-10", "RING-CHAIN-3", "RING-PACKED-15", "RING-CHAIN-1")
@pytest.mark.parametrize("form", FORMATS)
def test_only_what_is_the_devices_is_written(form: str) -> None:
    bench = make_bench(form, 8)
    bench.memory.write(GuestAddress(ASK), b"question")
    bench.pen.offer([Raw(ASK, 3, NEXT), Raw(ASK + 3, 5, NEXT), Raw(ANSWER, 2, NEXT | WRITE), Raw(ANSWER + 2, 9, WRITE)])
    table, driver = part(bench, "desc"), part(bench, "driver" if form == "packed" else "avail")
    chain = pop(bench.queue)
    chain.write(b"answer...")
    bench.queue.push(chain, 6)
    assert bench.pen.used() == [(0, 6)]
    assert bench.memory.read(GuestAddress(ANSWER), 11) == b"answer...\0\0", "more may be written than is told"
    assert bench.memory.read(GuestAddress(ASK), 8) == b"question"
    assert part(bench, "driver" if form == "packed" else "avail") == driver
    if form == "split":
        assert part(bench, "desc") == table
    else:
        assert part(bench, "desc")[16:] == table[16:], "only the used descriptor is written"


@pytest.mark.clause("RING-CHAIN-4", "RING-PACKED-16")
@pytest.mark.parametrize("form", FORMATS)
def test_what_an_answers_room_holds_does_not_matter(form: str) -> None:
    answers = []
    for filling in (b"\0", b"\xff"):
        bench = make_bench(form, 4)
        bench.memory.write(GuestAddress(ANSWER), filling * 6)
        bench.pen.offer([Raw(ASK, 8, NEXT), Raw(ANSWER, 6, WRITE)])
        assert pop(bench.queue).read() == bytes(8)
        answers.append(part(bench, "desc"))
    assert answers[0] == answers[1]


@pytest.mark.clause("RING-CHAIN-2", "RING-PACKED-20")
@pytest.mark.parametrize("form", FORMATS)
def test_a_chain_has_at_most_as_many_descriptors_as_the_queue(form: str) -> None:
    bench = make_bench(form, 4)
    for count, used in ((4, [(0, 0)]), (5, [(0, 0)])):
        bench.memory.write(
            GuestAddress(TABLE),
            bench.pen.table([Raw(ASK + at, 1, NEXT if at < count - 1 else 0) for at in range(count)]),
        )
        bench.pen.offer([Raw(TABLE, 16 * count, INDIRECT)])
        if count == 4:
            serve(bench)
        else:
            assert bench.queue.pop() is None
            assert bench.queue.malformed == {"too_long": 1}
        assert bench.pen.used() == used


@pytest.mark.clause("RING-INDIRECT-1", "RING-INDIRECT-2", "RING-PACKED-9")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("write", [0, WRITE])
def test_plain_descriptors_may_come_before_an_indirect_table(form: str, write: int) -> None:
    bench = make_bench(form, 4)
    bench.memory.write(GuestAddress(ASK), b"question")
    bench.memory.write(GuestAddress(TABLE), bench.pen.table([Raw(ASK + 5, 3, NEXT), Raw(ANSWER, 6, WRITE)]))
    if form == "split":
        bench.pen.offer([Raw(ASK, 5, NEXT), Raw(TABLE, 32, INDIRECT | write)])
    else:  # there the descriptors of a list and an indirect table exclude each other
        bench.memory.write(GuestAddress(TABLE), bench.pen.table([Raw(ASK, 8), Raw(ANSWER, 6, WRITE)]))
        bench.pen.offer([Raw(TABLE, 32, INDIRECT | write)])
    chain = pop(bench.queue)
    assert (chain.read(), chain.writable) == (b"question", 6)


@pytest.mark.clause("RING-PACKED-7", "RING-PACKED-8")
def test_in_a_packed_indirect_table_only_the_write_flag_counts() -> None:
    bench = make_bench("packed", 4)
    bench.memory.write(GuestAddress(ASK), b"question")
    noise = AVAIL | USED | NEXT
    entries = [(ASK, 5, 7, noise), (ASK + 5, 3, 99, 0), (ANSWER, 6, 3, WRITE | noise)]
    bench.memory.write(GuestAddress(TABLE), b"".join(struct.pack("<QIHH", *entry) for entry in entries))
    bench.pen.offer([Raw(TABLE, 48, INDIRECT)], 2)
    chain = pop(bench.queue)
    assert (chain.id, chain.read(), chain.writable) == (2, b"question", 6)


@pytest.mark.clause("RING-PACKED-2", "RING-PACKED-4", "RING-PACKED-5", "RING-PACKED-6", "RING-PACKED-19")
def test_packed_layout_by_hand() -> None:
    memory = guest_memory()
    desc, driver, device = 0x10000, 0x11000, 0x12000
    queue = PackedQueue(memory, 3, desc=GuestAddress(desc), driver=GuestAddress(driver), device=GuestAddress(device))
    memory.write(GuestAddress(ASK), b"question")
    memory.write(GuestAddress(desc), struct.pack("<QIHH", ASK, 8, 0, NEXT | AVAIL))
    memory.write(GuestAddress(desc + 16), struct.pack("<QIHH", ANSWER, 6, 42, WRITE | AVAIL))
    chain = pop(queue)
    assert (chain.id, chain.read()) == (42, b"question")
    chain.write(b"answer")
    queue.push(chain, 6)
    assert memory.read(GuestAddress(desc + 8), 8) == struct.pack("<IHH", 6, 42, WRITE | AVAIL | USED)
    # The next chain is behind the list of two; behind it the wrap counter turns over.
    memory.write(GuestAddress(desc + 32), struct.pack("<QIHH", ASK, 8, 1, AVAIL))
    queue.push(pop(queue), 0)
    assert memory.read(GuestAddress(desc + 40), 8) == struct.pack("<IHH", 0, 1, AVAIL | USED), "nothing was written"
    memory.write(GuestAddress(desc), struct.pack("<QIHH", ASK, 8, 5, USED))
    queue.push(pop(queue), 0)
    assert memory.read(GuestAddress(desc + 8), 8) == struct.pack("<IHH", 0, 5, 0)


@pytest.mark.clause("RING-PACKED-13")
def test_packed_chains_are_used_in_the_order_in_which_they_are_finished() -> None:
    bench = make_bench("packed", 4)
    bench.pen.offer([Raw(ASK, 8)], 1)
    bench.pen.offer([Raw(ASK, 8)], 2)
    first, second = pop(bench.queue), pop(bench.queue)
    bench.queue.push(second, 0)
    bench.queue.push(first, 0)
    assert bench.pen.used() == [(2, 0), (1, 0)]


@pytest.mark.clause("RING-PACKED-17", "RING-PACKED-18")
def test_packed_descriptors_are_touched_only_while_they_are_the_devices() -> None:
    bench = make_bench("packed", 4)
    assert bench.queue.pop() is None, "a ring of zeroes offers nothing"
    bench.pen.offer([Raw(ASK, 8)], 1)
    serve(bench)
    bench.memory.write(GuestAddress(bench.layout.desc), b"driver's")
    for _ in range(3):
        assert bench.queue.pop() is None
        bench.queue.enable_notifications()
        bench.queue.disable_notifications()
    assert bench.memory.read(GuestAddress(bench.layout.desc), 8) == b"driver's"


def notified(bench: Bench, count: int = 1) -> bool:
    for _ in range(count):
        bench.pen.offer([Raw(ASK, 8)])
        serve(bench)
    return bench.queue.should_notify()


def set_word(bench: Bench, area: str, at: int, value: int) -> None:
    bench.memory.store16(GuestAddress(getattr(bench.layout, area) + at), value)


@pytest.mark.clause("RING-NOTIFY-1", "RING-NOTIFY-2", "RING-NOTIFY-3")
@pytest.mark.parametrize("used_event", [0, 1, 77, 65535])
def test_split_without_event_index_the_flags_decide(used_event: int) -> None:
    bench = make_bench("split", 4)
    set_word(bench, "avail", 4 + 2 * 4, used_event)
    for flags, expected in ((0, True), (1, False), (0, True)):
        set_word(bench, "avail", 0, flags)
        assert notified(bench) is expected


@pytest.mark.clause("RING-NOTIFY-4", "RING-NOTIFY-5", "RING-NOTIFY-6")
@pytest.mark.parametrize("flags", [0, 1])
def test_split_with_event_index_the_named_entry_decides(flags: int) -> None:
    bench = make_bench("split", 4, event_idx=True)
    set_word(bench, "avail", 0, flags)
    for used_event, count, expected in ((0, 1, True), (0, 1, False), (3, 1, False), (3, 3, True), (9, 3, False)):
        set_word(bench, "avail", 4 + 2 * 4, used_event)
        assert notified(bench, count) is expected


@pytest.mark.clause("RING-NOTIFY-7", "RING-NOTIFY-8", "RING-NOTIFY-9", "RING-NOTIFY-10", "RING-PACKED-22")
def test_how_the_device_does_without_notifications() -> None:
    plain, event = make_bench("split", 4), make_bench("split", 4, event_idx=True)
    packed = make_bench("packed", 4)
    for enabled in (False, True, False):
        for bench in (plain, event, packed):
            if enabled:
                bench.queue.enable_notifications()
            else:
                bench.queue.disable_notifications()
        assert words(plain, "used", 1) == [0 if enabled else 1]
        assert words(event, "used", 1) == [0]
        assert words(packed, "device", 2)[1] == (0 if enabled else 1)
    notified(event, 3)
    event.queue.enable_notifications()
    assert event.memory.load16(GuestAddress(event.layout.areas["used"].address + 4 + 8 * 4)) == 3


@pytest.mark.clause("RING-NOTIFY-11")
@pytest.mark.parametrize("form", FORMATS)
def test_a_look_at_an_empty_ring_does_no_harm(form: str) -> None:
    bench = make_bench(form, 4)
    for _ in range(100):
        assert bench.queue.pop() is None
    assert notified(bench)


@pytest.mark.clause("RING-PACKED-10", "RING-PACKED-11")
def test_packed_event_flags_decide() -> None:
    bench = make_bench("packed", 4, event_idx=True)
    for flags, expected in ((0, True), (1, False)):
        set_word(bench, "driver", 2, flags)
        assert notified(bench) is expected
    set_word(bench, "driver", 2, 2)  # the entry that is named by offset and wrap counter decides
    for offset, wrap, count, expected in ((2, 1, 1, True), (1, 0, 1, False), (1, 0, 2, True), (3, 0, 1, False)):
        set_word(bench, "driver", 0, offset | wrap << 15)
        assert notified(bench, count) is expected
