"""The worker is killed at moments that nobody chose, under a driver that plugs and unplugs, and nobody can tell."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import counts
from tests.serve.rig import FORMS, NB_BLOCKS, Guest, guest, zone
from tests.serve.supervised import Supervised, supervised
from vhost_user.frontend import Frontend
from virtio_mem.protocol import RequestType, ResponseType
from virtio_mem.serve.plan import ServePlan

MOST_AT_ONCE = 6


def random_request(machine: Guest, rng: random.Random) -> tuple[RequestType, int, int]:
    """One that has to be granted."""
    if rng.random() < 0.05:
        return RequestType.UNPLUG_ALL, 0, 1
    type_ = rng.choice((RequestType.PLUG, RequestType.UNPLUG))
    wanted = [block for block in range(NB_BLOCKS) if (block in machine.plugged) is (type_ is RequestType.UNPLUG)]
    if not wanted:
        return RequestType.STATE, rng.randrange(NB_BLOCKS), 1
    first = rng.choice(wanted)
    most = rng.randint(1, MOST_AT_ONCE)
    nb_blocks = next((n for n in range(1, most) if first + n not in wanted), most)
    return type_, first, nb_blocks


class Killer:
    """Kills the worker every now and then."""

    def __init__(self, service: Supervised, rng: random.Random) -> None:
        self._service = service
        self._rng = rng
        self.kills = 0

    def perhaps(self, share: float = 0.3) -> None:
        if self._rng.random() < share:
            time.sleep(self._rng.uniform(0, 0.004))
            self._service.kill_worker()
            self.kills += 1


def asked_under_kills(
    machine: Guest, frontend: Frontend, perhaps: Callable[[], None], rng: random.Random, *, restarts: float
) -> str:
    """A request that is granted, now and then a look at all blocks and, in `restarts` of the cases, a ring that is
    stopped and started; `perhaps` kills in between. Returns the name of the request's type."""
    type_, block, nb_blocks = random_request(machine, rng)
    machine.send_typed(frontend, type_, block, nb_blocks)
    perhaps()
    response = machine.wait(frontend, 30)
    assert machine.took(type_, block, nb_blocks, response) is ResponseType.ACK, (type_, block, nb_blocks)
    if rng.random() < 0.1:
        perhaps()
        machine.check(frontend)
    if rng.random() < restarts:
        base = frontend.vring(0).stop()
        perhaps()
        frontend.vring(0).start(machine.layout, base)
    return type_.name


@pytest.mark.parametrize("form", FORMS)
def test_a_guest_never_notices(
    form: str, tmp_path: Path, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    answers: Counter[str] = Counter()
    plan = ServePlan(zones=(zone(),))
    with (
        guest(form) as machine,
        supervised(plan, tmp_path) as service,
        Frontend.connect(str(service.sockets["mem0"]), features=machine.features, timeout=20) as frontend,
    ):
        killer = Killer(service, rng)
        killer.perhaps()
        machine.start(frontend)
        while killer.kills < counts.SERVE_KILLS:
            answers[asked_under_kills(machine, frontend, killer.perhaps, rng, restarts=0.02)] += 1
            if rng.random() < 0.02:
                service.upgrade()
        machine.check(frontend)
    assert answers["PLUG"]
    assert answers["UNPLUG"]
    figure(f"workers killed under a guest, {form} ring", killer.kills)
    figure(f"requests served while workers are killed, {form} ring", answers.total())
