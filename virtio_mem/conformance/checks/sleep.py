"""A machine that goes to sleep, with its memory kept, and wakes up. Its driver begins anew after that."""

from __future__ import annotations

from virtio_mem.conformance.check import (
    Unsuitable,
    check,
    expect,
    expect_answer,
    granted,
    need_feature,
    ready,
)
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability
from virtio_mem.protocol import BlockState, Feature, ResponseType

ACK = ResponseType.ACK
PLUGGED = frozenset({0, 1, 5})


def some_plugged(session: Session) -> None:
    """Start the driver, with a run and a single block plugged, and something in them where that can be."""
    ready(session, 8)
    granted(session, session.plug(0, 2))
    granted(session, session.plug(5))
    if session.can(Capability.CONTENT):
        session.fill(0, 2, seed=1)


def still_plugged(session: Session, clause: str) -> None:
    """Violation of `clause` where plugged_size is another."""
    size = session.config().plugged_size
    should = len(PLUGGED) * session.block_size
    expect(clause, size == should, f"plugged_size {size}", f"{should}, as before")


@check("MEM-OP-12", needs=Capability.SLEEP)
def going_to_sleep(session: Session) -> None:
    """The blocks are there while the machine sleeps."""
    need_feature(session, Feature.PERSISTENT_SUSPEND)
    some_plugged(session)
    session.sleep()
    still_plugged(session, "MEM-OP-12")


@check("MEM-OP-13", needs=Capability.SLEEP)
def waking_up(session: Session) -> None:
    """Each block is as it was, and so is what was in them; also the second time."""
    need_feature(session, Feature.PERSISTENT_SUSPEND)
    some_plugged(session)
    for _ in range(2):
        session.sleep()
        session.wake()
        still_plugged(session, "MEM-OP-13")
        session.begin()
        for block in range(8):
            state = BlockState.PLUGGED if block in PLUGGED else BlockState.UNPLUGGED
            expect_answer("MEM-OP-13", session.state(block), ACK, state)
        if session.can(Capability.CONTENT):
            expect("MEM-OP-13", session.same(0, 2, seed=1), "other bytes", "the bytes from before")


@check("MEM-INIT-5", needs=Capability.SLEEP)
def sleep_that_keeps_blocks_is_told(session: Session) -> None:
    """A driver that does not find the feature keeps its machine awake."""
    some_plugged(session)
    session.sleep()
    session.wake()
    size = session.config().plugged_size
    offered = bool(session.subject.offered_features & Feature.PERSISTENT_SUSPEND)
    if not offered and size != len(PLUGGED) * session.block_size:
        raise Unsuitable("the machine loses blocks when it sleeps, so the feature can't be on offer")
    expect("MEM-INIT-5", offered, "PERSISTENT_SUSPEND not on offer", "on offer, since blocks outlive a sleep")
