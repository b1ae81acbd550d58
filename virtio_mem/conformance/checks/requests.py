"""PLUG, UNPLUG, UNPLUG ALL and STATE: what is granted, what is not, and what each of them changes."""

from __future__ import annotations

from vhost_user.units import GIB, MIB
from virtio_mem.conformance.check import (
    check,
    expect,
    expect_answer,
    granted,
    need_blocks,
    ready,
    set_target,
    tight,
    usable_blocks,
)
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability, Wish
from virtio_mem.protocol import RESPONSE_SIZE, BlockState, RequestType, ResponseType

ACK, NACK, BUSY, ERROR = ResponseType
PLUGGED, UNPLUGGED, MIXED = BlockState

HUGE = Wish(region_size=256 * GIB, block_size=2 * MIB, requested_size=256 * GIB)
"""131,072 blocks: twice what 16 bits can count."""


MANY = 256
"""Requests that a check makes of one kind."""


def expect_blocks(session: Session, clause: str, blocks: int) -> None:
    """Violation of `clause` unless so many blocks are plugged."""
    plugged = session.config().plugged_size
    expect(clause, plugged == blocks * session.block_size, f"plugged_size {plugged}", f"{blocks} blocks")


def expect_states(session: Session, clause: str, plugged: set[int], among: int) -> None:
    """Violation of `clause` unless of the first `among` blocks just `plugged` are plugged."""
    for block in range(among):
        expect_answer(clause, session.state(block), ACK, PLUGGED if block in plugged else UNPLUGGED)


@check("MEM-PLUG-8", "MEM-PLUG-9", "MEM-WIRE-1", "MEM-WIRE-2")
def plug(session: Session) -> None:
    """Granted, and then just these blocks are plugged, in one request and in several."""
    ready(session, 8)
    expect_answer("MEM-PLUG-8", session.plug(2, 3), ACK)
    expect_blocks(session, "MEM-PLUG-9", 3)
    expect_states(session, "MEM-PLUG-8", {2, 3, 4}, 8)
    expect_answer("MEM-PLUG-8", session.plug(0), ACK)
    expect_answer("MEM-PLUG-8", session.plug(5), ACK)
    expect_blocks(session, "MEM-PLUG-9", 5)
    expect_states(session, "MEM-WIRE-1", {0, 2, 3, 4, 5}, 8)


@check("MEM-UNPLUG-8", "MEM-UNPLUG-9", "MEM-WIRE-2")
def unplug(session: Session) -> None:
    """Granted, and then just these blocks are unplugged: one end, the other, the middle, over two plugs."""
    ready(session, 12)
    granted(session, session.plug(0, 6))
    granted(session, session.plug(6, 6))
    left = set(range(12))
    for block, nb_blocks in ((0, 1), (11, 1), (5, 2), (2, 1)):
        expect_answer("MEM-UNPLUG-8", session.unplug(block, nb_blocks), ACK)
        left -= set(range(block, block + nb_blocks))
        expect_blocks(session, "MEM-UNPLUG-9", len(left))
    expect_states(session, "MEM-UNPLUG-8", left, 12)


@check("MEM-PLUG-6")
def plug_of_plugged_blocks(session: Session) -> None:
    """One plugged block among those named, wherever it stands, is too many; none of the others is plugged then."""
    ready(session, 16)
    granted(session, session.plug(5, 2))
    for block, nb_blocks in ((5, 1), (5, 2), (4, 2), (6, 2), (3, 8), (0, 12)):
        expect_answer("MEM-PLUG-6", session.plug(block, nb_blocks), ERROR)
    expect_blocks(session, "MEM-PLUG-6", 2)


@check("MEM-UNPLUG-6")
def unplug_of_unplugged_blocks(session: Session) -> None:
    """One unplugged block among those named, wherever it stands, is too many; none of the others goes then."""
    ready(session, 16)
    granted(session, session.plug(5, 4))
    granted(session, session.unplug(7, 1))
    for block, nb_blocks in ((4, 1), (4, 2), (6, 2), (5, 4), (8, 2), (0, 12)):
        expect_answer("MEM-UNPLUG-6", session.unplug(block, nb_blocks), ERROR)
    expect_blocks(session, "MEM-UNPLUG-6", 3)


@check("MEM-TARGET-1")
def nothing_beyond_the_target(session: Session) -> None:
    """With the target met, no PLUG is granted, be it of one block or of many."""
    target = tight(session, 4)
    need_blocks(session, target + 4)
    if target:
        granted(session, session.plug(0, target))
    for nb_blocks in (1, 4):
        answer = session.plug(target, nb_blocks)
        expect("MEM-TARGET-1", answer.type in (NACK, BUSY, ERROR), f"the answer {answer}", "none that grants it")
    expect_blocks(session, "MEM-TARGET-1", target)


@check("MEM-TARGET-1", needs=Capability.SET_TARGET)
def nothing_beyond_a_target_that_was_lowered(session: Session) -> None:
    """With more plugged than the target allows, no PLUG is granted."""
    ready(session, 8)
    granted(session, session.plug(0, 6))
    for target in (4, 0):
        set_target(session, target)
        answer = session.plug(6)
        expect("MEM-TARGET-1", answer.type in (NACK, BUSY, ERROR), f"the answer {answer}", "none that grants it")
    expect_blocks(session, "MEM-TARGET-1", 6)


@check("MEM-UNPLUGALL-4", "MEM-UNPLUGALL-5", "MEM-WIRE-2")
def unplug_all(session: Session) -> None:
    """From a run, from pieces: afterwards no block is plugged."""
    ready(session, 8)
    for runs in (((0, 4),), ((1, 1), (3, 1), (5, 3))):
        for block, nb_blocks in runs:
            granted(session, session.plug(block, nb_blocks))
        expect_answer("MEM-UNPLUGALL-4", session.unplug_all(), ACK)
        expect_blocks(session, "MEM-UNPLUGALL-5", 0)
        expect_states(session, "MEM-UNPLUGALL-4", set(), 8)


