"""A supervised back end in ordinary service, with workers that die between its steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backend.rig import EVERYTHING, SPLIT, Ram, start_ring
from tests.supervisor.rig import RESUMED, WORKERS, service


@pytest.mark.parametrize("features", [SPLIT, EVERYTHING], ids=["split", "packed"])
def test_rings_go_on_where_they_were(tmp_path: Path, features: int) -> None:
    ram = Ram()
    with service(tmp_path) as supervised, supervised.connect(features=features) as frontend:
        frontend.regions.share([ram.region])
        ring = start_ring(frontend, ram)
        for number in range(5):
            ring.echo(b"request %d" % number)
            supervised.kill_worker()
        ring.echo(b"the last one")
        assert supervised.board[WORKERS] == 1 + supervised.board[RESUMED] == 6
        frontend.vring(0).stop()
    ram.close()
