"""Descriptors: what in them has a meaning, and what of the driver's memory stays the driver's.

What the device writes is watched by whoever lays out the ring, and is a failure of the device.
"""

from __future__ import annotations

from virtio_mem.conformance.check import Unsuitable, allowed, check, expect_answer, granted, need_feature
from virtio_mem.conformance.checks.chains import Probe, cuts, judge_chain, probe
from virtio_mem.conformance.checks.notifications import OPEN
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Chain, Odd
from virtio_mem.protocol import REQUEST_SIZE, BlockState, Feature, RequestType, ResponseType

PLUG, UNPLUG, _, STATE = RequestType

SHAPES = ((REQUEST_SIZE,), (8, REQUEST_SIZE - 8), (REQUEST_SIZE + 40,), (1,) * REQUEST_SIZE)
_TWO_EACH = 32
"""Chains of two descriptors that are a ringful, together, where the ring is as long as others are."""

_MORE_THAN_ROUND = 70
"""More requests than the ring has entries."""

FILLS = (0x00, 0x01, 0x02, 0xFF)


def of_split_ring(session: Session) -> Probe:
    """Start the driver of a split ring."""
    return probe(session, without=Feature.RING_PACKED)


def of_packed_ring(session: Session) -> Probe:
    """Start the driver of a packed ring."""
    need_feature(session, Feature.RING_PACKED)
    return probe(session)


def judge_shapes(session: Session, one: Probe, clause: str) -> None:
    """Requests in various pieces get their answer, and are left as they are."""
    for readable in SHAPES:
        judge_chain(session, one, clause, Chain(one.request, readable=readable))
        judge_chain(session, one, clause, Chain(one.request, readable=readable, room=(2, 62)))


@check("RING-CHAIN-3", needs=OPEN)
def requests_are_only_read(session: Session) -> None:
    """What the driver gave for reading is as it was when the buffer comes back."""
    judge_shapes(session, of_split_ring(session), "RING-CHAIN-3")


@check("RING-PACKED-15", needs=OPEN)
def requests_on_a_packed_ring_are_only_read(session: Session) -> None:
    """What the driver gave for reading is as it was when the buffer comes back."""
    judge_shapes(session, of_packed_ring(session), "RING-PACKED-15")


@check("RING-SPLIT-6", needs=OPEN)
def descriptor_table_is_only_read(session: Session) -> None:
    """All of it is as it was when the buffers come back, those that were not used as well."""
    one = of_split_ring(session)
    for count in (1, 5, 20):
        for answer in session.batch([Chain(one.request)] * count):
            one.judge("RING-SPLIT-6", answer)


def judge_layout(session: Session, one: Probe, clause: str) -> None:
    """Each descriptor of the ring has its turn, and each flag that one can have."""
    indirect = bool(session.features & Feature.INDIRECT_DESC)
    for readable in SHAPES:
        chain = Chain(one.request, readable=readable, room=(2, 8))
        for batch in ([Chain(one.request)] * _TWO_EACH, [chain] * 2, [chain._replace(indirect=indirect)] * 2):
            for answer in session.batch([each for each in batch if session.fits(each)]):
                one.judge(clause, answer)


@check("RING-SPLIT-2", needs=OPEN)
def descriptors_of_a_split_ring(session: Session) -> None:
    """Address, length, flags and next lie as the standard has them, in each entry of the table."""
    judge_layout(session, of_split_ring(session), "RING-SPLIT-2")


@check("RING-SPLIT-3", needs=OPEN)
def available_ring(session: Session) -> None:
    """A head in each entry of the ring, one at a time."""
    one = of_split_ring(session)
    for _ in range(_MORE_THAN_ROUND):
        one.judge("RING-SPLIT-3", session.chain(Chain(one.request)))


