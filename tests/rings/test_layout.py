"""Sizes, alignment and placement of a ring's parts, and what a queue refuses to lie on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rings.rig import BORDER, END, RING, anonymous, guest_memory
from vhost_user.errors import PeerError
from vhost_user.memory import GuestMemory, Region
from vhost_user.units import ByteCount, GuestAddress, HostOffset
from vhost_user.vring import PackedDriver, PackedLayout, PackedQueue, SplitDriver, SplitLayout, SplitQueue

SPLIT = SplitLayout.place(4, RING)
PACKED = PackedLayout.place(4, RING)


def test_sizes_are_those_of_the_standard() -> None:
    assert [(area.size, area.alignment) for area in SplitLayout.place(8, RING).areas.values()] == [
        (128, 16),
        (22, 2),
        (70, 4),
    ]
    assert [(area.size, area.alignment) for area in PackedLayout.place(5, RING).areas.values()] == [
        (80, 16),
        (4, 4),
        (4, 4),
    ]


@given(kind=st.sampled_from([SplitLayout, PackedLayout]), exponent=st.integers(0, 15), at=st.integers(0, 2**40))
def test_parts_are_placed_aligned_and_apart(
    kind: type[SplitLayout] | type[PackedLayout], exponent: int, at: int
) -> None:
    layout = kind.place(2**exponent, GuestAddress(at))
    before = at
    for area in layout.areas.values():
        assert area.address % area.alignment == 0
        assert before <= area.address < before + area.alignment
        before = area.address + area.size
    assert layout.end == before


@pytest.mark.parametrize("size", [0, -1, 3, 6, 32769, 65536])
def test_split_size_is_a_power_of_two_up_to_32768(size: int) -> None:
    with pytest.raises(PeerError, match=f"size={size}: "):
        SplitQueue(guest_memory(), size, desc=SPLIT.desc, avail=SPLIT.avail, used=SPLIT.used)


@pytest.mark.parametrize("size", [0, -1, 32769])
def test_packed_size_is_1_to_32768(size: int) -> None:
    with pytest.raises(PeerError, match=f"size={size}: "):
        PackedQueue(guest_memory(), size, desc=PACKED.desc, driver=PACKED.driver, device=PACKED.device)


def test_largest_queues_can_be_made() -> None:
    memory = guest_memory()
    assert SplitQueue(memory, **vars(SplitLayout.place(32768, RING))).size == 32768
    assert PackedQueue(memory, **vars(PackedLayout.place(32768, RING))).size == 32768


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
@pytest.mark.parametrize("bad", ["misaligned", "outside", "across a border", "past the end", "wraps"])
def test_split_queue_on_a_bad_part_is_refused(part: str, bad: str) -> None:
    fields = dict(vars(SplitLayout.place(64, RING)))
    fields[part] = BAD[bad](fields[part])
    with pytest.raises(PeerError) as refusal:
        SplitQueue(guest_memory(), **fields)
    assert refusal.value.field == part
    with pytest.raises(PeerError):
        SplitDriver(guest_memory(), SplitLayout(**fields))


@pytest.mark.parametrize("part", ["desc", "driver", "device"])
@pytest.mark.parametrize("bad", ["misaligned", "outside", "past the end", "wraps"])
def test_packed_queue_on_a_bad_part_is_refused(part: str, bad: str) -> None:
    fields = dict(vars(PackedLayout.place(64, RING)))
    fields[part] = BAD[bad](fields[part])
    with pytest.raises(PeerError) as refusal:
        PackedQueue(guest_memory(), **fields)
    assert refusal.value.field == part
    with pytest.raises(PeerError):
        PackedDriver(guest_memory(), PackedLayout(**fields))


BAD: dict[str, Callable[[int], int]] = {
    "misaligned": lambda address: address + 1,
    "outside": lambda address: END + address % 4096,
    "across a border": lambda _: BORDER - 16,
    "past the end": lambda _: END,
    "wraps": lambda _: 2**64 - 16,
}


def test_part_must_be_aligned_in_host_memory_too() -> None:
    mapping = anonymous(0x20000)
    memory = GuestMemory([Region(GuestAddress(0), ByteCount(0x10000), mapping, HostOffset(1))])
    with pytest.raises(PeerError, match=r"desc=0x0: .*host memory"):
        SplitQueue(memory, **vars(SplitLayout.place(4, GuestAddress(0))))


@pytest.mark.parametrize(("next_avail", "next_used"), [(-1, 0), (65536, 0), (0, 65536), (5, 0), (0, 1), (3, 65534)])
def test_split_state_that_cannot_be_is_refused(next_avail: int, next_used: int) -> None:
    with pytest.raises(PeerError) as refusal:
        SplitQueue(guest_memory(), **vars(SPLIT), next_avail=next_avail, next_used=next_used)
    assert refusal.value.field in {"next_avail", "next_used"}


@pytest.mark.parametrize(
    ("next_avail", "avail_wrap", "next_used", "used_wrap"),
    [(4, True, 0, True), (-1, True, 0, True), (0, True, 4, True), (1, False, 0, True), (0, True, 1, True)],
)
def test_packed_state_that_cannot_be_is_refused(
    next_avail: int, avail_wrap: bool, next_used: int, used_wrap: bool
) -> None:
    with pytest.raises(PeerError) as refusal:
        PackedQueue(
            guest_memory(),
            **vars(PACKED),
            next_avail=next_avail,
            avail_wrap=avail_wrap,
            next_used=next_used,
            used_wrap=used_wrap,
        )
    assert refusal.value.field in {"next_avail", "next_used"}


def test_full_flight_is_a_possible_state() -> None:
    assert SplitQueue(guest_memory(), **vars(SPLIT), next_avail=2, next_used=65534).state() == (2, 65534)
    packed = PackedQueue(guest_memory(), **vars(PACKED), next_avail=3, avail_wrap=False, next_used=3)
    assert packed.state() == (3, False, 3, True)
