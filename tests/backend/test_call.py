"""A back end that takes over a ring tells its driver to look: the one before may have been killed before it could."""

from __future__ import annotations

import pytest

from tests.backend.rig import EVERYTHING, SPLIT, pair, start_ring


@pytest.mark.parametrize("features", [SPLIT, EVERYTHING], ids=["split", "packed"])
def test_a_ring_that_is_started_again_calls_its_driver(features: int) -> None:
    with pair(features=features) as both:
        ring = start_ring(both.frontend, both.ram)
        ring.echo(b"used")
        base = ring.vring.stop()
        ring.vring.call.take()
        ring.vring.start(ring.layout, base)
        assert ring.vring.wait(5)
        ring.echo(b"goes on")
