"""Many requests decided on together are what they would be one by one, on devices of any geometry."""

from __future__ import annotations

import ctypes
import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from tests import counts
from tests.conformance.wrong.steps import Steps
from tests.device.helpers import ADDR, BLOCK, make_device
from tests.device.model import ModelDevice
from tests.rings.answerer import VuAnswer
from vhost_user.units import U64_MAX, ByteCount, GuestAddress
from virtio_mem.blocks import BlockIndex, BlockMap, Run
from virtio_mem.device import Effect, EffectType, VirtioMemDevice
from virtio_mem.geometry import Geometry, UsableRegion
from virtio_mem.protocol import RESPONSE_SIZE, BlockState, Request, RequestType, Response, ResponseType
from virtio_mem.verdict import VERDICTS

PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType
ACK, NACK, BUSY, ERROR = ResponseType

MOST_BLOCKS = 200
"""So that runs reach over words, and the last word is not whole."""

AT_ONCE = 64
"""Requests that the C core answers at most in a call."""

NOISE = b"\xa5" * RESPONSE_SIZE
"""What was in an answer's place before."""

MOVES = 20
"""Of a device of one geometry."""


def random_geometry(rng: random.Random) -> Geometry:
    """Blocks of 1 byte to 2**63, a region as high as can be at times, or with no block at all."""
    exponent = rng.choice([0, 12, 21, 63, rng.randrange(64)])
    most = min(MOST_BLOCKS, U64_MAX >> exponent)
    nb_blocks = rng.choice([most, most, most, min(64, most), rng.randint(0, most), rng.randrange(2)])
    highest = (U64_MAX >> exponent) - nb_blocks
    return Geometry(
        addr=GuestAddress(rng.choice([0, highest, rng.randint(0, highest)]) << exponent),
        region_size=ByteCount(nb_blocks << exponent),
        block_size=ByteCount(1 << exponent),
        usable_region=rng.choice(list(UsableRegion)),
    )


class Ask(NamedTuple):
    """A request by its block number, which may be any, and bytes beyond that block's start."""

    type: int
    block: int
    nb_blocks: int
    shift: int = 0

    def request(self, geometry: Geometry) -> Request:
        addr = geometry.addr + self.block * geometry.block_size + self.shift
        return Request(self.type, GuestAddress(addr % 2**64), self.nb_blocks)


def random_asks(rng: random.Random, blocks: BlockMap) -> list[Ask]:
    """Requests for blocks beside each other, upwards or downwards; now and then, what no driver should ask."""
    nb_blocks, asks = len(blocks), []
    first = end = rng.randrange(nb_blocks + 1)
    plugged = first < nb_blocks and blocks.state(Run(BlockIndex(first), 1)) is BlockState.PLUGGED
    type_ = rng.choice([UNPLUG if plugged else PLUG] * 4 + [PLUG, UNPLUG, STATE])
    for _ in range(rng.randrange(10 if rng.random() < 0.97 else 2 * AT_ONCE)):
        count = rng.randrange(1, 5)
        up = rng.random() < 0.7
        usual = Ask(type_, end if up else first - count, count)
        match rng.randrange(30):
            case 0 | 5:
                asks.append(usual._replace(type=rng.choice([*RequestType, 4, rng.randrange(1 << 16)])))
            case 1:
                asks.append(usual._replace(nb_blocks=rng.choice([0, nb_blocks - usual.block, 0xFFFF]) & 0xFFFF))
            case 2:
                asks.append(usual._replace(shift=rng.choice([1, -1, 2**62, 2**63])))
            case 3:
                asks.append(usual._replace(block=rng.choice([-1, nb_blocks, -(2**63), 2**64 - 1])))
            case 4:
                first = end = rng.randrange(nb_blocks + 1)
            case _:
                asks.append(usual)
                first, end = (first, end + count) if up else (first - count, end)
    return asks


