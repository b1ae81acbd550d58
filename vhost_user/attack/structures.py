"""Attacks by the two structures that a front end shares besides guest memory: the dirty log, and inflight areas."""

from __future__ import annotations

import struct
from functools import partial

from vhost_user.attack.attacker import HARMLESS, ODD_FDS, Attacker, NotReached
from vhost_user.attack.canary import MARGIN, Canary
from vhost_user.attack.ring import SIZE, HostileRing
from vhost_user.attack.theme import Outcome, Reaction, Theme
from vhost_user.errors import Disconnected, FieldError
from vhost_user.message import F_LOG_ALL, LOG_PAGE, FrontendRequest, Inflight, ProtocolFeature, VringState
from vhost_user.units import KIB, ByteCount, HostOffset

F = FrontendRequest
LOG = ProtocolFeature.LOG_SHMFD
INFLIGHT = ProtocolFeature.INFLIGHT_SHMFD
log = Theme("log")
inflight = Theme("inflight")

_U64 = 2**64

# The dirty log. Guest memory begins at a gibibyte: its first page's bit is the first of byte 32,768.

_ENOUGH = 64 * KIB
"""Bytes of log that cover the window and what lies around it."""

_SILENT_LIE = "CVE-2020-10722 group"

_LOGS: tuple[tuple[str, str, str, int, int, str], ...] = (
    ("size-zero", "left open by vhost-user", "A log of no bytes.", 0, 0, ""),
    ("size-max", _SILENT_LIE, "A log of 2**64 - 1 bytes.", _U64 - 1, 0, ""),
    ("offset-wrap", _SILENT_LIE, "A log whose offset and size wrap.", 8 * KIB, _U64 - 4096, ""),
    ("offset-wrap-to-little", _SILENT_LIE, "Offset and size whose sum is one page.", _U64 - 60 * KIB, 64 * KIB, ""),
    ("offset-beyond", _SILENT_LIE, "A log that begins beyond its file's end.", 4096, 1 << 30, ""),
    ("size-beyond", _SILENT_LIE, "A log that ends beyond its file's end.", 1 << 30, 0, ""),
    (
        "offset-unaligned",
        "left open by vhost-user",
        "A log at an odd offset.",
        64,
        1,
        "the page around it can be mapped",
    ),
)


def _log_base(attacker: Attacker, size: int, offset: int, *fds: int) -> Outcome:
    return attacker.line.provoke(F.SET_LOG_BASE, struct.pack("=QQ", size, offset), fds)


def _bad_log(size: int, offset: int, attacker: Attacker) -> Outcome:
    attacker.negotiated_memory()
    return _log_base(attacker, size, offset, attacker.canary(1 << 40).fd)


for _name, _source, _says, _size, _offset, _lawful in _LOGS:
    log.add(_name, _source, _says, partial(_bad_log, _size, _offset), needs=LOG, lawful=_lawful)


def _log_of_kind(kind: str, attacker: Attacker) -> Outcome:
    attacker.negotiated_memory()
    return _log_base(attacker, 4096, 0, attacker.odd_fd(kind))


for _kind in ODD_FDS:
    log.add(
        f"fd.{_kind}",
        "SPDK#2852",
        f"A log whose descriptor is of this kind: {_kind}.",
        partial(_log_of_kind, _kind),
        needs=LOG,
        lawful={"file": "a file can be mapped", "zero": "the device can be mapped"}.get(_kind, ""),
    )


def _log_fds(number: int, attacker: Attacker) -> Outcome:
    attacker.negotiated_memory()
    return _log_base(attacker, 4096, 0, *[attacker.canary(1 << 40).fd] * number)


for _name, _fds in (("none", 0), ("two", 2), ("eight", 8)):
    log.add(
        f"fds-{_name}", "CVE-2022-0669", f"SET_LOG_BASE with {_fds} descriptors.", partial(_log_fds, _fds), needs=LOG
    )


