"""What the host does to a device: targets that can't be, targets at odd times, resets, and a host that is short."""

from __future__ import annotations

from vhost_user.units import GIB, MIB
from virtio_mem.conformance.check import (
    Unsuitable,
    check,
    expect,
    expect_answer,
    granted,
    need_blocks,
    ready,
    set_target,
    usable_blocks,
)
from virtio_mem.conformance.checks.dependable import PATIENCE, soon
from virtio_mem.conformance.checks.notices import some
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability, Wish
from virtio_mem.conformance.words import config_words
from virtio_mem.protocol import BlockState, ResponseType

ACK, NACK, BUSY, ERROR = ResponseType

EIGHT_GIB = Wish(region_size=8 * GIB, block_size=2 * MIB, requested_size=64 * MIB)
"""Sizes that take more than 32 bits."""


# Targets.


@check("MEM-CONF-14", "DEP-TARGET-4", needs=Capability.SET_TARGET)
def targets_between_blocks(session: Session) -> None:
    """A target that is no multiple of block_size is refused, or rounded: it never shows as it is.

    Refused, it leaves the target that there was.
    """
    ready(session, 4)
    for size in (session.block_size // 2, session.block_size + 4096, 6 * session.block_size - 1):
        before = session.config()
        taken = session.set_target(size)
        after = session.config()
        whole = after.requested_size % session.block_size == 0
        expect("MEM-CONF-14", whole, f"requested_size {after.requested_size}", f"a multiple of {session.block_size}")
        if not taken:
            expect("DEP-TARGET-4", after == before, config_words(after), f"{config_words(before)}, as it was")


@check("MEM-LAYOUT-3", "MEM-CONF-8", needs=Capability.SET_TARGET)
def target_of_the_whole_region(session: Session) -> None:
    """The usable region grows to the region's end, and no further."""
    ready(session, 1)
    for blocks in (session.nb_blocks - 1, session.nb_blocks):
        set_target(session, blocks)
        config = session.config()
        usable, region = config.usable_region_size, config.region_size
        expect("MEM-LAYOUT-3", usable <= region, f"usable_region_size {usable}", f"region_size {region} or less")
        requested = config.requested_size
        expect("MEM-CONF-8", usable >= requested, f"usable_region_size {usable}", f"requested_size {requested} or more")


@check("DEP-TARGET-4", needs=Capability.SET_TARGET | Capability.WISH, wishes=(EIGHT_GIB,))
def targets_beyond_four_gib(session: Session) -> None:
    """A size that is small modulo 2**32 is not a small target (firecracker pull request 6076 has such a one)."""
    need_blocks(session, EIGHT_GIB.region_size // EIGHT_GIB.block_size)
    ready(session)
    for size in (4 * GIB, 4 * GIB + 64 * MIB):
        if not session.set_target(size):
            raise Unsuitable(f"the host's side refuses a target of {size} bytes")
        requested = session.config().requested_size
        expect("DEP-TARGET-4", requested == size, f"requested_size {requested}", size)


@check("DEP-TARGET-4", needs=Capability.SET_TARGET)
def target_outlives_a_device_reset(session: Session) -> None:
    """It is the host's, and a driver that comes anew finds it."""
    ready(session, 4)
    set_target(session, 3)
    session.device_reset()
    requested = session.config().requested_size
    expect("DEP-TARGET-4", requested == 3 * session.block_size, f"requested_size {requested}", "3 blocks")


@check("DEP-TARGET-1", needs=Capability.SET_TARGET)
def target_at_any_time(session: Session) -> None:
    """What the host may set for a driver it may set before there is one, and between two of them."""
    need_blocks(session, 6)
    taken = [session.set_target(6 * session.block_size)]
    ready(session)
    if not session.set_target(5 * session.block_size):
        raise Unsuitable("the host's side refuses a target of 5 blocks")
    session.device_reset()
    taken.append(session.set_target(4 * session.block_size))
    expect("DEP-TARGET-1", all(taken), "a target refused while there was no driver", "taken, as with a driver")


@check("DEP-TARGET-2", needs=Capability.SET_TARGET)
def same_target_is_no_mistake(session: Session) -> None:
    """Whoever is not sure that a target arrived sets it again (cloud-hypervisor takes that for an error)."""
    ready(session, 4)
    set_target(session, 5)
    expect("DEP-TARGET-2", session.set_target(5 * session.block_size), "the second time refused", "taken")


@check("MEM-CONF-17", needs=Capability.NOTICES)
def usable_region_and_requests(session: Session) -> None:
    """Where a PLUG or an UNPLUG changes the usable region, there is a notice of it."""
    ready(session, 8)
    session.notices()
    usable = session.config().usable_region_size
    for ask, block in ((session.plug, 0), (session.plug, 4), (session.unplug, 2)):
        granted(session, ask(block, 4))
        before, usable = usable, session.config().usable_region_size
        if usable != before:
            some(session, "MEM-CONF-17")


# Resets.


@check("MEM-CONF-5")
def addr_whatever_is_plugged(session: Session) -> None:
    """addr is the region's, and not that of what is plugged in it."""
    ready(session, 4)
    addr = session.config().addr
    granted(session, session.plug(2, 2))
    now = session.config().addr
    expect("MEM-CONF-5", now == addr, f"addr {now:#x}", f"{addr:#x}, as before")


@check("MEM-CONF-7", needs=Capability.SYSTEM_RESET)
def size_after_a_system_reset(session: Session) -> None:
    """plugged_size is what STATE says, block by block (cloud-hypervisor issue 1593)."""
    ready(session, 6)
    granted(session, session.plug(0, 2))
    granted(session, session.plug(4, 1))
    session.system_reset()
    if not session.begin():
        raise Unsuitable("the device does not agree to the same features again")
    plugged = 0
    for block in range(min(6, usable_blocks(session))):
        plugged += session.state(block).state is BlockState.PLUGGED
    size = session.config().plugged_size
    expect("MEM-CONF-7", size == plugged * session.block_size, f"plugged_size {size}", f"{plugged} blocks")


@check("MEM-OP-11", needs=Capability.SYSTEM_RESET | Capability.SET_TARGET)
def system_reset_with_more_than_the_target(session: Session) -> None:
    """Blocks beyond the target go as well."""
    ready(session, 6)
    granted(session, session.plug(0, 6))
    set_target(session, 2)
    session.system_reset()
    size = session.config().plugged_size
    expect("MEM-OP-11", size == 0, f"plugged_size {size}", 0)


# The host's memory.


@check("MEM-OP-4", needs=Capability.CONTENT)
def plugged_anew(session: Session) -> None:
    """A block that was unplugged and plugged again is as good as any: nothing of its past comes after it."""
    ready(session, 8)
    granted(session, session.plug(0, 8))
    granted(session, session.unplug(2, 2))
    granted(session, session.plug(2, 2))
    session.fill(2, 2, seed=11)
    granted(session, session.unplug(5, 2))
    expect("MEM-OP-4", session.same(2, 2, seed=11), "other bytes after an UNPLUG elsewhere", "what was written")
    granted(session, session.plug(5, 1))
    expect("MEM-OP-4", session.same(2, 2, seed=11), "other bytes after a PLUG elsewhere", "what was written")


@check("DEP-REFUSED-1", needs=Capability.HOST_REFUSES | Capability.SET_TARGET)
def usable_region_after_a_refusal(session: Session) -> None:
    """An UNPLUG ALL that fails leaves the usable region as large as it is, though the target needs less."""
    ready(session, 2)
    set_target(session, session.nb_blocks)
    set_target(session, 2)
    granted(session, session.plug(0, 2))
    session.refuse(True)
    before = session.config()
    if session.unplug_all().type is ACK:
        raise Unsuitable("the device needs nothing of its host for UNPLUG ALL")
    after = session.config()
    expect("DEP-REFUSED-1", after == before, config_words(after), f"{config_words(before)}, as it was")


@check("DEP-BUSY-4", "DEP-REFUSED-1", needs=Capability.HOST_REFUSES)
def refused_several_times(session: Session) -> None:
    """However often the host refused: once it does not, each request is granted."""
    ready(session, 4)
    granted(session, session.plug(0, 2))
    session.refuse(True)
    for _ in range(3):
        for answer in (session.plug(2, 2), session.unplug(0, 1)):
            if answer.type is ACK:
                raise Unsuitable("the device needs nothing of its host")
    size = session.config().plugged_size
    expect("DEP-REFUSED-1", size == 2 * session.block_size, f"plugged_size {size}", "2 blocks, as before")
    session.refuse(False)
    expect_answer("DEP-BUSY-4", soon(session, lambda: session.unplug(0, 1)), ACK)
    expect_answer("DEP-BUSY-4", soon(session, lambda: session.plug(2, 2)), ACK)


@check("DEP-BUSY-5", needs=Capability.HOST_REFUSES | Capability.NOTICES)
def notice_each_time(session: Session) -> None:
    """A host that is short again and again: each time that it ends, a driver that was told BUSY hears of it."""
    ready(session, 4)
    for turn in range(3):
        session.refuse(True)
        if session.plug(0, 4).type is not BUSY:
            raise Unsuitable(f"{session.lines[-1]!r} is not BUSY")
        session.notices()
        session.refuse(False)
        session.advance(PATIENCE)
        expect("DEP-BUSY-5", session.notices() > 0, f"no notice after shortage number {turn + 1}", "one")
        granted(session, session.plug(0, 4))
        granted(session, session.unplug(0, 4))
