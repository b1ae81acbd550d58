"""Attacks on how a ring is set up: indices, sizes, addresses that can't be, and descriptors that are no eventfds.

A back end may look at addresses when they come or when the ring is started; so an attack on them goes on until the ring
is kicked, and it is there that a yes is believed.
"""

from __future__ import annotations

import os
import struct
from functools import partial

from vhost_user.attack.attacker import ODD_FDS, Attacker
from vhost_user.attack.canary import GUEST, WINDOW
from vhost_user.attack.ring import AVAIL, USED, HostileRing
from vhost_user.attack.theme import Outcome, Reaction, Theme
from vhost_user.errors import FieldError
from vhost_user.message import F_PROTOCOL_FEATURES, U64, FrontendRequest, VringAddr, VringState
from vhost_user.units import GuestAddress, UserAddress

F = FrontendRequest
rings = Theme("rings")

_U64 = 2**64

# Indices.

_STATES = (F.SET_VRING_NUM, F.SET_VRING_BASE, F.GET_VRING_BASE, F.SET_VRING_ENABLE, F.SET_VRING_ADDR)
_DESCRIPTORS = (F.SET_VRING_KICK, F.SET_VRING_CALL, F.SET_VRING_ERR)


def _index(request: FrontendRequest, index: int, attacker: Attacker) -> Outcome:
    canary = attacker.negotiated_memory()
    line = attacker.line
    if request in _DESCRIPTORS:
        return line.provoke(request, struct.pack("=Q", index), [attacker.odd_fd("eventfd")])
    if request is F.SET_VRING_ADDR:
        ring = attacker.ring(canary)
        places = ring.addresses()
        return line.provoke(request, VringAddr(index, 0, places.desc, places.used, places.avail))
    num = 0 if request is F.GET_VRING_BASE else 1 if request is F.SET_VRING_ENABLE else 64
    return line.provoke(request, VringState(index, num))


for _request in (*_STATES, *_DESCRIPTORS):
    for _index_ in (200, 255) if _request in _DESCRIPTORS else (200, 255, 0x7FFFFFFF, 0xFFFFFFFF):
        rings.add(
            f"{_request.name}.index-{_index_:#x}",
            "passt's SIGSEGV of 2026",
            f"{_request.name} of ring {_index_}.",
            partial(_index, _request, _index_),
            lawful="" if _index_ > 0xFF else "the device may have so many rings",
        )


@rings.attack(
    "kick.reserved-bits", "vhost-user: descriptors of rings", lawful="the document gives bits 9 to 63 no meaning"
)
def reserved_bits(attacker: Attacker) -> Outcome:
    """SET_VRING_KICK with all the bits that have no meaning, and index 0."""
    attacker.negotiated_memory()
    return attacker.line.provoke(F.SET_VRING_KICK, struct.pack("=Q", _U64 - 1 & ~0x1FF), [attacker.odd_fd("eventfd")])


# Sizes, and numbers that are neither 0 nor 1.


def _num(request: FrontendRequest, num: int, attacker: Attacker) -> Outcome:
    canary = attacker.negotiated_memory()
    outcome = attacker.line.provoke(request, VringState(0, num))
    if request is not F.SET_VRING_NUM or outcome.reaction in {Reaction.CLOSED, Reaction.REFUSED}:
        return outcome
    ring = attacker.ring(canary)
    return _after(outcome, _start(attacker, ring, ring.addresses(), num), ring, attacker)


_SIZES = {0: "", 3: "", 65536: "", 32769: "", 0xFFFFFFFF: "", 0x80000000: ""}
for _num_, _lawful in _SIZES.items():
    rings.add(
        f"num-{_num_:#x}",
        "virtio: queue size",
        f"A ring of {_num_} entries, started and kicked.",
        partial(_num, F.SET_VRING_NUM, _num_),
        lawful=_lawful,
    )
for _num_ in (2, 0xFFFFFFFF):
    rings.add(
        f"enable-{_num_:#x}",
        "vhost-user: SET_VRING_ENABLE",
        f"SET_VRING_ENABLE with {_num_}.",
        partial(_num, F.SET_VRING_ENABLE, _num_),
        lawful="the document gives other numbers than 0 and 1 no meaning",
    )
rings.add(
    "base-0x10000",
    "split rings: bits 16-31 are zero",
    "SET_VRING_BASE of a split ring with more than 16 bits.",
    partial(_num, F.SET_VRING_BASE, 0xFFFF0000),
)
rings.add(
    "get-base-num",
    "vhost-user: GET_VRING_BASE",
    "GET_VRING_BASE with a number that should be 0.",
    partial(_num, F.GET_VRING_BASE, 0xFFFFFFFF),
    lawful="a back end has no use for the number",
)


# Addresses.