@check("RING-SPLIT-4", needs=OPEN)
def used_ring(session: Session) -> None:
    """An id and a length in each entry of the ring, several at a time."""
    one = of_split_ring(session)
    for count in (1, *(6,) * (_MORE_THAN_ROUND // 6)):
        for answer in session.batch([Chain(one.request)] * count):
            one.judge("RING-SPLIT-4", answer)


@check("RING-PACKED-2", needs=OPEN)
def layout_of_a_packed_ring(session: Session) -> None:
    """Descriptors lie as the standard has them, more than once round."""
    judge_layout(session, of_packed_ring(session), "RING-PACKED-2")


@check("RING-PACKED-12", needs=OPEN)
def order_of_a_packed_ring(session: Session) -> None:
    """Of requests that are there at once, each finds what those before it have done."""
    of_packed_ring(session)
    if not allowed(session, 4):
        raise Unsuitable("the host's target is below 4 blocks and can't be moved")
    granted(session, session.unplug_all())
    requests = [(PLUG, 0), (STATE, 0), (UNPLUG, 0), (STATE, 0)] * 4
    answers = session.batch([session.request(type_, block) for type_, block in requests])
    if any(answer.type is ResponseType.BUSY for answer in answers):
        raise Unsuitable("the device is busy, which it may be")
    states = [None, BlockState.PLUGGED, None, BlockState.UNPLUGGED] * 4
    for answer, state in zip(answers, states, strict=True):
        expect_answer("RING-PACKED-12", answer, ResponseType.ACK, state)


@check("RING-PACKED-19", needs=OPEN)
def order_within_a_chain(session: Session) -> None:
    """A request's pieces are read one behind the other."""
    one = of_packed_ring(session)
    for readable in cuts(REQUEST_SIZE):
        judge_chain(session, one, "RING-PACKED-19", Chain(one.request, readable=readable))


@check("RING-PACKED-17", needs=OPEN)
def empty_packed_ring(session: Session) -> None:
    """A ring of zeroes offers nothing, whoever kicks."""
    of_packed_ring(session)
    session.begin(session.features)
    nothing_is_written(session)


@check("RING-PACKED-18", needs=OPEN)
def used_descriptors_of_a_packed_ring(session: Session) -> None:
    """What was used belongs to the driver again, also when the device looks for more."""
    one = of_packed_ring(session)
    for count in (1, 3):
        session.batch([Chain(one.request)] * count)
        nothing_is_written(session)


def nothing_is_written(session: Session) -> None:
    """Whoever lays out the ring watches all of it while nothing is offered."""
    session.offer([])
    session.kick()
    session.look(whole=False)


def judge_fills(session: Session, one: Probe, clause: str) -> None:
    """The answer is the same whatever was in the room for it."""
    for fill in FILLS:
        for room in ((10,), (64,), (2, 8)):
            one.judge(clause, session.chain(Chain(one.request, room=room, fill=fill)))


@check("RING-CHAIN-4", needs=OPEN)
def rooms_that_are_not_empty(session: Session) -> None:
    """A driver need not clear the room for an answer."""
    judge_fills(session, of_split_ring(session), "RING-CHAIN-4")


@check("RING-PACKED-16", needs=OPEN)
def rooms_on_a_packed_ring_that_are_not_empty(session: Session) -> None:
    """A driver need not clear the room for an answer."""
    judge_fills(session, of_packed_ring(session), "RING-PACKED-16")


def judge_odd(session: Session, one: Probe, clause: str, odd: Odd) -> None:
    """An indirect table is served with bits set that mean nothing, as without."""
    for what in (Odd(0), odd):
        for readable in SHAPES:
            chain = Chain(one.request, readable=readable, room=(2, 8), indirect=True, odd=what)
            judge_chain(session, one, clause, chain)


@check("RING-INDIRECT-1", needs=OPEN)
def write_flag_of_an_indirect_table(session: Session) -> None:
    """The descriptor that points at the table has the flag, and the table's own entries decide."""
    need_feature(session, Feature.INDIRECT_DESC)
    judge_odd(session, of_split_ring(session), "RING-INDIRECT-1", Odd.WRITE)


@check("RING-PACKED-9", needs=OPEN)
def write_flag_of_a_packed_rings_table(session: Session) -> None:
    """The descriptor that points at the table has the flag, and the table's own entries decide."""
    need_feature(session, Feature.INDIRECT_DESC)
    judge_odd(session, of_packed_ring(session), "RING-PACKED-9", Odd.WRITE)


@check("RING-PACKED-7", needs=OPEN)
def flags_in_an_indirect_table(session: Session) -> None:
    """Every flag that means nothing there is set in the table's entries."""
    need_feature(session, Feature.INDIRECT_DESC)
    judge_odd(session, of_packed_ring(session), "RING-PACKED-7", Odd.FLAGS)


@check("RING-PACKED-8", needs=OPEN)
def ids_in_an_indirect_table(session: Session) -> None:
    """The table's entries have ids that belong to no chain."""
    need_feature(session, Feature.INDIRECT_DESC)
    judge_odd(session, of_packed_ring(session), "RING-PACKED-8", Odd.IDS)
