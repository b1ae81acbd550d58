"""Used buffer notifications that the driver asks for or not, and available buffer notifications that bring nothing.

A device may have forgotten, when its ring was started, which entry it told of last, and tell once more. So each look
here follows a plain request, by which it knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from virtio_mem.conformance.check import allowed, check, expect, expect_answer, need_feature, ready
from virtio_mem.conformance.checks.chains import Probe, probe
from virtio_mem.conformance.session import KNOWN_FEATURES, Session
from virtio_mem.conformance.target import Capability, Chain
from virtio_mem.conformance.words import Looked
from virtio_mem.protocol import BlockState, Feature, RequestType, ResponseType

OPEN = Capability.CHAINS | Capability.RING

NO_INTERRUPT = 1
"""VIRTQ_AVAIL_F_NO_INTERRUPT of a split ring, RING_EVENT_FLAGS_DISABLE of a packed one."""

FAR = (40, 1000, 2**15 + 40)
"""Entries ahead of the next one: further than any batch here."""

COUNTS = (1, 5, 1, 16)


def batches(session: Session, one: Probe, *, flags: int = 0, ahead: Sequence[int] = (0,)) -> Iterator[Looked]:
    """What is seen of each of some batches of requests, made while the driver's area says this."""
    for entries in ahead:
        for count in COUNTS:
            session.chain(Chain(one.request))
            chains = [Chain(one.request)] * min(count, session.subject.ring_size // 2)
            session.offer(chains, flags=flags, ahead=entries)
            session.kick()
            yield session.look()


def told(clause: str, looked: Looked) -> None:
    """Violation of `clause` unless a used buffer notification came."""
    expect(clause, looked.notified, "no used buffer notification", "one")


def left_alone(clause: str, looked: Looked) -> None:
    """Violation of `clause` unless none came."""
    expect(clause, not looked.notified, "a used buffer notification", "none, since none was wanted")


def split(session: Session, *, event_idx: bool) -> Probe:
    """Start the driver of a split ring. NotOffered where the device has no EVENT_IDX and this takes it."""
    if not event_idx:
        return probe(session, without=Feature.RING_PACKED | Feature.EVENT_IDX)
    need_feature(session, Feature.EVENT_IDX)
    return probe(session, without=Feature.RING_PACKED)


@check("RING-NOTIFY-1", needs=OPEN)
def used_event_without_event_idx(session: Session) -> None:
    """Whatever is in its place, with flags of 0 each batch brings a notification."""
    for looked in batches(session, split(session, event_idx=False), ahead=FAR):
        told("RING-NOTIFY-1", looked)


@check("RING-NOTIFY-2", needs=OPEN)
def no_interrupt_flag(session: Session) -> None:
    """Without EVENT_IDX a driver that polls sets a flag, and is not notified."""
    for looked in batches(session, split(session, event_idx=False), flags=NO_INTERRUPT):
        left_alone("RING-NOTIFY-2", looked)


@check("RING-NOTIFY-4", needs=OPEN)
def flag_with_event_idx(session: Session) -> None:
    """With EVENT_IDX the event alone decides: the flag that was for a driver that polls keeps nothing back."""
    for looked in batches(session, split(session, event_idx=True), flags=NO_INTERRUPT):
        told("RING-NOTIFY-4", looked)


@check("RING-NOTIFY-6", needs=OPEN)
def event_that_is_far_away(session: Session) -> None:
    """With EVENT_IDX a driver that names an entry which is not used yet is not notified."""
    for looked in batches(session, split(session, event_idx=True), ahead=FAR):
        left_alone("RING-NOTIFY-6", looked)


@check("RING-NOTIFY-7", needs=OPEN)
def used_flags_without_event_idx(session: Session) -> None:
    """Of the 16 bits one has a meaning, and the others stay 0."""
    for looked in batches(session, split(session, event_idx=False)):
        expect("RING-NOTIFY-7", looked.flags in (0, 1), f"used ring flags {looked.flags:#x}", "0 or 1")


@check("RING-NOTIFY-9", needs=OPEN)
def used_flags_with_event_idx(session: Session) -> None:
    """With EVENT_IDX no bit has a meaning: avail_event is in their place."""
    for looked in batches(session, split(session, event_idx=True)):
        expect("RING-NOTIFY-9", looked.flags == 0, f"used ring flags {looked.flags:#x}", "0")


@check("RING-NOTIFY-11", needs=OPEN)
def kicks_for_nothing(session: Session) -> None:
    """A driver that notifies of nothing, as it may where it can't tell in time that it need not."""
    one = probe(session)
    before = session.config()
    for _ in range(3):
        session.offer([])
        session.kick()
        session.kick()
        session.look(whole=False)
        after = session.config()
        expect("RING-NOTIFY-11", after == before, after, f"{before}, as it was")
        one.judge("RING-NOTIFY-11", session.chain(Chain(one.request)))


@check("RING-PACKED-10", needs=OPEN)
def disabled_on_a_packed_ring(session: Session) -> None:
    """A driver that polls has its event flags at 1, and is not notified."""
    need_feature(session, Feature.RING_PACKED)
    for looked in batches(session, probe(session, without=Feature.EVENT_IDX), flags=NO_INTERRUPT):
        left_alone("RING-PACKED-10", looked)


# Before there is a driver, and after.


@check("STATUS-2", "STATUS-3", needs=OPEN | Capability.START)
def offered_before_driver_ok(session: Session) -> None:
    """A driver that fills its ring first, and says DRIVER_OK then."""
    judge_early(session, kicks=False)


@check("STATUS-2", needs=OPEN | Capability.START)
def kicked_before_driver_ok(session: Session) -> None:
    """A driver that notifies before it may is still not served before DRIVER_OK."""
    judge_early(session, kicks=True, notices=False)


@check("STATUS-3", needs=OPEN | Capability.START)
def answered_before_driver_ok(session: Session) -> None:
    """A driver that notifies before it may is not notified before DRIVER_OK."""
    judge_early(session, kicks=True, takes=False)


def judge_early(session: Session, *, kicks: bool, takes: bool = True, notices: bool = True) -> None:
    """Nothing is taken, and nothing said, before DRIVER_OK."""
    one = probe(session)
    session.device_reset()
    session.prepare()
    session.offer([Chain(one.request)])
    if kicks:
        session.kick()
    looked = session.look(whole=False)
    if takes:
        expect("STATUS-2", looked.answers == [None], f"the answer {looked.answers[0]}", "none before DRIVER_OK")
    if notices:
        expect("STATUS-3", not looked.notified, "a used buffer notification", "none before DRIVER_OK")
    session.go()
    session.kick()
    (answer,) = session.look().answers
    if answer is not None and takes:
        one.judge("STATUS-2", answer)


@check("RESET-3", needs=OPEN)
def kicked_after_a_reset(session: Session) -> None:
    """The old ring lies where it was, with a PLUG on it, and belongs to the driver alone."""
    ready(session)
    has_blocks = allowed(session, 2)
    session.device_reset()
    session.offer([session.request(RequestType.PLUG, 1)])
    session.kick()
    looked = session.look(whole=False)
    expect("RESET-3", looked.answers == [None], f"the answer {looked.answers[0]}", "none before the next start")
    expect("RESET-3", not looked.notified, "a used buffer notification", "none before the next start")
    session.begin(session.subject.offered_features & KNOWN_FEATURES)
    if has_blocks:
        expect_answer("RESET-3", session.state(1), ResponseType.ACK, BlockState.UNPLUGGED)
