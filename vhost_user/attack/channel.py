"""Attacks on the back-end channel: what it is made of, who is at its other end, and what is said on it."""

from __future__ import annotations

from functools import partial

from vhost_user.attack.attacker import HARMLESS, ODD_FDS, Attacker
from vhost_user.attack.theme import Outcome, Reaction, Theme
from vhost_user.message import HEADER, U64, VERSION, BackendRequest, FrontendRequest, ProtocolFeature, encode_message

F = FrontendRequest
P = ProtocolFeature
channel = Theme("channel")

_ACKED = HARMLESS | P.BACKEND_REQ | P.BACKEND_SEND_FD
_NEEDS = P.BACKEND_REQ
_UNLOOKED = "a back end that has nothing to say need not look at what it would say it on"


def _of_kind(kind: str, attacker: Attacker) -> Outcome:
    line = attacker.negotiate(_ACKED)
    return line.provoke(F.SET_BACKEND_REQ_FD, b"", [attacker.odd_fd(kind)])


for _kind in ODD_FDS:
    channel.add(
        f"fd.{_kind}",
        "vhost-user: back-end channel",
        f"SET_BACKEND_REQ_FD with a descriptor of this kind: {_kind}.",
        partial(_of_kind, _kind),
        needs=_NEEDS,
        lawful=_UNLOOKED,
    )


def _fds(number: int, attacker: Attacker) -> Outcome:
    line = attacker.negotiate(_ACKED)
    return line.provoke(F.SET_BACKEND_REQ_FD, b"", [attacker.odd_fd("socket") for _ in range(number)])


for _name, _number in (("none", 0), ("two", 2), ("eight", 8)):
    channel.add(
        f"fds-{_name}",
        "CVE-2022-0669, CVE-2019-14818",
        f"SET_BACKEND_REQ_FD with {_number} descriptors.",
        partial(_fds, _number),
        needs=_NEEDS,
    )


@channel.attack(
    "closed",
    "vhost-user: back-end channel",
    needs=_NEEDS,
    lawful="whether anybody is there is seen when something is sent",
)
def closed(attacker: Attacker) -> Outcome:
    """A channel whose other end is closed already, and rings that run."""
    line = attacker.negotiate(_ACKED)
    ours, theirs = attacker.pair()
    ours.close()
    outcome = line.provoke(F.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
    if outcome.reaction is Reaction.CLOSED:
        return outcome
    rings = [attacker.ring(attacker.share(), 0)]
    attacker.start(*rings)
    after = attacker.kick(*rings)
    return after if after.reaction is Reaction.CLOSED else outcome


@channel.attack("again-and-again", "SPDK#2852", needs=_NEEDS, lawful="a new channel takes the place of the one before")
def again_and_again(attacker: Attacker) -> Outcome:
    """A channel a hundred times: the one before has to be closed."""
    line = attacker.negotiate(_ACKED)
    outcome = Outcome(Reaction.IGNORED)
    for _ in range(100):
        ours, theirs = attacker.pair()
        outcome = line.provoke(F.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        ours.close()
        theirs.close()
        if outcome.reaction is Reaction.CLOSED:
            break
    return outcome


def _said(data: bytes, attacker: Attacker) -> Outcome:
    line = attacker.negotiate(_ACKED)
    ours, theirs = attacker.pair()
    outcome = line.provoke(F.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
    if outcome.reaction is Reaction.CLOSED:
        return outcome
    theirs.close()
    try:
        ours.sendall(data)
    except OSError:
        return Outcome(Reaction.IGNORED, "the channel was closed")
    ended = line.wait_for_silence(attacker.patience)
    return ended if ended.reaction is Reaction.CLOSED else line.judge(F.GET_FEATURES)


_REPLY = encode_message(BackendRequest.IOTLB_MSG, U64(0).encode(), reply=True)
for _name, _says, _data in (
    (
        "unasked-reply",
        "an answer to what was not asked",
        _REPLY,
    ),
    ("request", "a request, as if it were the back end's to take", encode_message(F.GET_FEATURES, b"")),
    ("half-a-header", "half a header", HEADER.pack(1, VERSION, 8)[:6]),
    ("size-max", "a header that announces 2**32 - 1 bytes", HEADER.pack(1, VERSION | 4, 0xFFFFFFFF) + bytes(64)),
    ("garbage", "64 KiB of nothing", b"\xa7" * 65536),
):
    channel.add(
        f"says.{_name}",
        "vhost-user: back-end channel",
        f"On the channel comes {_says}.",
        partial(_said, _data),
        needs=_NEEDS,
    )


@channel.attack(
    "unread",
    "vhost-user: back-end channel",
    needs=_NEEDS,
    lawful="nothing is wrong with it; a back end must not wait for a reader",
)
def unread(attacker: Attacker) -> Outcome:
    """A channel that is full from the start and that nobody reads."""
    line = attacker.negotiate(_ACKED)
    _, theirs = attacker.pair()
    theirs.setblocking(False)
    try:
        while True:
            theirs.send(bytes(4096))
    except BlockingIOError:
        theirs.setblocking(True)
    return line.provoke(F.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
