"""Attacks by what stands in a ring: indices that lie, chains without end, buffers that are nowhere.

The guest's driver writes rings, and a guest is nobody's friend. Each attack fills the device's first rings the same
way, kicks them, and stops them again. A device may give a chain back, or leave it, or say that the ring is broken; it
must still stop when it is told to, and touch nothing but what the chains let it write.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vhost_user.attack.attacker import Attacker
from vhost_user.attack.ring import BUFFERS, INDIRECT, NEXT, SIZE, USED, WRITE, HostileRing
from vhost_user.attack.theme import Outcome, Reaction, Theme
from vhost_user.errors import Disconnected
from vhost_user.message import FrontendRequest

F = FrontendRequest
content = Theme("content")

RING_INDIRECT_DESC = 1 << 28
_U64 = 2**64
_TABLE = BUFFERS + 0x2000
"""Where an indirect table lies in a ring's area, behind the first buffers."""

_MANY = 1 << 20
"""Bytes of a table of 65,536 descriptors."""

Fill = Callable[[HostileRing], None]


def _run(fill: Fill, virtio: int, attacker: Attacker) -> Outcome:
    _, rings = attacker.running(virtio=virtio)
    for ring in rings:
        fill(ring)
    return attacker.kick(*rings)


def _fill(name: str, source: str, *, virtio: int = 0) -> Callable[[Fill], Fill]:
    """Decorates a function that fills a ring; what it says is its docstring."""

    def register(fill: Fill) -> Fill:
        says = " ".join((fill.__doc__ or "").split())
        content.add(name, source, says, partial(_run, fill, virtio), virtio=virtio)
        return fill

    return register


# Indices.


def _index(index: int, ring: HostileRing) -> None:
    ring.request()
    ring.offer(0, index=index)


for _index_ in (SIZE + 1, 0x8000, 0xFFFF):
    content.add(
        f"avail-index-{_index_:#x}",
        "virtio: ring indices",
        f"An available index of {_index_} at once, in a ring of {SIZE}.",
        partial(_run, partial(_index, _index_), 0),
    )


@_fill("avail-index-back", "virtio: ring indices")
def avail_index_back(ring: HostileRing) -> None:
    """An available index that is one behind where the ring began."""
    ring.offer(index=-1)


@_fill("head-out-of-range", "virtio: ring indices")
def head_out_of_range(ring: HostileRing) -> None:
    """Heads beyond the descriptor table: its size, and 65535."""
    ring.offer(SIZE, 0xFFFF)


@_fill("same-head-everywhere", "virtio: ring indices")
def same_head_everywhere(ring: HostileRing) -> None:
    """A full ring whose entries are all the same chain."""
    ring.request()
    ring.offer(*[0] * SIZE)


@_fill("used-index-set", "virtio: ring indices")
def used_index_set(ring: HostileRing) -> None:
    """A used index that the driver writes, as if the device had."""
    ring.canary.write(ring.at + USED + 2, b"\xff\x7f")
    ring.request()
    ring.offer(0)


# Chains.


@_fill("loop-of-one", "virtio: chains have an end")
def loop_of_one(ring: HostileRing) -> None:
    """A descriptor whose next one is itself."""
    ring.describe(0, ring.guest(), 64, NEXT, 0)
    ring.offer(0)


@_fill("loop-of-two", "virtio: chains have an end")
def loop_of_two(ring: HostileRing) -> None:
    """Two descriptors that go round, to be written."""
    ring.describe(0, ring.guest(), 64, NEXT | WRITE, 1)
    ring.describe(1, ring.guest(), 64, NEXT | WRITE, 0)
    ring.offer(0)


@_fill("loop-of-all", "virtio: chains have an end")
def loop_of_all(ring: HostileRing) -> None:
    """All descriptors of the ring, one after the other, round and round."""
    for slot in range(SIZE):
        ring.describe(slot, ring.guest(), 64, NEXT, (slot + 1) % SIZE)
    ring.offer(0)


@_fill("next-out-of-range", "virtio: ring indices")
def next_out_of_range(ring: HostileRing) -> None:
    """A chain that goes on beyond the descriptor table."""
    ring.describe(0, ring.guest(), 64, NEXT, 0xFFFF)
    ring.offer(0)


