"""UNPLUGs that nobody asked for, at a vhost-user socket."""

from __future__ import annotations

from dataclasses import replace

import pytest

import virtio_mem.service
from tests.serve.killed import Bomb, world
from tests.serve.rig import BLOCK_SIZE, FORMS, guest, request_for, zone
from tests.serve.test_device import ACK, BUSY, PLUG, UNPLUG, served


@pytest.mark.parametrize("form", FORMS)
def test_a_zone_that_takes_back_only_what_it_asked_for(form: str) -> None:
    with guest(form) as machine, served(replace(zone(hotplugged=4), unrequested_unplug=False)) as here:
        frontend = here.start(machine)
        assert machine.ask(frontend, PLUG, 0, 4) is ACK
        assert machine.ask(frontend, UNPLUG, 1) is BUSY
        machine.check(frontend)
        here.device.service.resize(3 * BLOCK_SIZE)
        assert machine.ask(frontend, UNPLUG, 1) is ACK
        assert machine.ask(frontend, UNPLUG, 2) is BUSY
        machine.check(frontend)


def test_a_zone_that_takes_whatever_comes_counts_it() -> None:
    with guest() as machine, served(zone(hotplugged=4)) as here:
        frontend = here.start(machine)
        assert machine.ask(frontend, PLUG, 0, 4) is ACK
        assert machine.ask(frontend, UNPLUG, 1) is ACK
        assert here.device.service.info()["unrequested_bytes"] == BLOCK_SIZE


def test_one_that_is_refused_is_not_carried_out_by_who_comes_after_a_kill() -> None:
    """It is refused by each process, wherever the one before was killed."""
    with world("split", replace(zone(hotplugged=4), unrequested_unplug=False)) as here:
        assert here.machine.ask(here.frontend, PLUG, 0, 4) is ACK
        here.next_backend(lambda: Bomb(1).before(virtio_mem.service, "refusal"))
        here.machine.send(request_for(UNPLUG, 1, 1), here.frontend)
        assert not here.answered(), "it was killed just before it refused"
        here.next_backend()
        assert here.machine.took(UNPLUG, 1, 1, here.machine.wait(here.frontend)) is BUSY
        here.check()
