"""Where zones lie in guest-physical space."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhost_user.errors import UsageError
from vhost_user.units import GIB, KIB, MIB, ByteCount, HostOffset
from virtio_mem.layout import HOLE_END, HOLE_START, HOTPLUG_ALIGNMENT, ZoneSize, lay_out


def zone(name: str, size: int, hotplug_size: int = 0, page_size: int = 4 * KIB, block_size: int = 2 * MIB) -> ZoneSize:
    return ZoneSize(name, ByteCount(size), ByteCount(hotplug_size), ByteCount(page_size), ByteCount(block_size))


def placed(zones: list[ZoneSize]) -> list[tuple[str, int, int, int]]:
    return [tuple(placement) for placement in lay_out(zones).boot]  # type: ignore[misc]


def test_small_memory_starts_at_zero_and_hotplug_at_4_gib() -> None:
    layout = lay_out([zone("a", 512 * MIB, 1 * GIB)])
    assert [tuple(placement) for placement in layout.boot] == [("a", 0, 512 * MIB, 0)]
    assert [tuple(placement) for placement in layout.hotplug] == [("a", 4 * GIB, 1 * GIB, 0)]


def test_memory_leaves_out_the_hole() -> None:
    assert placed([zone("a", 5 * GIB)]) == [("a", 0, 3 * GIB, 0), ("a", 4 * GIB, 2 * GIB, 3 * GIB)]
    assert placed([zone("a", 3 * GIB), zone("b", GIB)]) == [("a", 0, 3 * GIB, 0), ("b", 4 * GIB, GIB, 0)]
    assert placed([zone("a", 3 * GIB - 4096), zone("b", 8192)])[1:] == [
        ("b", 3 * GIB - 4096, 4096, 0),
        ("b", 4 * GIB, 4096, 4096),
    ]


def test_a_zone_of_large_pages_is_cut_between_two_of_them() -> None:
    zones = [zone("a", 512 * MIB), zone("b", 4 * GIB, page_size=GIB, block_size=GIB), zone("c", MIB)]
    assert placed(zones) == [
        ("a", 0, 512 * MIB, 0),
        ("b", GIB, 2 * GIB, 0),
        ("b", 4 * GIB, 2 * GIB, 2 * GIB),
        ("c", 6 * GIB, MIB, 0),
    ]


def test_hotplug_regions_follow_in_the_order_of_zones() -> None:
    zones = [zone("a", 6 * GIB + 4096, 64 * MIB), zone("b", 0, GIB), zone("c", MIB, 2 * GIB, GIB, GIB)]
    assert [tuple(placement)[:3] for placement in lay_out(zones).hotplug] == [
        ("a", 8 * GIB + 128 * MIB, 64 * MIB),
        ("b", 8 * GIB + 256 * MIB, GIB),
        ("c", 10 * GIB, 2 * GIB),
    ]


def test_what_does_not_fit_is_refused_by_zone() -> None:
    with pytest.raises(UsageError, match="zone b"):
        lay_out([zone("a", GIB), zone("b", MIB, 1 << 52)])


page_sizes = st.sampled_from([4 * KIB, 2 * MIB, GIB])
zones_of_any_kind = st.lists(
    st.builds(
        lambda page, pages, blocks: (page * pages, max(page, 2 * MIB) * blocks, page, max(page, 2 * MIB)),
        page_sizes,
        st.integers(0, 2000),
        st.integers(0, 2000),
    ),
    max_size=8,
)


@pytest.mark.clause("MEM-REGION-2")
@given(zones_of_any_kind)
def test_nothing_overlaps_and_everything_is_aligned(sizes: list[tuple[int, int, int, int]]) -> None:
    zones = [zone(str(number), *size) for number, size in enumerate(sizes)]
    layout = lay_out(zones)
    everything = sorted([*layout.boot, *layout.hotplug], key=lambda placement: placement.addr)
    for below, above in pairwise(everything):
        assert below.end <= above.addr
    for placement in everything:
        assert placement.end <= HOLE_START or placement.addr >= HOLE_END
        assert placement.addr % zones[int(placement.zone)].page_size == 0
        assert placement.offset % zones[int(placement.zone)].page_size == 0
    for each in zones:
        pieces = [placement for placement in layout.boot if placement.zone == each.id]
        assert sum(piece.size for piece in pieces) == each.size
        assert [piece.offset for piece in pieces] == [0, HostOffset(pieces[0].size)][: len(pieces)] if pieces else True
        hotplug = [placement for placement in layout.hotplug if placement.zone == each.id]
        assert sum(region.size for region in hotplug) == each.hotplug_size
        assert all(region.addr % HOTPLUG_ALIGNMENT == 0 and region.addr >= HOLE_END for region in hotplug)
