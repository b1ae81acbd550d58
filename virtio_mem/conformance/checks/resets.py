"""Device reset and system reset."""

from __future__ import annotations

from virtio_mem.conformance.check import check, expect, expect_answer, granted, ready, set_target
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability
from virtio_mem.protocol import BlockState, ResponseType

ACK = ResponseType.ACK
PLUGGED, UNPLUGGED, MIXED = BlockState


@check("MEM-INIT-2")
def device_reset_keeps_blocks(session: Session) -> None:
    """What is plugged stays plugged, and nothing else is."""
    ready(session, 8)
    granted(session, session.plug(0, 2))
    granted(session, session.plug(5, 1))
    for _ in range(2):
        session.device_reset()
        plugged = session.config().plugged_size
        expect("MEM-INIT-2", plugged == 3 * session.block_size, f"plugged_size {plugged}", "3 blocks")
        session.begin()
        for block in range(8):
            state = PLUGGED if block in {0, 1, 5} else UNPLUGGED
            expect_answer("MEM-INIT-2", session.state(block), ACK, state)


@check("MEM-INIT-3", needs=Capability.CONTENT)
def device_reset_keeps_contents(session: Session) -> None:
    """Each byte of plugged memory is what it was."""
    ready(session, 8)
    granted(session, session.plug(0, 2))
    granted(session, session.plug(5, 1))
    session.fill(0, 2, seed=1)
    session.fill(5, 1, seed=1)
    session.device_reset()
    expect("MEM-INIT-3", session.same(0, 2, seed=1), "other bytes", "the bytes from before the reset")
    session.begin()
    same = session.same(0, 2, seed=1) and session.same(5, 1, seed=1)
    expect("MEM-INIT-3", same, "other bytes", "the bytes from before the reset")


@check("MEM-OP-11", needs=Capability.SYSTEM_RESET)
def system_reset_unplugs(session: Session) -> None:
    """After a reset of the machine no block is plugged, by plugged_size and by STATE."""
    ready(session, 8)
    granted(session, session.plug(0, 2))
    granted(session, session.plug(5, 1))
    session.system_reset()
    session.begin()
    plugged = session.config().plugged_size
    expect("MEM-OP-11", plugged == 0, f"plugged_size {plugged}", 0)
    expect_answer("MEM-OP-11", session.state(0, 8), ACK, UNPLUGGED)


@check("MEM-OP-11", needs=Capability.SYSTEM_RESET | Capability.SET_TARGET)
def system_reset_and_a_lower_target(session: Session) -> None:
    """What was plugged before the reset does not come back with another target (cloud-hypervisor issue 1593)."""
    ready(session, 8)
    granted(session, session.plug(0, 6))
    session.system_reset()
    set_target(session, 2)
    session.begin()
    expect_answer("MEM-OP-11", session.state(0, 6), ACK, UNPLUGGED)
    granted(session, session.plug(4, 2))
    plugged = session.config().plugged_size
    expect("MEM-OP-11", plugged == 2 * session.block_size, f"plugged_size {plugged}", "2 blocks")
