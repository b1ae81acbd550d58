"""A device that is left prepared for the requests to come is so only as long as nobody else has had it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.peers.processes import wait_until
from tests.serve.rig import BLOCK_SIZE, Guest, guest, zone
from tests.serve.test_device import Served, served
from vhost_user.frontend import Frontend
from vhost_user.units import ByteCount
from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.device import EffectType, VirtioMemDevice
from virtio_mem.protocol import Request, RequestType, Response, ResponseType
from virtio_mem.serve.at_once import AtOnce
from virtio_mem.serve.intent import Intent, Phase

PLUG, UNPLUG, _, STATE = RequestType
ACK = ResponseType.ACK

ZONE = zone(prefault=False)


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the device was prepared first, for each time that the C core was to answer."""
    found, entering = list[bool](), [False]
    enter, prepare = AtOnce.__enter__, VirtioMemDevice.prepare

    def enter_and_note(at_once: AtOnce) -> None:
        found.append(False)
        entering[0] = True
        enter(at_once)
        entering[0] = False

    def prepare_and_note(device: VirtioMemDevice, *arguments: Any, **options: Any) -> None:
        found[-1] |= entering[0]
        prepare(device, *arguments, **options)

    monkeypatch.setattr(AtOnce, "__enter__", enter_and_note)
    monkeypatch.setattr(VirtioMemDevice, "prepare", prepare_and_note)
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
    entered: list[bool], between: Callable[[Served, Guest, Frontend], None]
) -> None:
    with guest() as machine, served(ZONE) as here:
        frontend = here.start(machine)
        assert machine.ask(frontend, PLUG, 0) is ACK
        before = len(entered)
        for block in range(1, 5):
            assert machine.ask(frontend, PLUG, block) is ACK

        def begun_anew() -> bool:
            assert machine.ask(frontend, STATE, 0) is ACK
            return len(entered) > before + 3

        wait_until(begun_anew, "not all is served in one go")
        assert not any(entered[before:]), "nobody else had it"
        before = len(entered)
        between(here, machine, frontend)
        assert machine.ask(frontend, PLUG, 5) is ACK
        assert any(entered[before:])
        machine.check(frontend, prefault=False)


def test_a_request_that_may_be_on_record_is_left_to_others(entered: list[bool]) -> None:
    """A system reset hides the record while it is tried, and puts it back where the host refuses."""
    with guest() as machine, served(ZONE) as here:
        frontend = here.start(machine)
        service, state = here.device.service, here.device.state
        assert machine.ask(frontend, PLUG, 0) is ACK
        before, there = len(entered), Intent(Phase.GRANTED, EffectType.PLUG, Run(BlockIndex(0), 1), ())
        with service.lock:  # the reset's
            machine.send_typed(frontend, STATE, 0)
            wait_until(lambda: len(entered) > before, "the ring's thread has found no record, and waits for the lock")
            state.intent = there
        assert machine.wait(frontend).type is ACK
        assert state.intent is None, "it was looked at, and is no such request's"


@pytest.mark.parametrize("by", ["service", "device"])
def test_who_is_told_of_a_request_may_change_the_device(by: str) -> None:
    """By itself, too, as it has the lock."""
    with guest() as machine, served(zone(hotplugged=0, prefault=False)) as here:
        service = here.device.service

        class Grows:
            """By a block, whenever it is asked for a state."""

            def answered(self, request: Request, response: Response) -> None:
                if request.type == STATE:
                    (service if by == "service" else service.device).resize(service.device.requested_size + BLOCK_SIZE)

            def discarded(self, unplugged: ByteCount, kept: ByteCount | None) -> None:
                pass

        with service.lock:
            service.observers.append(Grows())
        frontend = here.start(machine)
        for block in range(4):
            machine.ask(frontend, STATE, 0)
            assert machine.ask(frontend, PLUG, block) is ACK
        machine.check(frontend, prefault=False)
