"""Feature bits: what is offered, and that it can be taken."""

from __future__ import annotations

from virtio_mem.conformance.check import Unsuitable, allowed, check, expect, expect_answer, need_feature, ready
from virtio_mem.conformance.session import KNOWN_FEATURES, Session
from virtio_mem.conformance.target import Capability
from virtio_mem.protocol import BlockState, Feature, ResponseType

KEPT = int(Feature.VERSION_1 | Feature.UNPLUGGED_INACCESSIBLE)
"""A device may insist on these (FEAT-8, MEM-INIT-1)."""


def optional(session: Session) -> list[Feature]:
    """What is on offer and known, and can be left."""
    offered = session.subject.offered_features & KNOWN_FEATURES & ~KEPT
    return [feature for feature in Feature if feature & offered]


def kept(session: Session) -> int:
    """What is on offer and may have to be taken."""
    return session.subject.offered_features & KEPT


def serves(session: Session, clause: str) -> None:
    """Violation of `clause` unless PLUG, STATE and UNPLUG of a block work, or what works without a target."""
    if not allowed(session, 1):
        expect_answer(clause, session.unplug_all(), ResponseType.ACK)
        return
    expect_answer(clause, session.plug(0), ResponseType.ACK)
    expect_answer(clause, session.state(0), ResponseType.ACK, BlockState.PLUGGED)
    expect_answer(clause, session.unplug(0), ResponseType.ACK)


def agrees(session: Session, clause: str, features: int) -> None:
    """Violation of `clause` unless the device agrees to `features`."""
    expect(clause, session.begin(features), f"no agreement to {features:#x}", "an agreement")


@check("FEAT-7")
def version_1(session: Session) -> None:
    """VIRTIO_F_VERSION_1 is on offer."""
    offered = session.subject.offered_features
    expect("FEAT-7", bool(offered & Feature.VERSION_1), f"the offer {offered:#x}", "bit 32 among it")


@check("FEAT-4")
def all_that_is_offered(session: Session) -> None:
    """A driver that takes the whole offer is not refused."""
    agreed = session.begin()
    if session.subject.offered_features & ~KNOWN_FEATURES and not agreed:
        raise Unsuitable("the device does not agree without features that the kit can't take")
    expect("FEAT-4", agreed, "no agreement to all that is offered", "an agreement")


@check("FEAT-2", "FEAT-4")
def every_selection(session: Session) -> None:
    """All features, none that can be left, each one alone and each one left out: agreed to, and the device serves."""
    ready(session)
    everything = sum(map(int, optional(session)))
    selections = [everything, 0]
    selections += [int(feature) for feature in optional(session)]
    selections += [everything & ~feature for feature in optional(session)]
    for selection in dict.fromkeys(selections):
        agrees(session, "FEAT-2", kept(session) | selection)
        serves(session, "FEAT-4")


@check("FEAT-5")
def agreed_again_after_a_device_reset(session: Session) -> None:
    """The same selection after each of three resets."""
    ready(session)
    features = session.features
    for _ in range(3):
        session.device_reset()
        agrees(session, "FEAT-5", features)


@check("FEAT-6", needs=Capability.SYSTEM_RESET)
def agreed_again_after_a_system_reset(session: Session) -> None:
    """The same selection after the machine was reset."""
    ready(session)
    features = session.features
    session.system_reset()
    agrees(session, "FEAT-6", features)


@check("MEM-FEAT-2")
def unplugged_inaccessible(session: Session) -> None:
    """Where it is on offer, a driver that takes it is served."""
    need_feature(session, Feature.UNPLUGGED_INACCESSIBLE)
    ready(session)
    agrees(session, "MEM-FEAT-2", kept(session))
    serves(session, "MEM-FEAT-2")


@check("MEM-FEAT-3")
def persistent_suspend(session: Session) -> None:
    """Where it is on offer, a driver that takes it is served."""
    need_feature(session, Feature.PERSISTENT_SUSPEND)
    ready(session)
    agrees(session, "MEM-FEAT-3", kept(session) | Feature.PERSISTENT_SUSPEND)
    serves(session, "MEM-FEAT-3")
