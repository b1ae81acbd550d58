"""A device that is left prepared for the requests to come is so only as long as nobody else has had it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.serve.rig import BLOCK_SIZE, Guest, guest, zone
from tests.serve.test_device import Served, served
from vhost_user.frontend import Frontend
from vhost_user.units import ByteCount
from virtio_mem.device import VirtioMemDevice
from virtio_mem.protocol import Request, RequestType, Response, ResponseType

PLUG, UNPLUG, _, STATE = RequestType
ACK = ResponseType.ACK

ZONE = zone(prefault=False)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[VirtioMemDevice]:
    """One more each time that a device is prepared."""
    found: list[VirtioMemDevice] = []
    prepare = VirtioMemDevice.prepare

    def noted(device: VirtioMemDevice, *arguments: object, **options: object) -> None:
        found.append(device)
        prepare(device, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(VirtioMemDevice, "prepare", noted)
    return found


def look(here: Served, machine: Guest, frontend: Frontend) -> None:
    del machine, frontend
    here.device.service.info()


def unplug(here: Served, machine: Guest, frontend: Frontend) -> None:
    """What the C core doesn't answer."""
    del here
    assert machine.ask(frontend, UNPLUG, 0) is ACK


@pytest.mark.parametrize("between", [look, unplug])
def test_it_is_prepared_again_after_somebody_else(
    prepared: list[VirtioMemDevice], between: Callable[[Served, Guest, Frontend], None]
) -> None:
    with guest() as machine, served(ZONE) as here:
        frontend = here.start(machine)
        for block in range(4):
            assert machine.ask(frontend, PLUG, block) is ACK
            assert machine.ask(frontend, STATE, block) is ACK
        settled = len(prepared)
        assert machine.ask(frontend, PLUG, 4) is ACK
        assert len(prepared) == settled, "nobody else had it"
        between(here, machine, frontend)
        assert machine.ask(frontend, PLUG, 5) is ACK
        assert len(prepared) > settled
        machine.check(frontend, prefault=False)


def test_who_is_told_of_a_request_may_change_the_device() -> None:
    with guest() as machine, served(zone(hotplugged=0, prefault=False)) as here:
        service = here.device.service

        class Grows:
            """By a block, whenever it is asked for a state."""

            def answered(self, request: Request, response: Response) -> None:
                if request.type == STATE:
                    service.resize(service.device.requested_size + BLOCK_SIZE)

            def discarded(self, unplugged: ByteCount, kept: ByteCount | None) -> None:
                pass

        with service.lock:
            service.observers.append(Grows())
        frontend = here.start(machine)
        for block in range(4):
            machine.ask(frontend, STATE, 0)
            assert machine.ask(frontend, PLUG, block) is ACK
        machine.check(frontend, prefault=False)
