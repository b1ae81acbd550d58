"""Many requests decided on together are what they would be one by one, on devices of any geometry."""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import NamedTuple

import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from tests.conformance.wrong.steps import Steps
from tests.device.helpers import ADDR, BLOCK, make_device
from tests.device.model import ModelDevice
from tests.rings.answerer import VuAnswer
from vhost_user.units import U64_MAX, ByteCount, GuestAddress
from virtio_mem.device import Effect, EffectType, VirtioMemDevice
from virtio_mem.geometry import Geometry, UsableRegion
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, Request, RequestType, Response, ResponseType
from virtio_mem.verdict import VERDICTS

PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType
ACK, NACK, BUSY, ERROR = ResponseType

MOST_BLOCKS = 200

AT_ONCE = 64
"""Requests that the C core answers at most in a call."""


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Blocks of 1 byte to 2**63, a region that ends at 2**64 at times, or has no block at all."""
    exponent = draw(st.integers(0, 63))
    most = min(MOST_BLOCKS, U64_MAX >> exponent)
    nb_blocks = draw(st.integers(0, most) | st.sampled_from([0, 1, min(64, most), most]))
    highest = (U64_MAX >> exponent) - nb_blocks
    addr = draw(st.sampled_from([0, highest]) | st.integers(0, highest))
    return Geometry(
        addr=GuestAddress(addr << exponent),
        region_size=ByteCount(nb_blocks << exponent),
        block_size=ByteCount(1 << exponent),
        usable_region=draw(st.sampled_from(UsableRegion)),
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


@st.composite
def neighbours(draw: st.DrawFn) -> list[Ask]:
    """Requests for blocks beside each other, upwards, downwards, or both."""
    type_, start = draw(st.sampled_from([PLUG, PLUG, UNPLUG])), draw(st.integers(0, MOST_BLOCKS))
    first = end = start
    asks = []
    for _ in range(draw(st.integers(1, 8))):
        nb_blocks = draw(st.integers(1, 3))
        if draw(st.booleans()):
            asks.append(Ask(type_, end, nb_blocks))
            end += nb_blocks
        else:
            first -= nb_blocks
            asks.append(Ask(type_, first, nb_blocks))
    return asks


types = st.sampled_from([PLUG, PLUG, UNPLUG, STATE, STATE, UNPLUG_ALL]) | st.integers(0, 0xFFFF)
lengths = st.integers(1, 4) | st.sampled_from([0, MOST_BLOCKS, 0xFFFF]) | st.integers(0, 0xFFFF)
blocks = st.integers(-2, MOST_BLOCKS + 2) | st.sampled_from([-(2**63), 2**63, 2**64 - 1])
anything = st.builds(Ask, types, blocks, lengths, st.just(0) | st.sampled_from([1, -1, 2**62, 2**63]))
batches = st.lists(neighbours() | st.lists(anything, max_size=6), max_size=6).map(
    lambda lists: [ask for asks in lists for ask in asks]
)


class Move(NamedTuple):
    """What the host does, and then the driver. The host can't carry out what falls on one of `refused`."""

    target: int
    paused: bool
    asks: list[Ask]
    refused: frozenset[int]


moves = st.builds(
    Move,
    st.integers(0, MOST_BLOCKS),
    st.sampled_from([False, False, False, True]),
    batches,
    st.just(frozenset[int]()) | st.frozensets(st.integers(0, 10), max_size=4),
)


def end(device: VirtioMemDevice, effect: Effect, refused: bool) -> Response:
    return device.abandon(effect, "refused by the test") if refused else device.commit(effect)


NO_BLOCKS = Geometry(addr=GuestAddress(0), region_size=ByteCount(0), block_size=ByteCount(1))


