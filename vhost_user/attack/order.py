"""Attacks by order: good messages at a moment when they should not come, and bits that nobody offered."""

from __future__ import annotations

import os
from functools import partial

from vhost_user.attack.attacker import HARMLESS, VERSION_1, Attacker
from vhost_user.attack.theme import Outcome, Reaction, Theme
from vhost_user.errors import Disconnected, FieldError
from vhost_user.message import (
    F_PROTOCOL_FEATURES,
    FRONTEND_MESSAGES,
    U64,
    FrontendRequest,
    Inflight,
    Log,
    MacAddress,
    MemoryTable,
    Payload,
    ProtocolFeature,
    SingleMemoryRegion,
    VringState,
)
from vhost_user.units import ByteCount, HostOffset

F = FrontendRequest
P = ProtocolFeature
order = Theme("order")

LENIENT = "the document binds the front end; a back end may serve it even so"

_UNOFFERED_VIRTIO = 1 << 62
_UNOFFERED_PROTOCOL = 1 << 60
_RING_PACKED = 1 << 34


@order.attack(
    "unoffered-features",
    "vhost-user: feature bits",
    lawful="the document does not say what a back end does about such bits",
)
def unoffered_features(attacker: Attacker) -> Outcome:
    """SET_FEATURES with a bit that was not offered."""
    line = attacker.negotiate(set_features=False)
    return line.provoke(F.SET_FEATURES, U64(attacker.offer.features | _UNOFFERED_VIRTIO))


@order.attack(
    "all-features", "vhost-user: feature bits", lawful="the document does not say what a back end does about such bits"
)
def all_features(attacker: Attacker) -> Outcome:
    """SET_FEATURES with all 64 bits."""
    line = attacker.negotiate(set_features=False)
    return line.provoke(F.SET_FEATURES, U64(2**64 - 1))


@order.attack(
    "unoffered-protocol-features",
    "vhost-user: feature bits",
    lawful="the document does not say what a back end does about such bits",
)
def unoffered_protocol_features(attacker: Attacker) -> Outcome:
    """SET_PROTOCOL_FEATURES with a bit that was not offered, and then with all 64."""
    line = attacker.negotiate()
    outcome = line.provoke(F.SET_PROTOCOL_FEATURES, U64(int(attacker.offer.protocol) | _UNOFFERED_PROTOCOL))
    if outcome.reaction is Reaction.CLOSED:
        return outcome
    return line.provoke(F.SET_PROTOCOL_FEATURES, U64(2**64 - 1))


def _unnegotiated(request: FrontendRequest, payload: Payload | bytes, fds: int, attacker: Attacker) -> Outcome:
    canary = attacker.canary()
    canary.give_away()  # a back end that takes it for a log, or for the end of a pipe, may write to it
    line = attacker.negotiate(P.REPLY_ACK)
    return line.provoke(request, payload, [canary.fd] * fds)


def _example(request: FrontendRequest, size: int) -> Payload | bytes:
    """A payload that would do, if the moment were right."""
    examples: dict[FrontendRequest, Payload] = {
        F.GET_INFLIGHT_FD: Inflight(ByteCount(0), HostOffset(0), 1, 64),
        F.SET_INFLIGHT_FD: Inflight(ByteCount(4096), HostOffset(0), 1, 64),
        F.SET_LOG_BASE: Log(ByteCount(4096), HostOffset(0)),
        F.SEND_RARP: MacAddress(b"\x52\x54\0\0\0\1"),
    }
    return examples.get(request, bytes(size))


for _request, _spec in FRONTEND_MESSAGES.items():
    for _one in (_spec, *(variant for _, variant in _spec.variants)):
        if _one.needs and not _one.offered_suffices:
            order.add(
                f"unnegotiated.{_request.name}" + (".XEN" if _one.needs is P.XEN_MMAP else ""),
                "vhost-user: unknown requests",
                f"{_request.name}, though what it needs was offered and not acked.",
                partial(_unnegotiated, _request, _example(_request, _one.payload.max_size()), _one.fds[0]),
                needs=_one.needs,
                lawful=LENIENT,
            )
            break


@order.attack("memory-first", "vhost-user: order of messages", lawful=LENIENT)
def memory_first(attacker: Attacker) -> Outcome:
    """SET_MEM_TABLE as the first message."""
    canary = attacker.canary()
    return attacker.line.provoke(F.SET_MEM_TABLE, MemoryTable((canary.region(),)), [canary.fd])


