"""Bytes where they belong: the fields of a request told apart, those of a response, and the used entry beside it.

The other checks ask whether an answer is right. Here it is about numbers that could be cut short, and fields that could
be somewhere else, with all that is usual going well.
"""

from __future__ import annotations

from virtio_mem.conformance.check import (
    Unsuitable,
    check,
    expect,
    granted,
    ready,
    set_target,
    usable_blocks,
)
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import FILL, Capability, Chain
from virtio_mem.conformance.words import request_bytes
from virtio_mem.protocol import RESPONSE_SIZE, BlockState, Feature, RequestType, ResponseType

ACK, ERROR = ResponseType.ACK, ResponseType.ERROR
MANY = 257


def raw(session: Session, type_: int, block: int, nb_blocks: int = 1) -> bytes:
    """The response, byte by byte, whatever it says."""
    used = session.ask(type_, session.addr(block), nb_blocks).used
    return used.room[: used.length]


@check("CFG-1")
def sizes_of_a_region_that_can_be(session: Session) -> None:
    """A block is no larger than the region. Read the wrong way round, 2 MiB are 32 TiB, and 1 GiB is 256 GiB."""
    config = session.config()
    fits = config.block_size <= config.region_size or not config.region_size
    expect("CFG-1", fits, f"block_size {config.block_size}", f"region_size {config.region_size} or less")


@check("MEM-WIRE-1")
def all_of_nb_blocks_counts(session: Session) -> None:
    """A STATE of 257 blocks is not one of a single block."""
    ready(session, 1)
    if session.can(Capability.SET_TARGET):
        set_target(session, min(session.nb_blocks, MANY))
    if usable_blocks(session) < MANY:
        raise Unsuitable(f"fewer than {MANY} blocks are usable")
    granted(session, session.plug(0))
    answer = session.state(0, MANY)
    expect("MEM-WIRE-1", answer.state is BlockState.MIXED, f"the answer {answer}", "ACK MIXED")


@check("MEM-WIRE-1")
def all_of_addr_counts(session: Session) -> None:
    """Addresses that differ from a block's only in a high bit are none of it, for PLUG, UNPLUG and STATE."""
    ready(session, 2)
    granted(session, session.plug(0))
    addr, end = session.addr(0), session.addr(usable_blocks(session))
    for bit in range(32, 64):
        other = addr ^ 1 << bit
        if addr <= other < end:
            continue
        for type_, shift in ((RequestType.PLUG, session.block_size), (RequestType.UNPLUG, 0), (RequestType.STATE, 0)):
            answer = session.ask(type_, other + shift, 1)
            expect("MEM-WIRE-1", answer.type is ERROR, f"the answer {answer}", "ERROR: it is outside the region")


@check("MEM-WIRE-2")
def each_type_does_its_own(session: Session) -> None:
    """By the numbers 0 to 3, and by what becomes of plugged_size."""
    ready(session, 4)
    for type_, block, nb_blocks, plugged in ((0, 0, 3, 3), (1, 0, 1, 2), (3, 0, 4, 2), (2, 0, 0, 0)):
        response = raw(session, type_, block, nb_blocks)
        if response[:2] == b"\2\0" and type_ != RequestType.STATE:
            raise Unsuitable("the device is busy, which it may be")
        expect("MEM-WIRE-2", response[:2] == b"\0\0", f"the response {response.hex()}", "one that begins with 0, ACK")
        size = session.config().plugged_size
        expect("MEM-WIRE-2", size == plugged * session.block_size, f"plugged_size {size}", f"{plugged} blocks")


@check("MEM-WIRE-3", "MEM-WIRE-5")
def state_is_at_eight(session: Session) -> None:
    """Ten bytes, and the state in the last two: 0 for PLUGGED, 1 for UNPLUGGED, 2 for MIXED."""
    ready(session, 2)
    response = raw(session, RequestType.STATE, 0)
    length = len(response)
    expect("MEM-WIRE-3", length == RESPONSE_SIZE, f"a response of {length} bytes", f"{RESPONSE_SIZE}")
    granted(session, session.plug(0))
    responses = [raw(session, RequestType.STATE, block, nb_blocks) for block, nb_blocks in ((0, 1), (1, 1), (0, 2))]
    states = [response[8:10] for response in responses]
    text = ", ".join(response.hex() for response in responses)
    expect("MEM-WIRE-3", len(set(states)) == 3, f"the responses {text}", "three states, at 8")
    numbers = [int.from_bytes(state, "little") for state in states]
    expect("MEM-WIRE-5", numbers == list(BlockState), f"the states {numbers}", "0, 1, 2")


def ring_form(session: Session, packed: bool) -> None:
    """Unsuitable where the ring is of the other form, which has clauses of its own."""
    if bool(session.features & Feature.RING_PACKED) is not packed:
        raise Unsuitable(f"the ring is a {'split' if packed else 'packed'} one")


def judge_length(session: Session, clause: str) -> None:
    """In a room of 64 bytes: no fewer than the response has, and none that was not written."""
    request = request_bytes(RequestType.STATE, session.addr(0), 2)
    length, room, flagged = session.chain(Chain(request, room=(64,))).used
    expect(clause, length >= RESPONSE_SIZE, f"a used length of {length}", f"{RESPONSE_SIZE}")
    expect(clause, flagged, f"a used length of {length} without the write flag", "the write flag beside it")
    rest = room[RESPONSE_SIZE:length]
    unwritten = bool(rest) and rest == FILL * len(rest)
    expect(clause, not unwritten, f"a used length of {length}", f"{RESPONSE_SIZE}: the rest was not written")


def judge_batch(session: Session, clause: str) -> None:
    """Of requests that are made at once, each gets its own answer."""
    for block in (1, 4, 5):
        granted(session, session.plug(block))
    batch = [session.request(RequestType.STATE, block, nb_blocks) for block in range(7) for nb_blocks in (1, 2)]
    alone = [session.chain(chain).state for chain in batch]
    together = [answer.state for answer in session.batch(batch)]
    expect(clause, together == alone, f"the states {together}", f"{alone}, as for one after the other")


@check("RING-SPLIT-7", needs=Capability.CHAINS)
def used_length_counts_what_was_written(session: Session) -> None:
    """On a split ring: len is that of a response, also where there is more room."""
    ready(session, 2)
    ring_form(session, packed=False)
    judge_length(session, "RING-SPLIT-7")


@check("RING-PACKED-5", needs=Capability.CHAINS)
def packed_used_length_counts_what_was_written(session: Session) -> None:
    """On a packed ring: len is that of a response, also where there is more room."""
    ready(session, 2)
    ring_form(session, packed=True)
    judge_length(session, "RING-PACKED-5")


@check("RING-SPLIT-7", needs=Capability.CHAINS)
def each_answer_under_its_own_head(session: Session) -> None:
    """On a split ring, with requests that can be told apart by their answers."""
    ready(session, 8)
    ring_form(session, packed=False)
    judge_batch(session, "RING-SPLIT-7")


@check("RING-PACKED-6", needs=Capability.CHAINS)
def each_answer_under_its_own_id(session: Session) -> None:
    """On a packed ring, with requests that can be told apart by their answers."""
    ready(session, 8)
    ring_form(session, packed=True)
    judge_batch(session, "RING-PACKED-6")
