"""Checks: short scripts, each of which shows whether a device keeps one clause, or a few that belong together.

    @check("MEM-PLUG-4")
    def plug_of_no_blocks(session: Session) -> None:
        '''Nothing is no range.'''
        ready(session, blocks=1)
        expect_answer("MEM-PLUG-4", session.plug(0, 0), ERROR)

A check ends in one of four ways: it returns, and all its clauses hold as far as it can tell; it raises Violation; it
raises Unsuitable, since the device is of a kind on which this can't be shown; or it raises NotOffered. Which check is
run says `needs`: what the target must be able to do. Each gets a device that has just been started, one for each of
`wishes`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vhost_user.units import GIB, KIB, MIB
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability, Wish
from virtio_mem.conformance.words import Answer
from virtio_mem.protocol import BlockState, Feature, ResponseType

CheckFunction = Callable[[Session], None]

WISH = Wish(region_size=1 * GIB, block_size=2 * MIB, requested_size=64 * MIB)
"""What most checks would like: 32 blocks to plug of 512, and with most devices some that are not usable yet."""

MANY = Wish(region_size=1 * GIB, block_size=2 * MIB, requested_size=1 * GIB)
"""The same blocks, all of which may be plugged: as many as drivers name in one request."""

FINE = Wish(region_size=64 * MIB, block_size=128 * KIB, requested_size=64 * MIB)
"""As many small ones, for devices that hold memory for what is plugged."""

NOTHING = Capability(0)
MOMENT = 3.0
"""Seconds that a device which is BUSY of its own accord has until it is asked again."""

_MOST_PLUGGED = 4096
"""Blocks: a check that has to meet the target plugs no more than that."""

_NOT_BUSY = ("DEP-BUSY-", "DEP-USABLE-", "MEM-STATE-")
"""Clauses that a device violates by BUSY in the place of ACK."""


class Violation(Exception):  # noqa: N818
    """The device broke `clause`: `was` is what it did, `should` what it should have done, both in words."""

    def __init__(self, clause: str, was: str, should: str) -> None:
        super().__init__(clause, was, should)
        self.clause = clause
        self.was = was
        self.should = should

    def __str__(self) -> str:
        return f"{self.clause}: {self.was}; should be: {self.should}"


class Unsuitable(Exception):  # noqa: N818
    """What a check is about can't be shown on this device. `reason` says why; that is no fault of the device."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NotOffered(Exception):  # noqa: N818
    """What a check is about belongs to a feature that the device does not offer. `feature` is its name."""

    def __init__(self, feature: str) -> None:
        super().__init__(feature)
        self.feature = feature


@dataclass(frozen=True)
class Check:
    """One check. `clauses` are those that it can show; `slow` ones are left out of the profile quick."""

    name: str
    clauses: tuple[str, ...]
    run: CheckFunction
    needs: Capability
    wishes: tuple[Wish, ...]
    slow: bool

    @property
    def says(self) -> str:
        """The first paragraph of its docstring, on one line."""
        return " ".join((self.run.__doc__ or "").split("\n\n")[0].split())


_checks: dict[str, Check] = {}


def check(
    *clauses: str, needs: Capability = NOTHING, wishes: tuple[Wish, ...] = (WISH,), slow: bool = False
) -> Callable[[CheckFunction], CheckFunction]:
    """Register a function as the check of `clauses`."""

    def register(run: CheckFunction) -> CheckFunction:
        name = f"{run.__module__.rpartition('.')[2]}.{run.__name__}"
        assert clauses and name not in _checks, name
        _checks[name] = Check(name, clauses, run, needs, wishes, slow)
        return run

    return register


def all_checks() -> tuple[Check, ...]:
    """Every check there is, module by module, each in the order in which it is written."""
    package = importlib.import_module("virtio_mem.conformance.checks")
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return tuple(_checks.values())


def checks_of(clause: str) -> Iterator[Check]:
    """Those that can show `clause`."""
    return (one for one in all_checks() if clause in one.clauses)


# What a check says.