@order.attack("add-region-first", "vhost-user: order of messages", needs=P.CONFIGURE_MEM_SLOTS, lawful=LENIENT)
def add_region_first(attacker: Attacker) -> Outcome:
    """ADD_MEM_REG as the first message."""
    canary = attacker.canary()
    return attacker.line.provoke(F.ADD_MEM_REG, SingleMemoryRegion(canary.region()), [canary.fd])


@order.attack(
    "kick-first", "vhost-user: start and stop of rings", lawful="the descriptor is kept until the ring can be started"
)
def kick_first(attacker: Attacker) -> Outcome:
    """SET_VRING_KICK before anything is known of the ring."""
    return attacker.negotiate().provoke(F.SET_VRING_KICK, U64(0), [attacker.odd_fd("eventfd")])


@order.attack(
    "kick-without-addresses",
    "vhost-user: start and stop of rings",
    lawful="the descriptor is kept until the ring can be started",
)
def kick_without_addresses(attacker: Attacker) -> Outcome:
    """SET_VRING_KICK, and the kick itself, with memory and a size, but no addresses."""
    attacker.negotiated_memory()
    kick = attacker.odd_fd("eventfd")
    line = attacker.line
    line.tell(F.SET_VRING_NUM, VringState(0, 64))
    line.provoke(F.SET_VRING_ENABLE, VringState(0, 1))
    outcome = line.provoke(F.SET_VRING_KICK, U64(0), [kick])
    return outcome if outcome.reaction is Reaction.CLOSED else _kicked(attacker, kick, outcome)


@order.attack(
    "kick-without-memory", "vhost-user: start and stop of rings", lawful="addresses are looked at when the ring is used"
)
def kick_without_memory(attacker: Attacker) -> Outcome:
    """A ring with size, addresses and kick, and no memory at all."""
    attacker.negotiate()
    ring = attacker.ring(attacker.canary())
    line = attacker.line
    outcome = Outcome(Reaction.IGNORED)
    for request, payload, fds in (
        (F.SET_VRING_NUM, VringState(0, 64), []),
        (F.SET_VRING_ADDR, ring.addresses(), []),
        (F.SET_VRING_ENABLE, VringState(0, 1), []),
        (F.SET_VRING_KICK, U64(0), [ring.kick]),
    ):
        outcome = line.provoke(request, payload, fds)
        if outcome.reaction is Reaction.CLOSED:
            return outcome
    return _kicked(attacker, ring.kick, outcome)


def _kicked(attacker: Attacker, kick: int, before: Outcome) -> Outcome:
    """Whether the daemon is still there after a kick that it can do nothing with."""
    os.eventfd_write(kick, 1)
    ended = attacker.line.wait_for_silence(attacker.patience)
    return ended if ended.reaction is Reaction.CLOSED else before


@order.attack("get-base-of-no-ring", "vhost-user: GET_VRING_BASE", lawful="a ring that never ran is stopped, at 0")
def get_base_of_no_ring(attacker: Attacker) -> Outcome:
    """GET_VRING_BASE of a ring that never ran, ten times."""
    line = attacker.negotiate()
    outcome = Outcome(Reaction.IGNORED)
    for _ in range(10):
        outcome = line.provoke(F.GET_VRING_BASE, VringState(0, 0))
        if outcome.reaction is Reaction.CLOSED:
            break
    return outcome


@order.attack(
    "enable-before-features", "vhost-user: SET_VRING_ENABLE", lawful="enabling is remembered until the ring is started"
)
def enable_before_features(attacker: Attacker) -> Outcome:
    """SET_VRING_ENABLE before SET_FEATURES."""
    return attacker.negotiate(set_features=False).provoke(F.SET_VRING_ENABLE, VringState(0, 1))


def _while_running(request: FrontendRequest, payload: Payload | bytes, attacker: Attacker) -> Outcome:
    _, rings = attacker.running()
    ring = rings[0]
    outcome = attacker.line.provoke(request, payload)
    if outcome.reaction is Reaction.CLOSED:
        return outcome
    ring.request()
    ring.offer(0)
    after = attacker.kick(*rings)
    return after if after.reaction is Reaction.CLOSED else outcome


