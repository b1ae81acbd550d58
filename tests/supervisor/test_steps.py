"""A worker killed between each two of its steps: at the n-th call or return of any function, in a session's whole life.

The front end says all that front ends say, from SET_OWNER to GET_VRING_BASE, and sends requests in between. A death in
the middle costs it nothing: each answer is right, each request comes back once, and the next session is served.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tests import counts
from tests.backend.rig import EVERYTHING, SPLIT, Ram, Running, start_ring
from tests.supervisor.numbered import Load, Numbered
from tests.supervisor.rig import NO_INFLIGHT, WORKERS, Board, Service, service
from vhost_user.frontend import PROTOCOL_FEATURES
from vhost_user.message import ProtocolFeature
from vhost_user.supervisor import Worker
from vhost_user.units import GuestAddress
from vhost_user.vring import SplitLayout

STEP, FIRST, SECOND = 16, 17, 18
"""Words of the board: calls and returns so far, and the numbers of those at which a worker dies."""

EVERYWHERE = PROTOCOL_FEATURES & ~ProtocolFeature.PAGEFAULT


def count_steps(worker: Worker, board: Board) -> None:
    """Have this worker count, and die at the step that the board says."""

    def step(*_: object) -> None:
        at = board[STEP] = board[STEP] + 1
        if at in (board[FIRST], board[SECOND]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(step)


def restart(ring: Running) -> None:
    """Stop the ring, which has nothing in flight, and start it where it was."""
    base = ring.vring.stop()
    if isinstance(ring.layout, SplitLayout):
        assert base == ring.memory.load16(GuestAddress(ring.layout.used + 2))
    ring.vring.start(ring.layout, base)


def live(supervised: Service, ram: Ram, more: Ram, features: int, inflight: bool) -> None:
    """A session's whole life."""
    board = supervised.board
    acked = EVERYWHERE if inflight else NO_INFLIGHT
    with supervised.connect(features=features, protocol_features=acked) as frontend:
        assert frontend.get_config(0, 16) == b"configuration..."
        frontend.regions.share([ram.region])
        if inflight:
            frontend.track_inflight(2, 64)
        ring = start_ring(frontend, ram, size=8)
        load = Load(ring, board, random.Random(0))

        def some() -> None:
            for _ in range(3):
                assert load.send(malformed=False)
            ring.kick()
            load.finish()

        some()
        frontend.status = 15
        frontend.regions.add(more.region)
        some()
        ring.vring.enable(False)
        frontend.start_logging(GuestAddress((1 << 30) - 1))
        ring.vring.enable()
        some()
        frontend.regions.remove(more.region)
        restart(ring)
        assert frontend.stop_logging()
        some()
        assert frontend.status == 15
        ring.vring.stop()


@pytest.mark.parametrize("inflight", [False, True], ids=["private area", "shared buffer"])
@pytest.mark.parametrize("features", [SPLIT, EVERYTHING], ids=["split", "packed"])
def test_a_worker_may_die_between_any_two_steps(
    tmp_path: Path, features: int, inflight: bool, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    with service(tmp_path, Numbered, count_steps) as supervised:
        board = supervised.board

        def attempt(first: int = 0, second: int = 0) -> int:
            """The steps that there were, from those of this session on; a worker dies at two of them."""
            # Counted on and on: to begin at 0 would be undone by a worker that counts at that moment.
            ram, more, before = Ram(), Ram(guest=1 << 30, user=1 << 40), board[STEP]
            board[FIRST], board[SECOND] = before + first, before + second
            live(supervised, ram, more, features, inflight)
            for each in (ram, more):
                each.close()
            return board[STEP] - before

        attempt()  # a worker's first life has more steps: what it imports then
        steps, before = attempt(), board[WORKERS]
        # One of each part of a life: no two have quite as many steps, and an end that is chosen may not be reached.
        parts = min(steps - 1, counts.SUPERVISOR_STEPS // 4)
        bounds = [max(1, part * steps // parts) for part in range(parts + 1)]
        chosen = [rng.randrange(*between) for between in pairwise(bounds)]
        # Half of the second deaths are while the next worker takes over, which is what the first one brings about.
        deaths = sum(attempt(first, first + rng.randrange(1, rng.choice([2000, steps]))) >= first for first in chosen)
        assert deaths >= (len(chosen) + 1) // 2
        supervised.wait_for(WORKERS, before + deaths)
    kind = f"{'split' if features == SPLIT else 'packed'} ring, {'shared buffer' if inflight else 'private area'}"
    figure(f"steps of a session's life ({kind})", steps)
    figure(f"of these, at which a worker died ({kind})", deaths)