def expect(clause: str, holds: bool, was: object, should: object) -> None:
    """Violation of `clause` unless `holds`; the two others say in words what was there and what should be."""
    if not holds:
        raise Violation(clause, str(was), str(should))


def expect_answer(clause: str, answer: Answer, type_: ResponseType, state: BlockState | None = None) -> None:
    """Violation of `clause` unless the device answered just so.

    Unsuitable where it said BUSY instead of ACK, which the standard allows it (MEM-PLUG-7, MEM-UNPLUG-7,
    MEM-UNPLUGALL-3): not to STATE, and not where the rule is about just that.
    """
    may_wait = type_ is ResponseType.ACK and state is None and not clause.startswith(_NOT_BUSY)
    if may_wait and answer.type is ResponseType.BUSY:
        raise Unsuitable("the device is busy, which it may be")
    should = type_.name if state is None else f"{type_.name} {state.name}"
    expect(clause, (answer.type, answer.state) == (type_, state), f"the answer {answer}", should)


# What a check needs.


def ready(session: Session, blocks: int = 0, *, region: int = 0, features: int | None = None) -> None:
    """Start the driver, with the target at `blocks` blocks or more, in a region of `region` blocks or more.

    Unsuitable where this device is smaller, or has a smaller target that can't be moved, or wants other features.
    """
    if not session.block_size:
        raise Unsuitable("block_size is 0")
    if not session.begin(features):
        raise Unsuitable("the device does not agree to these features")
    need_blocks(session, max(blocks, region))
    if not allowed(session, blocks):
        raise Unsuitable(f"the host's target is below {blocks} blocks and can't be moved")


def allowed(session: Session, blocks: int) -> bool:
    """Whether the target is `blocks` blocks or more now. It is moved there where it can be, and has to be."""
    if session.config().requested_size >= blocks * session.block_size:
        return True
    if not session.can(Capability.SET_TARGET) or session.nb_blocks < blocks:
        return False
    return session.set_target(blocks * session.block_size)


def tight(session: Session, blocks: int, room: int = 0) -> int:
    """Start the driver with a target of just `blocks` where it can be moved; the target, in blocks, is returned.

    `room` blocks more than those are usable, so that a PLUG of them is out of order by the target alone. Unsuitable
    where the target is far more and can't be moved; where it is less, it is.
    """
    ready(session, region=blocks + room)
    if session.can(Capability.SET_TARGET):
        set_target(session, blocks + room)
        set_target(session, blocks)
    target = session.config().requested_size // session.block_size
    if target > _MOST_PLUGGED:
        raise Unsuitable(f"the host's target is {target} blocks and can't be moved")
    if usable_blocks(session) < target + room:
        raise Unsuitable(f"{room} blocks more than the target are not usable")
    return target


def need_blocks(session: Session, blocks: int) -> None:
    """Unsuitable where the region has fewer blocks."""
    if session.nb_blocks < blocks:
        raise Unsuitable(f"the region has {session.nb_blocks} blocks, and this takes {blocks}")


def set_target(session: Session, blocks: int) -> None:
    """The host's target, in blocks. Unsuitable where the host's side refuses it."""
    if not session.set_target(blocks * session.block_size):
        raise Unsuitable(f"the host's side refuses a target of {blocks} blocks")


def need_feature(session: Session, feature: Feature) -> None:
    """NotOffered where the device lacks it."""
    if feature not in Feature(session.subject.offered_features & sum(Feature)):
        raise NotOffered(feature.name or str(int(feature)))


def granted(session: Session, answer: Answer) -> None:
    """The answer to the last request, a step on the way that the device may put off but not turn down. Unsuitable where
    it does, a second time where it was BUSY.

    That a plain PLUG, UNPLUG or UNPLUG ALL is granted is a matter of checks of their own.
    """
    if answer.type is ResponseType.BUSY:
        session.advance(MOMENT)
        answer = session.again()
    if answer.type is not ResponseType.ACK:
        raise Unsuitable(f"{session.lines[-1]!r} is no ACK")


def usable_blocks(session: Session) -> int:
    """Blocks in the usable region now."""
    return session.config().usable_region_size // session.block_size
