"""How a request lies on the ring: cut into descriptors, in an indirect table, beside others, and not at all."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from virtio_mem.conformance.check import allowed, check, expect, expect_answer, granted, need_feature, ready
from virtio_mem.conformance.session import KNOWN_FEATURES, Session
from virtio_mem.conformance.target import Capability, Chain, TargetFailure
from virtio_mem.conformance.words import Answer, request_bytes
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, BlockState, Feature, RequestType, ResponseType

PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType
ACK, ERROR = ResponseType.ACK, ResponseType.ERROR
MIXED = BlockState.MIXED

ROUND = 2**16 + 200
"""More requests than an index of the ring can count."""


def cuts(whole: int) -> Iterator[tuple[int, ...]]:
    """Lengths that make up `whole`: in two at each place, in single bytes, in pieces of three."""
    for first in range(1, whole):
        yield first, whole - first
    yield (1,) * whole
    yield (3,) * (whole // 3) + ((whole % 3,) if whole % 3 else ())


class Probe(NamedTuple):
    """A request, and the answer that it has to get however it lies on the ring."""

    request: bytes
    type: ResponseType
    state: BlockState | None

    def judge(self, clause: str, answer: Answer) -> None:
        """Violation of `clause` unless this is the answer."""
        expect_answer(clause, answer, self.type, self.state)


def probe(session: Session, without: Feature | None = None) -> Probe:
    """Start the driver, which leaves the feature `without`. The request is a STATE whose answer is MIXED.

    Where the host's target is 0 and can't be moved it is UNPLUG ALL.
    """
    features = None if without is None else session.subject.offered_features & KNOWN_FEATURES & ~without
    ready(session, features=features)
    if not allowed(session, 2):
        return Probe(request_bytes(UNPLUG_ALL, 0, 0), ACK, None)
    granted(session, session.plug(0))
    return Probe(request_bytes(STATE, session.addr(0), 2), ACK, MIXED)


def judge_chain(session: Session, one: Probe, clause: str, chain: Chain) -> None:
    """Violation of `clause` unless `chain` gets the probe's answer. One that is longer than the ring is left out."""
    if session.fits(chain):
        one.judge(clause, session.chain(chain))


@check("RING-CHAIN-1", needs=Capability.CHAINS)
def requests_cut_up(session: Session) -> None:
    """A request in two descriptors, cut at each place, and in as many as it has bytes.

    Seen refused in the code of cloud-hypervisor, firecracker and Dragonball: QEMU gathers.
    """
    one = probe(session)
    for readable in cuts(REQUEST_SIZE):
        judge_chain(session, one, "RING-CHAIN-1", Chain(one.request, readable=readable))


@check("RING-CHAIN-1", needs=Capability.CHAINS)
def answers_cut_up(session: Session) -> None:
    """The room for the answer in two descriptors, cut at each place, and in as many as it has bytes."""
    one = probe(session)
    for room in cuts(RESPONSE_SIZE):
        judge_chain(session, one, "RING-CHAIN-1", Chain(one.request, room=room))
    judge_chain(session, one, "RING-CHAIN-1", Chain(one.request, readable=(8, 8, 8), room=(2, 6, 2)))


@check("RING-CHAIN-1", needs=Capability.CHAINS)
def more_room_than_the_answer_takes(session: Session) -> None:
    """Room for 64 bytes, in one piece and in two."""
    one = probe(session)
    for room in ((64,), (RESPONSE_SIZE, 54), (4, 60)):
        one.judge("RING-CHAIN-1", session.chain(Chain(one.request, room=room)))


@check("RING-SPLIT-7", "RING-SPLIT-9", needs=Capability.CHAINS)
def used_length(session: Session) -> None:
    """The used entry's length is that of a response, and so many bytes were written."""
    one = probe(session, without=Feature.RING_PACKED)
    judge_length(session, one, "RING-SPLIT-7", "RING-SPLIT-9")


@check("RING-PACKED-5", "RING-PACKED-6", needs=Capability.CHAINS)
def used_length_of_a_packed_ring(session: Session) -> None:
    """The used descriptor's length is that of a response, and one such answers a chain of several."""
    need_feature(session, Feature.RING_PACKED)
    one = probe(session)
    judge_length(session, one, "RING-PACKED-5", "RING-PACKED-6")


def judge_length(session: Session, one: Probe, length: str, whole: str) -> None:
    """Violation of `length` where it is none of a response, of `whole` where the answer is not in the room."""
    for room in ((RESPONSE_SIZE,), (64,), (2, 8)):
        answer = session.chain(Chain(one.request, readable=(REQUEST_SIZE - 8, 8), room=room))
        used, _, flagged = answer.used
        expect(length, RESPONSE_SIZE <= used <= sum(room), f"a used length of {used}", f"{RESPONSE_SIZE}")
        expect(length, flagged, f"a used length of {used} without the write flag", "the write flag beside it")
        one.judge(whole, answer)


@check("RING-INDIRECT-2", needs=Capability.CHAINS)
def indirect(session: Session) -> None:
    """A request in an indirect table, whole and cut up, and plain ones in between."""
    need_feature(session, Feature.INDIRECT_DESC)
    one = probe(session)
    for readable in ((REQUEST_SIZE,), (1, REQUEST_SIZE - 1), (1,) * REQUEST_SIZE):
        chain = Chain(one.request, readable=readable, room=(2, 8), indirect=True)
        judge_chain(session, one, "RING-INDIRECT-2", chain)
        judge_chain(session, one, "RING-INDIRECT-2", Chain(one.request))


