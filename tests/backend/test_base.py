"""Bases that can't be meant as they are: half of a packed ring's, and 0 for a split ring in the middle of its life."""

from __future__ import annotations

import pytest

from tests.backend.rig import EVERYTHING, SPLIT, pair, start_ring

HALF = 1 << 16


@pytest.mark.parametrize("chains", [0, 3, 15], ids=["new", "in the first lap", "in the second lap"])
def test_nothing_is_in_flight_where_the_base_has_no_used_half(chains: int) -> None:
    with pair(features=EVERYTHING) as both:
        ring = start_ring(both.frontend, both.ram)
        for _ in range(chains):
            ring.echo(b"before")
        base = ring.vring.stop()
        assert base // HALF == base % HALF
        ring.vring.start(ring.layout, base % HALF)
        for _ in range(20):
            ring.echo(b"after")
        assert ring.vring.stop() // HALF == ring.vring.base % HALF


@pytest.mark.parametrize("distance", [-1, 17, 1 << 15], ids=["behind", "too far", "at the other end"])
def test_a_split_ring_goes_on_where_its_used_ring_says_if_the_base_cannot_be_true(distance: int) -> None:
    with pair(features=SPLIT) as both:
        ring = start_ring(both.frontend, both.ram)
        for _ in range(20):
            ring.echo(b"before")
        base = ring.vring.stop()
        assert base == 20
        ring.vring.start(ring.layout, base + distance)
        for _ in range(20):
            ring.echo(b"after")
        assert ring.vring.stop() == 40
