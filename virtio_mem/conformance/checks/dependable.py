"""What the standard leaves open and drivers depend on: see spec-notes/dependable.toml."""

from __future__ import annotations

from collections.abc import Callable

from virtio_mem.conformance.check import (
    MOMENT,
    Unsuitable,
    allowed,
    check,
    expect,
    expect_answer,
    granted,
    need_blocks,
    ready,
    set_target,
    tight,
)
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability
from virtio_mem.conformance.words import Answer
from virtio_mem.protocol import BlockState, ResponseType

ACK, NACK, BUSY, ERROR = ResponseType
PATIENCE = 3.0
"""Seconds in which a notice has to come after a BUSY's cause has gone; ours comes within one."""


def expect_plugged(session: Session, clause: str, blocks: int) -> None:
    """Violation of `clause` unless so many blocks are plugged."""
    plugged = session.config().plugged_size
    expect(clause, plugged == blocks * session.block_size, f"plugged_size {plugged}", f"{blocks} blocks")


# The target.


@check("DEP-NACK-1")
def nack_at_the_target(session: Session) -> None:
    """firecracker's code answers ERROR, for which Linux gives the device up."""
    target = tight(session, 4, room=4)
    if target:
        granted(session, session.plug(0, target))
    expect_answer("DEP-NACK-1", session.plug(target), NACK)
    expect_answer("DEP-NACK-1", session.plug(target + 1, 3), NACK)


@check("DEP-NACK-1", needs=Capability.SET_TARGET)
def nack_above_a_target_that_was_lowered(session: Session) -> None:
    """A driver that is about to plug when the host lowers the target is told to look again."""
    ready(session, 8)
    granted(session, session.plug(0, 4))
    set_target(session, 2)
    expect_answer("DEP-NACK-1", session.plug(4), NACK)


@check("DEP-NACK-2")
def nack_over_the_target(session: Session) -> None:
    """A PLUG that would fit but for its last block is no PLUG of a part."""
    target = tight(session, 4, room=1)
    if target < 2:
        raise Unsuitable("the host's target is less than two blocks and can't be moved")
    granted(session, session.plug(0, 1))
    expect_answer("DEP-NACK-2", session.plug(1, target), NACK)
    expect_plugged(session, "DEP-NACK-2", 1)
    expect_answer("DEP-NACK-2", session.plug(1, target - 1), ACK)


@check("DEP-ORDER-1", needs=Capability.PAUSE)
def nack_before_busy(session: Session) -> None:
    """A driver that is told BUSY would wait for nothing."""
    target = tight(session, 4, room=1)
    session.pause(True)
    expect_answer("DEP-ORDER-1", session.plug(0, target + 1), NACK)


@check("DEP-USABLE-1")
def target_can_be_met_after_unplug_all(session: Session) -> None:
    """firecracker's code leaves nothing usable after UNPLUG ALL."""
    target = tight(session, 8)
    if target < 2:
        raise Unsuitable("the host's target is less than two blocks and can't be moved")
    granted(session, session.plug(0, target))
    granted(session, session.unplug_all())
    expect_answer("DEP-USABLE-1", soon(session, lambda: session.plug(0, 1)), ACK)
    expect_answer("DEP-USABLE-1", soon(session, lambda: session.plug(1, target - 1)), ACK)


@check("DEP-TARGET-1", needs=Capability.SET_TARGET)
def target_before_the_driver(session: Session) -> None:
    """A resize before the driver was there hung (cloud-hypervisor issues 4001 and 4003)."""
    need_blocks(session, 6)
    set_target(session, 6)
    ready(session)
    requested = session.config().requested_size
    expect("DEP-TARGET-1", requested == 6 * session.block_size, f"requested_size {requested}", "6 blocks")
    expect_answer("DEP-TARGET-1", session.plug(0, 6), ACK)


