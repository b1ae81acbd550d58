"""Attacks by what is shared: regions that overlap, wrap, lie beyond their file, are no memory, or go away.

Where the document leaves a case open (M16), a back end may refuse it or take it, as long as nothing breaks. To say yes
to memory that is not there is a lie that the guest will pay for, so that is not lawful.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Sequence
from functools import partial

from vhost_user.attack.attacker import ODD_FDS, Attacker, NotReached
from vhost_user.attack.canary import GUEST, MARGIN, USER, WINDOW, Canary
from vhost_user.attack.theme import Outcome, Reaction, Theme
from vhost_user.errors import Disconnected, FieldError
from vhost_user.message import FrontendRequest, MemoryRegion, ProtocolFeature, SingleMemoryRegion
from vhost_user.units import KIB

F = FrontendRequest
SLOTS = ProtocolFeature.CONFIGURE_MEM_SLOTS
memory = Theme("memory")

_GAP = "M16"
_U64 = 2**64


def encode_table(regions: Sequence[MemoryRegion], count: int | None = None) -> bytes:
    """A table as bytes, with a count that may be a lie, and as many regions as there are."""
    head = struct.pack("=I4x", len(regions) if count is None else count)
    return head + b"".join(region.encode() for region in regions)


def _table(
    attacker: Attacker, regions: Sequence[MemoryRegion], fds: Sequence[int], count: int | None = None
) -> Outcome:
    return attacker.negotiate().provoke(F.SET_MEM_TABLE, encode_table(regions, count), fds)


def _neighbours(attacker: Attacker, number: int) -> list[Canary]:
    """Canaries that lie one behind the other, with gaps."""
    return [attacker.canary(GUEST + 2 * WINDOW * at, window=4 * KIB) for at in range(number)]


# Counts.


@memory.attack("fewer-fds", "CVE-2019-14818, M4")
def fewer_fds(attacker: Attacker) -> Outcome:
    """A table of two regions with one descriptor."""
    one, two = _neighbours(attacker, 2)
    return _table(attacker, [one.region(), two.region()], [one.fd])


@memory.attack("more-fds", "CVE-2022-0669, M4", lawful="what is there is complete; the surplus has to be closed")
def more_fds(attacker: Attacker) -> Outcome:
    """A table of one region with eight descriptors."""
    canary = attacker.canary()
    return _table(attacker, [canary.region()], [canary.fd] * 8)


@memory.attack("no-fds", "M4")
def no_fds(attacker: Attacker) -> Outcome:
    """A table of one region without a descriptor."""
    return _table(attacker, [attacker.canary().region()], [])


@memory.attack("nine-regions", "M4")
def nine_regions(attacker: Attacker) -> Outcome:
    """A table of nine regions, with eight descriptors, which is as many as a message carries."""
    nine = _neighbours(attacker, 9)
    return _table(attacker, [canary.region() for canary in nine], [canary.fd for canary in nine][:8])


@memory.attack("nine-regions-nine-fds", "M4", lawful="the document has room for eight, and no rule for nine")
def nine_regions_nine_fds(attacker: Attacker) -> Outcome:
    """A table of nine regions, with nine descriptors."""
    nine = _neighbours(attacker, 9)
    return _table(attacker, [canary.region() for canary in nine], [canary.fd for canary in nine])


@memory.attack("count-lies", "CVE-2020-10722 class")
def count_lies(attacker: Attacker) -> Outcome:
    """A table that has one region and counts four."""
    canary = attacker.canary()
    return _table(attacker, [canary.region()], [canary.fd] * 4, count=4)


@memory.attack("count-max", "CVE-2020-10722 class")
def count_max(attacker: Attacker) -> Outcome:
    """A table that has one region and counts 2**32 - 1."""
    canary = attacker.canary()
    return _table(attacker, [canary.region()], [canary.fd], count=0xFFFFFFFF)


@memory.attack("empty-table", "M4", lawful="a table without regions is a table")
def empty_table(attacker: Attacker) -> Outcome:
    """A table without regions, with a descriptor."""
    return _table(attacker, [], [attacker.canary().fd])


# One region that can't be.

Change = Callable[[Canary], MemoryRegion]

_IMPOSSIBLE: tuple[tuple[str, str, str, Change, str], ...] = (
    ("size-zero", _GAP, "A region of no bytes.", lambda canary: canary.region(size=0), ""),
    ("size-max", _GAP, "A region of 2**64 - 1 bytes.", lambda canary: canary.region(size=_U64 - 1), ""),
    ("size-2-to-63", _GAP, "A region of 2**63 bytes.", lambda canary: canary.region(size=1 << 63), ""),
    ("guest-wrap", _GAP, "Guest addresses that wrap.", lambda canary: canary.region(guest=_U64 - 4096), ""),
    ("user-wrap", _GAP, "User addresses that wrap.", lambda canary: canary.region(user=_U64 - 4096), ""),
    (
        "offset-wrap",
        "CVE-2020-10722, M16",
        "An offset that wraps with the size.",
        lambda canary: canary.region(offset=_U64 - 4096),
        "",
    ),
    (
        "offset-wrap-to-little",
        "CVE-2020-10722, M16",
        "Offset and size whose sum is one page.",
        lambda canary: canary.region(size=_U64 - 64 * KIB, offset=64 * KIB + 4096),
        "",
    ),
    ("offset-max", _GAP, "An offset of 2**64 - 1.", lambda canary: canary.region(offset=_U64 - 1), ""),
    (
        "offset-beyond",
        _GAP,
        "An offset beyond the file's end.",
        lambda canary: canary.region(offset=canary.size + MARGIN),
        "",
    ),
    (
        "size-beyond",
        _GAP,
        "A region that ends beyond its file.",
        lambda canary: canary.region(size=canary.size * 2),
        "",
    ),
    (
        "offset-unaligned",
        _GAP,
        "An offset that is no multiple of a page.",
        lambda canary: canary.region(offset=MARGIN + 1, size=4096),
        "the page around it can be mapped",
    ),
    (
        "size-unaligned",
        _GAP,
        "A region of 4097 bytes.",
        lambda canary: canary.region(size=4097),
        "the kernel maps the rest of a page along",
    ),
)


def _set_one(change: Change, attacker: Attacker) -> Outcome:
    canary = attacker.canary()
    return _table(attacker, [change(canary)], [canary.fd])


def _add_one(change: Change, attacker: Attacker) -> Outcome:
    canary = attacker.canary()
    line = attacker.negotiate()
    return line.provoke(F.ADD_MEM_REG, bytes(8) + change(canary).encode(), [canary.fd])


for _name, _source, _says, _change, _lawful in _IMPOSSIBLE:
    memory.add(f"table.{_name}", _source, _says, partial(_set_one, _change), lawful=_lawful)
    memory.add(f"add.{_name}", _source, _says, partial(_add_one, _change), needs=SLOTS, lawful=_lawful)


# Regions of something else than memory.


def _of_kind(kind: str, attacker: Attacker) -> Outcome:
    return _table(attacker, [attacker.canary().region(size=4096, offset=0)], [attacker.odd_fd(kind)])


for _kind in ODD_FDS:
    _mappable = {"file": "a file can be mapped", "zero": "the device can be mapped"}
    memory.add(
        f"fd.{_kind}",
        "SPDK#2852, M16",
        f"A region whose descriptor is of this kind: {_kind}.",
        partial(_of_kind, _kind),
        lawful=_mappable.get(_kind, ""),
    )


@memory.attack("fd.read-only", "SPDK#2852, M16")
def fd_read_only(attacker: Attacker) -> Outcome:
    """A region whose file can't be written."""
    canary = attacker.canary()
    fd = os.open(f"/proc/self/fd/{canary.fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _table(attacker, [canary.region()], [fd])
    finally:
        os.close(fd)


@memory.attack("fd.write-sealed", "SPDK#2852, M16")
def fd_write_sealed(attacker: Attacker) -> Outcome:
    """A region of a memfd that is sealed against writing."""
    canary = attacker.canary()
    fcntl.fcntl(canary.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    return _table(attacker, [canary.region()], [canary.fd])


# Several regions.


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


for _name, _source, _fds in (("none", "CVE-2019-14818, M8", 0), ("two", "CVE-2022-0669, M8", 2), ("eight", "M8", 8)):

    def _add_with_fds(number: int, attacker: Attacker) -> Outcome:
        canary = attacker.canary()
        attacker.negotiate()
        return _add(attacker, canary.region(), *[canary.fd] * number)

    memory.add(
        f"add.fds-{_name}", _source, f"ADD_MEM_REG with {_fds} descriptors.", partial(_add_with_fds, _fds), needs=SLOTS
    )

_OVERLAPS: tuple[tuple[str, str, str, dict[str, int]], ...] = (
    ("duplicate", "M1", "the same region again", {}),
    (
        "guest",
        "M1",
        "a region that overlaps another's guest addresses",
        {"guest": GUEST + WINDOW // 2, "user": 1 << 40},
    ),
    ("user", "M2", "a region that overlaps one in user addresses", {"guest": 1 << 40, "user": USER + WINDOW // 2}),
    ("around", "M1", "a region around another one", {"guest": GUEST - 4096, "user": 1 << 40, "offset": 0}),
)


def _add_overlapping(where: dict[str, int], attacker: Attacker) -> Outcome:
    canary = _added(attacker)
    return _add(attacker, canary.region(**where), canary.fd)


def _table_overlapping(where: dict[str, int], attacker: Attacker) -> Outcome:
    canary = attacker.canary()
    return _table(attacker, [canary.region(), canary.region(**where)], [canary.fd] * 2)


for _name, _source, _says, _where in _OVERLAPS:
    memory.add(
        f"add.overlap-{_name}", _source, f"ADD_MEM_REG of {_says}.", partial(_add_overlapping, _where), needs=SLOTS
    )
    memory.add(f"table.overlap-{_name}", _source, f"A table with {_says}.", partial(_table_overlapping, _where))


@memory.attack("add.too-many", "issue list: more regions than the advertised maximum", needs=SLOTS)
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


@memory.attack("table-over-added", "M16", needs=SLOTS, lawful="a table replaces what there was")
def table_over_added(attacker: Attacker) -> Outcome:
    """Regions by ADD_MEM_REG, then a table of one of them, then the other is removed."""
    canary = _added(attacker)
    other = attacker.canary(GUEST + 2 * WINDOW)
    attacker.share(other)
    first = _remove(attacker, canary.region())
    return first if first.reaction is Reaction.CLOSED else _remove(attacker, other.region())


# REM_MEM_REG.

_OTHERS = (
    ("unknown", "M10, M16", "that was never added", {"guest": GUEST + 4 * WINDOW}, ""),
    ("other-size", "M10, M16", "with another size", {"size": WINDOW - 4096}, ""),
    ("other-user", "M10, M16", "with another user address", {"user": USER + 4096}, ""),
    (
        "other-offset",
        "QEMU 8d19371593 (mmap_offset not initialised)",
        "with another offset",
        {"offset": 0xA7A7A7A7A7A7A7A7},
        "the offset is no part of a region's name (M10)",
    ),
)


def _remove_other(where: dict[str, int], attacker: Attacker) -> Outcome:
    canary = _added(attacker)
    return _remove(attacker, canary.region(**where))


for _name, _source, _says, _where, _lawful in _OTHERS:
    _act = partial(_remove_other, _where)
    memory.add(f"remove.{_name}", _source, f"REM_MEM_REG of a region {_says}.", _act, needs=SLOTS, lawful=_lawful)


@memory.attack("remove.twice", "M10, M16", needs=SLOTS)
def remove_twice(attacker: Attacker) -> Outcome:
    """A region removed twice."""
    canary = _added(attacker)
    with attacker.reaching("REM_MEM_REG"):
        attacker.line.tell(F.REM_MEM_REG, SingleMemoryRegion(canary.region()))
    return _remove(attacker, canary.region())


@memory.attack(
    "remove.with-fd", "QEMU a81d8d4a72, M13", needs=SLOTS, lawful="one descriptor may come, and is closed (M12)"
)
def remove_with_fd(attacker: Attacker) -> Outcome:
    """REM_MEM_REG with a descriptor."""
    canary = _added(attacker)
    return _remove(attacker, canary.region(), canary.fd)


@memory.attack("remove.with-eight-fds", "QEMU a81d8d4a72, M12", needs=SLOTS)
def remove_with_eight_fds(attacker: Attacker) -> Outcome:
    """REM_MEM_REG with eight descriptors."""
    canary = _added(attacker)
    return _remove(attacker, canary.region(), *[canary.fd] * 8)


@memory.attack(
    "remove.in-between",
    "M10",
    needs=SLOTS,
    lawful="nothing is wrong with it; the others have to stay where they are",
)
def remove_in_between(attacker: Attacker) -> Outcome:
    """Three regions; the middle one goes, and then the others."""
    three = _neighbours(attacker, 3)
    attacker.negotiate()
    outcome = Outcome(Reaction.IGNORED)
    for canary in three:
        outcome = _add(attacker, canary.region(), canary.fd)
    for at in (1, 0, 2):
        outcome = _remove(attacker, three[at].region())
        if outcome.reaction is not Reaction.ACCEPTED:
            break
    return outcome
