"""Attacks by memory that goes, or becomes other memory, while rings run in it and requests are under way."""

from __future__ import annotations

from vhost_user.attack.attacker import Attacker, NotReached
from vhost_user.attack.ring import BUFFERS, SIZE, USED, HostileRing
from vhost_user.attack.ring_content import content
from vhost_user.attack.theme import Outcome, Reaction
from vhost_user.message import FrontendRequest, MemoryTable, ProtocolFeature, SingleMemoryRegion

__all__ = ["content"]
# The theme is that of ring_content.py, and what is here is added behind.

F = FrontendRequest

_LIVE = "libvhost-user 2024-03-12, FDio/vpp#776, SPDK#3132"
_DEAD = "the document does not forbid it; the ring is dead then"


def _busy(attacker: Attacker) -> list[HostileRing]:
    """Rings that run, with as many requests in them as fit, kicked."""
    _, rings = attacker.running()
    for ring in rings:
        for slot in range(0, SIZE, 2):
            ring.request(slot)
            ring.offer(slot)
        ring.signal()
    return rings


def _then(attacker: Attacker, rings: list[HostileRing], outcome: Outcome) -> Outcome:
    """Kicks once more, after what was to be refused: a yes to it is a yes only if the daemon goes on."""
    if outcome.reaction is Reaction.CLOSED:
        return outcome
    after = attacker.kick(*rings)
    return outcome if after.reaction is Reaction.IGNORED else after


@content.attack(
    "memory.removed-under-ring",
    _LIVE,
    needs=ProtocolFeature.CONFIGURE_MEM_SLOTS,
    lawful=_DEAD,
)
def removed_under_ring(attacker: Attacker) -> Outcome:
    """REM_MEM_REG of the region that holds running rings with requests in them, and more kicks."""
    rings = _busy(attacker)
    region = attacker.canaries[0].region()
    return _then(attacker, rings, attacker.line.provoke(F.REM_MEM_REG, SingleMemoryRegion(region)))


@content.attack(
    "memory.table-emptied-under-ring", _LIVE, lawful="the document does not forbid it; the ring is dead then"
)
def table_emptied_under_ring(attacker: Attacker) -> Outcome:
    """A memory table without regions, while rings with requests in them run, and more kicks."""
    rings = _busy(attacker)
    return _then(attacker, rings, attacker.line.provoke(F.SET_MEM_TABLE, MemoryTable(())))


@content.attack(
    "memory.table-replaced-under-ring", _LIVE, lawful="the document does not forbid it; the ring is dead then"
)
def table_replaced_under_ring(attacker: Attacker) -> Outcome:
    """A memory table with other memory at other addresses, while rings run, and more kicks."""
    rings = _busy(attacker)
    other = attacker.canary(0x9000_0000)
    return _then(attacker, rings, attacker.line.provoke(F.SET_MEM_TABLE, MemoryTable((other.region(),)), [other.fd]))


@content.attack("memory.swapped-under-ring", _LIVE, lawful="nothing is wrong with it; rings go on in the new memory")
def swapped_under_ring(attacker: Attacker) -> Outcome:
    """Another file at the same addresses, while rings run: the old one must not be written any more."""
    rings = _busy(attacker)
    old = attacker.canaries[0]
    new = attacker.canary(old.guest)
    new.write(0, old.read(0, old.window))
    for ring in rings:
        new.allow(ring.at + USED, 6 + 8 * SIZE)
        new.allow(ring.at + BUFFERS + 4096, 4096)
    return _then(attacker, rings, attacker.line.provoke(F.SET_MEM_TABLE, MemoryTable((new.region(),)), [new.fd]))


@content.attack("memory.truncated", "a truncated file must not kill")
def truncated(attacker: Attacker) -> Outcome:
    """The file is truncated under rings that run, and they are kicked."""
    rings = _busy(attacker)
    attacker.canaries[0].truncate()
    return attacker.kick(*rings)


@content.attack("memory.truncated-before-start", "a truncated file must not kill")
def truncated_before_start(attacker: Attacker) -> Outcome:
    """The file is truncated after it was shared, and rings are started in it."""
    canary = attacker.negotiated_memory()
    rings = [attacker.ring(canary, index) for index in range(min(attacker.offer.rings, 2))]
    canary.truncate()
    try:
        attacker.start(*rings)
    except NotReached as error:
        return Outcome(Reaction.REFUSED, str(error))
    return attacker.kick(*rings)


@content.attack("memory.truncated-then-gone", "a truncated file must not kill")
def truncated_then_gone(attacker: Attacker) -> Outcome:
    """The file is truncated under rings that run, and the front end closes without a kick."""
    _busy(attacker)
    attacker.canaries[0].truncate()
    attacker.line.close()
    return Outcome(Reaction.CLOSED, "by us")
