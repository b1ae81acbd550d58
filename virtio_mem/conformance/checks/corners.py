"""Corners of ranges and of the map of blocks, where a device that is wrong seldom looks wrong.

A bad range can pass for one that is refused anyway: a PLUG below the region, taken for its first block, is an ERROR as
long as that block is plugged. So each is asked for here with the blocks such that only the range stands against it.
"""

from __future__ import annotations

from virtio_mem.conformance.check import (
    WISH,
    Unsuitable,
    check,
    expect,
    expect_answer,
    granted,
    ready,
    tight,
    usable_blocks,
)
from virtio_mem.conformance.checks.ranges import errors
from virtio_mem.conformance.checks.requests import HUGE
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability
from virtio_mem.protocol import BlockState, RequestType, ResponseType

PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType
ACK, ERROR = ResponseType.ACK, ResponseType.ERROR
PLUGGED, UNPLUGGED, MIXED = BlockState

FAR = 140
"""Blocks: more than two 64-bit words of a map."""


def is_error(session: Session, clause: str, type_: RequestType, addr: int, nb_blocks: int) -> None:
    """Violation of `clause` unless such a range, modulo 2^64, gets ERROR, and no block changes by it."""
    errors(session, clause, type_, [(addr % 2**64, nb_blocks)])


def plugged_ones(session: Session, clause: str, blocks: range) -> set[int]:
    """Which of `blocks` STATE says are plugged, asked one by one. Violation of `clause` where it is no state."""
    found = set()
    for block in blocks:
        answer = session.state(block)
        expect(clause, answer.state in (PLUGGED, UNPLUGGED), f"the answer {answer}", "a state")
        if answer.state is PLUGGED:
            found.add(block)
    return found


