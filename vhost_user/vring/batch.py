"""Many small requests at a time: the chains that a ring has, with the request that each begins with.

A device whose requests and answers have a fixed size is served so with two calls for a ringful. Members are in the
order of the ring, and go back in it, each with its answer from `answers`. A member that asks nothing goes back empty,
and is counted: one that the ring found malformed, one whose chain is too short for a request or has no room for an
answer, one whose memory is gone.

Where each chain has to be looked at by itself (`DeviceQueue`), a batch has one member.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from vhost_user import _native
from vhost_user.chain import Chain
from vhost_user.errors import PeerError

_KEY = struct.Struct("=II")
assert _KEY.size == _native.KEY_SIZE and _native.ASKS == 0

_REASONS = {
    _native.TOO_SHORT: "request_too_short",
    _native.NO_ROOM: "no_room_for_response",
    _native.MEMORY_GONE: "memory_gone",
}


class Part(NamedTuple):
    """Neighbouring members of a batch; see `Batch`."""

    keys: memoryview
    requests: memoryview
    answers: memoryview


class Answerer(Protocol):
    """A device that can answer some requests at once, in the C core, by a look at its state.

    What is served so goes from the ring and back to it without a step of Python's.
    """

    raw: _native.Answerer

    def ready(self) -> AbstractContextManager[object] | None:
        """What has the state ready, and keeps it as it is, while requests are answered; None where none are to be."""


class Batch:
    """Room for `most` members of a queue of `size`, whose requests and answers have so many bytes.

    `requests` and `answers` are those of all members, one behind the other; `keys` says of each its chain's id and
    where the used ring will have it, two 32-bit words in the host's byte order: in a packed ring the slot, with its
    wrap counter as bit 15.
    """

    def __init__(self, size: int, most: int, request_size: int, answer_size: int) -> None:
        self.most = most
        self.request_size = request_size
        self.answer_size = answer_size
        self.raw = _native.Batch(size, most, request_size, answer_size)
        self.requests, self.answers, self.keys = self.raw.requests, self.raw.answers, self.raw.keys
        self.alone: Chain | None = None
        """The only member's chain, where it was looked at by itself."""
        self.count = 0
        """How many members were taken."""
        self.given = 0
        """How many of them went back."""

    def hold(self, chain: Chain | None, position: int) -> int:
        """Have `chain` as the only member, or none; how many there are."""
        self.alone, self.given = chain, 0
        self.count = int(chain is not None)
        if chain is None:
            return 0
        self.keys[: _KEY.size] = _KEY.pack(chain.id, position)
        self.raw.kinds[0] = self._kind_alone(chain)
        return 1

    def _kind_alone(self, chain: Chain) -> int:
        if chain.readable < self.request_size:
            return _native.TOO_SHORT
        if chain.writable < self.answer_size:
            return _native.NO_ROOM
        try:
            self.requests[: self.request_size] = chain.read(0, self.request_size)
        except PeerError:
            return _native.MEMORY_GONE
        return _native.ASKS

    def answer_alone(self) -> int:
        """Write the only member's answer to its chain, which is about to be pushed; how many bytes it has."""
        assert self.alone is not None
        if self.raw.kinds[0] != _native.ASKS:
            return 0
        try:
            self.alone.write(bytes(self.answers[: self.answer_size]))
        except PeerError:
            self.raw.kinds[0] = _native.MEMORY_GONE
            return 0
        return self.answer_size

    def asking(self) -> Iterable[tuple[int, int]]:
        """Neighbouring members that ask and have not gone back, as first and end."""
        kinds = bytes(self.raw.kinds[: self.count])
        if not any(kinds):  # each is ASKS
            return ((self.given, self.count),)
        return [found.span() for found in re.compile(rb"\0+").finditer(kinds, self.given)]

    def part(self, first: int, end: int) -> Part:
        """What there is of the members from `first` to before `end`."""
        key, request, answer = _KEY.size, self.request_size, self.answer_size
        return Part(
            self.keys[key * first : key * end],
            self.requests[request * first : request * end],
            self.answers[answer * first : answer * end],
        )

    def position(self, member: int) -> int:
        """Where the used ring will have a member; see `keys`."""
        position: int = _KEY.unpack_from(self.keys, _KEY.size * member)[1]
        return position

    def reason(self, member: int) -> str | None:
        """Why a member goes back empty, unless the ring has counted it: as `DeviceQueue.malformed` names it."""
        return _REASONS.get(self.raw.kinds[member])

    def reasons(self, first: int, end: int) -> list[str]:
        """Of members that went back, the reasons why some are empty."""
        return [reason for kind in self.raw.kinds[first:end] if (reason := _REASONS.get(kind)) is not None]
