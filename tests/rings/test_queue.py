"""What a device does with chains, whatever the ring's format."""

from __future__ import annotations

import struct
from collections import Counter

import pytest

from tests.rings.rig import (
    AVAIL,
    BORDER,
    FORMATS,
    INDIRECT,
    ISLAND,
    NEXT,
    RING,
    USED,
    WRITE,
    Raw,
    anonymous,
    guest_memory,
    make_bench,
    make_rig,
    pop,
)
from vhost_user.errors import PeerError, UsageError
from vhost_user.memory import Region
from vhost_user.units import ByteCount, GuestAddress
from vhost_user.vring import DeviceQueue, PackedQueue, RingBroken, SplitQueue

BUFFER = GuestAddress(0x100000)
TABLE = GuestAddress(0x180000)

pytestmark = pytest.mark.parametrize("form", FORMATS)


def test_request_and_response(form: str) -> None:
    rig = make_rig(form, 8)
    assert rig.queue.pop() is None
    rig.memory.write(BUFFER, b"request")
    token = rig.driver.add([(BUFFER, 7)], [(BUFFER + 16, 8)])
    chain = pop(rig.queue)
    assert (chain.readable, chain.writable) == (7, 8)
    assert chain.read() == b"request"
    chain.write(b"response")
    assert rig.driver.get_used() is None
    rig.queue.push(chain, 8)
    assert rig.driver.get_used() == (token, 8)
    assert rig.memory.read(GuestAddress(BUFFER + 16), 8) == b"response"
    assert rig.driver.get_used() is None
    assert rig.queue.pop() is None


def test_offsets_reach_over_pieces_and_borders(form: str) -> None:
    rig = make_rig(form, 8)
    pieces = [(BORDER - 3, 5), (BUFFER, 1), (BORDER - 40, 4)]
    room = [(BUFFER + 64, 2), (BORDER - 60, 3), (BORDER + 2, 5)]
    rig.driver.add(pieces, room)
    for (address, _), text in zip(pieces, (b"abcde", b"f", b"ghij"), strict=True):
        rig.memory.write(GuestAddress(address), text)
    chain = pop(rig.queue)
    assert chain.readable_ranges == pieces
    assert chain.writable_ranges == room
    assert chain.read() == b"abcdefghij"
    for offset in range(11):
        for size in range(12):
            assert chain.read(offset, size) == b"abcdefghij"[offset : offset + size]
    assert [bytes(view) for view in chain.readable_views()] == [b"abc", b"de", b"f", b"ghij"]
    assert all(view.readonly for view in chain.readable_views())

    chain.write(bytearray(b"12345678"), 1)
    assert b"".join(chain.writable_views()) == b"\x0012345678\0"
    for view in chain.writable_views():
        view[:] = b"." * len(view)
    assert rig.memory.read(GuestAddress(BORDER + 2), 5) == b"....."


def test_range_outside_of_a_part_is_refused(form: str) -> None:
    rig = make_rig(form, 4)
    rig.driver.add([(BUFFER, 4)], [(BUFFER + 8, 4)])
    chain = pop(rig.queue)
    for read in ((-1, 1), (5, 0), (5, None), (0, -1)):
        with pytest.raises(UsageError, match="range="):
            chain.read(*read)
    for data, offset in ((b"12345", 0), (b"1", 4), (b"1", -1), (b"", 5)):
        with pytest.raises(UsageError, match="range="):
            chain.write(data, offset)
    assert rig.memory.read(GuestAddress(BUFFER + 8), 5) == bytes(5)
    chain.write(b"", 4)
    assert chain.read(4) == b""


def test_pushed_chain_is_the_drivers(form: str) -> None:
    rig, other = make_rig(form, 4), make_rig(form, 4)
    rig.driver.add([(BUFFER, 4)], [(BUFFER + 8, 4)])
    chain = pop(rig.queue)
    with pytest.raises(UsageError, match="popped from this queue"):
        other.queue.push(chain, 0)
    for written in (-1, 5):
        with pytest.raises(UsageError, match=f"written={written}"):
            rig.queue.push(chain, written)
    assert rig.driver.get_used() is None
    rig.queue.push(chain, 4)
    with pytest.raises(UsageError, match="popped from this queue"):
        rig.queue.push(chain, 4)
    for use in (chain.read, lambda: chain.write(b"late"), chain.readable_views, chain.writable_views):
        with pytest.raises(UsageError, match="was pushed"):
            use()
    assert rig.memory.read(GuestAddress(BUFFER + 8), 4) == bytes(4)


def test_chains_may_be_used_in_any_order(form: str) -> None:
    rig = make_rig(form, 8)
    tokens = [rig.driver.add([(BUFFER, 1)] * (at % 2), [(BUFFER, 10)]) for at in range(5)]
    chains = [pop(rig.queue) for _ in tokens]
    for at in (3, 0, 4, 1, 2):
        rig.queue.push(chains[at], at)
        assert rig.driver.get_used() == (tokens[at], at)
    assert rig.driver.free == 8


def test_indirect_table_takes_one_descriptor(form: str) -> None:
    rig = make_rig(form, 4)
    pieces = [(BUFFER + 32 * at, 1 + at) for at in range(4)]
    tokens = [
        rig.driver.add(pieces[:2], pieces[2:], indirect_table=GuestAddress(table))
        for table in (TABLE, TABLE + 64 + 1, BORDER - 24, BORDER + 64)  # aligned or not, and across a border
    ]
    for token in tokens:
        chain = pop(rig.queue)
        assert chain.readable_ranges + chain.writable_ranges == pieces
        assert (chain.readable, chain.writable) == (3, 7)
        rig.queue.push(chain, 7)
        assert rig.driver.get_used() == (token, 7)


