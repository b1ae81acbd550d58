"""Attacks by what stands in a packed ring: chains without end, ids and flags that lie.

A packed ring is one array that both sides write: the device may overwrite any descriptor, and nothing else of the ring
but its own event structure.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial

from vhost_user.attack.attacker import Attacker
from vhost_user.attack.ring import BUFFERS, INDIRECT, NEXT, SIZE, WRITE, HostileRing
from vhost_user.attack.theme import Outcome, Reaction, Theme
from vhost_user.errors import Disconnected
from vhost_user.message import PackedBase

packed = Theme("packed")

RING_PACKED = 1 << 34
RING_INDIRECT_DESC = 1 << 28
AVAIL, USED = 1 << 7, 1 << 15
"""Of a descriptor's flags: available when the first is as the wrap counter and the second is not."""

_START = PackedBase(0, True, 0, True).to_num()
_DESCRIPTOR = struct.Struct("<QIHH")
_TABLE = BUFFERS + 0x2000

Entry = tuple[int, int, int, int]
"""Address, size, id, flags."""

Fill = Callable[[HostileRing], Sequence[Entry]]


def _put(ring: HostileRing, entries: Sequence[Entry]) -> None:
    ring.canary.write(ring.at, b"".join(_DESCRIPTOR.pack(*entry) for entry in entries[:SIZE]))


def _ready(attacker: Attacker, virtio: int) -> list[HostileRing]:
    canary, rings = attacker.negotiated_memory(virtio=virtio | RING_PACKED), []
    for index in range(min(attacker.offer.rings, 2)):
        ring = attacker.ring(canary, index)
        canary.allow(ring.at, _DESCRIPTOR.size * SIZE)
        canary.allow(ring.at + BUFFERS, 0x2000)
        rings.append(ring)
    return rings


def _run(fill: Fill, virtio: int, attacker: Attacker) -> Outcome:
    rings = _ready(attacker, virtio)
    attacker.start(*rings, base=_START)
    for ring in rings:
        _put(ring, fill(ring))
    outcome = attacker.kick(*rings)
    # What is where a split ring has its used index is nobody's here.
    return Outcome(Reaction.IGNORED, "the rings stopped") if outcome.reaction is Reaction.IGNORED else outcome


_FILLS: tuple[tuple[str, str, Fill, int], ...] = (
    (
        "chain-without-end",
        "A ring full of descriptors, each of which goes on.",
        lambda ring: [(ring.guest(), 64, 0, NEXT | AVAIL)] * SIZE,
        0,
    ),
    (
        "id-out-of-range",
        "Buffers whose ids are beyond the ring.",
        lambda ring: [(ring.guest(), 64, 0xFFFF - slot, AVAIL) for slot in range(4)],
        0,
    ),
    (
        "same-id",
        "A ring full of buffers that have the same id.",
        lambda ring: [(ring.guest(), 64, 7, AVAIL | WRITE * (slot % 2)) for slot in range(SIZE)],
        0,
    ),
    (
        "used-already",
        "Descriptors that are marked as used, which only the device does.",
        lambda ring: [(ring.guest(), 64, slot, AVAIL | USED) for slot in range(SIZE)],
        0,
    ),
    ("all-flags", "Descriptors with every flag but USED.", lambda ring: [(ring.guest(), 64, 0, 0x7FFF)] * SIZE, 0),
    (
        "length-max",
        "A chain of buffers of 2**32 - 1 bytes.",
        lambda ring: [(ring.guest(), 0xFFFFFFFF, 0, AVAIL | (NEXT if slot < 7 else WRITE)) for slot in range(8)],
        0,
    ),
    (
        "outside",
        "Buffers outside memory.",
        lambda _: [(0x10, 64, 0, AVAIL | NEXT), (2**64 - 8, 64, 0, AVAIL | WRITE)],
        0,
    ),
    (
        "indirect-max",
        "An indirect table of 2**32 - 16 bytes.",
        lambda ring: [(ring.guest(_TABLE), 0xFFFFFFF0, 0, AVAIL | INDIRECT)],
        RING_INDIRECT_DESC,
    ),
    (
        "indirect-in-indirect",
        "An indirect table in the ring itself, whose entries are indirect.",
        lambda ring: [(ring.guest(0), 32, 0, AVAIL | INDIRECT)] * 2,
        RING_INDIRECT_DESC,
    ),
)

for _name, _says, _fill, _virtio in _FILLS:
    packed.add(
        _name,
        "virtio: packed rings",
        _says,
        partial(_run, _fill, _virtio),
        virtio=RING_PACKED | _virtio,
    )


@packed.attack("random", "fuzzing", virtio=RING_PACKED)
def random(attacker: Attacker) -> Outcome:
    """Random descriptors, some of them plausible, sixteen times over."""
    rng = attacker.rng
    rings = _ready(attacker, RING_INDIRECT_DESC & attacker.offer.features)
    attacker.start(*rings, base=_START)
    for canary in attacker.canaries:
        canary.allow(0, canary.window)
    for _ in range(16):
        for ring in rings:
            where = (ring.guest(), rng.getrandbits(64), ring.guest() + rng.randrange(1 << 20))
            _put(
                ring,
                [
                    (rng.choice(where), rng.choice((0, 16, 64, rng.getrandbits(32))), slot, rng.getrandbits(16))
                    for slot in range(SIZE)
                ],
            )
            ring.signal()
        try:
            attacker.line.answers()
        except Disconnected:
            return Outcome(Reaction.CLOSED)
    outcome = attacker.kick(*rings)
    return Outcome(Reaction.IGNORED, "the rings stopped") if outcome.reaction is Reaction.IGNORED else outcome
