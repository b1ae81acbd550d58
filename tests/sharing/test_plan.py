"""How large slots have to be: as small as the limit allows, and refused where nothing fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhost_user.errors import UsageError
from vhost_user.frontend.plan import HotplugRegion, SlotPlan, plan_slots
from vhost_user.units import GIB, MIB, TIB, ByteCount

BLOCK = 2 * MIB


def region(name: str, size: int, block_size: int = BLOCK) -> HotplugRegion:
    return HotplugRegion(name, ByteCount(size), ByteCount(block_size))


@pytest.mark.parametrize(
    ("limit", "others", "sizes", "slots"),
    [
        (509, 2, [GIB - 10 * MIB], [BLOCK]),
        (509, 2, [GIB], [2 * BLOCK]),
        (514, 2, [GIB], [BLOCK]),
        (509, 2, [TIB, GIB], [8 * GIB, 4 * MIB]),
        (8, 2, [GIB], [256 * MIB]),
        (8, 2, [GIB, GIB], [512 * MIB, 256 * MIB]),
        (4, 2, [GIB, BLOCK], [GIB, BLOCK]),
        (8, 8, [], []),
    ],
)
def test_slots_are_as_small_as_the_limit_allows(limit: int, others: int, sizes: list[int], slots: list[int]) -> None:
    plan = plan_slots(limit, others, [region(f"zone{n}", size) for n, size in enumerate(sizes)])
    assert [each.size for each in plan.slots] == slots
    assert plan.count <= limit


def test_whole_regions() -> None:
    plan = plan_slots(509, 1, [region("a", 3 * BLOCK), region("b", BLOCK)], whole=True)
    assert [each.count for each in plan.slots] == [1, 1]
    assert str(plan) == "3 of 509 regions; a: whole, 6M; b: whole, 2M"


def test_a_plan_says_what_it_protects() -> None:
    plan = plan_slots(8, 1, [region("a", 64 * MIB), region("b", 2 * BLOCK)])
    assert str(plan) == (
        "7 of 8 regions; a: slots of 16M, of which 14M may stay shared while unplugged; b: slots of 2M, one block each"
    )
    assert plan.slot_size("a") == 16 * MIB
    with pytest.raises(UsageError, match="of the plan"):
        plan.slot_size("c")


def test_what_does_not_fit_whole_is_refused() -> None:
    regions = [region("a", GIB), region("b", GIB)]
    assert plan_slots(8, 6, regions).count == 8
    for whole in (False, True):
        with pytest.raises(UsageError) as caught:
            plan_slots(8, 7, regions, whole=whole)
        assert (caught.value.field, caught.value.value) == ("regions", 9)


@pytest.mark.parametrize(("size", "block_size"), [(0, BLOCK), (3 * MIB, BLOCK), (6 * MIB, 3 * MIB), (MIB, 0)])
def test_a_region_is_whole_blocks(size: int, block_size: int) -> None:
    with pytest.raises(UsageError, match="a "):
        region("a", size, block_size)


@given(
    limit=st.integers(1, 600),
    others=st.integers(0, 20),
    blocks=st.lists(st.integers(1, 100_000), max_size=6),
    order=st.integers(0, 3),
)
def test_no_slot_could_be_half_as_large(limit: int, others: int, blocks: list[int], order: int) -> None:
    regions = [region(f"{n}", count * (BLOCK << order), BLOCK << order) for n, count in enumerate(blocks)]
    if others + len(regions) > limit:
        with pytest.raises(UsageError):
            plan_slots(limit, others, regions)
        return
    plan = plan_slots(limit, others, regions)
    assert plan.count == others + sum(each.count for each in plan.slots) <= limit
    for each in plan.slots:
        factor, left = divmod(each.size, each.region.block_size)
        assert left == 0
        assert factor & (factor - 1) == 0
        assert each.unprotected == min(each.size, each.region.size) - each.region.block_size
        if factor > 1:
            assert _count_if_halved(plan, each.region.name) > limit


def _count_if_halved(plan: SlotPlan, name: str) -> int:
    sizes = {each.region: each.size // 2 if each.region.name == name else each.size for each in plan.slots}
    return plan.others + sum(-(-region.size // size) for region, size in sizes.items())
