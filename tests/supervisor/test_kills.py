"""Workers killed by SIGKILL at moments that nobody chose, while requests go through a ring."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import counts
from tests.backend.rig import EVERYTHING, SPLIT, Ram, start_ring
from tests.supervisor.numbered import Load, Numbered
from tests.supervisor.rig import NO_INFLIGHT, RESUMED, WORKER, WORKERS, now_and_then, service
from vhost_user.frontend import PROTOCOL_FEATURES
from vhost_user.message import ProtocolFeature
from vhost_user.units import GuestAddress
from vhost_user.vring import SplitLayout

WITH_INFLIGHT = PROTOCOL_FEATURES & ~ProtocolFeature.PAGEFAULT


@pytest.mark.parametrize("features", [SPLIT, EVERYTHING], ids=["split", "packed"])
def test_no_request_is_lost_and_none_comes_back_twice(
    tmp_path: Path, features: int, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    ram = Ram()
    with service(tmp_path, Numbered) as supervised, supervised.connect(features=features) as frontend:
        frontend.regions.share([ram.region])
        ring = start_ring(frontend, ram, size=32)
        load = Load(ring, supervised.board, rng)
        killed = 0
        for _ in range(counts.SUPERVISOR_KILLS):
            while supervised.board[WORKER] == killed:
                load.step()
            # It may be at anything by now: at its journal, at what was in flight, or asleep.
            ending = time.monotonic() + rng.choice([0.01, 0.1]) * rng.random()
            while time.monotonic() < ending:
                load.step()
            killed = supervised.kill_worker()
        load.finish()
        workers = supervised.board[WORKERS]
        assert supervised.board[RESUMED] > 0
        frontend.vring(0).stop()
    form = "split" if features == SPLIT else "packed"
    figure(f"requests to a {form} ring whose workers were killed", load.guest.number)
    figure(f"workers that the {form} ring had", workers)
    ram.close()


@pytest.mark.parametrize("protocol_features", [NO_INFLIGHT, WITH_INFLIGHT], ids=["private area", "shared buffer"])
@pytest.mark.parametrize("features", [SPLIT, EVERYTHING], ids=["split", "packed"])
def test_messages_while_workers_die(
    tmp_path: Path, features: int, protocol_features: ProtocolFeature, rng: random.Random
) -> None:
    """Rings are stopped and started, and regions come and go, and each message has its one answer."""
    rams = [Ram(), Ram(guest=1 << 30, user=1 << 40)]
    ending = time.monotonic() + min(counts.SUPERVISOR_KILLS / 40, 100)
    with (
        service(tmp_path, Numbered) as supervised,
        supervised.connect(features=features, protocol_features=protocol_features) as frontend,
    ):
        frontend.regions.share([rams[0].region])
        if frontend.has(ProtocolFeature.INFLIGHT_SHMFD):
            frontend.track_inflight(2, 256)
        ring = start_ring(frontend, rams[0], size=32)
        load = Load(ring, supervised.board, rng)
        with now_and_then(lambda _: supervised.kill_worker(), rng):
            while time.monotonic() < ending or supervised.board[WORKERS] == 1:
                load.step()
                frontend.regions.add(rams[1].region)
                ring.vring.enable(False)
                load.step()
                base = ring.vring.stop()
                load.receive()
                if isinstance(ring.layout, SplitLayout):
                    assert base == ring.memory.load16(GuestAddress(ring.layout.used + 2))
                load.step()
                ring.vring.start(ring.layout, base)
                frontend.regions.remove(rams[1].region)
        load.finish()
    for ram in rams:
        ram.close()
