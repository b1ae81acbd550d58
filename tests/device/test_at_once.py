"""Requests that the C core answers by itself, a PLUG among them: the device is as if it had been asked one by one."""

from __future__ import annotations

import ctypes
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from tests import counts
from tests.device.helpers import BLOCK, make_device
from tests.device.test_decide import Ask, look, move_devices, random_asks, random_geometry
from tests.rings.answerer import VuAnswer
from virtio_mem import _native
from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.device import EffectType, VirtioMemDevice
from virtio_mem.geometry import Geometry
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, Request, RequestType, ResponseType
from virtio_mem.serve.intent import MOST_CHAINS, ChainKey, Intent, IntentRecord, Phase
from virtio_mem.serve.words import Words
from virtio_mem.verdict import VERDICTS

PLUG, UNPLUG, UNPLUG_ALL, _ = RequestType
BUSY = ResponseType.BUSY

MOVES = 20


class AtOnce(NamedTuple):
    """What the C core made of some requests: the answers, and by its own account the blocks that came and what each was
    answered. `turns` are how many it answered at a time, and what it put on record for them."""

    answers: bytes
    plugged: int
    verdicts: bytes
    turns: list[tuple[int, Intent | None]]


class File:
    """The file that a device's memory is in: it may be too short."""

    def __init__(self, geometry: Geometry, rng: random.Random) -> None:
        longest = 2**63 - 4096
        self.fd = os.memfd_create("region")
        self.offset = rng.choice([0, 0, 4096, rng.randrange(longest)])
        whole = self.offset + geometry.region_size
        self.size = min(rng.choice([whole, whole, rng.randint(0, whole)]), longest)
        os.ftruncate(self.fd, self.size)

    def has(self, geometry: Geometry, request: Request) -> bool:
        end = request.addr - geometry.addr + request.nb_blocks * geometry.block_size
        return self.offset + end <= self.size


@contextmanager
def file_for(geometry: Geometry, rng: random.Random) -> Iterator[File]:
    made = File(geometry, rng)
    try:
        yield made
    finally:
        os.close(made.fd)


def at_once(device: VirtioMemDevice, requests: list[Request], keys: list[int], file: File, *, looks: bool) -> AtOnce:
    """Have the first of some requests answered; and what is left by two calls more, unless somebody looks."""
    words = Words(memoryview(bytearray(8 * _native.RECORD_WORDS)))
    record, kept = _native.Record(words.view), IntentRecord(words, device.geometry.nb_blocks)
    function, itself = device.answering()
    data = b"".join(request.encode() for request in requests)
    answers, turns = b"", []
    try:
        device.prepare(_native.Plugs(record, file.fd, file.offset), looks=looks)
        for _ in range(1 if looks else 3):
            first = len(answers) // RESPONSE_SIZE
            left = len(requests) - first
            room = ctypes.create_string_buffer(RESPONSE_SIZE * left)
            words[_native.RECORD["phase"]] = Phase.NONE
            count = VuAnswer(function)(
                itself, (ctypes.c_uint64 * left)(*keys[first:]), data[REQUEST_SIZE * first :], left, room
            )
            answers += room.raw[: RESPONSE_SIZE * count]
            turns.append((count, kept.read()))
        return AtOnce(answers, *device.answered_at_once(), turns)
    finally:
        record.release()
        words.release()


def one_by_one(device: VirtioMemDevice, requests: list[Request]) -> tuple[bytes, Counter[int]]:
    """The answers to all of them where the host refuses nothing, and how often each verdict."""
    answers, seen = b"", Counter[int]()
    for request in requests:
        verdicts, effect = device.decide(request.encode(), bytearray(RESPONSE_SIZE), 1)
        answers += (VERDICTS[verdicts[0]].response if effect is None else device.commit(effect)).encode()
        seen[verdicts[0]] += 1
    return answers, seen


def chains_of(requests: list[Request], keys: list[int]) -> tuple[ChainKey, ...]:
    return tuple(ChainKey(key & 0xFFFF, key >> 32, request) for key, request in zip(keys, requests, strict=False))


