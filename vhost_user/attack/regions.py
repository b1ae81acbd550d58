"""Attacks by several regions: that overlap, that are too many, that are removed as nobody knows them."""

from __future__ import annotations

from functools import partial

from vhost_user.attack.attacker import Attacker, NotReached
from vhost_user.attack.canary import GUEST, USER, WINDOW, Canary
from vhost_user.attack.memory import SLOTS, memory, neighbours, set_table
from vhost_user.attack.theme import Outcome, Reaction
from vhost_user.errors import Disconnected, FieldError
from vhost_user.message import FrontendRequest, MemoryRegion, SingleMemoryRegion

__all__ = ["memory"]
# The theme is that of memory.py, and what is here is added behind.

F = FrontendRequest


def _add(attacker: Attacker, region: MemoryRegion, *fds: int) -> Outcome:
    return attacker.line.provoke(F.ADD_MEM_REG, bytes(8) + region.encode(), fds)


def _remove(attacker: Attacker, region: MemoryRegion, *fds: int) -> Outcome:
    return attacker.line.provoke(F.REM_MEM_REG, bytes(8) + region.encode(), fds)


def _added(attacker: Attacker) -> Canary:
    canary = attacker.canary()
    attacker.negotiate()
    with attacker.reaching("ADD_MEM_REG"):
        attacker.line.tell(F.ADD_MEM_REG, SingleMemoryRegion(canary.region()), [canary.fd])
        attacker.line.answers()
    return canary


for _name, _source, _fds in (
    ("none", "CVE-2019-14818", 0),
    ("two", "CVE-2022-0669", 2),
    ("eight", "vhost-user: ADD_MEM_REG", 8),
):

    def _add_with_fds(number: int, attacker: Attacker) -> Outcome:
        canary = attacker.canary()
        attacker.negotiate()
        return _add(attacker, canary.region(), *[canary.fd] * number)

    memory.add(
        f"add.fds-{_name}", _source, f"ADD_MEM_REG with {_fds} descriptors.", partial(_add_with_fds, _fds), needs=SLOTS
    )