def _start(attacker: Attacker, ring: HostileRing, addresses: VringAddr, num: int | None = None) -> Outcome:
    """All that starts a ring, kick included, whatever is said to it; the reaction to the last of it."""
    line = attacker.line
    refused: Outcome | None = None
    outcome = Outcome(Reaction.IGNORED)
    steps: list[tuple[FrontendRequest, VringState | VringAddr | U64, list[int]]] = [
        (F.SET_VRING_NUM, VringState(ring.index, ring.size if num is None else num), []),
        (F.SET_VRING_BASE, VringState(ring.index, 0), []),
        (F.SET_VRING_ADDR, addresses, []),
        (F.SET_VRING_CALL, U64(ring.index), [ring.call]),
        (F.SET_VRING_KICK, U64(ring.index), [ring.kick]),
    ]
    if attacker.offer.features & F_PROTOCOL_FEATURES:
        steps.append((F.SET_VRING_ENABLE, VringState(ring.index, 1), []))
    for request, payload, fds in steps:
        outcome = line.provoke(request, payload, fds)
        if outcome.reaction is Reaction.CLOSED:
            return outcome
        if outcome.reaction is Reaction.REFUSED:
            refused = refused or Outcome(Reaction.REFUSED, f"{request.name} {outcome.detail}".strip())
    return refused or outcome


def _after(first: Outcome, started: Outcome, ring: HostileRing, attacker: Attacker) -> Outcome:
    """What to make of a ring that can't work, once it is kicked: a yes counts where chains come back."""
    if started.reaction in {Reaction.CLOSED, Reaction.REFUSED}:
        return started
    kicked = attacker.kick(ring)
    if kicked.reaction is not Reaction.IGNORED:
        return kicked
    return Outcome(Reaction.ACCEPTED, f"ring started; {kicked.detail}") if first else kicked


_ADDRESSES: tuple[tuple[str, str, str, dict[str, int]], ...] = (
    (
        "unmapped",
        "vhost-user: ring addresses",
        "All three parts where there is no memory.",
        {"desc": 1 << 40, "avail": 1 << 40, "used": 1 << 40},
    ),
    ("null", "vhost-user: ring addresses", "All three parts at address 0.", {"desc": -1, "avail": -1, "used": -1}),
    (
        "desc-past-end",
        "vhost-user: ring addresses",
        "Descriptors that begin in the last bytes of memory.",
        {"desc": WINDOW - 16},
    ),
    (
        "avail-past-end",
        "vhost-user: ring addresses",
        "An available ring that begins at the end of memory.",
        {"avail": WINDOW - 4},
    ),
    (
        "used-past-end",
        "vhost-user: ring addresses",
        "A used ring that begins in the last bytes of memory.",
        {"used": WINDOW - 8},
    ),
    ("desc-before", "vhost-user: ring addresses", "Descriptors that begin before memory.", {"desc": -16}),
    ("used-before", "vhost-user: ring addresses", "A used ring that begins before memory.", {"used": -64}),
    ("desc-unaligned", "virtio: alignment", "Descriptors at an odd address.", {"desc": 1}),
    ("avail-unaligned", "virtio: alignment", "An available ring at an odd address.", {"avail": AVAIL + 1}),
    ("used-unaligned", "virtio: alignment", "A used ring at an odd address.", {"used": USED + 1}),
)


def _addresses(where: dict[str, int], attacker: Attacker) -> Outcome:
    canary = attacker.negotiated_memory()
    ring = attacker.ring(canary)
    places = {"desc": 0, "avail": AVAIL, "used": USED} | where
    if places["desc"] == places["used"] == -1:
        addresses = VringAddr(0, 0, UserAddress(0), UserAddress(0), UserAddress(0))
    else:
        addresses = ring.addresses(**places)
    if 0 <= places["used"] < WINDOW:
        canary.allow(places["used"], 6 + 8 * ring.size)
    return _address_attack(attacker, ring, addresses)


def _address_attack(attacker: Attacker, ring: HostileRing, addresses: VringAddr) -> Outcome:
    ring.request()
    ring.offer(*[0] * 32)
    started = _start(attacker, ring, addresses)
    return _after(started, started, ring, attacker)


for _name, _source, _says, _where in _ADDRESSES:
    rings.add(f"address.{_name}", _source, _says, partial(_addresses, _where))


@rings.attack("address.wrap", "vhost-user: ring addresses")
def address_wrap(attacker: Attacker) -> Outcome:
    """Parts whose ends are beyond 2**64."""
    canary = attacker.negotiated_memory()
    high = UserAddress(_U64 - 16)
    return _address_attack(attacker, attacker.ring(canary), VringAddr(0, 0, high, high, high))


