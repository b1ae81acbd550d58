"""Drivers that exist, in whole scenarios: see `virtio_mem.conformance.drivers`."""

from __future__ import annotations

from vhost_user.errors import PeerError
from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.conformance.check import Unsuitable, Violation, check, expect, granted, ready, set_target, usable_blocks
from virtio_mem.conformance.drivers import WindowsDriver, linux_driver, memory_block_size
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability
from virtio_mem.guest.memory_driver import MemoryDriver, Outcome

PATIENCE = 10
"""Seconds within which a driver that was told BUSY has to be woken. Linux would come by itself after 50."""

_MOST_WOKEN = 64
"""Times that a driver which is told BUSY without a cause that we know of is woken and tries again, on one way."""

UNITS = 8
"""The usable region has to have so many of the units in which a scenario goes up and down, of which it plugs four."""

MOST_BLOCKS = 1 << 26
"""Of a region whose blocks a driver of ours keeps count of."""

_HEARS = Capability.SET_TARGET | Capability.NOTICES


def _unit(session: Session) -> int:
    """The unit in blocks: a 16th of a memory block, or a whole one where less leaves Linux none that is usable."""
    if session.nb_blocks > MOST_BLOCKS:
        raise Unsuitable(f"the region has more than {MOST_BLOCKS} blocks, which no driver keeps count of")
    size = memory_block_size(session)
    for unit in (max(1, size // 16 // session.block_size), size // session.block_size):
        if session.nb_blocks < UNITS * unit:
            raise Unsuitable("the region is too small for a driver to go up and down in")
        set_target(session, 4 * unit)
        if usable_blocks(session) >= max(UNITS * unit, size // session.block_size):
            return unit
    raise Unsuitable("the usable region has no room besides the target, which drivers want")


def _woken(session: Session) -> bool:
    """Whether a notice comes."""
    if not session.can(Capability.NOTICES):
        return False
    for _ in range(PATIENCE):
        if session.notices():
            return True
        session.advance(1)
    return session.notices() > 0


def _reaches(session: Session, driver: MemoryDriver, step: str) -> None:
    outcome = driver.run()
    for _ in range(_MOST_WOKEN):
        if outcome is not Outcome.BUSY or not _woken(session):
            break
        outcome = driver.run()
    expect("DEP-DRIVER-1", outcome is Outcome.REACHED, f"{step}: {outcome.value}", Outcome.REACHED.value)


@check("DEP-DRIVER-1", needs=Capability.SET_TARGET)
def linux_up_and_down(session: Session) -> None:
    """Boot with a target, go up, be told to go down while nothing can be freed, go down, up again, and to nothing."""
    ready(session)
    unit = _unit(session)
    driver, memory = linux_driver(session)
    for blocks in (2 * unit, 4 * unit, unit, 3 * unit):
        set_target(session, blocks)
        memory.pinned = blocks == unit
        if memory.pinned:
            expect("DEP-DRIVER-1", driver.run() is Outcome.STUCK, "a driver that was made to give", "one that is stuck")
            memory.pinned = False
        _reaches(session, driver, f"target {blocks} blocks")
    memory.check(0, session.nb_blocks)
    set_target(session, 0)
    _reaches(session, driver, "target 0")
    size = session.config().plugged_size
    expect("DEP-DRIVER-1", size == 0, f"plugged_size {size}", "0, with the driver at a target of 0")


@check("DEP-DRIVER-1", needs=Capability.SET_TARGET)
def linux_comes_back(session: Session) -> None:
    """Its module is loaded again: it finds memory plugged that it knows nothing of, and begins with UNPLUG ALL."""
    ready(session)
    unit = _unit(session)
    set_target(session, 3 * unit)
    _reaches(session, linux_driver(session)[0], "the first time")
    session.device_reset()
    if not session.begin():
        raise Violation("DEP-DRIVER-1", "the device refused the driver that it had before", "it takes it")
    driver, memory = linux_driver(session)
    _reaches(session, driver, "loaded again")
    memory.check(0, session.nb_blocks)


@check("DEP-DRIVER-1", needs=Capability.SET_TARGET | Capability.SYSTEM_RESET)
def linux_boots_again(session: Session) -> None:
    """The machine is reset; whether blocks are gone or not, the driver gets to the target."""
    ready(session)
    unit = _unit(session)
    set_target(session, 2 * unit)
    _reaches(session, linux_driver(session)[0], "the first boot")
    session.system_reset()
    if not session.begin():
        raise Violation("DEP-DRIVER-1", "the device refused the driver after a system reset", "it takes it")
    _reaches(session, linux_driver(session)[0], "the second boot")


@check("DEP-DRIVER-1", needs=_HEARS | Capability.PAUSE)
def linux_waits_for_a_pause(session: Session) -> None:
    """The device is paused on the way up, and again on the way down."""
    ready(session)
    unit = _unit(session)
    driver, memory = linux_driver(session)
    for before, after in ((2 * unit, 3 * unit), (3 * unit, unit)):
        set_target(session, before)
        _reaches(session, driver, f"target {before} blocks")
        session.notices()
        session.pause(True)
        set_target(session, after)
        outcome = driver.run()
        expect("DEP-DRIVER-1", outcome is Outcome.BUSY, f"paused: {outcome.value}", Outcome.BUSY.value)
        session.notices()
        session.pause(False)
        expect("DEP-DRIVER-1", _woken(session), "no notice after a pause", "one at which the driver tries again")
        _reaches(session, driver, "after a pause")
    memory.check(0, session.nb_blocks)


@check("DEP-DRIVER-1", needs=_HEARS | Capability.HOST_REFUSES)
def linux_waits_for_its_host(session: Session) -> None:
    """The host is short of memory in the middle; the driver is not broken by it."""
    ready(session)
    unit = _unit(session)
    driver, memory = linux_driver(session)
    set_target(session, unit)
    _reaches(session, driver, f"target {unit} blocks")
    session.refuse(True)
    set_target(session, 3 * unit)
    outcome = driver.run()
    if outcome is Outcome.REACHED:
        raise Unsuitable("the device needs nothing of its host for a PLUG")
    expect("DEP-DRIVER-1", outcome is Outcome.BUSY, f"the host short: {outcome.value}", Outcome.BUSY.value)
    session.notices()
    session.refuse(False)
    expect("DEP-DRIVER-1", _woken(session), "no notice after a shortage", "one at which the driver tries again")
    _reaches(session, driver, "after a shortage")
    memory.check(0, session.nb_blocks)


@check("DEP-DRIVER-2", needs=Capability.SET_TARGET)
def windows_up_and_down(session: Session) -> None:
    """Up in one PLUG, down in pieces, and up again where it left off."""
    ready(session)
    unit = _unit(session)
    driver = _windows(session, pieces=3)
    for blocks in (2 * unit, 4 * unit, unit, 3 * unit, 0):
        set_target(session, blocks)
        _gets_there(driver, f"target {blocks} blocks")


@check("DEP-DRIVER-2", needs=Capability.SET_TARGET)
def windows_comes_back(session: Session) -> None:
    """After a device reset it asks with STATE what is plugged, and goes on from there."""
    ready(session)
    unit = _unit(session)
    set_target(session, 3 * unit)
    before = _windows(session)
    _gets_there(before, "the first time")
    hole = Run(BlockIndex(1), 2)
    granted(session, session.unplug(*hole))
    before.blocks.unplug(hole)
    session.device_reset()
    if not session.begin():
        raise Violation("DEP-DRIVER-2", "the device refused the driver that it had before", "it takes it")
    after = _windows(session)
    same = list(after.blocks.plugged_runs()) == list(before.blocks.plugged_runs())
    expect("DEP-DRIVER-2", same, "other blocks plugged after a device reset", "those that were")
    set_target(session, 0)
    after.wake()
    _gets_there(after, "target 0")


@check("DEP-DRIVER-2", needs=_HEARS | Capability.PAUSE)
def windows_waits_for_a_pause(session: Session) -> None:
    """It has nothing but notices to go by: without one after BUSY it would wait for ever."""
    ready(session)
    unit = _unit(session)
    set_target(session, unit)
    driver = _windows(session)
    _gets_there(driver, f"target {unit} blocks")
    session.pause(True)
    set_target(session, 2 * unit)
    driver.wake()
    session.notices()
    session.pause(False)
    expect("DEP-DRIVER-2", _woken(session), "no notice after a pause", "one at which the driver tries again")
    _gets_there(driver, "after a pause")


def _windows(session: Session, pieces: int = 1) -> WindowsDriver:
    try:
        return WindowsDriver(session, pieces)
    except PeerError as error:
        raise Violation("DEP-DRIVER-2", str(error), "a device that the driver starts on") from error


def _gets_there(driver: WindowsDriver, step: str) -> None:
    reached = driver.wake()
    for _ in range(_MOST_WOKEN):
        if reached or not driver.busy or not _woken(driver.session):
            break
        reached = driver.wake()
    expect("DEP-DRIVER-2", reached, f"{step}: the driver has {driver.plugged_size} bytes", "the target reached at once")
