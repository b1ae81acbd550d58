"""Attacks on the parser of each message: payloads that are too short, too long, missing or huge; numbers that are none.

Every request of the protocol is sent in five wrong shapes, whether or not what it needs was negotiated: a parser comes
before that. What makes the size wrong is never that the stream is cut: all that the header announces is there.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from vhost_user.attack.attacker import Attacker
from vhost_user.attack.theme import Outcome, Theme
from vhost_user.errors import Disconnected
from vhost_user.message import FRONTEND_MESSAGES, FrontendRequest, MessageSpec, Payload

codec = Theme("codec")

HUGE = 4096 + 12
"""Bytes: as much as any message of any peer has, and far more than all but one may have."""

EXTRA = 64
"""Beyond the largest size that a payload has; some readers take a C structure's padding for a part of it."""

_SURPLUS = "the message is as it should be; what came along has to be closed"
_LONGER_MAY_BE = "the document gives no rule for bytes behind a payload"


def _size_of(kind: type[Payload]) -> int:
    layout = getattr(kind, "layout", None)
    return layout.size if layout is not None else kind.max_size()


def _sent(request: FrontendRequest, size: int, fds: int, attacker: Attacker) -> Outcome:
    canary = attacker.canary()
    canary.give_away()  # a back end that takes it for a log, or for the end of a pipe, may write to it
    line = attacker.negotiate()
    with suppress(Disconnected):
        line.send(request, bytes(size), [canary.fd] * fds)
    return line.judge(request)


def _add_shapes(request: FrontendRequest, spec: MessageSpec) -> None:
    size, largest, fds = _size_of(spec.payload), spec.payload.max_size(), spec.fds[0]
    name = request.name
    if size:
        for shape, short in (("empty", 0), ("short", size - 1)):
            says = f"{name} with {short} bytes of payload, where {size} belong."
            codec.add(f"{name}.{shape}", "CVE-2020-10722 class", says, partial(_sent, request, short, fds))
    for shape, long in (("long", largest + EXTRA), ("huge", HUGE)):
        says = f"{name} with {long} bytes of payload, where {largest} at most belong."
        if long > largest:
            act = partial(_sent, request, long, fds)
            codec.add(f"{name}.{shape}", "CVE-2019-14818 class", says, act, lawful=_LONGER_MAY_BE)
    says = f"{name} with eight descriptors."
    act = partial(_sent, request, size, 8)
    codec.add(f"{name}.fds", "CVE-2022-0669, CVE-2019-14818", says, act, lawful="" if spec.fds[1] else _SURPLUS)


for _request, _spec in FRONTEND_MESSAGES.items():
    _add_shapes(_request, _spec)


def _unknown(number: int, attacker: Attacker) -> Outcome:
    line = attacker.negotiate()
    return line.provoke(number, bytes(8), [attacker.canary().fd])


for _number in (0, 45, 1000, 0x7FFFFFFF, 0xFFFFFFFF):
    codec.add(
        f"unknown-{_number:#x}",
        "vhost-user: unknown requests",
        f"Request {_number:#x}, which the protocol does not have, with eight bytes and a descriptor.",
        partial(_unknown, _number),
    )