@log.attack(
    "again-and-again", "SPDK#2852", needs=LOG, lawful="nothing is wrong with it; each time the last one has to go"
)
def log_again_and_again(attacker: Attacker) -> Outcome:
    """A log a hundred times."""
    attacker.negotiated_memory()
    canary = attacker.canary(1 << 40)
    try:
        for _ in range(100):
            attacker.line.ask(F.SET_LOG_BASE, struct.pack("=QQ", _ENOUGH, MARGIN), [canary.fd])
    except Disconnected:
        return Outcome(Reaction.CLOSED)
    return Outcome(Reaction.ACCEPTED)


def _busy_with_log(attacker: Attacker, size: int, *, used_at: int | None = None) -> tuple[list[HostileRing], Canary]:
    """Rings that run with LOG_ALL, with requests in them, and `size` bytes of log in the middle of a canary."""
    canary = attacker.negotiated_memory(HARMLESS, virtio=F_LOG_ALL)
    logged = attacker.canary(1 << 40)
    logged.allow(0, size)
    with attacker.reaching("SET_LOG_BASE"):
        attacker.line.ask(F.SET_LOG_BASE, struct.pack("=QQ", size, MARGIN), [logged.fd])
    rings = [attacker.ring(canary, index) for index in range(min(attacker.offer.rings, 2))]
    attacker.start(*rings)
    if used_at is not None:
        for ring in rings:
            attacker.line.provoke(F.SET_VRING_ADDR, ring.addresses(log=used_at))
    for ring in rings:
        ring.request()
        ring.offer(*[0] * 8)
    return rings, logged


@log.attack("double-offset", "CVE-2026-86563", needs=LOG, virtio=F_LOG_ALL)
def double_offset(attacker: Attacker) -> Outcome:
    """A log that lies at an offset, and writes to be logged: an offset added twice ends outside the log."""
    rings, _ = _busy_with_log(attacker, _ENOUGH)
    return attacker.kick(*rings)


@log.attack("too-short", "CVE-2020-10722 group", needs=LOG, virtio=F_LOG_ALL)
def too_short(attacker: Attacker) -> Outcome:
    """A log of one page, which ends far before guest memory begins, and writes to be logged."""
    try:
        rings, _ = _busy_with_log(attacker, 4096)
    except NotReached as error:
        return Outcome(Reaction.REFUSED, str(error))
    return attacker.kick(*rings)


def _used_beyond(address: int, attacker: Attacker) -> Outcome:
    rings, _ = _busy_with_log(attacker, _ENOUGH, used_at=address)
    return attacker.kick(*rings)


for _name, _address in (("max", _U64 - 1), ("just-beyond", _ENOUGH * 8 * LOG_PAGE), ("wrap", _U64 - SIZE)):
    log.add(
        f"used-ring-{_name}",
        "vhost-user: dirty log",
        f"A used ring that is to be logged at {_address:#x}, where the log does not reach.",
        partial(_used_beyond, _address),
        needs=LOG,
        virtio=F_LOG_ALL,
    )


@log.attack("truncated", "a truncated file must not kill", needs=LOG, virtio=F_LOG_ALL)
def log_truncated(attacker: Attacker) -> Outcome:
    """The log's file is truncated while writes are logged in it."""
    rings, logged = _busy_with_log(attacker, _ENOUGH)
    logged.truncate()
    return attacker.kick(*rings)


@log.attack(
    "log-fd.file",
    "vhost-user: descriptors",
    lawful="it is a hint that nobody has to give; the descriptor need not be looked at",
)
def log_fd_file(attacker: Attacker) -> Outcome:
    """SET_LOG_FD with a regular file, and then with a full eventfd that blocks, twenty times."""
    line = attacker.negotiate()
    outcome = Outcome(Reaction.IGNORED)
    for _ in range(20):
        for kind in ("file", "full-eventfd"):
            outcome = line.provoke(F.SET_LOG_FD, b"", [attacker.odd_fd(kind)])
            if outcome.reaction is Reaction.CLOSED:
                return outcome
    return outcome


