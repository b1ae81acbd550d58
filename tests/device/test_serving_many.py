"""Many requests served together: what a host that refuses some of them makes of the others, and who hears of what."""

from __future__ import annotations

import ctypes
import random

import pytest

from tests import counts
from tests.device.helpers import ADDR, BLOCK, REGION, make_device
from tests.device.test_service import Script, ScriptedListener, ScriptedMemory, refusal
from tests.rings.answerer import VuAnswer
from vhost_user.units import ByteCount, GuestAddress, HostOffset
from virtio_mem.device import Effect
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, Request, RequestType, Response, ResponseType
from virtio_mem.service import DeviceService

ACK, NACK, BUSY, ERROR = ResponseType
PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType


class Patchy(ScriptedMemory):
    """Memory with blocks that the host neither gives nor takes."""

    def __init__(self, script: Script, bad: set[int]) -> None:
        super().__init__(script)
        self.bad = bad

    def _look(self, offset: HostOffset, size: ByteCount) -> None:
        if not self.bad.isdisjoint(range(offset // BLOCK, (offset + size) // BLOCK)):
            raise refusal()

    def populate(self, offset: HostOffset, size: ByteCount) -> None:
        self._look(offset, size)
        super().populate(offset, size)

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        self._look(offset, size)
        super().discard(offset, size)


class Noting:
    """A keeper and an observer that write down what they are told."""

    def __init__(self) -> None:
        self.kept: list[str] = []
        self.answered_: list[tuple[Request, ResponseType]] = []

    def opening(self, effect: Effect) -> None:
        self.kept.append(f"opening {effect.run.first}+{effect.run.nb_blocks} for {effect.requests}")

    def granted(self, effect: Effect) -> None:
        self.kept.append(f"granted {effect.run.first}+{effect.run.nb_blocks}")

    def changed(self) -> None:
        self.kept.append("changed")

    def done(self) -> None:
        self.kept.append("done")

    def answered(self, request: Request, response: Response) -> None:
        self.answered_.append((request, response.type))

    def discarded(self, unplugged: ByteCount, kept: ByteCount | None) -> None:
        pass


def make_service(bad: set[int], requested: int = REGION) -> tuple[DeviceService, Script, Noting]:
    script, noting = Script(), Noting()
    service = DeviceService(make_device(requested=requested), Patchy(script, bad), prefault=True)
    service.listeners.append(ScriptedListener(script, "a"))
    service.keeper = noting
    service.observers.append(noting)
    return service, script, noting


def ask(type_: int, block: int = 0, nb_blocks: int = 1) -> Request:
    return Request(type_, GuestAddress(ADDR + block * BLOCK), nb_blocks)


def serve(service: DeviceService, requests: list[Request]) -> tuple[list[ResponseType], list[int]]:
    """The answers to all of them, and how many were answered at a time."""
    answers, steps = list[ResponseType](), list[int]()
    while len(answers) < len(requests):
        data = memoryview(b"".join(request.encode() for request in requests[len(answers) :]))
        room = memoryview(bytearray(RESPONSE_SIZE * len(data) // REQUEST_SIZE))
        steps.append(service.serve(data, room))
        answers += [Response.decode(room[RESPONSE_SIZE * at :]).type for at in range(steps[-1])]
    return answers, steps


def test_what_is_granted_together_is_one_call_to_the_host() -> None:
    service, script, noting = make_service(set())
    requests = [ask(PLUG, block) for block in range(2, 6)]
    assert serve(service, requests) == ([ACK] * 4, [4])
    assert script.take() == [("memory", "populate", 2, 4), ("a", "plugged", 2, 4)]
    assert noting.kept == ["opening 2+4 for 4", "granted 2+4", "changed"]
    assert noting.answered_ == [(request, ACK) for request in requests]


@pytest.mark.parametrize("type_", [PLUG, UNPLUG])
def test_a_host_that_refuses_a_run_is_asked_for_each_part(type_: RequestType) -> None:
    service, script, noting = make_service(set())
    if type_ is UNPLUG:
        serve(service, [ask(PLUG, 0, 5)])
    assert isinstance(service.memory, Patchy)
    service.memory.bad = {2}
    script.take()
    noting.kept, noting.answered_ = [], []
    requests = [ask(type_, block) for block in range(5)]
    assert serve(service, requests) == ([ACK, ACK, BUSY, ACK, ACK], [1] * 5)
    assert noting.answered_ == list(zip(requests, (ACK, ACK, BUSY, ACK, ACK), strict=True))
    one = {block: [f"opening {block}+1 for 1", f"granted {block}+1", "changed"] for block in range(5)}
    refused = ["opening 2+1 for 1", "done"]
    assert noting.kept == ["opening 0+5 for 5", "done", *one[0], *one[1], *refused, *one[3], *one[4]]
    if type_ is PLUG:
        assert script.take() == [
            step for block in (0, 1, 3, 4) for step in (("memory", "populate", block, 1), ("a", "plugged", block, 1))
        ]
    assert service.device.owes_notice
    assert service.device.plugged_size == (4 if type_ is PLUG else 1) * BLOCK


def test_a_listener_that_refuses_a_run_is_told_of_its_parts() -> None:
    service, script, _ = make_service(set())
    script.failing.add(("a", "plugged"))
    assert serve(service, [ask(PLUG, 0), ask(PLUG, 1)]) == ([BUSY, BUSY], [1, 1])
    together = [("memory", "populate", 0, 2), ("memory", "discard", 0, 2)]
    parts = [("memory", step, block, 1) for block in range(2) for step in ("populate", "discard")]
    assert script.take() == together + parts
    assert service.device.plugged_size == 0


def test_after_a_refusal_as_many_are_tried_alone_and_no_more() -> None:
    """Also where the requests that were refused together are not those that come then."""
    service, _, _ = make_service({2})
    data = memoryview(b"".join(ask(PLUG, block).encode() for block in range(4)))
    assert service.serve(data, memoryview(bytearray(RESPONSE_SIZE * 4))) == 1
    assert serve(service, [ask(STATE, 0), ask(PLUG, 10)]) == ([ACK, ACK], [1, 1])
    answers, steps = serve(service, [ask(PLUG, block) for block in range(20, 24)])
    assert answers == [ACK] * 4
    assert steps == [1, 3]


def random_requests(rng: random.Random) -> list[Request]:
    """Many of which are neighbours."""
    found: list[Request] = []
    while len(found) < 40:
        type_, block = rng.choice((PLUG, PLUG, UNPLUG, STATE, STATE, UNPLUG_ALL, 9)), rng.randrange(-1, 20)
        found += [ask(type_, block + at, rng.choice((1, 1, 1, 0))) for at in range(rng.choice((1, 1, 6)))]
    return found


def at_once(service: DeviceService, requests: list[Request]) -> int:
    """How many the C core answers by itself."""
    function, argument = service.device.answering()
    service.device.prepare()
    room = ctypes.create_string_buffer(RESPONSE_SIZE * len(requests))
    data = b"".join(request.encode() for request in requests)
    return VuAnswer(function)(argument, data, len(requests), room)  # type: ignore[no-any-return]


@pytest.mark.parametrize("observed", [False, True])
def test_answers_are_counted_alike_whichever_way_they_came(observed: bool, rng: random.Random) -> None:
    for _ in range(counts.HYPOTHESIS_EXAMPLES):
        bad = {rng.randrange(20)}
        alone, together, mixed = (make_service(bad, requested=12 * BLOCK)[0] for _ in range(3))
        if not observed:
            for service in (alone, together, mixed):
                service.observers.clear()
        requests = random_requests(rng)
        for request in requests:
            alone.request(request)
        serve(together, requests)
        left = requests
        while left:
            left = left[at_once(mixed, left) :]
            data = memoryview(b"".join(request.encode() for request in left[:3]))
            if left:
                left = left[mixed.serve(data, memoryview(bytearray(RESPONSE_SIZE * 3))) :]
        assert alone.answers == together.answers == mixed.answers
        assert alone.answers.total() == len(requests)
        assert alone.info() == together.info() == mixed.info()