def test_write_flag_of_the_descriptor_that_refers_to_a_table_is_ignored(form: str) -> None:
    bench = make_bench(form, 4)
    bench.memory.write(TABLE, bench.pen.table([Raw(BUFFER, 3)]))
    bench.pen.offer([Raw(TABLE, 16, INDIRECT | WRITE)])
    chain = pop(bench.queue)
    assert (chain.readable, chain.writable) == (3, 0)


def test_chain_of_the_largest_length_is_good(form: str) -> None:
    bench = make_bench(form, 4)
    bench.pen.offer([Raw(0, 0x200000, NEXT), Raw(1, 1, NEXT), Raw(2, 2, NEXT | WRITE), Raw(3, 3, WRITE)])
    chain = pop(bench.queue)
    assert (chain.readable, chain.writable) == (0x200001, 5)
    assert repr(chain) == "<Chain 0: 2097153 bytes to read, 5 to write>"


def test_length_of_4_gib_is_told_as_one_byte_less(form: str) -> None:
    bench = make_bench(form, 2)
    mapping = anonymous(1 << 32)
    bench.memory.add(Region(GuestAddress(1 << 40), ByteCount(1 << 32), mapping))
    bench.pen.offer([Raw(1 << 40, 1 << 31, NEXT | WRITE), Raw((1 << 40) + (1 << 31), 1 << 31, WRITE)])
    chain = pop(bench.queue)
    assert chain.writable == 1 << 32
    bench.queue.push(chain, 1 << 32)
    assert bench.pen.used() == [(chain.id, (1 << 32) - 1)]


def test_memory_removed_after_pop_is_an_error_and_never_touched(form: str) -> None:
    rig = make_rig(form, 4)
    rig.driver.add([(BORDER - 2, 4)], [(BORDER - 8, 2), (BORDER + 8, 2)])
    chain = pop(rig.queue)
    above = rig.memory.regions[1]
    rig.memory.remove(above)
    for use in (chain.read, lambda: chain.write(b"1234"), chain.readable_views, chain.writable_views):
        with pytest.raises(PeerError):
            use()
    assert chain.read(0, 2) == bytes(2)
    assert rig.memory.read(GuestAddress(BORDER - 8), 2) == bytes(2)  # nothing was written before the gap was found
    above.mapping.close()
    rig.queue.push(chain, 0)
    assert rig.driver.get_used() is not None


def test_ring_in_removed_memory_rests_and_goes_on_when_it_is_back(form: str) -> None:
    rig = make_rig(form, 4)
    token = rig.driver.add([(BUFFER, 4)])
    regions = rig.memory.regions
    popped = pop(rig.queue)
    rig.memory.replace(regions[1:])
    for call in (
        rig.queue.pop,
        lambda: rig.queue.push(popped, 0),
        rig.queue.should_notify,
        rig.queue.enable_notifications,
        rig.queue.disable_notifications,
    ):
        with pytest.raises(PeerError, match="each part has to lie in one region") as error:
            call()
        assert not isinstance(error.value, RingBroken)
    rig.memory.replace(regions)
    rig.queue.push(popped, 0)
    assert rig.queue.should_notify()
    assert rig.driver.get_used() == (token, 0)
    assert rig.queue.broken is None


def test_each_part_of_the_ring_is_looked_up(form: str) -> None:
    memory = guest_memory()
    desc, driver, device = RING, GuestAddress(BORDER + 64), ISLAND
    queue: DeviceQueue
    if form == "split":
        queue = SplitQueue(memory, 4, desc=desc, avail=driver, used=device)
    else:
        queue = PackedQueue(memory, 4, desc=desc, driver=driver, device=device)
    for region in memory.regions:
        memory.remove(region)
        with pytest.raises(PeerError):
            queue.enable_notifications()
        memory.add(region)
    assert not queue.enable_notifications()


def test_state_makes_a_queue_that_goes_on(form: str) -> None:
    rig = make_rig(form, 4)
    kind = SplitQueue if form == "split" else PackedQueue
    queue = rig.queue
    for step in range(30):
        token = rig.driver.add([(BUFFER, 1)], [(BUFFER + 8, 4)] * (step % 2))
        chain = pop(queue)
        queue.push(chain, chain.writable)
        assert rig.driver.get_used() == (token, 4 * (step % 2))
        assert isinstance(queue, SplitQueue | PackedQueue)
        queue = kind(rig.memory, **vars(rig.layout), **queue.state()._asdict())
    assert queue.malformed == Counter()


@pytest.mark.parametrize("written", [0, 3])
def test_used_element_is_what_the_standard_says(form: str, written: int) -> None:
    rig = make_rig(form, 4)
    token = rig.driver.add([(BUFFER, 1)], [(BUFFER, 4)])
    rig.queue.push(pop(rig.queue), written)
    if form == "split":
        used = rig.memory.read(rig.layout.areas["used"].address, 12)
        assert used == struct.pack("<HHII", 0, 1, token, written)
    else:
        flags = AVAIL | USED | (WRITE if written else 0)
        assert rig.memory.read(GuestAddress(RING + 8), 8) == struct.pack("<IHH", written, token, flags)


def test_device_rejects_what_it_cannot_understand(form: str) -> None:
    rig = make_rig(form, 4)
    token = rig.driver.add([], [(BUFFER, 4)])
    chain = pop(rig.queue)
    assert chain.read() == b""
    rig.queue.reject(chain, "write-only request")
    assert rig.driver.get_used() == (token, 0)
    assert rig.queue.malformed == {"write-only request": 1}