# Inflight areas.


def _get(attacker: Attacker, queues: int, size: int) -> Outcome:
    return attacker.line.provoke(F.GET_INFLIGHT_FD, Inflight(ByteCount(0), HostOffset(0), queues, size))


def _bad_get(queues: int, size: int, attacker: Attacker) -> Outcome:
    attacker.negotiate()
    return _get(attacker, queues, size)


for _queues, _entries in ((0, 64), (65535, 64), (65535, 65535), (1, 0), (1, 65535)):
    inflight.add(
        f"get.{_queues}-queues-of-{_entries}",
        "QEMU work_items 3974, 4403",
        f"GET_INFLIGHT_FD for {_queues} queues of {_entries} entries.",
        partial(_bad_get, _queues, _entries),
        needs=INFLIGHT,
    )


@inflight.attack(
    "get.a-thousand-times", "GHSA-whmr-hj5c-pm9g", needs=INFLIGHT, lawful="each time there is one area, not a thousand"
)
def get_a_thousand_times(attacker: Attacker) -> Outcome:
    """GET_INFLIGHT_FD a thousand times."""
    line = attacker.negotiate()
    question = Inflight(ByteCount(0), HostOffset(0), 1, 64)
    try:
        for _ in range(1000):
            line.ask(F.GET_INFLIGHT_FD, question)
    except Disconnected:
        return Outcome(Reaction.CLOSED)
    except FieldError as error:
        return Outcome(Reaction.REFUSED, str(error))
    return Outcome(Reaction.ACCEPTED)


def _set(attacker: Attacker, size: int, offset: int, queues: int, entries: int, *fds: int) -> Outcome:
    body = struct.pack("=QQHH4x", size, offset, queues, entries)
    return attacker.line.provoke(F.SET_INFLIGHT_FD, body, fds)


_SETS: tuple[tuple[str, str, int, int, int, int], ...] = (
    ("size-zero", "an area of no bytes", 0, MARGIN, 1, SIZE),
    ("size-small", "an area of 8 bytes", 8, MARGIN, 1, SIZE),
    ("size-max", "an area of 2**64 - 1 bytes", _U64 - 1, 0, 1, SIZE),
    ("size-beyond", "an area that ends beyond its file's end", 1 << 30, 0, 1, SIZE),
    ("offset-wrap", "an area whose offset wraps", 8192, _U64 - 4096, 1, SIZE),
    ("offset-beyond", "an area that begins beyond its file's end", 8192, 1 << 30, 1, SIZE),
    ("offset-odd", "an area at an odd offset", 8192, MARGIN + 1, 1, SIZE),
    ("no-queues", "an area for no queue", 8192, MARGIN, 0, SIZE),
    ("many-queues", "an area for 65,535 queues", 8192, MARGIN, 65535, SIZE),
    ("no-entries", "an area of queues of no entries", 8192, MARGIN, 1, 0),
    ("many-entries", "an area of queues of 65,535 entries", 8192, MARGIN, 1, 65535),
)


def _bad_set(size: int, offset: int, queues: int, entries: int, attacker: Attacker) -> Outcome:
    attacker.negotiate()
    return _set(attacker, size, offset, queues, entries, attacker.canary(1 << 40).fd)


for _name, _says, _size, _offset, _queues, _entries in _SETS:
    inflight.add(
        f"set.{_name}",
        "QEMU work_items 3974, 4403",
        f"SET_INFLIGHT_FD of {_says}.",
        partial(_bad_set, _size, _offset, _queues, _entries),
        needs=INFLIGHT,
    )


def _set_of_kind(kind: str, attacker: Attacker) -> Outcome:
    attacker.negotiate()
    return _set(attacker, 8192, 0, 1, SIZE, attacker.odd_fd(kind))


