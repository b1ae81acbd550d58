"""What every adapter has to pass on, asked of it by hand: each function is for one thing that a target can do.

The device behind it is ours each time, so what is right is known; whether an adapter brings it across is the question.
"""

from __future__ import annotations

import pytest

from vhost_user.units import MIB, GuestAddress
from virtio_mem.conformance.target import Asks, Capability, Chain, Odd, Refused, Subject, Target, Used, Wish
from virtio_mem.protocol import BlockState, Feature, Request, RequestType, Response, ResponseType

BLOCK = 2 * MIB
WISH = Wish(region_size=32 * MIB, block_size=BLOCK, requested_size=16 * MIB)
DEVICE_FEATURES = int(Feature.VERSION_1 | Feature.UNPLUGGED_INACCESSIBLE | Feature.PERSISTENT_SUSPEND)


def request(subject: Subject, type_: RequestType, block: int = 0, nb_blocks: int = 1) -> bytes:
    """The 24 bytes of a request, blocks being counted from the region's start."""
    config = subject.config()
    return Request(type_, GuestAddress(config.addr + block * config.block_size), nb_blocks).encode()


def response(used: Used) -> Response:
    assert used.length == 10
    return Response.decode(used.room)


def ask(subject: Subject, type_: RequestType, block: int = 0, nb_blocks: int = 1) -> ResponseType:
    (used,) = subject.submit([Chain(request(subject, type_, block, nb_blocks))])
    return response(used).type


def plug(subject: Subject, block: int = 0, nb_blocks: int = 1) -> None:
    assert ask(subject, RequestType.PLUG, block, nb_blocks) is ResponseType.ACK


def state(subject: Subject, block: int, nb_blocks: int = 1) -> BlockState:
    (used,) = subject.submit([Chain(request(subject, RequestType.STATE, block, nb_blocks))])
    answer = response(used)
    assert answer.type is ResponseType.ACK
    return answer.state


def begin(subject: Subject) -> None:
    assert subject.begin(DEVICE_FEATURES & subject.offered_features)


def play(target: Target) -> None:
    """All that `target` says it can do, and what everyone can."""
    subject = target.start(WISH)
    try:
        for needed, part in PARTS:
            if needed in target.capabilities:
                begin(subject)
                assert ask(subject, RequestType.UNPLUG_ALL) is ResponseType.ACK
                part(subject)
    finally:
        subject.close()
    if Capability.RESTART in target.capabilities:
        again = target.start(WISH)
        assert again.config().plugged_size == 0
        again.close()
    target.close()
    target.close()


def requests(subject: Subject) -> None:
    first = subject.config()
    assert (first.block_size, first.plugged_size) == (BLOCK, 0)
    assert [ask(subject, RequestType.PLUG, at, 2) for at in (0, 1, 2)] == [
        ResponseType.ACK,
        ResponseType.ERROR,
        ResponseType.ACK,
    ]
    assert subject.config().plugged_size == 4 * BLOCK
    assert [state(subject, 2, 2), state(subject, 4), state(subject, 3, 2)] == [
        BlockState.PLUGGED,
        BlockState.UNPLUGGED,
        BlockState.MIXED,
    ]
    assert ask(subject, RequestType.UNPLUG, 1, 2) is ResponseType.ACK
    assert ask(subject, RequestType.PLUG, 0, 2000) is ResponseType.ERROR
    batch = [Chain(request(subject, RequestType.STATE, block)) for block in range(4)]
    states = [response(used).state for used in subject.submit(batch)]
    assert states == [BlockState.PLUGGED, BlockState.UNPLUGGED, BlockState.UNPLUGGED, BlockState.PLUGGED]


def negotiation(subject: Subject) -> None:
    plug(subject)
    for unknown in (1 << 23, 1 << 40):
        assert not subject.offered_features & unknown
        assert not subject.begin(DEVICE_FEATURES & subject.offered_features | unknown)
    begin(subject)
    assert state(subject, 0) is BlockState.PLUGGED
    subject.device_reset()
    begin(subject)
    assert state(subject, 0) is BlockState.PLUGGED


def target_size(subject: Subject) -> None:
    subject.set_target(4 * BLOCK)
    assert subject.config().requested_size == 4 * BLOCK
    plug(subject, 0, 4)
    assert ask(subject, RequestType.PLUG, 4) is ResponseType.NACK
    for impossible in (BLOCK + 1, subject.config().region_size + BLOCK):
        with pytest.raises(Refused, match=str(impossible)):
            subject.set_target(impossible)
    subject.set_target(8 * BLOCK)
    assert ask(subject, RequestType.PLUG, 4) is ResponseType.ACK


