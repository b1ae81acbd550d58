"""Attacks by an IOMMU: translations that can't be, that never come, that go away, or that come without end."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import partial

from vhost_user.attack.attacker import HARMLESS, Attacker, NotReached
from vhost_user.attack.canary import WINDOW, Canary
from vhost_user.attack.theme import Outcome, Reaction, Theme
from vhost_user.errors import Disconnected, FieldError, TimedOut
from vhost_user.message import (
    U64,
    VIRTIO_F_IOMMU_PLATFORM,
    FrontendRequest,
    IotlbPermission,
    IotlbType,
    ProtocolFeature,
    VringState,
)

F = FrontendRequest
UPDATE, INVALIDATE = IotlbType.UPDATE, IotlbType.INVALIDATE
READ_WRITE = IotlbPermission.READ_WRITE
iotlb = Theme("iotlb")

_U64 = 2**64
_ACKED = HARMLESS | ProtocolFeature.BACKEND_REQ | ProtocolFeature.BACKEND_SEND_FD
_NEEDS = ProtocolFeature.BACKEND_REQ
_IOMMU = VIRTIO_F_IOMMU_PLATFORM

MANY = 20_000
"""Translations that a front end sends, each for a page of its own: far more than rings and requests have."""


def _behind(attacker: Attacker) -> Canary:
    """A channel, whose other end nobody reads, and one region behind an IOMMU."""
    attacker.negotiate(_ACKED, virtio=VIRTIO_F_IOMMU_PLATFORM)
    _, theirs = attacker.pair()
    with attacker.reaching("SET_BACKEND_REQ_FD"):
        attacker.line.tell(F.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
    return attacker.share()


def _entry(iova: int, size: int, user: int, perm: int = READ_WRITE, kind: int = UPDATE) -> bytes:
    return struct.pack("=QQQBB6x", iova, size, user, perm, kind)


def _sent(entry: tuple[int, int, int | None, int, int], attacker: Attacker) -> Outcome:
    canary = _behind(attacker)
    iova, size, user, perm, kind = entry
    body = _entry(iova, size, canary.user if user is None else user, perm, kind)
    return attacker.line.provoke(F.IOTLB_MSG, body)


_ENTRIES: tuple[tuple[str, str, str, tuple[int, int, int | None, int, int], str], ...] = (
    ("type-zero", "vhost-user: IOTLB", "of type 0", (0, 4096, None, 3, 0), ""),
    ("type-max", "vhost-user: IOTLB", "of type 255", (0, 4096, None, 3, 255), ""),
    ("miss", "vhost-user: IOTLB", "that is a miss, which only a back end has", (0, 4096, None, 3, IotlbType.MISS), ""),
    ("perm-max", "vhost-user: IOTLB", "with permission 255", (0, 4096, None, 255, UPDATE), ""),
    (
        "size-zero",
        "vhost-user: IOTLB",
        "of no bytes",
        (0, 0, None, 3, UPDATE),
        "some front ends mean 2**64 bytes by it",
    ),
    ("size-max", "vhost-user: IOTLB", "of 2**64 - 1 bytes", (0, _U64 - 1, None, 3, UPDATE), ""),
    ("iova-wrap", "vhost-user: IOTLB", "whose IOVAs wrap", (_U64 - 4096, 8192, None, 3, UPDATE), ""),
    ("user-wrap", "vhost-user: IOTLB", "whose user addresses wrap", (0, 8192, _U64 - 4096, 3, UPDATE), ""),
    (
        "outside",
        "vhost-user: IOTLB",
        "to where no memory is",
        (0, 4096, 1 << 40, 3, UPDATE),
        "it is looked at when it is used",
    ),
    (
        "past-end",
        "vhost-user: IOTLB",
        "that ends behind memory",
        (0, 2 * WINDOW, None, 3, UPDATE),
        "it is looked at when it is used",
    ),
    (
        "invalidate-unknown",
        "vhost-user: IOTLB",
        "that invalidates what is not there",
        (1 << 50, 4096, 0, 0, INVALIDATE),
        "it is gone",
    ),
    (
        "invalidate-all",
        "vhost-user: IOTLB",
        "that invalidates everything",
        (0, _U64 - 1, 0, 0, INVALIDATE),
        "then nothing is there",
    ),
)

for _name, _source, _says, _values, _lawful in _ENTRIES:
    _says = f"An IOTLB_MSG {_says}."
    iotlb.add(_name, _source, _says, partial(_sent, _values), lawful=_lawful, needs=_NEEDS, virtio=_IOMMU)


def _kicked(attacker: Attacker, canary: Canary, entries: Sequence[bytes], later: Sequence[bytes] = ()) -> Outcome:
    """Rings at their user addresses as IOVAs, `entries` before they are started, and `later` while they run."""
    line = attacker.line
    rings = [attacker.ring(canary, index) for index in range(min(attacker.offer.rings, 2))]
    for ring in rings:
        ring.request()
        ring.offer(*[0] * 8)
    try:
        for entry in entries:
            line.ask(F.IOTLB_MSG, entry)
        attacker.start(*rings)
        for ring in rings:
            ring.signal()
        for entry in later:
            line.ask(F.IOTLB_MSG, entry)
        for ring in rings:
            ring.signal()
        line.answers()
        for ring in rings:
            line.ask(F.GET_VRING_BASE, VringState(ring.index, 0))
    except Disconnected:
        return Outcome(Reaction.CLOSED)
    except TimedOut:
        return Outcome(Reaction.SILENT, "and hangs, it seems")
    except FieldError as error:
        return Outcome(Reaction.REFUSED, str(error))
    return Outcome(Reaction.IGNORED, f"{sum(ring.used() for ring in rings)} chains came back, the rings stopped")


@iotlb.attack("never-answered", "vhost-user: IOTLB", needs=_NEEDS, virtio=_IOMMU)
def never_answered(attacker: Attacker) -> Outcome:
    """Rings that are started and kicked, and none of whose translations ever comes."""
    return _kicked(attacker, _behind(attacker), [])


@iotlb.attack("rings-only", "vhost-user: IOTLB", needs=_NEEDS, virtio=_IOMMU)
def rings_only(attacker: Attacker) -> Outcome:
    """The rings are translated, the buffers never."""
    canary = _behind(attacker)
    return _kicked(attacker, canary, [_entry(canary.user, canary.window, canary.user)])


@iotlb.attack("taken-away", "vhost-user: IOTLB", needs=_NEEDS, virtio=_IOMMU)
def taken_away(attacker: Attacker) -> Outcome:
    """All translations are invalidated while rings run."""
    canary = _behind(attacker)
    all_of_it = [_entry(start, canary.window, canary.user) for start in (canary.user, canary.guest)]
    gone = [_entry(start, canary.window, 0, 0, INVALIDATE) for start in (canary.user, canary.guest)]
    return _kicked(attacker, canary, all_of_it, gone)


@iotlb.attack("read-only-rings", "vhost-user: IOTLB", needs=_NEEDS, virtio=_IOMMU)
def read_only_rings(attacker: Attacker) -> Outcome:
    """Everything is translated for reading alone, the used ring too."""
    canary = _behind(attacker)
    entries = [_entry(start, canary.window, canary.user, IotlbPermission.READ) for start in (canary.user, canary.guest)]
    return _kicked(attacker, canary, entries)


@iotlb.attack(
    "without-end",
    "vhost-user: IOTLB",
    lawful="it may keep as many as it likes, within bounds",
    needs=_NEEDS,
    virtio=_IOMMU,
)
def without_end(attacker: Attacker) -> Outcome:
    """20,000 translations of a page each, no two of which touch."""
    canary = _behind(attacker)
    line = attacker.line
    refused = 0
    try:
        for at in range(MANY):
            refused += U64.decode(line.ask(F.IOTLB_MSG, _entry(at << 13, 4096, canary.user))).value > 0
    except Disconnected:
        return Outcome(Reaction.CLOSED)
    except FieldError as error:
        return Outcome(Reaction.SILENT, str(error))
    return Outcome(Reaction.REFUSED, f"{refused} of them") if refused else Outcome(Reaction.ACCEPTED)


@iotlb.attack(
    "without-a-channel",
    "vhost-user: IOTLB",
    lawful="without a channel nothing is asked for",
    needs=_NEEDS,
    virtio=_IOMMU,
)
def without_a_channel(attacker: Attacker) -> Outcome:
    """IOMMU_PLATFORM is acked, and there is no channel to ask for translations on."""
    try:
        attacker.negotiate(HARMLESS, virtio=VIRTIO_F_IOMMU_PLATFORM)
    except NotReached as error:
        return Outcome(Reaction.REFUSED, str(error))
    return _kicked(attacker, attacker.share(), [])