@check("DEP-TARGET-2", needs=Capability.SET_TARGET)
def same_target_again(session: Session) -> None:
    """Whether the driver has met it or not."""
    ready(session, 4)
    set_target(session, 4)
    for blocks in (0, 4):
        if blocks:
            granted(session, session.plug(0, blocks))
        before = session.config()
        set_target(session, 4)
        after = session.config()
        expect("DEP-TARGET-2", after == before, after, f"{before}, as it was")
    granted(session, session.unplug(0, 4))


@check("DEP-TARGET-3", needs=Capability.SET_TARGET)
def target_below_what_is_plugged(session: Session) -> None:
    """The way down is the driver's."""
    ready(session, 8)
    granted(session, session.plug(0, 8))
    set_target(session, 2)
    expect_plugged(session, "DEP-TARGET-3", 8)
    expect_answer("DEP-TARGET-3", session.state(0, 8), ACK, BlockState.PLUGGED)
    expect_answer("DEP-TARGET-3", session.unplug(2, 6), ACK)
    expect_plugged(session, "DEP-TARGET-3", 2)


@check("DEP-TARGET-4", needs=Capability.SET_TARGET)
def target_shows(session: Session) -> None:
    """requested_size is what the host's side took, and what it was before where that refused."""
    ready(session)
    for blocks in (min(100, session.nb_blocks), 1, 0, min(7, session.nb_blocks)):
        set_target(session, blocks)
        requested = session.config().requested_size
        expect(
            "DEP-TARGET-4", requested == blocks * session.block_size, f"requested_size {requested}", f"{blocks} blocks"
        )
    before = session.config().requested_size
    if not session.set_target(session.first_config.region_size + session.block_size):
        requested = session.config().requested_size
        expect("DEP-TARGET-4", requested == before, f"requested_size {requested}", f"{before}, as it was")


# A host that can't.

Hindrance = tuple[Callable[[Session], None], Callable[[Session], None]]
PAUSED: Hindrance = (lambda session: session.pause(True), lambda session: session.pause(False))
SHORT: Hindrance = (lambda session: session.refuse(True), lambda session: session.refuse(False))


def soon(session: Session, ask: Callable[[], Answer]) -> Answer:
    """The answer to a request that nothing stands against. One that is BUSY is made again once, a moment later."""
    answer = ask()
    if answer.type is BUSY:
        session.advance(MOMENT)
        answer = ask()
    return answer


def busy_and_again(session: Session, clause: str, hindrance: Hindrance, ask: Callable[[], Answer]) -> None:
    """`ask` gets BUSY during `hindrance` (else a violation of `clause`), changes nothing, and is granted afterwards."""
    begin, end = hindrance
    before = session.config()
    begin(session)
    expect_answer(clause, ask(), BUSY)
    after = session.config()
    expect("DEP-REFUSED-1", after == before, after, f"{before}, as it was")
    end(session)
    expect_answer("DEP-BUSY-4", soon(session, ask), ACK)


def judge_busy(session: Session, hindrance: Hindrance) -> None:
    """The three requests that change blocks, one after the other."""
    ready(session, 8)
    granted(session, session.plug(4, 4))
    busy_and_again(session, "DEP-BUSY-1", hindrance, lambda: session.plug(0, 4))
    busy_and_again(session, "DEP-BUSY-2", hindrance, lambda: session.unplug(2, 4))
    busy_and_again(session, "DEP-BUSY-3", hindrance, session.unplug_all)


@check("DEP-BUSY-1", "DEP-BUSY-2", "DEP-BUSY-3", "DEP-BUSY-4", "DEP-REFUSED-1", needs=Capability.PAUSE)
def busy_while_paused(session: Session) -> None:
    """Blocks stay as they are for a migration or a snapshot, and driver and device are at peace again afterwards."""
    judge_busy(session, PAUSED)


@check("DEP-BUSY-1", "DEP-BUSY-2", "DEP-BUSY-3", "DEP-BUSY-4", "DEP-REFUSED-1", needs=Capability.HOST_REFUSES)
def busy_while_the_host_refuses(session: Session) -> None:
    """No memory is no ERROR. cloud-hypervisor, firecracker and Dragonball answer ERROR where the host fails."""
    judge_busy(session, SHORT)


