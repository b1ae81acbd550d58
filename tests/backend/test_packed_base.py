"""Half a base: what a front end tells that knows of a packed ring's next available descriptor only."""

from __future__ import annotations

import pytest

from tests.backend.rig import EVERYTHING, pair, start_ring

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
