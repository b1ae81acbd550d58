"""What PLUG, UNPLUG and STATE have in common: ranges that can't be, and bytes that don't count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from virtio_mem.conformance.check import (
    Unsuitable,
    allowed,
    check,
    expect,
    expect_answer,
    granted,
    ready,
    tight,
    usable_blocks,
)
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability, Chain
from virtio_mem.conformance.words import Answer, request_bytes
from virtio_mem.protocol import REQUEST_SIZE, RequestType, ResponseType

PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType
ACK, ERROR = ResponseType.ACK, ResponseType.ERROR

JUNK = bytes.fromhex("deadbeefcafe")


def some_plugged(session: Session) -> None:
    """Blocks 0 to 3 of a target of 12 are plugged, so that a request is wrong by its range alone.

    Where the host's target is less and can't be moved, nothing is plugged: the range is wrong all the same.
    """
    ready(session)
    if allowed(session, 12):
        granted(session, session.plug(0, 4))


def errors(session: Session, clause: str, type_: RequestType, ranges: Iterable[tuple[int, int]]) -> None:
    """Violation of `clause` unless each (addr, nb_blocks) gets ERROR, and no block changes by it."""
    before = session.config()
    for addr, nb_blocks in ranges:
        expect_answer(clause, session.ask(type_, addr, nb_blocks), ERROR)
    after = session.config()
    expect(clause, after == before, after, f"{before}, as it was")


def misaligned(session: Session) -> Iterator[tuple[int, int]]:
    """Inside the usable region, between blocks."""
    for shift in (1, session.block_size // 2, session.block_size - 1):
        yield session.addr(5, shift), 1


def empty(session: Session) -> Iterator[tuple[int, int]]:
    """No blocks: at the start, in the middle, at the end."""
    for block in (0, 5, usable_blocks(session)):
        yield session.addr(block), 0


def outside(session: Session) -> Iterator[tuple[int, int]]:
    """Below the region and beyond the usable one, whole and in part, also where addresses come round."""
    end, size = usable_blocks(session), session.block_size
    for block, nb_blocks in ((-1, 1), (-1, 2), (end, 1), (end - 1, 2), (end, 65535)):
        yield session.addr(block), nb_blocks
    first, behind = session.addr(0), session.addr(0) + end * size
    for addr in (0, 2**64 - size, 2**64 - 2 * size):
        if not first <= addr < behind:
            yield addr, 1
            yield addr, 65535
    if end + 1 < 65536:
        yield session.addr(0), end + 1
    if end + 4 < session.nb_blocks:
        yield session.addr(end + 1), 2
        yield session.addr(session.nb_blocks - 1), 1


def lines_of(type_: RequestType) -> tuple[str, str, str]:
    """The clauses on alignment, number and range of a request type."""
    return tuple(f"MEM-{type_.name}-{number}" for number in (3, 4, 5))  # type: ignore[return-value]


def judge_ranges(session: Session, type_: RequestType) -> None:
    """All three at once."""
    some_plugged(session)
    alignment, number, range_ = lines_of(type_)
    errors(session, alignment, type_, misaligned(session))
    errors(session, number, type_, empty(session))
    errors(session, range_, type_, outside(session))


@check("MEM-PLUG-3", "MEM-PLUG-4", "MEM-PLUG-5", "MEM-REGION-1")
def plug_of_bad_ranges(session: Session) -> None:
    """PLUG between blocks, of no blocks, and outside the usable region."""
    judge_ranges(session, PLUG)
    plugged, usable = session.config().plugged_size, session.config().usable_region_size
    expect("MEM-REGION-1", plugged <= usable, f"{plugged} bytes plugged", f"at most the usable {usable}")


@check("MEM-UNPLUG-3", "MEM-UNPLUG-4", "MEM-UNPLUG-5")
def unplug_of_bad_ranges(session: Session) -> None:
    """UNPLUG between blocks, of no blocks, and outside the usable region."""
    judge_ranges(session, UNPLUG)


@check("MEM-STATE-3", "MEM-STATE-4", "MEM-STATE-5")
def state_of_bad_ranges(session: Session) -> None:
    """STATE between blocks, of no blocks, and outside the usable region.

    STATE of the block below the region read memory that is no bitmap (cloud-hypervisor commit 1dd588fa6); Dragonball's
    code has the same subtraction.
    """
    judge_ranges(session, STATE)


# Errors in spite of another answer that would be possible.


@check("MEM-PLUG-3", "MEM-PLUG-4", "MEM-PLUG-5")
def bad_range_above_the_target(session: Session) -> None:
    """A PLUG of a bad range is an ERROR also where it is beyond the target: the clauses know no exception.

    cloud-hypervisor and Dragonball look at the target first.
    """
    if target := tight(session, 4):
        granted(session, session.plug(0, target))
    alignment, number, range_ = lines_of(PLUG)
    errors(session, alignment, PLUG, misaligned(session))
    errors(session, number, PLUG, empty(session))
    errors(session, range_, PLUG, outside(session))


@check("MEM-PLUG-6")
def plugged_block_above_the_target(session: Session) -> None:
    """A PLUG that names a plugged block is an ERROR also beyond the target: the clause knows no exception."""
    target = tight(session, 4, room=1)
    granted(session, session.plug(0, target))
    for block, nb_blocks in ((0, 1), (target - 1, 1), (0, target), (target - 1, 2)):
        expect_answer("MEM-PLUG-6", session.plug(block, nb_blocks), ERROR)


@check(
    "MEM-PLUG-3", "MEM-PLUG-4", "MEM-PLUG-5", "MEM-PLUG-6", "MEM-UNPLUG-3", "MEM-UNPLUG-4", "MEM-UNPLUG-5",
    "MEM-UNPLUG-6", needs=Capability.PAUSE,
)  # fmt: skip
def errors_while_paused(session: Session) -> None:
    """What has to be an ERROR is one also at a time when nothing can be served."""
    ready(session, 12)
    granted(session, session.plug(0, 4))
    session.pause(True)
    for type_ in (PLUG, UNPLUG):
        alignment, number, range_ = lines_of(type_)
        errors(session, alignment, type_, misaligned(session))
        errors(session, number, type_, empty(session))
        errors(session, range_, type_, outside(session))
    expect_answer("MEM-PLUG-6", session.plug(3, 2), ERROR)
    expect_answer("MEM-UNPLUG-6", session.unplug(3, 2), ERROR)


# Bytes that don't count.


def unheeded(session: Session, header: str, tail: str, type_: RequestType, *, nb_blocks: int = 1) -> None:
    """Violation of `header` or `tail` unless junk in that padding of a request, which has to be granted, is no matter.

    A PLUG or UNPLUG is made for one block after the other, the others with the same one.
    """
    for number, (clause, paddings) in enumerate(((header, {"pad": JUNK}), (tail, {"tail": JUNK}))):
        block = number if type_ in (PLUG, UNPLUG) else 0
        request = request_bytes(type_, session.addr(block), nb_blocks, **paddings)
        expect_answer(clause, _bare(session.chain(Chain(request))), ACK)


def _bare(answer: Answer) -> Answer:
    return answer._replace(state=None)


@check("MEM-PLUG-1", "MEM-PLUG-2", "MEM-UNPLUG-1", "MEM-UNPLUG-2", "MEM-STATE-1", "MEM-STATE-2")
def padding_does_not_count(session: Session) -> None:
    """Junk in either padding of PLUG, STATE and UNPLUG."""
    ready(session, 2)
    unheeded(session, "MEM-PLUG-1", "MEM-PLUG-2", PLUG)
    unheeded(session, "MEM-STATE-1", "MEM-STATE-2", STATE, nb_blocks=2)
    unheeded(session, "MEM-UNPLUG-1", "MEM-UNPLUG-2", UNPLUG)


@check("MEM-UNPLUGALL-1", "MEM-UNPLUGALL-2")
def unplug_all_is_its_type(session: Session) -> None:
    """addr and nb_blocks that no other request could have, and junk in the paddings."""
    ready(session)
    has_blocks = allowed(session, 2)
    for addr, nb_blocks in ((1, 0), (2**64 - 1, 65535), (session.addr(0), 1)):
        if has_blocks:
            granted(session, session.plug(0, 2))
        expect_answer("MEM-UNPLUGALL-1", session.ask(UNPLUG_ALL, addr, nb_blocks), ACK)
        plugged = session.config().plugged_size
        expect("MEM-UNPLUGALL-1", plugged == 0, f"plugged_size {plugged}", 0)
    request = request_bytes(UNPLUG_ALL, 0, 0, pad=JUNK, tail=JUNK)
    expect_answer("MEM-UNPLUGALL-2", session.chain(Chain(request)), ACK)


@check("MEM-PLUG-1", "MEM-UNPLUG-1", "MEM-STATE-1", "MEM-UNPLUGALL-2", needs=Capability.CHAINS)
def longer_requests(session: Session) -> None:
    """A buffer may be longer than the request in it.

    One of 64 bytes was refused (cloud-hypervisor commit 82d426162); Dragonball's code wants exactly 24.
    """
    ready(session, 2)
    for length in (REQUEST_SIZE + 1, 64, 4096):
        for clause, type_, nb_blocks in (
            ("MEM-PLUG-1", PLUG, 2),
            ("MEM-STATE-1", STATE, 2),
            ("MEM-UNPLUG-1", UNPLUG, 1),
            ("MEM-UNPLUGALL-2", UNPLUG_ALL, 0),
        ):
            request = request_bytes(type_, session.addr(0), nb_blocks) + b"\xff" * 8
            answer = session.chain(Chain(request[:length], readable=(length,)))
            expect_answer(clause, _bare(answer), ACK)


@check("MEM-PLUG-5", "MEM-UNPLUG-5", "MEM-STATE-5")
def the_usable_region_ends_where_it_says(session: Session) -> None:
    """The last usable block can be named, the one behind it can't.

    One block too few broke a guest's device (cloud-hypervisor issue 6736).
    """
    ready(session, 1)
    last = usable_blocks(session) - 1
    if last < 1:
        raise Unsuitable("the usable region has one block")
    for clause, type_, nb_blocks in (("MEM-STATE-5", STATE, 2), ("MEM-PLUG-5", PLUG, 1), ("MEM-UNPLUG-5", UNPLUG, 1)):
        inside = session.ask(type_, session.addr(last - nb_blocks + 1), nb_blocks)
        expect_answer(clause, _bare(inside), ACK)
        expect_answer(clause, session.ask(type_, session.addr(last), 2), ERROR)
        expect_answer(clause, session.ask(type_, session.addr(last + 1), 1), ERROR)