for _kind in ("directory", "pipe", "eventfd", "the-connection", "null"):
    inflight.add(
        f"set.fd.{_kind}",
        "SPDK#2852",
        f"SET_INFLIGHT_FD with a descriptor of this kind: {_kind}.",
        partial(_set_of_kind, _kind),
        needs=INFLIGHT,
    )


def _set_fds(number: int, attacker: Attacker) -> Outcome:
    attacker.negotiate()
    return _set(attacker, 8192, MARGIN, 1, SIZE, *[attacker.canary(1 << 40).fd] * number)


for _fds in (0, 2, 8):
    inflight.add(
        f"set.fds-{_fds}",
        "CVE-2022-0669, CVE-2019-14818",
        f"SET_INFLIGHT_FD with {_fds} descriptors.",
        partial(_set_fds, _fds),
        needs=INFLIGHT,
    )


def _started_with_area(fill: bytes | None, truncate: bool, attacker: Attacker) -> Outcome:
    attacker.negotiate(HARMLESS)
    area = attacker.canary(1 << 40)
    area.allow(0, area.window)
    area.write(0, attacker.rng.randbytes(64 * KIB) if fill is None else fill * (64 * KIB // len(fill)))
    outcome = _set(attacker, 64 * KIB, MARGIN, min(attacker.offer.rings, 2), SIZE, area.fd)
    if outcome.reaction in {Reaction.CLOSED, Reaction.REFUSED}:
        return outcome
    canary = attacker.share()
    rings = [attacker.ring(canary, index) for index in range(min(attacker.offer.rings, 2))]
    for ring in rings:
        ring.request()
        ring.offer(0)
    if truncate:
        area.truncate()
    try:
        for ring in rings:
            attacker.line.send(F.SET_VRING_NUM, VringState(ring.index, ring.size))
            attacker.line.send(F.SET_VRING_BASE, VringState(ring.index, 0))
            attacker.line.send(F.SET_VRING_ADDR, ring.addresses())
            attacker.line.send(F.SET_VRING_CALL, struct.pack("=Q", ring.index), [ring.call])
            attacker.line.send(F.SET_VRING_KICK, struct.pack("=Q", ring.index), [ring.kick])
            attacker.line.send(F.SET_VRING_ENABLE, VringState(ring.index, 1))
    except Disconnected:
        return Outcome(Reaction.CLOSED)
    ended = attacker.line.judge(F.GET_FEATURES)
    if ended.reaction is Reaction.CLOSED:
        return ended
    for ring in rings:
        ring.signal()
    ended = attacker.line.wait_for_silence(attacker.patience)
    return ended if ended.reaction is Reaction.CLOSED else Outcome(Reaction.IGNORED, "and the rings run")


inflight.add(
    "content.random",
    "QEMU work_items 3974: inflight content",
    "An area full of random bytes, and rings that are started with it.",
    partial(_started_with_area, None, False),
    needs=INFLIGHT,
)
inflight.add(
    "content.all-ones",
    "QEMU work_items 3974: inflight content",
    "An area full of ones: every chain is in flight, every index is 65535.",
    partial(_started_with_area, b"\xff", False),
    needs=INFLIGHT,
)
inflight.add(
    "content.loops",
    "vhost-user: inflight area",
    "An area of the right version, whose last batch goes round in a circle.",
    partial(
        _started_with_area,
        struct.pack("<QHHHH", 0, 1, SIZE, 0, 0x8000) + struct.pack("<B5xHQ", 1, 0, 0) * SIZE + bytes(48),
        False,
    ),
    needs=INFLIGHT,
)
inflight.add(
    "truncated",
    "a truncated file must not kill",
    "An area whose file is truncated before rings are started with it.",
    partial(_started_with_area, bytes(64), True),
    needs=INFLIGHT,
)