def notices(subject: Subject) -> None:
    subject.take_notices()
    subject.set_target(2 * BLOCK)
    assert subject.take_notices() == 1
    assert subject.take_notices() == 0
    subject.set_target(8 * BLOCK)
    begin(subject)


def system_reset(subject: Subject) -> None:
    plug(subject, 3)
    subject.system_reset()
    begin(subject)
    assert subject.config().plugged_size == 0
    assert state(subject, 3) is BlockState.UNPLUGGED


def memory(subject: Subject) -> None:
    plug(subject, 1, 3)
    data = bytes(range(256)) * 16
    subject.write(2 * BLOCK - 2048, data)
    assert subject.read(2 * BLOCK - 2048, 4096) == data
    subject.device_reset()
    begin(subject)
    assert subject.read(2 * BLOCK - 2049, 4098) == b"\0" + data + b"\0"
    assert ask(subject, RequestType.UNPLUG, 1, 2) is ResponseType.ACK
    plug(subject, 1, 1)
    assert subject.read(2 * BLOCK - 2048, 2048) == bytes(2048)


def held(subject: Subject) -> None:
    assert subject.held(0, 8 * BLOCK) == 0
    plug(subject, 2, 2)
    for block in (2, 3):
        subject.write(block * BLOCK, b"\1" * BLOCK)
    assert [subject.held(block * BLOCK, BLOCK) for block in range(1, 5)] == [0, BLOCK, BLOCK, 0]
    assert ask(subject, RequestType.UNPLUG, 2) is ResponseType.ACK
    assert subject.held(0, 8 * BLOCK) == BLOCK


def host_refuses(subject: Subject) -> None:
    plug(subject, 0)
    subject.take_notices()
    subject.refuse(True)
    assert ask(subject, RequestType.PLUG, 1) is ResponseType.BUSY
    assert ask(subject, RequestType.UNPLUG, 0) is ResponseType.BUSY
    subject.refuse(False)
    subject.advance(2)
    assert subject.take_notices() == 1
    plug(subject, 1)


def pause(subject: Subject) -> None:
    subject.pause(True)
    assert ask(subject, RequestType.PLUG) is ResponseType.BUSY
    assert state(subject, 0) is BlockState.UNPLUGGED
    subject.pause(False)
    plug(subject)


def chains(subject: Subject) -> None:
    """Cut up, too long, too short, none at all; the answer over two descriptors; more than one a kick."""
    plugging = request(subject, RequestType.PLUG)
    indirect = bool(subject.offered_features & Feature.INDIRECT_DESC)
    assert subject.begin(DEVICE_FEATURES & subject.offered_features | Feature.INDIRECT_DESC * indirect)
    (used,) = subject.submit([Chain(plugging, readable=(1, 11, 12, 5), room=(3, 7), indirect=indirect)])
    assert response(used).type is ResponseType.ACK
    short = Chain(plugging, readable=(23,))
    no_room = Chain(plugging, room=(9,))
    nothing_to_write = Chain(plugging, room=())
    nothing_to_read = Chain(b"", readable=(), room=(16,))
    good = Chain(request(subject, RequestType.STATE), room=(16,))
    answers = subject.submit([short, no_room, nothing_to_write, nothing_to_read, good])
    assert [used.length for used in answers] == [0, 0, 0, 0, 10]
    assert [used.room for used in answers[:4]] == [b"\xa5" * 10, b"\xa5" * 9, b"", b"\xa5" * 16]
    assert Response.decode(answers[4].room).state is BlockState.PLUGGED
    assert answers[4].room[10:] == b"\xa5" * 6


def forms(subject: Subject) -> list[int]:
    """The features of each kind of ring that the device has."""
    features = DEVICE_FEATURES & subject.offered_features
    packed = Feature.RING_PACKED & subject.offered_features
    return [features, features | packed] if packed else [features]


def ring(subject: Subject) -> None:
    """What the driver's area says is what the device goes by; nothing is offered by a kick."""
    looking = Chain(request(subject, RequestType.STATE))
    for features in forms(subject):
        assert subject.begin(features)
        subject.submit([looking])
        for flags, told in ((0, True), (1, False), (0, True)):
            subject.offer([looking, looking._replace(room=(2, 8), fill=0)], Asks(flags, 30))
            subject.kick()
            used, notified, _ = subject.look(True)
            assert [response(one).state for one in used if one is not None] == [BlockState.UNPLUGGED] * 2
            assert notified is told
        subject.offer([], Asks())
        subject.kick()
        assert subject.look(False)[:2] == ((), False)
        subject.device_reset()
        subject.offer([looking], Asks())
        subject.kick()
        assert subject.look(False)[:2] == ((None,), False)