_OVERLAPS: tuple[tuple[str, str, str, dict[str, int]], ...] = (
    ("duplicate", "vhost-user: regions", "the same region again", {}),
    (
        "guest",
        "vhost-user: regions",
        "a region that overlaps another's guest addresses",
        {"guest": GUEST + WINDOW // 2, "user": 1 << 40},
    ),
    (
        "user",
        "vhost-user: regions",
        "a region that overlaps one in user addresses",
        {"guest": 1 << 40, "user": USER + WINDOW // 2},
    ),
    (
        "around",
        "vhost-user: regions",
        "a region around another one",
        {"guest": GUEST - 4096, "user": 1 << 40, "offset": 0},
    ),
)


def _add_overlapping(where: dict[str, int], attacker: Attacker) -> Outcome:
    canary = _added(attacker)
    return _add(attacker, canary.region(**where), canary.fd)


def _table_overlapping(where: dict[str, int], attacker: Attacker) -> Outcome:
    canary = attacker.canary()
    return set_table(attacker, [canary.region(), canary.region(**where)], [canary.fd] * 2)


for _name, _source, _says, _where in _OVERLAPS:
    memory.add(
        f"add.overlap-{_name}", _source, f"ADD_MEM_REG of {_says}.", partial(_add_overlapping, _where), needs=SLOTS
    )
    memory.add(f"table.overlap-{_name}", _source, f"A table with {_says}.", partial(_table_overlapping, _where))


@memory.attack("add.too-many", "vhost-user: GET_MAX_MEM_SLOTS", needs=SLOTS)
def too_many(attacker: Attacker) -> Outcome:
    """One region more than GET_MAX_MEM_SLOTS says, and sixteen more than that."""
    slots, line = attacker.offer.slots, attacker.negotiate()
    if slots > 4096:
        raise NotReached(f"{slots} slots are too many to fill")
    canary = attacker.canary()
    outcome = Outcome(Reaction.IGNORED)
    for at in range(slots + 16):
        where = {"guest": GUEST + at * 8192, "user": USER + at * 8192}
        try:
            line.send(F.ADD_MEM_REG, SingleMemoryRegion(canary.region(size=4096, **where)), [canary.fd])
            if line.acknowledges:
                with line.receive() as received:
                    refused = any(received.body)
                if refused and at < slots:
                    return Outcome(Reaction.REFUSED, f"at region {at + 1} of {slots}")
                outcome = Outcome(Reaction.REFUSED if refused else Reaction.ACCEPTED, f"{at + 1} regions")
        except Disconnected:
            return Outcome(Reaction.CLOSED, f"at region {at + 1} of {slots}")
    after = line.judge(F.GET_FEATURES)
    return after if after.reaction is Reaction.CLOSED else outcome


@memory.attack("add-and-remove", "SPDK#2852", needs=SLOTS, lawful="nothing is wrong with it; each time all has to go")
def add_and_remove(attacker: Attacker) -> Outcome:
    """A region added and removed a hundred times."""
    canary = attacker.canary()
    line = attacker.negotiate()
    try:
        for _ in range(100):
            line.tell(F.ADD_MEM_REG, SingleMemoryRegion(canary.region()), [canary.fd])
            line.tell(F.REM_MEM_REG, SingleMemoryRegion(canary.region()))
        line.answers()
    except Disconnected:
        return Outcome(Reaction.CLOSED)
    except FieldError as error:
        return Outcome(Reaction.REFUSED, str(error))
    return Outcome(Reaction.ACCEPTED)


@memory.attack(
    "table-again-and-again", "SPDK#2852", lawful="nothing is wrong with it; each time the last one has to go"
)
def table_again_and_again(attacker: Attacker) -> Outcome:
    """A memory table a hundred times."""
    canary = attacker.negotiated_memory()
    for _ in range(100):
        attacker.share(canary)
    return Outcome(Reaction.ACCEPTED)


@memory.attack("table-over-added", "left open by vhost-user", needs=SLOTS, lawful="a table replaces what there was")
def table_over_added(attacker: Attacker) -> Outcome:
    """Regions by ADD_MEM_REG, then a table of one of them, then the other is removed."""
    canary = _added(attacker)
    other = attacker.canary(GUEST + 2 * WINDOW)
    attacker.share(other)
    first = _remove(attacker, canary.region())
    return first if first.reaction is Reaction.CLOSED else _remove(attacker, other.region())


# REM_MEM_REG.

_OTHERS = (
    ("unknown", "vhost-user: REM_MEM_REG", "that was never added", {"guest": GUEST + 4 * WINDOW}, ""),
    ("other-size", "vhost-user: REM_MEM_REG", "with another size", {"size": WINDOW - 4096}, ""),
    ("other-user", "vhost-user: REM_MEM_REG", "with another user address", {"user": USER + 4096}, ""),
    (
        "other-offset",
        "QEMU 8d19371593 (mmap_offset not initialised)",
        "with another offset",
        {"offset": 0xA7A7A7A7A7A7A7A7},
        "the offset is no part of a region's name",
    ),
)


def _remove_other(where: dict[str, int], attacker: Attacker) -> Outcome:
    canary = _added(attacker)
    return _remove(attacker, canary.region(**where))


for _name, _source, _says, _where, _lawful in _OTHERS:
    _act = partial(_remove_other, _where)
    memory.add(f"remove.{_name}", _source, f"REM_MEM_REG of a region {_says}.", _act, needs=SLOTS, lawful=_lawful)


@memory.attack("remove.twice", "vhost-user: REM_MEM_REG", needs=SLOTS)
def remove_twice(attacker: Attacker) -> Outcome:
    """A region removed twice."""
    canary = _added(attacker)
    with attacker.reaching("REM_MEM_REG"):
        attacker.line.tell(F.REM_MEM_REG, SingleMemoryRegion(canary.region()))
    return _remove(attacker, canary.region())


@memory.attack("remove.with-fd", "QEMU a81d8d4a72", needs=SLOTS, lawful="one descriptor may come, and is closed")
def remove_with_fd(attacker: Attacker) -> Outcome:
    """REM_MEM_REG with a descriptor."""
    canary = _added(attacker)
    return _remove(attacker, canary.region(), canary.fd)


@memory.attack("remove.with-eight-fds", "QEMU a81d8d4a72", needs=SLOTS)
def remove_with_eight_fds(attacker: Attacker) -> Outcome:
    """REM_MEM_REG with eight descriptors."""
    canary = _added(attacker)
    return _remove(attacker, canary.region(), *[canary.fd] * 8)


@memory.attack(
    "remove.in-between",
    "vhost-user: REM_MEM_REG",
    needs=SLOTS,
    lawful="nothing is wrong with it; the others have to stay where they are",
)
def remove_in_between(attacker: Attacker) -> Outcome:
    """Three regions; the middle one goes, and then the others."""
    three = neighbours(attacker, 3)
    attacker.negotiate()
    outcome = Outcome(Reaction.IGNORED)
    for canary in three:
        outcome = _add(attacker, canary.region(), canary.fd)
    for at in (1, 0, 2):
        outcome = _remove(attacker, three[at].region())
        if outcome.reaction is not Reaction.ACCEPTED:
            break
    return outcome