@_fill("all-flags", "virtio: descriptor flags")
def all_flags(ring: HostileRing) -> None:
    """A descriptor with every flag, those that there are not included."""
    ring.describe(0, ring.guest(), 64, 0xFFFF, 1)
    ring.describe(1, ring.guest(), 64, 0xFFF8 | WRITE)
    ring.offer(0)


@_fill("readable-after-writable", "virtio: order of buffers")
def readable_after_writable(ring: HostileRing) -> None:
    """A buffer to be written in front of one to be read."""
    ring.describe(0, ring.guest(), 64, NEXT | WRITE, 1)
    ring.describe(1, ring.guest(BUFFERS + 4096), 64)
    ring.offer(0)


# Buffers.

_BUFFERS: tuple[tuple[str, str, Callable[[HostileRing], int], int], ...] = (
    ("length-zero", "has no bytes", lambda ring: ring.guest(), 0),
    ("length-max", "has 2**32 - 1 bytes", lambda ring: ring.guest(), 0xFFFFFFFF),
    ("address-zero", "lies at address 0", lambda _: 0, 64),
    ("address-max", "lies at 2**64 - 1", lambda _: _U64 - 1, 64),
    ("address-wrap", "wraps", lambda _: _U64 - 32, 64),
    ("before", "begins before memory", lambda ring: ring.canary.guest - 32, 64),
    ("past-end", "ends behind memory", lambda ring: ring.canary.end - 32, 64),
    ("behind", "lies right behind memory", lambda ring: ring.canary.end, 64),
    ("user-address", "lies at a user address", lambda ring: ring.canary.user + ring.at, 64),
)


def _buffer(where: Callable[[HostileRing], int], size: int, ring: HostileRing) -> None:
    bad = where(ring), size
    if ring.one_way:
        ring.describe(0, *bad, 0 if ring.index % 2 else WRITE)
        ring.offer(0)
        return
    good = (ring.guest(), 64), (ring.guest(BUFFERS + 4096), 4096)
    ring.describe(0, *bad, NEXT, 1)
    ring.describe(1, *good[1], WRITE)
    ring.describe(2, *good[0], NEXT, 3)
    ring.describe(3, *bad, WRITE)
    # One more part behind the bad one, which some devices look at first.
    ring.describe(4, *good[0], NEXT, 5)
    ring.describe(5, *bad, NEXT | WRITE, 6)
    ring.describe(6, *good[1], WRITE)
    ring.offer(0, 2, 4)


for _name, _says, _where, _size in _BUFFERS:
    content.add(
        f"buffer.{_name}",
        "CVE-2018-1059 class",
        f"A buffer that {_says}, once to be read and once to be written.",
        partial(_run, partial(_buffer, _where, _size), 0),
    )


@_fill("buffer.many-of-max-length", "virtio: lengths of buffers")
def many_of_max_length(ring: HostileRing) -> None:
    """A chain of 64 buffers of 2**32 - 1 bytes: their sum is beyond 32 bits."""
    for slot in range(SIZE):
        more = NEXT if slot < SIZE - 1 else 0
        ring.describe(slot, ring.guest(), 0xFFFFFFFF, more | (WRITE if slot >= 2 else 0), slot + 1)
    ring.offer(0)


@_fill("buffer.the-ring-itself", "CVE-2018-1059 class")
def the_ring_itself(ring: HostileRing) -> None:
    """Buffers to be written that are the descriptors and the rings."""
    ring.describe(0, ring.guest(), 64, NEXT, 1)
    ring.describe(1, ring.guest(0), BUFFERS, WRITE)
    ring.offer(0, 1)


def _across(attacker: Attacker) -> Outcome:
    low = attacker.canary()
    high = attacker.canary(low.end, window=0x10000)
    attacker.negotiate()
    attacker.share(low, high)
    rings = [attacker.ring(low, index) for index in range(min(attacker.offer.rings, 2))]
    attacker.start(*rings)
    low.allow(low.window - 4096, 4096)
    high.allow(0, 4096)
    for ring in rings:
        ring.describe(0, ring.guest(), 64, NEXT, 1)
        ring.describe(1, low.end - 4096, 8192, NEXT | WRITE, 2)
        ring.describe(2, ring.guest(BUFFERS + 4096), 1, WRITE)
        ring.offer(0)
    return attacker.kick(*rings)