def events(subject: Subject) -> None:
    """The entry that the driver names, and no flag, decides whether it is told."""
    looking = Chain(request(subject, RequestType.STATE))
    for features in forms(subject) if subject.offered_features & Feature.EVENT_IDX else ():
        assert subject.begin(features | Feature.EVENT_IDX)
        subject.submit([looking])
        for ahead, told in ((1, True), (20, False), (0, True), (4, False)):
            subject.offer([looking] * 2, Asks(2 if features & Feature.RING_PACKED else 1, ahead))
            subject.kick()
            assert subject.look(True).notified is told, ahead


def odd_tables(subject: Subject) -> None:
    """A chain's descriptors as they have no meaning, on either kind of ring."""
    for form in (0, Feature.RING_PACKED):
        features = DEVICE_FEATURES | Feature.INDIRECT_DESC | form
        if features & ~subject.offered_features & ~DEVICE_FEATURES:
            continue
        assert subject.begin(features & subject.offered_features)
        looking = request(subject, RequestType.STATE)
        for odd in (Odd.WRITE, Odd.FLAGS, Odd.IDS, Odd.WRITE | Odd.FLAGS | Odd.IDS):
            (used,) = subject.submit([Chain(looking, readable=(4, 20), indirect=True, odd=odd)])
            assert response(used).state is BlockState.UNPLUGGED


def start_in_two(subject: Subject) -> None:
    """A chain waits for DRIVER_OK."""
    assert subject.prepare(DEVICE_FEATURES & subject.offered_features)
    subject.offer([Chain(request(subject, RequestType.STATE))], Asks())
    assert subject.look(False)[:2] == ((None,), False)
    subject.go()
    subject.kick()
    (used,) = subject.look(True).used
    assert used is not None
    assert response(used).state is BlockState.UNPLUGGED


def registers(subject: Subject) -> None:
    found = subject.registers()
    assert (found.virtio_id, found.queues, found.status) == (24, 1, 15)
    subject.device_reset()
    assert subject.registers().status == 0
    assert (subject.registers().queue_size or 0) >= 64


def needs_reset(subject: Subject) -> None:
    subject.offer([], Asks())
    subject.overrun()
    subject.kick()
    subject.look(False)
    assert subject.registers().status == 15 | 64


def config_writes(subject: Subject) -> None:
    before = subject.config()
    for at in range(0, 56, 4):
        subject.write_config(at, b"\xff\x01\0\0")
    assert subject.config() == before


def unplugged(subject: Subject) -> None:
    assert len(subject.read(6 * BLOCK, 16)) == 16


def boot_memory(subject: Subject) -> None:
    ram = subject.boot_memory()
    assert ram[0][0] == 0
    assert sum(size for _, size in ram) >= MIB


def sleep(subject: Subject) -> None:
    plug(subject, 2)
    data = b"before it slept"
    subject.write(2 * BLOCK, data)
    subject.sleep()
    assert subject.config().plugged_size == BLOCK
    subject.wake()
    begin(subject)
    assert state(subject, 2) is BlockState.PLUGGED
    assert subject.read(2 * BLOCK, len(data)) == data


PARTS = (
    (Capability(0), requests),
    (Capability(0), negotiation),
    (Capability.SET_TARGET, target_size),
    (Capability.SET_TARGET | Capability.NOTICES, notices),
    (Capability.SYSTEM_RESET, system_reset),
    (Capability.CONTENT, memory),
    (Capability.HELD | Capability.CONTENT, held),
    (Capability.HOST_REFUSES | Capability.NOTICES, host_refuses),
    (Capability.PAUSE, pause),
    (Capability.CHAINS, chains),
    (Capability.CHAINS | Capability.RING, ring),
    (Capability.CHAINS | Capability.RING, events),
    (Capability.CHAINS | Capability.RING, odd_tables),
    (Capability.RING | Capability.START, start_in_two),
    (Capability.REGISTERS, registers),
    (Capability.REGISTERS | Capability.RING, needs_reset),
    (Capability.CONFIG_WRITES, config_writes),
    (Capability.UNPLUGGED, unplugged),
)
