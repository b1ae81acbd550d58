"""The curves: each point measures what it says, and the picture shows all of them."""

from __future__ import annotations

from functools import partial

import pytest

from tests.benchmarks import curves
from tests.benchmarks.curves import Curve, Series, fragmented_bits
from tests.benchmarks.plot import picture
from vhost_user.units import GIB, MIB, TIB
from virtio_mem.blocks import BlockMap


@pytest.fixture(scope="module", autouse=True)
def fonts() -> None:
    """The library keeps the fonts open that it has once used: that is no test's leak."""
    picture([Curve("a", "b", "c", [1], [Series("d", "flat", [1])]).to_json()])


def test_points_are_measured_in_turn_and_their_medians_count() -> None:
    asked: list[int] = []
    answers = {0: [9.0, 1, 3, 2], 1: [9.0, 10, 30, 20]}

    def point(number: int) -> list[float]:
        asked.append(number)
        return [answers[number].pop(0), 7]

    assert curves._measured([partial(point, 0), partial(point, 1)], 3) == [[2, 20], [7, 7]]
    assert asked == [0, 1, 0, 1, 1, 0, 0, 1]


def test_maps_are_in_as_many_pieces_as_they_should_be() -> None:
    for part, runs in ((0.0, 1), (0.5, 2_001), (1.0, 4_000)):
        bits = fragmented_bits(8_000, part)
        blocks = BlockMap(8_000, memoryview(bytearray(bits)))
        assert (blocks.plugged, len(blocks.plugged_runs())) == (4_000, runs)


def test_a_device_in_service_grants_what_is_timed() -> None:
    with curves._in_service(64 * TIB, 2 * MIB) as device:
        assert len(device.one_block(64 * TIB // (2 * MIB) - 1)) == 3
        assert device.service.device.plugged_size == 0
        assert device.service.answers == {("STATE", "ACK"): 50, ("PLUG", "ACK"): 50, ("UNPLUG", "ACK"): 50}
    with curves._in_service(GIB, 2 * MIB) as device:
        assert min(device.everything(fragmented_bits(512, 0.5))) > 0
        assert device.service.device.plugged_size == 0


def require_points(found: list[Curve]) -> None:
    assert all(len(series.y) == len(curve.x) and min(series.y) > 0 for curve in found for series in curve.series)


def test_curves_of_the_device_have_a_value_at_each_point() -> None:
    require_points(
        [
            *curves._over_region_size([GIB, 4 * GIB], 1),
            curves._over_block_size([MIB, GIB], 1),
            *curves._over_fragmentation([0, 1], 1, TIB // 16),
        ]
    )


def test_curves_of_the_service_have_a_value_at_each_point() -> None:
    require_points([curves._over_requests([1, 128], 1)])


@pytest.mark.long
def test_curves_of_many_zones_have_a_value_at_each_point() -> None:
    require_points(list(curves._over_zones([3], 1)))


def test_the_picture_is_the_same_for_the_same_figures() -> None:
    curve = Curve("a title", "x", "us", [1, 1000], [Series("one", "flat", [1, 1]), Series("two", "linear", [1, 1000])])
    svg = picture([curve.to_json()])
    assert svg == picture([curve.to_json()])
    assert svg.startswith(b"<?xml")
