"""Who is to be notified when: the decisions of both sides against a model that looks at one entry after the other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rings.rig import FORMATS, RING, Raw, Rig, guest_memory, make_bench, make_rig, pop
from vhost_user.units import GuestAddress
from vhost_user.vring import SplitDriver, SplitLayout, SplitQueue

BUFFER = 0x100000
SIZE = 8

ENABLE, DISABLE, DESC, RESERVED = range(4)

steps = st.lists(st.tuples(st.integers(0, SIZE), st.integers(-2 * SIZE, 2)), max_size=20)
"""Chains in a batch, and the event index relative to where the ring is after it."""


def split_rig(start: int, *, event_idx: bool = True) -> Rig:
    memory, layout = guest_memory(), SplitLayout.place(SIZE, RING)
    driver = SplitDriver(memory, layout, event_idx=event_idx, start=start)
    queue = SplitQueue(memory, **vars(layout), event_idx=event_idx, next_avail=start, next_used=start)
    return Rig(memory, layout, driver, queue)


def use(rig: Rig, chains: int = 1, descriptors: int = 1) -> None:
    """Let chains go all the way round, one at a time."""
    for _ in range(chains):
        rig.driver.add([(BUFFER, 1)] * descriptors)
        rig.queue.push(pop(rig.queue), 0)
        assert rig.driver.get_used() is not None


def used_event(rig: Rig) -> GuestAddress:
    return GuestAddress(rig.layout.areas["avail"].address + 4 + 2 * SIZE)


def avail_event(rig: Rig) -> GuestAddress:
    return GuestAddress(rig.layout.areas["used"].address + 4 + 8 * SIZE)


@given(start=st.sampled_from([0, 1, 32767, 65530, 65535]), steps=steps)
def test_split_event_indices(start: int, steps: list[tuple[int, int]]) -> None:
    rig, idx = split_rig(start), start
    for chains, ahead in steps:
        use(rig, chains)
        entries = {(idx + at) % 2**16 for at in range(chains)}
        idx = (idx + chains) % 2**16
        event = (idx + ahead) % 2**16
        rig.memory.store16(used_event(rig), event)
        rig.memory.store16(avail_event(rig), event)
        assert rig.queue.should_notify() == (event in entries)
        assert rig.driver.needs_kick() == (event in entries)
        assert not rig.queue.should_notify()
        assert not rig.driver.needs_kick()


@given(
    size=st.integers(3, SIZE),
    steps=st.lists(
        st.tuples(
            st.lists(st.integers(1, 3), max_size=8),
            st.sampled_from([ENABLE, DISABLE, DESC, DESC, DESC, RESERVED]),
            st.integers(0, 2 * SIZE - 1),
        ),
        max_size=20,
    ),
    event_idx=st.booleans(),
)
def test_packed_event_suppression(size: int, steps: list[tuple[list[int], int, int]], event_idx: bool) -> None:
    rig, position = make_rig("packed", size, event_idx=event_idx), 0
    for chains, flags, ahead in steps:
        slots = set()
        for descriptors in chains:
            use(rig, 1, descriptors)
            slots |= {(position + at) % (2 * size) for at in range(descriptors)}
            position += descriptors
        event = (position + ahead) % (2 * size)
        structure = flags << 16 | (event < size) << 15 | event % size
        rig.memory.store32(rig.layout.areas["driver"].address, structure)
        rig.memory.store32(rig.layout.areas["device"].address, structure)
        wanted = slots & {event} if flags == DESC and event_idx else slots
        expected = bool(wanted) and flags != DISABLE
        assert rig.queue.should_notify() == expected
        assert rig.driver.needs_kick() == expected


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("event_idx", [False, True])
def test_nothing_used_nothing_to_tell(form: str, event_idx: bool) -> None:
    rig = make_rig(form, SIZE, event_idx=event_idx)
    assert not rig.queue.should_notify()
    assert not rig.driver.needs_kick()


def test_event_named_longer_ago_than_the_index_can_tell() -> None:
    """After 65,536 chains every entry was used at least once, that of the event too."""
    rig = split_rig(0)
    for event in (used_event(rig), avail_event(rig)):
        rig.memory.store16(event, 5)
    use(rig, 5)
    assert not rig.queue.should_notify()
    assert not rig.driver.needs_kick()
    use(rig, 2**16)
    assert rig.queue.should_notify()
    assert rig.driver.needs_kick()


def test_packed_event_named_longer_ago_than_two_laps() -> None:
    rig = make_rig("packed", SIZE, event_idx=True)
    for area in ("driver", "device"):
        rig.memory.store32(rig.layout.areas[area].address, DESC << 16 | 1 << 15)
    use(rig, 2 * SIZE - 1, 1)
    assert rig.queue.should_notify()
    use(rig, 2 * SIZE)
    assert rig.queue.should_notify()
    use(rig, 1)
    assert not rig.queue.should_notify()
    use(rig, 1)
    assert rig.queue.should_notify()


@pytest.mark.parametrize("slot", [SIZE, SIZE + 3, 2 * SIZE + 1, 0x7FFF])
@pytest.mark.parametrize("wrap", [0, 1])
def test_packed_event_at_a_slot_that_is_not_there_gets_notifications(slot: int, wrap: int) -> None:
    rig = make_rig("packed", SIZE, event_idx=True)
    rig.memory.store32(rig.layout.areas["driver"].address, DESC << 16 | wrap << 15 | slot)
    for _ in range(3 * SIZE):
        use(rig)
        assert rig.queue.should_notify()


@pytest.mark.parametrize("flags", [0, 1, 0xFFFE, 0xFFFF])
def test_only_the_lowest_flag_counts_without_event_index(flags: int) -> None:
    rig = split_rig(0, event_idx=False)
    use(rig)
    rig.memory.store16(rig.layout.areas["avail"].address, flags)
    rig.memory.store16(rig.layout.areas["used"].address, flags)
    assert rig.queue.should_notify() == (not flags & 1)
    assert rig.driver.needs_kick() == (not flags & 1)


def test_flags_are_ignored_and_stay_0_with_event_index() -> None:
    rig = split_rig(0)
    for flags in (rig.layout.areas["avail"].address, rig.layout.areas["used"].address):
        rig.memory.store16(flags, 1)
    use(rig)
    assert rig.queue.should_notify()
    assert rig.driver.needs_kick()
    for flags in (rig.layout.areas["avail"].address, rig.layout.areas["used"].address):
        rig.memory.store16(flags, 0)
        rig.queue.disable_notifications()
        rig.driver.disable_interrupts()
        assert rig.memory.load16(flags) == 0


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("event_idx", [False, True])
def test_each_side_hears_what_it_asked_for(form: str, event_idx: bool) -> None:
    rig = make_rig(form, SIZE, event_idx=event_idx)
    for _ in range(3 * SIZE):
        assert not rig.queue.enable_notifications()
        assert not rig.driver.enable_interrupts()
        rig.driver.add([(BUFFER, 1)])
        assert rig.driver.needs_kick()
        rig.queue.push(pop(rig.queue), 0)
        assert rig.queue.should_notify()
        assert rig.driver.get_used() is not None


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("in_flight", range(1, SIZE))
def test_device_that_holds_chains_hears_of_the_next(form: str, in_flight: int) -> None:
    """The event is the next chain to be made available: the next to be used lies behind by those in flight."""
    rig = make_rig(form, SIZE, event_idx=True)
    for _ in range(in_flight):
        rig.driver.add([(BUFFER, 1)])
    chains = [pop(rig.queue) for _ in range(in_flight)]
    rig.driver.needs_kick()
    for _ in range(3 * SIZE):
        assert not rig.queue.enable_notifications()
        rig.driver.add([(BUFFER, 1)])
        assert rig.driver.needs_kick()
        chains.append(pop(rig.queue))
        rig.queue.push(chains.pop(0), 0)
        assert rig.driver.get_used() is not None


@pytest.mark.parametrize("event", range(2 * SIZE))
@pytest.mark.parametrize("used", range(1, SIZE + 1))
def test_packed_event_at_every_distance(event: int, used: int) -> None:
    """Entries that were used since the last question count, those next to them on either side don't."""
    rig, start = make_rig("packed", SIZE, event_idx=True), 0
    structure = DESC << 16 | (event < SIZE) << 15 | event % SIZE
    for area in ("driver", "device"):
        rig.memory.store32(rig.layout.areas[area].address, structure)
    for _ in range(2 * SIZE):
        use(rig, used)
        entries = {at % (2 * SIZE) for at in range(start, start + used)}
        start += used
        assert rig.queue.should_notify() == (event in entries)
        assert rig.driver.needs_kick() == (event in entries)


