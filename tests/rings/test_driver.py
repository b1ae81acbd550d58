"""What the driver's side refuses: of its caller, and of a device that is not to be trusted."""

from __future__ import annotations

import struct

import pytest

from tests.rings.rig import AVAIL, END, FORMATS, USED, WRITE, Rig, make_rig, pop
from vhost_user.errors import PeerError, UsageError
from vhost_user.units import GuestAddress
from vhost_user.vring import QueueFull, RingBroken

BUFFER = 0x100000
TABLE = GuestAddress(0x180000)


def ring_bytes(rig: Rig) -> list[bytes]:
    return [rig.memory.read(area.address, area.size) for area in rig.layout.areas.values()]


@pytest.mark.parametrize("form", FORMATS)
def test_full_ring_says_so_and_stays_as_it_is(form: str) -> None:
    rig = make_rig(form, 4)
    rig.driver.add([(BUFFER, 1)] * 3)
    before = ring_bytes(rig)
    with pytest.raises(
        QueueFull, match="descriptors=2: have to be at most the 1 of 4 that are free; wait for get_used"
    ):
        rig.driver.add([(BUFFER, 1)], [(BUFFER, 1)])
    assert ring_bytes(rig) == before
    rig.driver.add([(BUFFER, 1)], [(BUFFER, 1)], indirect_table=TABLE)
    with pytest.raises(QueueFull):
        rig.driver.add([(BUFFER, 1)], indirect_table=GuestAddress(TABLE + 64))
    assert rig.memory.read(GuestAddress(TABLE + 64), 16) == bytes(16)
    rig.queue.push(pop(rig.queue), 0)
    assert rig.driver.get_used() is not None
    assert rig.driver.free == 3


@pytest.mark.parametrize("form", FORMATS)
def test_chain_without_buffers_is_refused(form: str) -> None:
    rig = make_rig(form, 4)
    with pytest.raises(UsageError, match="buffers=none"):
        rig.driver.add()


@pytest.mark.parametrize("form", FORMATS)
def test_indirect_table_outside_memory_is_refused(form: str) -> None:
    rig = make_rig(form, 4)
    before = ring_bytes(rig)
    with pytest.raises(PeerError, match="guest address"):
        rig.driver.add([(BUFFER, 1)], indirect_table=END)
    assert ring_bytes(rig) == before
    assert rig.driver.free == 4


def write_used(rig: Rig, entry: int, token: int, written: int) -> None:
    """Use a chain as a device that may lie about it."""
    if "used" in rig.layout.areas:
        used = rig.layout.areas["used"].address
        rig.memory.write(GuestAddress(used + 4 + 8 * (entry % rig.layout.size)), struct.pack("<II", token, written))
        rig.memory.store16(GuestAddress(used + 2), entry + 1)
    else:
        slot = rig.layout.areas["desc"].address + 16 * entry
        rig.memory.write(GuestAddress(slot + 8), struct.pack("<IH", written, token))
        rig.memory.store16(GuestAddress(slot + 14), AVAIL | USED | WRITE)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("token", [0, 1, 7, 8, 0xFFFF])
def test_used_id_of_no_chain_in_flight(form: str, token: int) -> None:
    rig = make_rig(form, 8)
    real = rig.driver.add([], [(BUFFER, 4)])
    if token == real:
        token = 2
    write_used(rig, 0, token, 0)
    for _ in range(2):
        with pytest.raises(RingBroken, match=f"used id={token}: "):
            rig.driver.get_used()
    write_used(rig, 0, real, 4)
    assert rig.driver.get_used() == (real, 4)


@pytest.mark.parametrize("form", FORMATS)
def test_chain_used_twice(form: str) -> None:
    rig = make_rig(form, 8)
    tokens = [rig.driver.add([], [(BUFFER, 4)]) for _ in range(2)]
    write_used(rig, 0, tokens[1], 4)
    assert rig.driver.get_used() == (tokens[1], 4)
    write_used(rig, 1, tokens[1], 4)
    with pytest.raises(RingBroken, match="used id"):
        rig.driver.get_used()


@pytest.mark.parametrize("form", FORMATS)
def test_more_written_than_there_was_room(form: str) -> None:
    rig = make_rig(form, 8)
    token = rig.driver.add([(BUFFER, 100)], [(BUFFER, 4), (BUFFER, 5)])
    write_used(rig, 0, token, 10)
    with pytest.raises(RingBroken, match="used length=10: the chain has room for 9"):
        rig.driver.get_used()


@pytest.mark.parametrize("idx", [2, 32768, 65535])
def test_used_index_that_cannot_be(idx: int) -> None:
    rig = make_rig("split", 8)
    rig.driver.add([], [(BUFFER, 4)])
    rig.memory.store16(GuestAddress(rig.layout.areas["used"].address + 2), idx)
    for call in (rig.driver.get_used, rig.driver.enable_interrupts):
        with pytest.raises(RingBroken, match=f"used.idx={idx}: "):
            call()


def test_length_without_the_write_flag_is_ignored() -> None:
    rig = make_rig("packed", 8)
    token = rig.driver.add([], [(BUFFER, 4)])
    slot = rig.layout.areas["desc"].address
    rig.memory.write(GuestAddress(slot + 8), struct.pack("<IH", 1000, token))
    rig.memory.store16(GuestAddress(slot + 14), AVAIL | USED)
    assert rig.driver.get_used() == (token, 0)
