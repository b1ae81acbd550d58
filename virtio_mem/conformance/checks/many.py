"""Requests of as many blocks as drivers name: Linux 64 and more (128 MiB of 2 MiB blocks), Windows a whole free run.

What is right of four blocks can be wrong of hundreds: a number of eight bits, a map that is gone through by words, a
buffer of so many entries.
"""

from __future__ import annotations

from collections.abc import Iterator

from virtio_mem.conformance.check import (
    FINE,
    MANY,
    allowed,
    check,
    expect,
    expect_answer,
    granted,
    ready,
    usable_blocks,
)
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability
from virtio_mem.protocol import BlockState, ResponseType

ACK = ResponseType.ACK
PLUGGED, UNPLUGGED, MIXED = BlockState

COUNTS = (64, 256, 300)
"""Blocks of a request: those of a Linux memory block, what eight bits can't count, and no power of two."""

_CLAUSES = ("MEM-PLUG-8", "MEM-PLUG-9", "MEM-UNPLUG-8", "MEM-UNPLUG-9", "MEM-STATE-7", "MEM-STATE-8", "MEM-STATE-9")

_PIECE = 16
"""Blocks of a STATE, as all the other checks make them too."""


@check(*_CLAUSES, wishes=(MANY,))
def many_blocks(session: Session) -> None:
    """PLUG, STATE and UNPLUG of 64, 256 and 300 blocks, as far as the region has them.

    Of 64 only, where the device holds memory for what is plugged: that would be 600 MiB.
    """
    _judge(session, spares=session.can(Capability.HELD))


@check(*_CLAUSES, needs=Capability.WISH, wishes=(FINE,))
def many_small_blocks(session: Session) -> None:
    """The same of blocks that are small, so that all of them are little memory."""
    _judge(session, spares=False)


def _judge(session: Session, *, spares: bool) -> None:
    ready(session, COUNTS[0])
    for count in COUNTS:
        if not allowed(session, count) or usable_blocks(session) < count:  # what is usable may follow the target
            break
        _plug(session, count)
        holds = spares and session.held(0, count) > 0
        _unplug(session, count)
        _one_among_many(session, count)
        if holds:
            break


def _plug(session: Session, count: int) -> None:
    """All of them in one request, then each end of them taken out and put back."""
    expect_answer("MEM-PLUG-8", session.plug(0, count), ACK)
    _expect_size(session, "MEM-PLUG-9", count)
    _expect_each(session, "MEM-PLUG-8", count, PLUGGED)
    expect_answer("MEM-STATE-7", session.state(0, count), ACK, PLUGGED)
    if usable_blocks(session) > count:
        expect_answer("MEM-PLUG-8", session.state(count), ACK, UNPLUGGED)
        expect_answer("MEM-STATE-9", session.state(0, count + 1), ACK, MIXED)
    for block in (0, count // 2, count - 1):
        granted(session, session.unplug(block))
        expect_answer("MEM-STATE-9", session.state(0, count), ACK, MIXED)
        granted(session, session.plug(block))


def _unplug(session: Session, count: int) -> None:
    """All of them in one request."""
    expect_answer("MEM-UNPLUG-8", session.unplug(0, count), ACK)
    _expect_size(session, "MEM-UNPLUG-9", 0)
    _expect_each(session, "MEM-UNPLUG-8", count, UNPLUGGED)
    expect_answer("MEM-STATE-8", session.state(0, count), ACK, UNPLUGGED)


def _one_among_many(session: Session, count: int) -> None:
    """The first, one in the middle or the last is plugged, and no other."""
    for block in (0, count // 2, count - 1):
        granted(session, session.plug(block))
        expect_answer("MEM-STATE-9", session.state(0, count), ACK, MIXED)
        granted(session, session.unplug(block))


def _expect_size(session: Session, clause: str, blocks: int) -> None:
    plugged = session.config().plugged_size
    expect(clause, plugged == blocks * session.block_size, f"plugged_size {plugged}", f"{blocks} blocks")


def _expect_each(session: Session, clause: str, count: int, state: BlockState) -> None:
    """Violation of `clause` unless each of the blocks is in `state`: in pieces, and one by one at the edges."""
    for first, nb_blocks in _pieces(count):
        expect_answer(clause, session.state(first, nb_blocks), ACK, state)


def _pieces(count: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, _PIECE):
        yield first, min(_PIECE, count - first)
    edges = {1 << bits for bits in range(3, count.bit_length())} | {count}
    for block in sorted({0} | {edge + by for edge in edges for by in (-1, 0) if edge + by < count}):
        yield block, 1