@check("RING-CHAIN-1", needs=Capability.CHAINS)
def several_at_once(session: Session) -> None:
    """With one notification for all, each gets the answer that it had got alone, in the order in which they lie."""
    ready(session, 4)
    batch = [
        session.request(PLUG, 0, 2),
        session.request(STATE, 0, 4),
        session.request(PLUG, 1, 2),
        session.request(STATE, 0, 0),
        session.request(UNPLUG, 1),
        session.request(STATE, 0),
    ]
    plug, mixed, twice, none, unplug, plugged = session.batch(batch)
    expect_answer("RING-CHAIN-1", plug, ACK)
    expect_answer("RING-CHAIN-1", mixed, ACK, MIXED)
    expect_answer("RING-CHAIN-1", twice, ERROR)
    expect_answer("RING-CHAIN-1", none, ERROR)
    expect_answer("RING-CHAIN-1", unplug, ACK)
    expect_answer("RING-CHAIN-1", plugged, ACK, BlockState.PLUGGED)


def judge_notices(session: Session, one: Probe, clause: str) -> None:
    """Violation of `clause` unless each kick is followed by a used buffer notification, of one request and of several.

    Who lays out the ring asks for a notification each time, and fails where none comes.
    """
    for count in (1, 1, 5, 1, 16, 1):
        for answer in session.batch([Chain(one.request)] * count):
            one.judge(clause, answer)


@check("RING-NOTIFY-3", needs=Capability.CHAINS)
def notices_without_event_idx(session: Session) -> None:
    """A split ring whose driver leaves EVENT_IDX and has the flags of its ring at 0."""
    judge_notices(session, probe(session, without=Feature.RING_PACKED | Feature.EVENT_IDX), "RING-NOTIFY-3")


@check("RING-NOTIFY-5", needs=Capability.CHAINS)
def notices_with_event_idx(session: Session) -> None:
    """A split ring whose driver names the next entry as its event, which may be used within a batch."""
    need_feature(session, Feature.EVENT_IDX)
    judge_notices(session, probe(session, without=Feature.RING_PACKED), "RING-NOTIFY-5")


@check("RING-PACKED-10", needs=Capability.CHAINS)
def notices_of_a_packed_ring(session: Session) -> None:
    """A packed ring whose driver leaves EVENT_IDX and has its event flags at 0."""
    need_feature(session, Feature.RING_PACKED)
    judge_notices(session, probe(session, without=Feature.EVENT_IDX), "RING-PACKED-10")


@check("RING-PACKED-11", needs=Capability.CHAINS)
def notices_of_a_packed_ring_with_event_idx(session: Session) -> None:
    """A packed ring whose driver names the next entry as its event, which may be used within a batch."""
    need_feature(session, Feature.RING_PACKED)
    need_feature(session, Feature.EVENT_IDX)
    judge_notices(session, probe(session), "RING-PACKED-11")


def rounds(session: Session, one: Probe, clause: str, count: int) -> None:
    """Violation of `clause` unless `count` requests, in batches of various sizes, get the answer that they should."""
    sizes, nothing = random.Random(count), session.request(PLUG, 0, 0)
    while count > 0:
        batch = [Chain(one.request), nothing] * sizes.randint(1, 8)
        answers = session.batch(batch)
        for good in answers[::2]:
            one.judge(clause, good)
        for bad in answers[1::2]:
            expect(clause, (bad.type, bad.state) != (one.type, one.state), f"the answer {bad}", "another one")
        count -= len(batch)


@check("RING-SPLIT-5", needs=Capability.CHAINS, slow=True)
def split_ring_comes_round(session: Session) -> None:
    """The indices go on at 0 after 65535."""
    one = probe(session, without=Feature.RING_PACKED)
    rounds(session, one, "RING-SPLIT-5", ROUND)


@check("RING-PACKED-3", "RING-PACKED-4", needs=Capability.CHAINS)
def packed_ring_comes_round(session: Session) -> None:
    """Behind the ring's last entry it goes on at the first one, with the other wrap counter."""
    need_feature(session, Feature.RING_PACKED)
    one = probe(session)
    rounds(session, one, "RING-PACKED-3", 2000)
    one.judge("RING-PACKED-4", session.chain(Chain(one.request)))


@check("DEP-CHAIN-1", needs=Capability.CHAINS)
def chains_that_carry_nothing(session: Session) -> None:
    """A request too short, room too small, and none of either.

    It was the end of the device's thread (cloud-hypervisor commit 6a1fe123c).
    """
    one = probe(session)
    short, full = one.request[: REQUEST_SIZE - 1], Chain(one.request)
    for chain in (
        Chain(short, readable=(len(short),)),
        Chain(one.request, room=(RESPONSE_SIZE - 1,)),
        Chain(b"", readable=()),
        Chain(one.request, room=()),
    ):
        try:
            session.chain(chain)
            answer = session.chain(full)
        except TargetFailure:
            session.device_reset()
            session.begin()
            answer = session.chain(full)
        one.judge("DEP-CHAIN-1", answer)