@check("DEP-REFUSED-1", needs=Capability.HOST_REFUSES)
def half_an_unplug_all(session: Session) -> None:
    """An UNPLUG ALL that fails leaves each block as it was (Dragonball's code has cleared some by then)."""
    ready(session, 12)
    for block in (0, 4, 8):
        granted(session, session.plug(block, 2))
    session.refuse(True)
    if session.unplug_all().type is ACK:
        raise Unsuitable("the device needs nothing of its host for UNPLUG ALL")
    for block in (0, 4, 8):
        expect_answer("DEP-REFUSED-1", session.state(block, 2), ACK, BlockState.PLUGGED)
        expect_answer("DEP-REFUSED-1", session.state(block + 2, 2), ACK, BlockState.UNPLUGGED)
    expect_plugged(session, "DEP-REFUSED-1", 6)


@check("DEP-REFUSED-1", needs=Capability.HOST_REFUSES | Capability.CONTENT)
def contents_after_a_refusal(session: Session) -> None:
    """An UNPLUG that fails has thrown nothing away."""
    ready(session, 4)
    granted(session, session.plug(0, 4))
    session.fill(0, 4, seed=9)
    session.refuse(True)
    asks: tuple[Callable[[], Answer], ...] = (lambda: session.unplug(1, 2), session.unplug_all)
    for ask in asks:
        if ask().type is ACK:
            raise Unsuitable(f"{session.lines[-1]!r} in spite of the host")
    expect("DEP-REFUSED-1", session.same(0, 4, seed=9), "other bytes", "what was written")


@check("DEP-REFUSED-1", needs=Capability.HOST_REFUSES)
def states_after_a_refusal(session: Session) -> None:
    """A PLUG that fails has plugged nothing (cloud-hypervisor's code sets the bitmap before the last step)."""
    ready(session, 4)
    session.refuse(True)
    if session.plug(0, 4).type is ACK:
        raise Unsuitable("the device needs nothing of its host for PLUG")
    expect_answer("DEP-REFUSED-1", session.state(0, 4), ACK, BlockState.UNPLUGGED)
    expect_plugged(session, "DEP-REFUSED-1", 0)


def judge_notice(session: Session, hindrance: Hindrance) -> None:
    """A driver that got BUSY has a notice once the hindrance has gone."""
    begin, end = hindrance
    ready(session, 4)
    begin(session)
    if session.plug(0, 4).type is not BUSY:
        raise Unsuitable(f"{session.lines[-1]!r} is not BUSY")
    session.notices()
    end(session)
    session.advance(PATIENCE)
    notices = session.notices()
    expect("DEP-BUSY-5", notices > 0, f"no configuration change notice in {PATIENCE:g} s", "one")


@check("DEP-BUSY-5", needs=Capability.NOTICES | Capability.PAUSE)
def notice_after_a_pause(session: Session) -> None:
    """The driver was told BUSY, and waits."""
    judge_notice(session, PAUSED)


@check("DEP-BUSY-5", needs=Capability.NOTICES | Capability.HOST_REFUSES)
def notice_once_the_host_can(session: Session) -> None:
    """The same where the host was short of memory."""
    judge_notice(session, SHORT)


# Requests that nobody should make.


@check("DEP-UNKNOWN-1")
def unknown_types(session: Session) -> None:
    """Type 0xFFFF was the end of the device's thread (cloud-hypervisor commit 97e16f249)."""
    ready(session)
    has_blocks = allowed(session, 1)
    for type_ in (4, 0x100, 0xFFFF):
        expect_answer("DEP-UNKNOWN-1", session.ask(type_, session.addr(0), 1), ERROR)
    expect_answer("DEP-UNKNOWN-1", session.plug(0) if has_blocks else session.unplug_all(), ACK)
