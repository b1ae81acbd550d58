"""Whole messages: bytes to send, and the judgement of bytes that came.

What came is judged against one `MessageSpec`: the payload's syntax and the number of descriptors. The descriptors
themselves are never touched here: they stay with whoever received them, who closes them whatever is raised, and who
puts the message's name in front of the error (`locate`, `name_of`).
"""

from __future__ import annotations

from vhost_user.errors import PeerError, UsageError
from vhost_user.message.header import HEADER, NEED_REPLY, REPLY
from vhost_user.message.numbers import VERSION
from vhost_user.message.payload import Payload
from vhost_user.message.payloads import Empty
from vhost_user.message.table import MAX_PAYLOAD, MessageSpec


def encode_message(request: int, payload: bytes, *, reply: bool = False, need_reply: bool = False) -> bytes:
    """Header and payload, to be sent with one call, descriptors attached.

    Raises UsageError for a reply that asks for one, which some front ends refuse, and for a payload of more than
    MAX_PAYLOAD bytes.
    """
    if reply and need_reply:
        raise UsageError("need_reply", need_reply, "may not be set in a reply", "set one of the two")
    if len(payload) > MAX_PAYLOAD:
        raise UsageError("payload", len(payload), f"has to be at most {MAX_PAYLOAD} bytes")
    flags = VERSION | (REPLY if reply else 0) | (NEED_REPLY if need_reply else 0)
    return HEADER.pack(request, flags, len(payload)) + payload


def decode_payload(spec: MessageSpec, body: bytes, fd_count: int) -> Payload:
    """The payload of a request, an instance of `spec.payload`, from the bytes behind the header.

    Raises PeerError for bytes that are none, and for more or fewer descriptors than belong to it.
    """
    return _decode(spec.payload, spec.fds, body, fd_count)


def decode_reply(spec: MessageSpec, body: bytes, fd_count: int) -> Payload:
    """The payload of a reply, an instance of `spec.reply_payload`; `Empty()` where an empty reply is a refusal.

    Raises PeerError for bytes that are none, and for more or fewer descriptors than belong to it.
    """
    kind = Empty if spec.empty_reply and not body else spec.reply_payload
    return _decode(kind, spec.reply_fds, body, fd_count)


def _decode(kind: type[Payload], fds: tuple[int, int], body: bytes, fd_count: int) -> Payload:
    payload = kind.decode(body)
    # A memory table has no descriptors with it where it is a reply: the kind of message decides first.
    fewest, most = (payload.fd_bounds or fds) if fds[1] else fds
    if not fewest <= fd_count <= most:
        limit = f"{most}" if fewest == most else f"{fewest} or {most}"
        raise PeerError("descriptors", fd_count, f"has to be {limit} with this message")
    return payload
