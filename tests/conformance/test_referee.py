"""The referee: each kind of thing that a device can do wrong is raised by its clause, and nothing that it may do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from tests.conformance.bare import Bare
from tests.conformance.test_machine import SMALL
from tests.conformance.wrong import FAULTS
from vhost_user.errors import PeerError
from virtio_mem.conformance.check import Unsuitable, Violation
from virtio_mem.conformance.referee import Referee
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability, Target, Wish
from virtio_mem.conformance.targets.in_process import Parts
from virtio_mem.conformance.targets.ours import OurTarget
from virtio_mem.device import VirtioMemDevice
from virtio_mem.geometry import Geometry
from virtio_mem.protocol import Request, RequestType
from virtio_mem.service import DeviceService

PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType


@contextmanager
def refereed(target: Target, wish: Wish = SMALL) -> Iterator[Referee]:
    with target, closing(target.start(wish)) as subject:
        yield Referee(Session(subject, wish, target.capabilities))


def ask(referee: Referee, type_: int, block: int = 0, nb_blocks: int = 1) -> None:
    referee.ask(type_, referee.session.addr(block), nb_blocks)


def plugs(referee: Referee) -> None:
    ask(referee, PLUG, 0, 4)


def resets_the_device(referee: Referee) -> None:
    plugs(referee)
    referee.write(2, seed=1)
    referee.device_reset()


def resets_the_machine(referee: Referee) -> None:
    plugs(referee)
    referee.system_reset()


def unplugs(referee: Referee) -> None:
    plugs(referee)
    ask(referee, UNPLUG, 1, 2)


def unplugs_all(referee: Referee) -> None:
    plugs(referee)
    ask(referee, UNPLUG_ALL)


def is_paused(referee: Referee) -> None:
    plugs(referee)
    referee.hinder(paused=True)
    ask(referee, UNPLUG, 0, 2)
    referee.hinder(paused=False)


def is_refused(referee: Referee) -> None:
    referee.hinder(refuses=True)
    plugs(referee)
    referee.hinder(refuses=False)


def is_resized(referee: Referee) -> None:
    plugs(referee)
    for blocks in (2, 2, 60, 0):
        referee.set_target(blocks * referee.session.block_size)
    referee.set_target(1)


MOVES = [plugs, resets_the_device, resets_the_machine, unplugs, unplugs_all, is_paused, is_refused, is_resized]


@pytest.mark.parametrize("move", MOVES)
def test_our_device_does_nothing_wrong(move: Callable[[Referee], None]) -> None:
    with refereed(OurTarget("memfd")) as referee:
        move(referee)
        referee.look_closely()


@pytest.mark.parametrize(
    ("fault", "move", "clause"),
    [
        ("device-reset-empties", resets_the_device, "MEM-INIT-3"),
        ("device-reset-unplugs", resets_the_device, "MEM-INIT-2"),
        ("system-reset-does-nothing", resets_the_machine, "MEM-OP-11"),
        ("system-reset-keeps-the-pages", resets_the_machine, "DEP-HOST-3"),
        ("nothing-is-given-back", unplugs, "DEP-HOST-1"),
        ("nothing-is-given-back", unplugs_all, "DEP-HOST-2"),
        ("refused-plug-keeps-pages", is_refused, "DEP-HOST-4"),
        ("refused-plug-is-marked", is_refused, "DEP-REFUSED-1"),
        ("no-notice-after-busy", is_paused, "DEP-BUSY-5"),
    ],
)
def test_what_a_wrong_device_does_is_raised(fault: str, move: Callable[[Referee], None], clause: str) -> None:
    with refereed(FAULTS[fault].target()) as referee:
        with pytest.raises(Violation) as raised:
            move(referee)
        assert raised.value.clause == clause


def dies(service: DeviceService, request: bytes) -> bytes:
    raise ZeroDivisionError(service)


def is_silent(service: DeviceService, request: bytes) -> bytes:
    asked = Request.decode(request)
    return service.request(asked).encode() if asked.type == STATE else b""


@pytest.mark.parametrize(
    ("answer", "type_", "clause"),
    [
        (dies, PLUG, "MEM-PLUG-8"),
        (dies, STATE, "MEM-STATE-6"),
        (dies, 9, "DEP-UNKNOWN-1"),
        (is_silent, PLUG, "MEM-WIRE-3"),
        (is_silent, UNPLUG, "MEM-WIRE-3"),
        (is_silent, 9, ""),
    ],
)
def test_a_device_that_says_nothing(answer: Callable[[DeviceService, bytes], bytes], type_: int, clause: str) -> None:
    with refereed(OurTarget("anonymous", parts=Parts(answer=answer))) as referee:
        if clause:
            with pytest.raises(Violation) as raised:
                ask(referee, type_)
            assert raised.value.clause == clause
        else:
            ask(referee, type_)


def test_bytes_that_change_by_themselves() -> None:
    with refereed(OurTarget("memfd")) as referee:
        plugs(referee)
        referee.write(1, seed=1)
        referee.session.fill(1, 1, seed=2)
        with pytest.raises(Violation, match="MEM-OP-4: other bytes in block 1"):
            referee.look_closely()


def test_pages_that_come_back_by_themselves() -> None:
    with refereed(OurTarget("memfd")) as referee:
        referee.session.fill(1, 1, seed=2)
        with pytest.raises(Violation, match="DEP-HOST-1"):
            referee.look_closely()


class Moody(VirtioMemDevice):
    """Takes a driver once."""

    times = 0

    def negotiate(self, features: int) -> None:
        self.times += 1
        if self.times > 1:
            raise PeerError("driver features", features, "the first driver only")
        super().negotiate(features)


def moody(geometry: Geometry, requested_size: int) -> VirtioMemDevice:
    return Moody(geometry, requested_size=requested_size)


def test_a_device_that_takes_no_second_driver() -> None:
    with refereed(OurTarget("anonymous", parts=Parts(make_device=moody))) as referee:
        with pytest.raises(Violation, match="FEAT-5: features refused"):
            referee.device_reset()
        session = referee.session
        with pytest.raises(Unsuitable, match="does not agree"):
            Referee(session)


def test_a_target_that_can_do_little_is_asked_for_no_more() -> None:
    with Bare("vhost-user", Capability(0), requested_size=1 << 20) as target, closing(target.start(SMALL)) as subject:
        referee = Referee(Session(subject, SMALL, Capability(0)))
        unplugs(referee)
        referee.device_reset()
        referee.look_closely()
        assert not [line for line in referee.session.lines if line.startswith(("held", "notices", "same"))]