@rings.attack(
    "address.log-max", "vhost-user: dirty log", lawful="nothing is logged, so the address of the log has no meaning"
)
def address_log_max(attacker: Attacker) -> Outcome:
    """A used ring that is to be logged at 2**64 - 1, where nothing is logged."""
    canary = attacker.negotiated_memory()
    ring = attacker.ring(canary)
    return _address_attack(attacker, ring, ring.addresses(log=_U64 - 1))


@rings.attack("address.flags", "vhost-user: ring addresses", lawful="the document gives the other bits no meaning")
def address_flags(attacker: Attacker) -> Outcome:
    """SET_VRING_ADDR with all flags but the one that there is."""
    canary = attacker.negotiated_memory()
    ring = attacker.ring(canary)
    places = ring.addresses()
    return attacker.line.provoke(
        F.SET_VRING_ADDR, VringAddr(0, 0xFFFFFFFE, places.desc, places.used, places.avail, GuestAddress(0))
    )


def _across(gap: int, attacker: Attacker) -> Outcome:
    low = attacker.canary()
    high = attacker.canary(GUEST + WINDOW + gap)
    attacker.negotiate()
    attacker.share(low, high)
    ring = attacker.ring(low)
    addresses = ring.addresses(desc=WINDOW - 512)
    return _address_attack(attacker, ring, addresses)


rings.add(
    "address.across-two-regions",
    "CVE-2018-1059",
    "Descriptors that begin in one region and end in its neighbour, which is another file.",
    partial(_across, 0),
)
rings.add(
    "address.across-a-hole",
    "CVE-2018-1059",
    "Descriptors that begin in one region and end behind a hole in another.",
    partial(_across, 512),
)


# Descriptors.


def _descriptor(request: FrontendRequest, kind: str, attacker: Attacker) -> Outcome:
    canary = attacker.negotiated_memory()
    ring = attacker.ring(canary)
    started = _start(attacker, ring, ring.addresses())
    if started.reaction in {Reaction.CLOSED, Reaction.REFUSED}:
        return Outcome(Reaction.NOT_REACHED, f"starting a ring: {started}")
    outcome = attacker.line.provoke(request, U64(0), [attacker.odd_fd(kind)])
    if outcome.reaction is Reaction.CLOSED:
        return outcome
    ring.request()
    ring.offer(0)
    kicked = attacker.kick(ring)
    return kicked if kicked.reaction is Reaction.CLOSED else outcome


_USABLE = {"eventfd", "pipe", "full-eventfd", "full-pipe", "unread-pipe", "broken-pipe"}
_NO_CHECK = "whether it is an eventfd can't be told by a portable call; it only fails to wake anybody"
for _request, _short in ((F.SET_VRING_KICK, "kick"), (F.SET_VRING_CALL, "call"), (F.SET_VRING_ERR, "err")):
    for _kind in ODD_FDS:
        if _kind in {"eventfd", "pipe"}:
            continue
        rings.add(
            f"{_short}.{_kind}",
            "vhost-user: descriptors of rings",
            f"{_request.name} with a descriptor of this kind: {_kind}.",
            partial(_descriptor, _request, _kind),
            lawful="pipes and eventfds are legal" if _kind in _USABLE else _NO_CHECK,
        )


def _wrong_count(request: FrontendRequest, value: int, fds: int, attacker: Attacker) -> Outcome:
    attacker.negotiated_memory()
    return attacker.line.provoke(request, U64(value), [attacker.odd_fd("eventfd") for _ in range(fds)])


for _request, _short in ((F.SET_VRING_KICK, "kick"), (F.SET_VRING_CALL, "call"), (F.SET_VRING_ERR, "err")):
    for _name, _value, _fds in (("fd-missing", 0, 0), ("fd-beside-flag", 0x100, 1), ("two-fds", 0, 2)):
        rings.add(
            f"{_short}.{_name}",
            "CVE-2022-0669",
            f"{_request.name} with {_fds} descriptors and the flag {'set' if _value else 'clear'}.",
            partial(_wrong_count, _request, _value, _fds),
            lawful="the flag says that there is none; a surplus one has to be closed" if _value else "",
        )


@rings.attack(
    "start-again-and-again",
    "vhost-user: start and stop of rings",
    lawful="nothing is wrong with it; each time the last kick has to be closed",
)
def start_again_and_again(attacker: Attacker) -> Outcome:
    """Fifty kicks and calls for rings that run, each replacing the one before; half of them wake the device."""
    attacker.running()
    try:
        for at in range(50):
            for request in (F.SET_VRING_CALL, F.SET_VRING_KICK):
                fd = attacker.odd_fd("eventfd")
                os.eventfd_write(fd, at % 2)
                attacker.line.tell(request, U64(0), [fd])
        attacker.line.answers()
    except FieldError as error:
        return Outcome(Reaction.CLOSED, str(error))
    return Outcome(Reaction.ACCEPTED)