def run_of(device: VirtioMemDevice, requests: list[Request]) -> Run:
    """The blocks of some requests that are neighbours."""
    geometry = device.geometry
    firsts = [(request.addr - geometry.addr) // geometry.block_size for request in requests]
    return Run(BlockIndex(min(firsts)), sum(request.nb_blocks for request in requests))


def left_for_the_host(device: VirtioMemDevice, request: Request, lacks: bool) -> bool:
    """Whether something is to be done for a request, now or later; for a PLUG, whether its memory `lacks`."""
    verdicts, effect = device.decide(request.encode(), bytearray(RESPONSE_SIZE), 1)
    verdict = VERDICTS[verdicts[0]]
    if effect is None:
        return verdict.response.type is BUSY or verdict.type is UNPLUG_ALL  # of a region without a block
    device.commit(effect)
    return lacks if verdict.type is PLUG else verdict.type in (UNPLUG, UNPLUG_ALL)


def granted(
    device: VirtioMemDevice, turns: list[tuple[int, Intent | None]], served: list[Request], keys: list[int], file: File
) -> Iterator[int]:
    """The blocks that are on record for requests that were served, turn for turn, which are theirs and in the file."""
    first = 0
    for count, record in turns:
        some = served[first : first + count]
        if record is not None:
            chains = chains_of(some, keys[first:])
            assert record == Intent(Phase.GRANTED, EffectType.PLUG, run_of(device, some), chains)
            assert all(file.has(device.geometry, request) for request in some)
            yield record.run.nb_blocks
        first += count


@pytest.mark.parametrize("looks", [False, True], ids=["counted", "looked at"])
def test_at_once_as_one_by_one(looks: bool, rng: random.Random) -> None:
    seen = Counter[str]()
    for _ in range(counts.REQUESTS_TOGETHER // MOVES):
        geometry = random_geometry(rng)
        with file_for(geometry, rng) as file:
            device, alone = VirtioMemDevice(geometry), VirtioMemDevice(geometry)
            for _ in range(MOVES):
                move_devices(rng, (device, alone))
                left = [ask.request(geometry) for ask in random_asks(rng, alone.blocks)]
                while left:
                    keys = [rng.randrange(1 << 16) | rng.randrange(1 << 16) << 32 for _ in left]
                    done = at_once(device, left, keys, file, looks=looks)
                    count = len(done.answers) // RESPONSE_SIZE
                    served, left = left[:count], left[count:]
                    answers, verdicts = one_by_one(alone, served)
                    assert done.answers == answers
                    assert device.take_answered() == ({} if looks else verdicts)
                    assert Counter(done.verdicts) == (verdicts if looks else Counter())
                    assert done.plugged == sum(granted(device, done.turns, served, keys, file))
                    seen["several"] += any(record and each > 1 for each, record in done.turns)
                    seen["again"] += len(done.turns) > 2 and done.turns[1][1] is not None
                    if not count:
                        lacks = not all(file.has(geometry, request) for request in left)
                        assert left_for_the_host(device, left[0], lacks)
                        assert left_for_the_host(alone, left.pop(0), lacks)
                        seen["left"] += 1
                        seen["lacks"] += lacks
                    assert look(device) == look(alone)
                    seen["plugged"] += done.plugged > 0
                    seen["answered"] += bool(count) and not done.plugged
    often = ("several", "left", "lacks", "plugged", "answered", *(() if looks else ("again",)))
    assert all(seen[each] > 5 for each in often), seen


def test_as_many_are_granted_together_as_a_record_has_room_for(rng: random.Random) -> None:
    device = make_device()
    requests = [Ask(PLUG, block, 1).request(device.geometry) for block in range(MOST_CHAINS + 1)]
    with file_for(device.geometry, rng) as file:
        os.ftruncate(file.fd, file.offset + device.geometry.region_size)
        done = at_once(device, requests, list(range(len(requests))), file, looks=True)
    assert done.plugged == MOST_CHAINS == device.blocks.plugged
    ((count, record),) = done.turns
    assert count == MOST_CHAINS
    assert record is not None
    assert record.chains == chains_of(requests[:MOST_CHAINS], list(range(MOST_CHAINS)))


@pytest.mark.parametrize("lacking", [0, 1])
def test_the_file_has_the_whole_of_a_block_or_not(lacking: int, rng: random.Random) -> None:
    device = make_device()
    with file_for(device.geometry, rng) as file:
        file.offset = 4096
        os.ftruncate(file.fd, file.offset + 3 * BLOCK - lacking)
        done = at_once(device, [Ask(PLUG, 0, 3).request(device.geometry)], [0], file, looks=True)
    assert done.plugged == (0 if lacking else 3)