@check("MEM-PLUG-5")
def plug_below_and_around(session: Session) -> None:
    """With nothing plugged: below the region, far below it, and so long that its end comes round into the region.

    The sum of address and size overflowed in cloud-hypervisor (issue 4859, found by oss-fuzz).
    """
    ready(session, 8)
    size, addr = session.block_size, session.addr(0)
    below = [addr - size, addr - 4 * size, addr - (addr % 2**63 or size)]
    ranges = [(start, nb_blocks) for start in below for nb_blocks in (1, 4)]
    if addr // size + 2 <= 0xFFFF:
        ranges += [(2**64 - size, addr // size + more) for more in (1, 2, 4)]
    for start, nb_blocks in ranges:
        is_error(session, "MEM-PLUG-5", PLUG, start, nb_blocks)


@check("MEM-UNPLUG-5")
def unplug_below(session: Session) -> None:
    """With the first blocks plugged: below the region, and from below into it."""
    ready(session, 8)
    granted(session, session.plug(0, 8))
    for block, nb_blocks in ((-1, 1), (-4, 4), (-1, 2), (-4, 8)):
        is_error(session, "MEM-UNPLUG-5", UNPLUG, session.addr(block), nb_blocks)


@check("MEM-UNPLUG-5")
def unplug_over_the_end(session: Session) -> None:
    """With the last usable block plugged: over the end of the usable region."""
    ready(session, 2)
    usable = usable_blocks(session)
    if usable < 2:
        raise Unsuitable("the usable region has one block")
    granted(session, session.plug(usable - 2, 2))
    for block, nb_blocks in ((usable - 1, 2), (usable - 2, 3), (usable - 2, 65535)):
        is_error(session, "MEM-UNPLUG-5", UNPLUG, session.addr(block), nb_blocks)


@check("MEM-UNPLUG-3", "MEM-STATE-3")
def between_plugged_blocks(session: Session) -> None:
    """An address inside a plugged block, or at its last byte, stands for no block."""
    ready(session, 4)
    granted(session, session.plug(0, 4))
    for shift in (1, 4096, session.block_size // 2, session.block_size - 1):
        is_error(session, "MEM-UNPLUG-3", UNPLUG, session.addr(1, shift), 1)
        is_error(session, "MEM-STATE-3", STATE, session.addr(1, shift), 1)


@check("MEM-STATE-6")
def state_of_more_than_the_target(session: Session) -> None:
    """The target bounds what can be plugged, and not what can be asked about."""
    target = tight(session, 2, room=4)
    granted(session, session.plug(0, target))
    answer = session.state(0, target + 4)
    expect("MEM-STATE-6", answer.type is ACK, f"the answer {answer}", "ACK")
    answer = session.state(target, 4)
    expect("MEM-STATE-6", answer.type is ACK, f"the answer {answer}", "ACK")


# The map.


@check("MEM-PLUG-8", "MEM-UNPLUG-8", "MEM-CONF-7")
def over_words_of_the_map(session: Session) -> None:
    """PLUGs over blocks 64 and 128, then UNPLUGs out of them: block by block, just those that were named."""
    ready(session, 24, region=FAR)
    if usable_blocks(session) < FAR:
        raise Unsuitable(f"fewer than {FAR} blocks are usable")
    should: set[int] = set()
    for first, nb_blocks in ((58, 12), (122, 12)):
        granted(session, session.plug(first, nb_blocks))
        should |= set(range(first, first + nb_blocks))
        _judge(session, "MEM-PLUG-8", should)
    for first, nb_blocks in ((62, 4), (127, 1), (58, 1), (133, 1)):
        granted(session, session.unplug(first, nb_blocks))
        should -= set(range(first, first + nb_blocks))
        _judge(session, "MEM-UNPLUG-8", should)


def _judge(session: Session, clause: str, should: set[int]) -> None:
    found = plugged_ones(session, clause, range(FAR))
    missing, more = sorted(should - found), sorted(found - should)
    counted = session.config().plugged_size
    if clause == "MEM-UNPLUG-8":
        missing, more = more, missing
    expect(clause, not missing, f"blocks {missing} not as asked for", "all of them")
    expect("MEM-CONF-7", not more, f"other blocks changed: {more}", "none")
    expect("MEM-CONF-7", counted == len(found) * session.block_size, f"plugged_size {counted}", f"{len(found)} blocks")


@check("MEM-PLUG-8", "MEM-UNPLUG-8", needs=Capability.WISH, wishes=(HUGE,))
def blocks_far_apart(session: Session) -> None:
    """Block 0 and those that are it to whoever counts blocks in 16 bits, or bytes in 32."""
    far = sorted({2**16, max(1, 2**32 // session.block_size)} if session.block_size else ())
    ready(session, 3, region=2**16 + 1)
    if usable_blocks(session) <= max(far):
        raise Unsuitable(f"block {max(far)} is not usable")
    granted(session, session.plug(0))
    for block in far:
        expect_answer("MEM-PLUG-8", session.state(block), ACK, UNPLUGGED)
        expect_answer("MEM-PLUG-8", session.plug(block), ACK)
    granted(session, session.unplug(0))
    for block in far:
        expect_answer("MEM-UNPLUG-8", session.state(block), ACK, PLUGGED)


@check("MEM-UNPLUG-8")
def unplug_is_seen(session: Session) -> None:
    """By STATE alone, whatever plugged_size says."""
    ready(session, 4)
    granted(session, session.plug(0, 4))
    granted(session, session.unplug(1, 2))
    expect_answer("MEM-UNPLUG-8", session.state(1, 2), ACK, UNPLUGGED)


@check("MEM-UNPLUGALL-4")
def unplug_all_reaches_the_ends(session: Session) -> None:
    """The first and the last usable block, by STATE alone."""
    ready(session, 2)
    last = usable_blocks(session) - 1
    for block in {0, last}:
        granted(session, session.plug(block))
    granted(session, session.unplug_all())
    if usable_blocks(session) <= last:
        raise Unsuitable("the last block is not usable any more")
    for block in {0, last}:
        expect_answer("MEM-UNPLUGALL-4", session.state(block), ACK, UNPLUGGED)


@check("MEM-UNPLUGALL-4", needs=Capability.SET_TARGET, wishes=(WISH, HUGE))
def unplug_all_before_the_region_grows(session: Session) -> None:
    """The last block of the whole region, once it is usable again; also where 16 bits can't count the blocks.

    From 128 GiB on they stayed plugged in cloud-hypervisor (commit dfee31a84).
    """
    ready(session, 2)
    _whole_region(session)
    last = usable_blocks(session) - 1
    granted(session, session.plug(last))
    granted(session, session.unplug_all())
    _whole_region(session)
    expect_answer("MEM-UNPLUGALL-4", session.state(last), ACK, UNPLUGGED)


def _whole_region(session: Session) -> None:
    if not session.set_target(session.nb_blocks * session.block_size):
        raise Unsuitable("the host's side refuses the whole region as the target")
