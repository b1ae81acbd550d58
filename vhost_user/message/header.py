"""The twelve bytes in front of every message."""

from __future__ import annotations

import struct

from vhost_user.errors import PeerError
from vhost_user.message.numbers import VERSION
from vhost_user.message.table import MAX_PAYLOAD

HEADER = struct.Struct("=III")
"""Request, flags, and the size of the payload, in the machine's byte order."""

VERSION_MASK = 0b11
REPLY = 1 << 2
NEED_REPLY = 1 << 3


class Header:
    """A message's request, flags and payload size in bytes. A reply has the request of the message that it answers.

    Bits of `flags` beyond the fourth have no meaning and are ignored. Some back ends leave NEED_REPLY in their replies.
    """

    __slots__ = ("flags", "request", "size")

    def __init__(self, request: int, flags: int, size: int) -> None:
        self.request = request
        self.flags = flags
        self.size = size

    @property
    def version(self) -> int:
        """1."""
        return self.flags & VERSION_MASK

    @property
    def reply(self) -> bool:
        """Whether it answers a message, rather than being one."""
        return bool(self.flags & REPLY)

    @property
    def need_reply(self) -> bool:
        """Whether the sender wants a message acknowledged that has no reply of its own."""
        return bool(self.flags & NEED_REPLY)

    @staticmethod
    def decode(data: bytes) -> Header:
        """The header that these twelve bytes are.

        Raises PeerError for another version of the protocol, and for a payload larger than any message has.
        """
        if len(data) != HEADER.size:
            raise PeerError("header", f"{len(data)} bytes", f"has to be {HEADER.size} bytes")
        header = Header(*HEADER.unpack(data))
        header.check()
        return header

    def check(self) -> None:
        """Raise PeerError for a header that can't be, as `decode` does. The C core's `good_header` says the same."""
        if self.version != VERSION:
            raise PeerError("version", self.version, f"has to be {VERSION}, that of the protocol")
        if self.size > MAX_PAYLOAD:
            raise PeerError("size", self.size, f"has to be at most {MAX_PAYLOAD}, the bytes of the largest payload")