content.add(
    "buffer.across-two-regions",
    "CVE-2018-1059",
    "A buffer to be written that begins in one region and ends in its neighbour, which is another file.",
    _across,
)


# Indirect tables.


def _indirect(name: str, source: str) -> Callable[[Fill], Fill]:
    return _fill(f"indirect.{name}", source, virtio=RING_INDIRECT_DESC)


@_indirect("loop", "virtio: chains have an end")
def indirect_loop(ring: HostileRing) -> None:
    """An indirect table whose descriptors go round."""
    ring.describe_in_table(_TABLE, (ring.guest(), 64, NEXT, 1), (ring.guest(), 64, NEXT, 0))
    ring.describe(0, ring.guest(_TABLE), 32, INDIRECT)
    ring.offer(0)


@_indirect("in-indirect", "virtio: indirect in indirect")
def indirect_in_indirect(ring: HostileRing) -> None:
    """An indirect table that refers to itself as one."""
    ring.describe_in_table(_TABLE, (ring.guest(_TABLE), 16, INDIRECT, 0))
    ring.describe(0, ring.guest(_TABLE), 16, INDIRECT)
    ring.offer(0)


@_indirect("and-next", "virtio: INDIRECT and NEXT")
def indirect_and_next(ring: HostileRing) -> None:
    """A descriptor that is indirect and goes on besides."""
    ring.describe_in_table(_TABLE, *ring.request_parts())
    ring.describe(0, ring.guest(_TABLE), 16 * len(ring.request_parts()), INDIRECT | NEXT, 0)
    ring.offer(0)


for _name, _says, _at, _size in (
    ("length-zero", "of no bytes", None, 0),
    ("length-odd", "of 17 bytes", None, 17),
    ("length-max", "of 2**32 - 16 bytes", None, 0xFFFFFFF0),
    ("length-many", "of 65,536 descriptors, beyond the ring's size", None, _MANY),
    ("outside", "outside memory", 0x10, 64),
    ("wrap", "that wraps", _U64 - 16, 64),
):

    def _table(at: int | None, size: int, ring: HostileRing) -> None:
        long = [(ring.guest(), 64, NEXT, slot + 1) for slot in range(2 * SIZE)]
        ring.describe_in_table(_TABLE, *(long if size == _MANY else ring.request_parts()))
        ring.describe(0, ring.guest(_TABLE) if at is None else at, size, INDIRECT)
        ring.offer(0)

    content.add(
        f"indirect.{_name}",
        "virtio: lengths of buffers",
        f"An indirect table {_says}.",
        partial(_run, partial(_table, _at, _size), RING_INDIRECT_DESC),
        virtio=RING_INDIRECT_DESC,
    )


@_fill("indirect.unnegotiated", "virtio: INDIRECT without the feature")
def indirect_unnegotiated(ring: HostileRing) -> None:
    """An indirect table, though that was not negotiated."""
    ring.describe_in_table(_TABLE, *ring.request_parts())
    ring.describe(0, ring.guest(_TABLE), 16 * len(ring.request_parts()), INDIRECT)
    ring.offer(0)


# Randomness.


def _random(attacker: Attacker) -> Outcome:
    canary, rings = attacker.running(virtio=RING_INDIRECT_DESC & attacker.offer.features)
    rng = attacker.rng
    canary.allow(0, canary.window)  # what random chains let a device write is anywhere
    for _ in range(16):
        for ring in rings:
            for slot in range(SIZE):
                where = rng.choice((canary.guest + rng.randrange(canary.window), rng.getrandbits(64)))
                size = rng.choice((0, 1, 16, 64, 512, 4096, rng.getrandbits(32)))
                flags = rng.choice((0, NEXT, WRITE, NEXT | WRITE, INDIRECT, rng.getrandbits(16)))
                ring.describe(slot, where, size, flags, rng.randrange(SIZE + 2))
            ring.offer(*(rng.randrange(SIZE + 1) for _ in range(8)))
            ring.signal()
        try:
            attacker.line.answers()
        except Disconnected:
            return Outcome(Reaction.CLOSED)
    return attacker.kick(*rings)


content.add("random", "fuzzing", "Random descriptors, some of them plausible, sixteen times over.", _random)