@pytest.mark.parametrize("reserved", [1 << bit for bit in range(2, 16)] + [0xFFFC])
def test_reserved_bits_of_packed_event_flags_are_ignored(reserved: int) -> None:
    rig = make_rig("packed", SIZE, event_idx=True)
    far = 1 << 15 | SIZE - 1
    for flags, expected in ((DISABLE, False), (DESC, False), (ENABLE, True)):
        for area in ("driver", "device"):
            rig.memory.store32(rig.layout.areas[area].address, (flags | reserved) << 16 | far)
        use(rig)
        assert rig.queue.should_notify() == expected
        assert rig.driver.needs_kick() == expected


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("event_idx", [False, True])
def test_neither_side_hears_what_it_did_not_ask_for(form: str, event_idx: bool) -> None:
    rig = make_rig(form, SIZE, event_idx=event_idx)
    use(rig)
    rig.driver.needs_kick(), rig.queue.should_notify()  # with the event index, the first is always told
    rig.queue.disable_notifications()
    rig.driver.disable_interrupts()
    for _ in range(3 * SIZE // 2):
        use(rig)
        assert not rig.driver.needs_kick()
        assert not rig.queue.should_notify()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("event_idx", [False, True])
def test_chain_between_the_last_look_and_going_to_sleep_is_not_missed(form: str, event_idx: bool) -> None:
    """Whichever comes first, the driver's store or the device's request, one of the two learns of the other."""
    rig = make_rig(form, SIZE, event_idx=event_idx)
    for driver_first in (True, False) * 20:
        rig.queue.disable_notifications()
        if driver_first:
            rig.driver.add([(BUFFER, 1)])
            assert rig.queue.enable_notifications() or rig.driver.needs_kick()
        else:
            assert not rig.queue.enable_notifications()
            rig.driver.add([(BUFFER, 1)])
            assert rig.driver.needs_kick()
        chain = pop(rig.queue)
        rig.driver.disable_interrupts()
        if driver_first:
            assert not rig.driver.enable_interrupts()
            rig.queue.push(chain, 0)
            assert rig.queue.should_notify()
        else:
            rig.queue.push(chain, 0)
            assert rig.driver.enable_interrupts() or rig.queue.should_notify()
        assert rig.driver.get_used() is not None


@pytest.mark.parametrize("form", FORMATS)
def test_chains_that_were_malformed_are_told_of_too(form: str) -> None:
    bench = make_bench(form, SIZE)
    bench.pen.offer([Raw(BUFFER, 0)])
    assert bench.queue.pop() is None
    assert bench.queue.should_notify()
    assert not bench.queue.should_notify()
