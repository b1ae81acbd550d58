"""What lies in the blocks, and what the host holds for them."""

from __future__ import annotations

from virtio_mem.conformance.check import Unsuitable, check, expect, granted, ready, set_target, tight, usable_blocks
from virtio_mem.conformance.checks.requests import HUGE
from virtio_mem.conformance.session import MOST_FILLED, Session
from virtio_mem.conformance.target import Capability
from virtio_mem.protocol import RequestType, ResponseType

SEES = Capability.HELD | Capability.CONTENT


def held(session: Session, clause: str, block: int, nb_blocks: int) -> None:
    """Violation of `clause` where the host holds anything for these blocks."""
    size = session.held(block, nb_blocks)
    expect(clause, size == 0, f"{size} bytes held for blocks {block} to {block + nb_blocks - 1}", "none")


@check("MEM-OP-6", needs=Capability.CONTENT)
def plugged_memory_is_memory(session: Session) -> None:
    """What is written to plugged blocks can be read, over the borders between PLUGs."""
    ready(session, 8)
    granted(session, session.plug(0, 3))
    granted(session, session.plug(3, 2))
    session.fill(0, 5, seed=2)
    expect("MEM-OP-6", session.same(0, 5, seed=2), "other bytes", "what was written")
    granted(session, session.unplug(1, 2))
    granted(session, session.plug(2, 1))
    session.fill(2, 2, seed=3)
    expect("MEM-OP-6", session.same(2, 2, seed=3), "other bytes", "what was written")


@check("MEM-OP-4", needs=Capability.CONTENT)
def other_blocks_keep_their_contents(session: Session) -> None:
    """Neither an UNPLUG beside it, nor a PLUG, nor a request that is turned down touches a plugged block.

    An UNPLUG strictly inside a range that shares a memory slot is a case of its own (firecracker pull request 5793).
    """
    ready(session, 10)
    granted(session, session.plug(0, 8))
    session.fill(0, 8, seed=4)
    granted(session, session.unplug(3, 2))
    session.unplug(0, 8)
    session.plug(2, 2)
    session.ask(RequestType.UNPLUG, session.addr(0, 1), 1)
    granted(session, session.plug(3, 1))
    kept = [session.same(block, nb_blocks, seed=4) for block, nb_blocks in ((0, 3), (5, 3))]
    expect("MEM-OP-4", all(kept), "other bytes in a block that stayed plugged", "what was written")


@check("MEM-OP-4", needs=Capability.CONTENT | Capability.SET_TARGET)
def other_targets_keep_contents(session: Session) -> None:
    """A target below what is plugged, and one above, leave the bytes alone."""
    ready(session, 8)
    granted(session, session.plug(0, 4))
    session.fill(0, 4, seed=5)
    for blocks in (0, 2, 8):
        set_target(session, blocks)
        expect("MEM-OP-4", session.same(0, 4, seed=5), "other bytes", "what was written")


@check("DEP-HOST-1", needs=SEES)
def unplugged_blocks_are_given_back(session: Session) -> None:
    """By the time of the answer: the middle of a range, its ends, all of it; and the rest is still held.

    MADV_DONTNEED gives nothing back of a memfd or of huge pages (cloud-hypervisor commit c397c9c95).
    """
    ready(session, 8)
    granted(session, session.plug(0, 8))
    session.fill(0, 8, seed=6)
    before, written = session.held(0, 8), 8 * min(session.block_size, MOST_FILLED)
    expect("DEP-HOST-1", before >= written, f"{before} bytes held of {written} written ones", "all of them")
    for block, nb_blocks in ((3, 2), (0, 1), (7, 1), (1, 2), (5, 2)):
        granted(session, session.unplug(block, nb_blocks))
        held(session, "DEP-HOST-1", block, nb_blocks)


@check("MEM-OP-4", "DEP-HOST-1", needs=SEES | Capability.WISH, wishes=(HUGE,))
def memory_far_apart(session: Session) -> None:
    """The first block's memory and that of the block 4 GiB behind it, which are one to whoever counts in 32 bits."""
    far = max(1, 2**32 // (session.block_size or 1))
    ready(session, 2, region=far + 1)
    if usable_blocks(session) <= far:
        raise Unsuitable(f"block {far} is not usable")
    for block in (0, far):
        granted(session, session.plug(block))
        session.fill(block, 1, seed=12)
    granted(session, session.unplug(0))
    expect("MEM-OP-4", session.same(far, 1, seed=12), "other bytes 4 GiB behind what was unplugged", "what was written")
    granted(session, session.unplug(far))
    held(session, "DEP-HOST-1", far, 1)


@check("DEP-HOST-2", needs=SEES)
def unplug_all_gives_all_back(session: Session) -> None:
    """The whole region, blocks that were plugged and others."""
    ready(session, 8)
    granted(session, session.plug(0, 3))
    granted(session, session.plug(5, 2))
    session.fill(0, 3, seed=7)
    granted(session, session.unplug_all())
    held(session, "DEP-HOST-2", 0, session.nb_blocks)


@check("DEP-HOST-3", needs=SEES | Capability.SYSTEM_RESET)
def system_reset_gives_all_back(session: Session) -> None:
    """The whole region."""
    ready(session, 8)
    granted(session, session.plug(0, 3))
    session.fill(0, 3, seed=8)
    session.system_reset()
    if session.config().plugged_size:
        raise Unsuitable("the system reset did not unplug the blocks")
    held(session, "DEP-HOST-3", 0, session.nb_blocks)


@check("DEP-HOST-4", needs=Capability.HELD)
def turned_down_plugs_take_nothing(session: Session) -> None:
    """A PLUG beyond the target, and one over a plugged block."""
    target = tight(session, 4, room=2)
    if target < 2:
        raise Unsuitable("the host's target is less than two blocks and can't be moved")
    granted(session, session.plug(0, target - 1))
    for block, nb_blocks in ((target - 1, 2), (target - 2, 3)):
        if session.plug(block, nb_blocks).type is ResponseType.ACK:
            raise Unsuitable(f"{session.lines[-1]!r} was granted")
        held(session, "DEP-HOST-4", target - 1, 1)


@check("DEP-HOST-4", needs=Capability.HELD | Capability.HOST_REFUSES)
def plugs_that_fail_take_nothing(session: Session) -> None:
    """A PLUG for which the host has no memory."""
    ready(session, 4)
    session.refuse(True)
    if session.plug(0, 4).type is ResponseType.ACK:
        raise Unsuitable(f"{session.lines[-1]!r} was granted")
    held(session, "DEP-HOST-4", 0, 4)
