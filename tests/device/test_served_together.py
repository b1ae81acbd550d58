"""Many requests served together: one step of each kind, each alone where the host refuses, and who hears of what."""

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
from virtio_mem.service import RETRY_INTERVAL, DeviceService

ACK, NACK, BUSY, ERROR = ResponseType
PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType


class PatchyMemory(ScriptedMemory):
    """Of which the host neither gives nor takes the blocks in `bad`, nor more than `most` at a time."""

    bad: frozenset[int] = frozenset()
    most = REGION // BLOCK

    def populate(self, offset: HostOffset, size: ByteCount) -> None:
        self._look(offset, size)
        super().populate(offset, size)

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        self._look(offset, size)
        super().discard(offset, size)

    def _look(self, offset: HostOffset, size: ByteCount) -> None:
        blocks = range(offset // BLOCK, (offset + size) // BLOCK)
        if len(blocks) > self.most or not self.bad.isdisjoint(blocks):
            raise refusal()


class Rig:
    """A service, and what its memory, its listeners a and b, its keeper and its observer were told."""

    def __init__(self, requested: int = REGION) -> None:
        self.script = Script()
        self.memory = PatchyMemory(self.script)
        self.service = DeviceService(make_device(requested=requested), self.memory, prefault=True)
        self.service.listeners += [ScriptedListener(self.script, "a"), ScriptedListener(self.script, "b")]
        self.service.keeper = self
        self.service.observers.append(self)
        self.kept: list[str] = []
        self.heard: list[tuple[Request, ResponseType]] = []

    def serve(self, requests: list[Request]) -> tuple[list[ResponseType], list[int]]:
        """The answers to all of them, and how many were answered at a time. What was told before is forgotten."""
        self.script.steps, self.kept, self.heard = [], [], []
        answers, calls = list[ResponseType](), list[int]()
        while len(answers) < len(requests):
            data = memoryview(b"".join(request.encode() for request in requests[len(answers) :]))
            room = memoryview(bytearray(RESPONSE_SIZE * len(data) // REQUEST_SIZE))
            calls.append(self.service.serve(data, room))
            answers += [Response.decode(room[RESPONSE_SIZE * at :]).type for at in range(calls[-1])]
        assert self.heard == list(zip(requests, answers, strict=True))
        return answers, calls

    def opening(self, effect: Effect) -> None:
        self.kept.append(f"opening {effect.run.first}+{effect.run.nb_blocks} for {effect.requests}")

    def granted(self, effect: Effect) -> None:
        self.kept.append(f"granted {effect.run.first}+{effect.run.nb_blocks}")

    def changed(self) -> None:
        self.kept.append("changed")

    def done(self) -> None:
        self.kept.append("done")

    def answered(self, request: Request, response: Response) -> None:
        self.heard.append((request, response.type))

    def discarded(self, unplugged: ByteCount, kept: ByteCount | None) -> None:
        pass


def ask(type_: int, block: int = 0, nb_blocks: int = 1) -> Request:
    return Request(type_, GuestAddress(ADDR + block * BLOCK), nb_blocks)


THREE = [ask(PLUG, 4, 2), ask(PLUG, 6, 1), ask(PLUG, 1, 3)]


def test_neighbours_come_by_one_step_of_each_kind() -> None:
    rig = Rig()
    assert rig.serve([*THREE, ask(STATE, 1, 6)]) == ([ACK] * 4, [3, 1])
    assert rig.script.steps == [("memory", "populate", 1, 6), ("a", "plugged", 1, 6), ("b", "plugged", 1, 6)]
    assert rig.kept == ["opening 1+6 for 3", "granted 1+6", "changed"]
    assert rig.serve([ask(UNPLUG, 1, 2), ask(UNPLUG, 3, 4)]) == ([ACK] * 2, [2])
    assert rig.script.steps == [("a", "unplugging", 1, 6), ("b", "unplugging", 1, 6), ("memory", "discard", 1, 6)]
    assert rig.kept == ["opening 1+6 for 2", "granted 1+6", "changed"]
    assert rig.service.answers == {("PLUG", "ACK"): 3, ("STATE", "ACK"): 1, ("UNPLUG", "ACK"): 2}
    assert rig.service.tally.unplugged_bytes == 6 * BLOCK


@pytest.mark.parametrize("type_", [PLUG, UNPLUG])
def test_a_host_that_refuses_a_run_is_asked_for_each_part(type_: RequestType) -> None:
    rig = Rig()
    if type_ is UNPLUG:
        rig.serve([ask(PLUG, 0, 7)])
    rig.service.answers.clear()
    rig.memory.bad = frozenset({2})
    assert rig.serve([ask(type_, block) for block in range(5)]) == ([ACK, ACK, BUSY, ACK, ACK], [1] * 5)
    one = {block: [f"opening {block}+1 for 1", f"granted {block}+1", "changed"] for block in range(5)}
    refused = ["opening 2+1 for 1", "done"]
    assert rig.kept == ["opening 0+5 for 5", "done", *one[0], *one[1], *refused, *one[3], *one[4]]
    acted = [step for step in rig.script.steps if step[0] == "memory"]
    assert acted == [("memory", "populate" if type_ is PLUG else "discard", block, 1) for block in (0, 1, 3, 4)]
    assert rig.service.answers == {(type_.name, "ACK"): 4, (type_.name, "BUSY"): 1}
    assert rig.service.device.owes_notice
    assert rig.service.device.plugged_size == (4 if type_ is PLUG else 3) * BLOCK
    assert rig.serve([ask(type_, 5), ask(type_, 6)]) == ([ACK] * 2, [2]), "and then they are together again"


def test_a_driver_that_was_told_no_busy_is_owed_no_notice() -> None:
    rig = Rig()
    rig.memory.most = 3
    assert rig.serve(THREE) == ([ACK] * 3, [1] * 3)
    assert not rig.service.device.owes_notice
    rig.service.poll(RETRY_INTERVAL)
    assert not rig.service.device.take_config_notice()


@pytest.mark.parametrize("who", ["a", "b"])
def test_what_a_listener_refuses_together_is_taken_back_together(who: str) -> None:
    rig = Rig()
    rig.script.failing = {(who, "plugged")}
    assert rig.serve(THREE) == ([BUSY] * 3, [1] * 3)
    steps = rig.script.steps
    for name in ("a", "b"):
        came, went = ([step[2:] for step in steps if step[:2] == (name, what)] for what in ("plugged", "unplugging"))
        assert came == went
    for what in ("populate", "discard"):
        assert [step[2:] for step in steps if step[1] == what] == [(1, 6), (4, 2), (6, 1), (1, 3)]
    assert rig.service.device.owes_notice
    assert rig.service.device.plugged_size == 0


def test_after_a_refusal_as_many_are_tried_alone_and_no_more() -> None:
    """Also where the requests that were refused together are not those that come then."""
    rig = Rig()
    rig.memory.bad = frozenset({2})
    data = memoryview(b"".join(ask(PLUG, block).encode() for block in range(4)))
    assert rig.service.serve(data, memoryview(bytearray(RESPONSE_SIZE * 4))) == 1
    assert rig.serve([ask(STATE, 0), ask(PLUG, 10)]) == ([ACK, ACK], [1, 1])
    assert rig.serve([ask(PLUG, block) for block in range(20, 24)]) == ([ACK] * 4, [1, 3])


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
    return VuAnswer(function)(argument, None, data, len(requests), room)  # type: ignore[no-any-return]


@pytest.mark.parametrize("observed", [False, True])
def test_answers_are_counted_alike_whichever_way_they_came(observed: bool, rng: random.Random) -> None:
    for _ in range(counts.HYPOTHESIS_EXAMPLES):
        alone, together, mixed = rigs = [Rig(requested=12 * BLOCK) for _ in range(3)]
        bad = frozenset({rng.randrange(20)})
        for rig in rigs:
            rig.memory.bad = bad
            if not observed:
                rig.service.observers.clear()
        requests = random_requests(rng)
        for request in requests:
            alone.service.request(request)
        left = requests
        while left:
            data = memoryview(b"".join(request.encode() for request in left))
            left = left[together.service.serve(data, memoryview(bytearray(RESPONSE_SIZE * len(left)))) :]
        left = requests
        while left:
            left = left[at_once(mixed.service, left) :]
            data = memoryview(b"".join(request.encode() for request in left[:3]))
            if left:
                left = left[mixed.service.serve(data, memoryview(bytearray(RESPONSE_SIZE * 3))) :]
        assert alone.service.answers == together.service.answers == mixed.service.answers
        assert alone.service.answers.total() == len(requests)
        assert alone.service.info() == together.service.info() == mixed.service.info()