_CHANGES = "some configuration may change while rings run"
for _name, _request_, _payload in (
    ("num", F.SET_VRING_NUM, VringState(0, 32768)),
    ("base", F.SET_VRING_BASE, VringState(0, 0x8000)),
    ("no-features", F.SET_FEATURES, U64(0)),
    ("packed", F.SET_FEATURES, U64(F_PROTOCOL_FEATURES | VERSION_1 | _RING_PACKED)),
    ("no-protocol-features", F.SET_PROTOCOL_FEATURES, U64(int(P.REPLY_ACK))),
    ("owner", F.SET_OWNER, U64(0)),
    ("reset-owner", F.RESET_OWNER, U64(0)),
):
    _body: Payload | bytes = b"" if _request_ in {F.SET_OWNER, F.RESET_OWNER} else _payload
    order.add(
        f"running.{_name}",
        "vhost-user: changes while rings run",
        f"{_request_.name} while rings run, and a request in the ring after it.",
        partial(_while_running, _request_, _body),
        lawful=_CHANGES,
        virtio=_RING_PACKED if _name == "packed" else 0,
    )


@order.attack(
    "reset-while-running", "vhost-user: RESET_DEVICE", needs=P.RESET_DEVICE, lawful="it is what a reset is for"
)
def reset_while_running(attacker: Attacker) -> Outcome:
    """RESET_DEVICE with a request in the ring, twice, and kicks after it."""
    _, rings = attacker.running(HARMLESS)
    for ring in rings:
        ring.request()
        ring.offer(0)
        ring.signal()
    for _ in range(2):
        outcome = attacker.line.provoke(F.RESET_DEVICE)
        if outcome.reaction is Reaction.CLOSED:
            return outcome
    after = attacker.kick(*rings)
    return after if after.reaction is Reaction.CLOSED else outcome


@order.attack("stop-twice", "vhost-user: start and stop of rings", lawful="a stopped ring is stopped")
def stop_twice(attacker: Attacker) -> Outcome:
    """A ring that runs is stopped three times, and kicked when it is stopped."""
    _, rings = attacker.running()
    line = attacker.line
    for _ in range(3):
        line.ask(F.GET_VRING_BASE, VringState(0, 0))
    rings[0].signal()
    return line.provoke(F.GET_VRING_BASE, VringState(0, 0))


@order.attack("postcopy-listen-first", "vhost-user: postcopy", needs=P.PAGEFAULT)
def postcopy_listen_first(attacker: Attacker) -> Outcome:
    """POSTCOPY_LISTEN without POSTCOPY_ADVISE."""
    return attacker.negotiate(HARMLESS | P.PAGEFAULT).provoke(F.POSTCOPY_LISTEN)


@order.attack("postcopy-end-first", "vhost-user: postcopy", needs=P.PAGEFAULT, lawful="what did not begin has ended")
def postcopy_end_first(attacker: Attacker) -> Outcome:
    """POSTCOPY_END without what goes before it."""
    return attacker.negotiate(HARMLESS | P.PAGEFAULT).provoke(F.POSTCOPY_END)


@order.attack(
    "postcopy-advise-again", "vhost-user: postcopy", needs=P.PAGEFAULT, lawful="each time there is one userfaultfd"
)
def postcopy_advise_again(attacker: Attacker) -> Outcome:
    """POSTCOPY_ADVISE a hundred times: each one before has a descriptor to close."""
    line = attacker.negotiate(HARMLESS | P.PAGEFAULT)
    try:
        for _ in range(100):
            line.ask(F.POSTCOPY_ADVISE)
    except Disconnected:
        return Outcome(Reaction.CLOSED)
    except FieldError as error:
        return Outcome(Reaction.REFUSED, str(error))
    return Outcome(Reaction.ACCEPTED)


@order.attack("postcopy-without-faults", "vhost-user: postcopy", needs=P.PAGEFAULT, lawful="it is the regular sequence")
def postcopy_without_faults(attacker: Attacker) -> Outcome:
    """Postcopy up to the memory table, whose acknowledgement never comes; then the front end is gone."""
    line = attacker.negotiate(HARMLESS | P.PAGEFAULT)
    canary = attacker.canary()
    with attacker.reaching("POSTCOPY_LISTEN"):
        line.ask(F.POSTCOPY_ADVISE)
        line.tell(F.POSTCOPY_LISTEN)
    return line.provoke(F.SET_MEM_TABLE, MemoryTable((canary.region(),)), [canary.fd])