class Together:
    """A device that decides on as many as it can at a time. What it saw is in `seen`."""

    def __init__(self, device: VirtioMemDevice, rng: random.Random, seen: Counter[str]) -> None:
        self.device = device
        self.rng = rng
        self.seen = seen
        self.answers: list[bytes] = []

    def serve(self, requests: list[Request]) -> list[bool]:
        """Which of them the host refused: where it refuses several together, each is tried alone, and may succeed."""
        self.answers, fates, at, alone = [], [], 0, 0
        while at < len(requests):
            most = 1 if at < alone else len(requests) - at
            verdicts, effect = self._decide(b"".join(request.encode() for request in requests[at : at + most]), most)
            count, refuse = len(verdicts), False
            response = None
            if effect is not None:
                self._look(effect, requests[at : at + count])
                refuse = self.rng.random() < (0.3 if count > 1 else 0.05)
                response = end(self.device, effect, refuse)
                if refuse and count > 1:
                    self.seen["several refused"] += 1
                    alone = at + count
                    continue
            self.answers += [(response or VERDICTS[verdict].response).encode() for verdict in verdicts]
            fates += [refuse] * count
            at += count
        return fates

    def _decide(self, requests: bytes, count: int) -> tuple[bytes, Effect | None]:
        at_once, answered = self._at_once(requests, count)
        room = bytearray(NOISE * count)
        verdicts, effect = self.device.decide(requests, room, count)
        assert 1 <= len(verdicts) <= count
        responses = [VERDICTS[verdict].response for verdict in verdicts]
        assert b"".join(response.encode() for response in responses) == room[: RESPONSE_SIZE * len(verdicts)]
        assert room[RESPONSE_SIZE * len(verdicts) :] == NOISE * (count - len(verdicts))
        # What is no change; an UNPLUG ALL of no blocks is one, although it has no effect.
        by_itself = [
            response.type is not BUSY and (response.type is not ACK or VERDICTS[verdict].type is STATE)
            for verdict, response in zip(verdicts, responses, strict=True)
        ]
        assert answered == min(AT_ONCE, [*by_itself, False].index(False))
        assert at_once == room[: RESPONSE_SIZE * answered]
        assert self.device.take_answered() == Counter(verdicts[:answered])
        self.seen["at once"] += answered
        return verdicts, effect

    def _at_once(self, requests: bytes, count: int) -> tuple[bytes, int]:
        function, itself = self.device.answering()
        self.device.prepare()
        before = look(self.device)
        room = ctypes.create_string_buffer(NOISE * count)
        answered = VuAnswer(function)(itself, None, requests, count, room)
        assert look(self.device) == before
        return room.raw[: RESPONSE_SIZE * answered], answered

    def _look(self, effect: Effect, requests: list[Request]) -> None:
        """An effect is that of its requests, no more and no less."""
        geometry = self.device.geometry
        assert effect.requests == len(requests)
        assert {request.type for request in requests} == {RequestType[effect.type.name]}
        assert (effect.offset, effect.size) == tuple(each * geometry.block_size for each in effect.run)
        if effect.everything:
            assert effect.run == (0, geometry.nb_blocks)
            return
        named = [(request.addr - geometry.addr) // geometry.block_size for request in requests]
        covered = [
            block + each for block, request in zip(named, requests, strict=True) for each in range(request.nb_blocks)
        ]
        assert sorted(covered) == list(range(effect.run.first, effect.run.first + effect.run.nb_blocks))
        self.seen["effects of many"] += len(requests) > 1


def end(device: VirtioMemDevice, effect: Effect, refused: bool) -> Response:
    return device.abandon(effect, "refused by the test") if refused else device.commit(effect)


def look(device: VirtioMemDevice) -> tuple[object, ...]:
    return device.config, device.blocks.to_bytes(), device.owes_notice


def move_devices(rng: random.Random, devices: Sequence[VirtioMemDevice]) -> int | None:
    """The host resizes them all, or pauses them or has them go on, or neither; the target."""
    geometry = devices[0].geometry
    target = rng.choice([geometry.nb_blocks, rng.randint(0, geometry.nb_blocks)]) * geometry.block_size
    resize, turn = rng.random() < 0.3, rng.random() < 0.1
    for device in devices:
        if resize:
            device.resize(target)
        if turn:
            (device.resume if device.paused else device.pause)()
    return target if resize else None


def move_host(rng: random.Random, model: ModelDevice, devices: Sequence[VirtioMemDevice]) -> None:
    target = move_devices(rng, devices)
    model.paused = devices[0].paused
    if target is not None:
        model.resize(target)


def test_together_as_one_by_one_and_as_the_model(rng: random.Random) -> None:
    """Also the device of which wrong ones are made, one step at a time: it is right itself."""
    seen: Counter[str] = Counter()
    for _ in range(counts.REQUESTS_TOGETHER // MOVES):
        geometry = random_geometry(rng)
        together = Together(VirtioMemDevice(geometry), rng, seen)
        alone, steps = VirtioMemDevice(geometry), Steps(geometry)
        whole = geometry.usable_region is UsableRegion.WHOLE_REGION
        model = ModelDevice(geometry.addr, geometry.region_size, geometry.block_size, whole_region=whole)
        for _ in range(MOVES):
            move_host(rng, model, [together.device, alone, steps])
            requests = [ask.request(geometry) for ask in random_asks(rng, alone.blocks)]
            fates = together.serve(requests)
            responses = [in_turn(alone, steps, model, *each) for each in zip(requests, fates, strict=True)]
            assert together.answers == [response.encode() for response in responses]
            seen.update(response.type.name for response in responses)
            assert look(together.device) == look(alone) == look(steps)
            notices = {device.take_config_notice() for device in (together.device, alone, steps)}
            assert len(notices) == 1
            assert (alone.plugged_size, alone.usable_region_size) == (model.plugged_size, model.usable_region_size)
    often = "effects of many", "several refused", "at once", "ACK", "NACK", "BUSY", "ERROR"
    assert all(seen[each] > 5 for each in often), seen


def test_no_more_than_64_are_answered_at_once(rng: random.Random) -> None:
    seen: Counter[str] = Counter()
    device = make_device()
    Together(device, rng, seen).serve([Ask(STATE, 0, 1).request(device.geometry)] * (AT_ONCE + 1))
    assert seen["at once"] == AT_ONCE


def in_turn(alone: VirtioMemDevice, steps: Steps, model: ModelDevice, request: Request, refuse: bool) -> Response:
    model.host_refuses = refuse
    outcome, stepped = alone.request(request), steps.request(request)
    assert stepped == outcome
    if isinstance(outcome, Effect):
        assert isinstance(stepped, Effect)
        end(steps, stepped, refuse)
        outcome = end(alone, outcome, refuse)
    expected, state = model.answer(request)
    assert outcome.type is expected, (request, outcome)
    assert state is None or outcome.state is state
    return outcome


def decide(device: VirtioMemDevice, *asks: Ask) -> tuple[int, Effect | None]:
    """How many were decided on, and what for."""
    data = b"".join(ask.request(device.geometry).encode() for ask in asks)
    verdicts, effect = device.decide(data, bytearray(RESPONSE_SIZE * len(asks)), len(asks))
    return len(verdicts), effect


@pytest.mark.parametrize("type_", [PLUG, UNPLUG])
@pytest.mark.parametrize(
    ("ranges", "run"),
    [
        ([(0, 1), (1, 2), (3, 1)], (0, 4)),
        ([(3, 1), (1, 2), (0, 1)], (0, 4)),
        ([(4, 1), (5, 1), (3, 1), (6, 2), (0, 3)], (0, 8)),
        ([(63, 1), (64, 1), (62, 1)], (62, 3)),
    ],
)
def test_neighbours_are_one_effect(type_: RequestType, ranges: list[tuple[int, int]], run: tuple[int, int]) -> None:
    device = make_device()
    if type_ is UNPLUG:
        for each in ranges:
            _, effect = decide(device, Ask(PLUG, *each))
            assert effect is not None
            device.commit(effect)
    count, effect = decide(device, *(Ask(type_, *each) for each in ranges))
    assert count == len(ranges)
    assert effect == Effect(EffectType(type_.name), run, run[0] * BLOCK, run[1] * BLOCK, count)  # type: ignore[arg-type]
    assert device.abandon(effect, "refused by the test").type is BUSY
    assert device.plugged_size == (run[1] * BLOCK if type_ is UNPLUG else 0)
    assert not device.owes_notice, "each is tried alone first"


def test_several_that_are_refused_leave_what_is_owed() -> None:
    device = make_device()
    for asks in ([Ask(PLUG, 0, 1)], [Ask(PLUG, 0, 1), Ask(PLUG, 1, 1)]):
        _, effect = decide(device, *asks)
        assert effect is not None
        device.abandon(effect, "refused by the test")
        assert device.owes_notice


@pytest.mark.parametrize(
    "second",
    [
        Ask(PLUG, 3, 1),  # not beside it
        Ask(PLUG, 1, 1),  # the same block again
        Ask(PLUG, 0, 2),  # overlaps
        Ask(PLUG, 2, 0),
        Ask(PLUG, 2, 1, 1),
        Ask(PLUG, 2, 3),  # beyond the target
        Ask(PLUG, 2, 0xFFFF),
        Ask(UNPLUG, 2, 1),
        Ask(UNPLUG_ALL, 0, 0),
        Ask(STATE, 2, 1),
        Ask(9, 2, 1),
    ],
)
def test_what_would_not_be_granted_behind_it_waits(second: Ask) -> None:
    device = make_device(requested=3 * BLOCK)
    count, effect = decide(device, Ask(PLUG, 1, 1), second)
    assert count == 1
    assert effect == Effect(EffectType.PLUG, (1, 1), BLOCK, BLOCK)  # type: ignore[arg-type]
    device.commit(effect)
    assert device.plugged_size == BLOCK


def test_a_plug_is_no_part_of_an_unplug_beside_it() -> None:
    device = make_device()
    _, effect = decide(device, Ask(PLUG, 0, 2))
    assert effect is not None
    device.commit(effect)
    assert decide(device, Ask(UNPLUG, 0, 2), Ask(PLUG, 2, 1))[0] == 1


def test_a_change_waits_for_what_is_answered_before_it() -> None:
    device = make_device()
    assert decide(device, Ask(STATE, 0, 1), Ask(9, 0, 1), Ask(PLUG, 0, 1), Ask(STATE, 0, 1)) == (2, None)
    assert decide(device, Ask(STATE, 0, 1), Ask(UNPLUG_ALL, 0, 0)) == (1, None)


def test_paused_answers_are_all_there_is_and_a_notice_is_owed() -> None:
    device = make_device()
    device.pause()
    assert not device.owes_notice
    assert decide(device, Ask(STATE, 0, 1), Ask(PLUG, 5, 1), Ask(UNPLUG_ALL, 0, 0), Ask(STATE, 0, 1)) == (4, None)
    assert device.owes_notice


def test_more_is_plugged_than_the_target_wants() -> None:
    device = make_device()
    _, effect = decide(device, Ask(PLUG, 0, 8))
    assert effect is not None
    device.commit(effect)
    device.resize(2 * BLOCK)
    outcome = device.request(Request(PLUG, GuestAddress(ADDR + 8 * BLOCK), 1))
    assert isinstance(outcome, Response)
    assert outcome.type is NACK
