"""Configuration change notices: when one has to come, and when one should not."""

from __future__ import annotations

from virtio_mem.conformance.check import Unsuitable, check, expect, granted, ready, set_target
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability

HEARS = Capability.NOTICES | Capability.SET_TARGET

PATIENCE = 3
"""Seconds that a notice has to come."""


def some(session: Session, clause: str) -> None:
    """Violation of `clause` unless a notice comes. It need not be there at once."""
    for _ in range(PATIENCE):
        if session.notices():
            return
        session.advance(1)
    expect(clause, session.notices() > 0, "no configuration change notice", "one")


@check("MEM-CONF-18", needs=HEARS)
def target_changes(session: Session) -> None:
    """Up and down, a new target brings a notice each time."""
    ready(session, 4)
    for blocks in (8, 2, 0, 3):
        session.notices()
        set_target(session, blocks)
        some(session, "MEM-CONF-18")


@check("MEM-CONF-17", needs=HEARS)
def usable_region_changes(session: Session) -> None:
    """A usable region that grows with the target brings a notice, be it the target's own."""
    ready(session, 1)
    before = session.config().usable_region_size
    session.notices()
    set_target(session, session.nb_blocks)
    if session.config().usable_region_size != before:
        some(session, "MEM-CONF-17")


@check("MEM-CONF-19", needs=HEARS)
def plugging_is_no_news(session: Session) -> None:
    """plugged_size alone changes silently: the driver did it itself."""
    ready(session, 8)
    session.notices()
    usable = session.config().usable_region_size
    granted(session, session.plug(0, 4))
    granted(session, session.unplug(1, 2))
    granted(session, session.plug(1, 1))
    if any(line.endswith("-> BUSY") for line in session.lines):
        raise Unsuitable("the device was busy, which it may be, and there has to be a notice of its end")
    notices = session.notices()
    if session.config().usable_region_size != usable:
        raise Unsuitable("the usable region changes with what is plugged, and there has to be a notice of it")
    expect("MEM-CONF-19", notices == 0, f"{notices} configuration change notices", "none")


@check("RESET-2", needs=HEARS)
def silence_after_a_reset(session: Session) -> None:
    """Between a reset and the next start of a driver there is nobody to be told of a new target."""
    ready(session, 4)
    session.notices()
    session.device_reset()
    set_target(session, 6)
    notices = session.notices()
    expect("RESET-2", notices == 0, f"{notices} configuration change notices", "none before a driver is there")
