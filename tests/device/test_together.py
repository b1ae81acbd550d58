"""Requests that are decided on together get what they get one by one, and leave the device the same."""

from __future__ import annotations

import ctypes
import random
from collections import Counter

from tests import counts
from tests.rings.answerer import VuAnswer
from vhost_user.units import MIB, ByteCount, GuestAddress
from virtio_mem.device import Effect, VirtioMemDevice
from virtio_mem.geometry import Geometry
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, Request, RequestType, Response, ResponseType
from virtio_mem.verdict import VERDICTS

ADDR = GuestAddress(1 << 32)
BLOCK_SIZE = ByteCount(2 * MIB)
NB_BLOCKS = 200
"""So that runs reach over words, and the last word is not whole."""

MOST = 64


def random_requests(rng: random.Random) -> bytes:
    """Some that belong together, with others in between; now and then, what no driver should ask."""
    requests, block = [], rng.randrange(NB_BLOCKS)
    type_ = rng.choice([RequestType.PLUG, RequestType.UNPLUG, RequestType.STATE])
    for _ in range(rng.randrange(1, 12)):
        nb_blocks = rng.randrange(1, 6)
        asked: int = type_
        at = ADDR + block * BLOCK_SIZE
        match rng.randrange(24):
            case 0:
                asked = rng.randrange(6)
            case 1:
                at += rng.choice([1, BLOCK_SIZE // 2, -BLOCK_SIZE * (block + 1)])
            case 2:
                nb_blocks = rng.choice([0, 0xFFFF, NB_BLOCKS - block, NB_BLOCKS - block + 1])
            case 3:
                at = rng.randrange(1 << 64)
            case 4:
                block = rng.randrange(NB_BLOCKS)
            case 5:
                type_ = rng.choice(list(RequestType)[:4])
        requests.append(Request(asked, GuestAddress(at), nb_blocks).encode())
        block = (block + nb_blocks if rng.random() < 0.7 else block - rng.randrange(1, 6)) % NB_BLOCKS
    return b"".join(requests)


def in_turn(device: VirtioMemDevice, requests: bytes) -> list[bytes]:
    """One by one."""
    answers = []
    for at in range(0, len(requests), REQUEST_SIZE):
        outcome = device.request(Request.decode(requests[at:]))
        answers.append((device.commit(outcome) if isinstance(outcome, Effect) else outcome).encode())
    return answers


def together(device: VirtioMemDevice, requests: bytes, seen: Counter[str]) -> list[bytes]:
    """As many at a time as the device decides on."""
    found = []
    left = requests
    while left:
        count = len(left) // REQUEST_SIZE
        answers, at_once = bytearray(RESPONSE_SIZE * count), bytearray(RESPONSE_SIZE * count)
        answered = answer_at_once(device, left, at_once)
        verdicts, effect = device.decide(left, answers, count)
        assert 1 <= len(verdicts) <= count
        if effect is not None:
            assert effect.requests == len(verdicts)
            assert len(set(verdicts)) == 1, "a request that changes nothing is in no record of those that do"
            assert VERDICTS[verdicts[0]].type is RequestType[effect.type.name]
            seen["effects of many"] += len(verdicts) > 1
            device.commit(effect)
        responses = [VERDICTS[verdict].response for verdict in verdicts]
        assert b"".join(each.encode() for each in responses) == answers[: RESPONSE_SIZE * len(verdicts)]
        # What C answers by itself needs neither an effect nor a notice.
        asks_nobody = 0
        while effect is None and asks_nobody < len(responses) and responses[asks_nobody].type is not ResponseType.BUSY:
            asks_nobody += 1
        assert answered == asks_nobody
        assert at_once[: RESPONSE_SIZE * answered] == answers[: RESPONSE_SIZE * answered]
        seen["at once"] += answered
        assert device.take_answered() == Counter(verdicts[:answered])
        found += [each.encode() for each in responses]
        left = left[REQUEST_SIZE * len(verdicts) :]
    return found


def answer_at_once(device: VirtioMemDevice, requests: bytes, answers: bytearray) -> int:
    function, itself = device.answering()
    device.prepare()
    room = (ctypes.c_char * len(answers)).from_buffer(answers)
    return int(VuAnswer(function)(itself, requests, len(requests) // REQUEST_SIZE, ctypes.addressof(room)))


def test_requests_together_are_as_in_turn(rng: random.Random) -> None:
    geometry = Geometry(addr=ADDR, region_size=ByteCount(NB_BLOCKS * BLOCK_SIZE), block_size=BLOCK_SIZE)
    one, other = (VirtioMemDevice(geometry, requested_size=100 * BLOCK_SIZE) for _ in range(2))
    seen: Counter[str] = Counter()
    for _ in range(counts.REQUESTS_TOGETHER):
        if rng.random() < 0.05:
            target = rng.randrange(NB_BLOCKS + 1) * BLOCK_SIZE
            for device in (one, other):
                device.resize(target)
        if rng.random() < 0.1:
            for device in (one, other):
                if device.paused:
                    device.resume()
                else:
                    device.pause()
        requests = random_requests(rng)
        expected = in_turn(one, requests)
        assert together(other, requests, seen) == expected
        seen.update(Response.decode(answer).type.name for answer in expected)
        assert other.blocks.to_bytes() == one.blocks.to_bytes()
        assert (other.config, other.owes_notice) == (one.config, one.owes_notice)
        assert other.take_config_notice() == one.take_config_notice()
    assert all(seen[each] > 20 for each in ("effects of many", "at once", "ACK", "NACK", "BUSY", "ERROR")), seen