@check("MEM-UNPLUGALL-4")
def unplug_all_of_nothing(session: Session) -> None:
    """That no block is plugged is no obstacle, also a second time."""
    ready(session)
    for _ in range(2):
        expect_answer("MEM-UNPLUGALL-4", session.unplug_all(), ACK)


@check("MEM-UNPLUGALL-4", "MEM-UNPLUGALL-5", "MEM-STATE-8", needs=Capability.WISH, wishes=(HUGE,))
def unplug_all_of_many_blocks(session: Session) -> None:
    """In a region of 256 GiB the last block goes with the others.

    Their number was cut to 16 bits, so blocks from 128 GiB on stayed plugged (cloud-hypervisor commit dfee31a84).
    """
    ready(session, 2, region=70_000)
    last = usable_blocks(session) - 1
    granted(session, session.plug(last))
    granted(session, session.plug(0))
    expect_answer("MEM-UNPLUGALL-4", session.unplug_all(), ACK)
    expect_answer("MEM-STATE-8", session.state(last), ACK, UNPLUGGED)
    expect_blocks(session, "MEM-UNPLUGALL-5", 0)


@check("MEM-STATE-6", "MEM-STATE-7", "MEM-STATE-8", "MEM-STATE-9", "MEM-WIRE-3", "MEM-WIRE-5")
def states_of_ranges(session: Session) -> None:
    """Ranges over blocks of one kind and of both, cut in each way."""
    ready(session, 8)
    granted(session, session.plug(2, 3))
    for nb_blocks in (1, 2, 3):
        expect_answer("MEM-STATE-7", session.state(2, nb_blocks), ACK, PLUGGED)
    for block, nb_blocks in ((0, 2), (1, 1), (5, 1), (5, 3)):
        expect_answer("MEM-STATE-8", session.state(block, nb_blocks), ACK, UNPLUGGED)
    for block, nb_blocks in ((1, 2), (4, 2), (1, 5), (0, 8), (4, 4)):
        expect_answer("MEM-STATE-9", session.state(block, nb_blocks), ACK, MIXED)
    granted(session, session.unplug(3, 1))
    expect_answer("MEM-STATE-9", session.state(2, 3), ACK, MIXED)
    answer = session.state(3)
    expect_answer("MEM-STATE-6", answer, ACK, UNPLUGGED)
    length = answer.used.length
    expect("MEM-WIRE-3", length == RESPONSE_SIZE, f"a response of {length} bytes", RESPONSE_SIZE)
    expect_answer("MEM-WIRE-5", session.state(0, 8), ACK, MIXED)


@check("MEM-STATE-8", "MEM-STATE-9", needs=Capability.WISH, wishes=(HUGE,))
def states_of_long_ranges(session: Session) -> None:
    """As many blocks as a request can name, with one of them plugged at the far end."""
    ready(session, 1, region=65_540)
    for block in (65_534, 0):
        granted(session, session.plug(block))
        expect_answer("MEM-STATE-9", session.state(0, 65_535), ACK, MIXED)
        granted(session, session.unplug(block))
        expect_answer("MEM-STATE-8", session.state(0, 65_535), ACK, UNPLUGGED)


@check("MEM-STATE-6", needs=Capability.PAUSE)
def state_while_paused(session: Session) -> None:
    """STATE changes nothing, so there is no time at which it can't be served."""
    ready(session, 4)
    granted(session, session.plug(0, 2))
    session.pause(True)
    expect_answer("MEM-STATE-6", session.state(0, 2), ACK, PLUGGED)
    expect_answer("MEM-STATE-6", session.state(0, 4), ACK, MIXED)


@check("MEM-STATE-6", needs=Capability.HOST_REFUSES)
def state_while_the_host_refuses(session: Session) -> None:
    """The same while the host has no memory."""
    ready(session, 4)
    granted(session, session.plug(0, 2))
    session.refuse(True)
    expect_answer("MEM-STATE-6", session.state(0, 4), ACK, MIXED)


@check("MEM-START-1", needs=Capability.RESTART)
def every_block_is_unplugged_at_first(session: Session) -> None:
    """STATE over the whole usable region of a new device, or over its ends where it is vast."""
    ready(session, 1)
    usable = usable_blocks(session)
    starts = range(0, usable, 65_535)
    for block in starts if len(starts) <= 2 * MANY else (*starts[:MANY], *starts[-MANY:]):
        expect_answer("MEM-START-1", session.state(block, min(65_535, usable - block)), ACK, UNPLUGGED)


@check("MEM-PLUG-8", "MEM-REGION-1", needs=Capability.SET_TARGET)
def plug_up_to_the_last_usable_byte(session: Session) -> None:
    """A target of the whole region can be met to its last block (cloud-hypervisor issue 6736), and not beyond."""
    ready(session, 1)
    set_target(session, session.nb_blocks)
    last = usable_blocks(session) - 1
    expect_answer("MEM-PLUG-8", session.plug(last), ACK)
    expect_answer("MEM-PLUG-8", session.state(last), ACK, PLUGGED)
    answer = session.ask(RequestType.PLUG, session.addr(last + 1), 1)
    expect("MEM-REGION-1", answer.type is not ACK, f"the answer {answer}", "none that grants it")


@check("MEM-WIRE-4")
def numbers_of_answers(session: Session) -> None:
    """ACK is 0, ERROR is 3."""
    ready(session, 1)
    expect_answer("MEM-WIRE-4", session.plug(0), ACK)
    expect_answer("MEM-WIRE-4", session.plug(0), ERROR)
