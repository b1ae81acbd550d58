"""UNPLUGs that nobody asked for, at a vhost-user socket."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.serve.rig import BLOCK_SIZE, FORMS, guest, zone
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