class Together:
    """A device that decides on as many as it can at a time."""

    def __init__(self, device: VirtioMemDevice) -> None:
        self.device = device
        self.answers: list[bytes] = []
        self.merged = 0

    def serve(self, requests: list[Request], refused: frozenset[int]) -> list[bool]:
        """Which of them the host refused: where it refuses several together, each is tried alone."""
        data = memoryview(b"".join(request.encode() for request in requests))
        self.answers, fates, at, alone = [], [], 0, 0
        while at < len(requests):
            most = 1 if at < alone else len(requests) - at
            room = bytearray(RESPONSE_SIZE * most)
            decision = self.device.decide(data[REQUEST_SIZE * at :], room, most)
            count, effect, refuse = len(decision.verdicts), decision.effect, False
            found = [bytes(room[RESPONSE_SIZE * each : RESPONSE_SIZE * (each + 1)]) for each in range(count)]
            assert count >= 1
            assert found == [VERDICTS[verdict].response.encode() for verdict in decision.verdicts]
            assert not any(room[RESPONSE_SIZE * count :])
            if effect is not None:
                self._look(effect, requests[at : at + count])
                refuse = not refused.isdisjoint(range(at, at + count))
                response = end(self.device, effect, refuse)
                if refuse and count > 1:
                    alone = at + count
                    continue
                found = [response.encode()] * count
            self.answers += found
            fates += [refuse] * count
            at += count
        return fates

    def _look(self, effect: Effect, requests: list[Request]) -> None:
        """An effect is that of its requests, no more and no less."""
        geometry = self.device.geometry
        assert effect.requests == len(requests)
        assert (effect.offset, effect.size) == tuple(each * geometry.block_size for each in effect.run)
        if effect.everything:
            assert effect.run == (0, geometry.nb_blocks)
            return
        named = [(request.addr - geometry.addr) // geometry.block_size for request in requests]
        covered = [
            block + each for block, request in zip(named, requests, strict=True) for each in range(request.nb_blocks)
        ]
        assert sorted(covered) == list(range(effect.run.first, effect.run.first + effect.run.nb_blocks))
        self.merged += len(requests) > 1


def move_host(device: VirtioMemDevice, move: Move) -> None:
    target = min(move.target, device.geometry.nb_blocks) * device.geometry.block_size
    device.resize(target)
    (device.pause if move.paused else device.resume)()


def look(device: VirtioMemDevice) -> tuple[object, ...]:
    return device.config, list(device.blocks.plugged_runs()), device.owes_notice, device.take_config_notice()


@given(geometry=geometries(), story=st.lists(moves, max_size=6))
@example(NO_BLOCKS, [Move(0, False, [Ask(UNPLUG_ALL, 0, 0), Ask(PLUG, 0, 1), Ask(STATE, 0, 0)], frozenset())])
def test_together_as_one_by_one_and_as_the_model(geometry: Geometry, story: list[Move]) -> None:
    together, alone = Together(VirtioMemDevice(geometry)), VirtioMemDevice(geometry)
    whole = geometry.usable_region is UsableRegion.WHOLE_REGION
    model = ModelDevice(geometry.addr, geometry.region_size, geometry.block_size, whole_region=whole)
    for move in story:
        for device in (together.device, alone):
            move_host(device, move)
        model.resize(alone.requested_size)
        model.paused = alone.paused
        requests = [ask.request(geometry) for ask in move.asks]
        fates = together.serve(requests, move.refused)
        answers = []
        for request, refuse in zip(requests, fates, strict=True):
            outcome = alone.request(request)
            response = end(alone, outcome, refuse) if isinstance(outcome, Effect) else outcome
            answers.append(response.encode())
            model.host_refuses = refuse
            expected, state = model.answer(request)
            assert response.type is expected, (request, response)
            assert state is None or response.state is state
        assert together.answers == answers
        assert look(together.device) == look(alone)
        assert alone.plugged_size == model.plugged_size
        assert alone.usable_region_size == model.usable_region_size
    event("merged" if together.merged else "not merged")


@given(geometry=geometries(), story=st.lists(moves, max_size=6))
@example(NO_BLOCKS, [Move(0, False, [Ask(UNPLUG_ALL, 0, 0), Ask(STATE, 0, 1)] * 2, frozenset())])
@example(NO_BLOCKS, [Move(0, False, [Ask(STATE, 0, 1)] * (AT_ONCE + 1), frozenset())])
def test_at_once_as_one_by_one(geometry: Geometry, story: list[Move]) -> None:
    """The first requests that need no host and leave nothing owed, and each is counted."""
    device, alone = VirtioMemDevice(geometry), VirtioMemDevice(geometry)
    function, argument = device.answering()
    answer = VuAnswer(function)
    counted: Counter[tuple[RequestType | None, ResponseType]] = Counter()
    for move in story:
        for each in (device, alone):
            move_host(each, move)
        left = [ask.request(geometry) for ask in move.asks]
        while left:
            room = ctypes.create_string_buffer(RESPONSE_SIZE * len(left))
            device.prepare()
            before = device.config, device.owes_notice
            answered = answer(argument, b"".join(request.encode() for request in left), len(left), room)
            assert (device.config, device.owes_notice) == before
            assert answered <= len(left)
            for at, request in enumerate(left[:answered]):
                outcome = alone.request(request)
                assert isinstance(outcome, Response)
                assert outcome.type is not BUSY
                assert room.raw[RESPONSE_SIZE * at : RESPONSE_SIZE * (at + 1)] == outcome.encode()
                counted[RequestType(request.type) if request.type in list(RequestType) else None, outcome.type] += 1
            if answered == len(left):
                break
            for each in (device, alone):
                outcome = each.request(left[answered])
                needs_more = isinstance(outcome, Effect) or outcome.type is BUSY
                assert needs_more or answered == AT_ONCE or left[answered].type == UNPLUG_ALL
                if isinstance(outcome, Effect):
                    each.commit(outcome)
            left = left[answered + 1 :]
    found = Counter({(VERDICTS[key].type, VERDICTS[key].response.type): 0 for key in VERDICTS})
    for key, count in device.take_answered().items():
        found[VERDICTS[key].type, VERDICTS[key].response.type] += count
    assert found == counted
    assert device.take_answered() == {}


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


@given(geometry=geometries(), story=st.lists(moves, max_size=6))
def test_steps_are_those_of_the_device(geometry: Geometry, story: list[Move]) -> None:
    """The device of which wrong ones are made, one step at a time, is right itself; for blocks that can be counted."""
    steps, device = Steps(geometry), VirtioMemDevice(geometry)
    for move in story:
        for each in (steps, device):
            move_host(each, move)
        for at, ask in enumerate(move.asks):
            outcomes = [each.request(ask.request(geometry)) for each in (steps, device)]
            assert outcomes[0] == outcomes[1]
            if isinstance(outcomes[0], Effect):
                for each, outcome in zip((steps, device), outcomes, strict=True):
                    assert isinstance(outcome, Effect)
                    end(each, outcome, at in move.refused)
        assert look(steps) == look(device)
