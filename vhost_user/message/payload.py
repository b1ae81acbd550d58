"""What all payloads have in common: how they become bytes, and how bytes are judged before they become one.

A payload is a frozen value. `decode` looks at syntax alone: the size, counts that must agree with it, ranges that may
not wrap past 2**64, values outside an enumeration. Whether the moment is right, whether a feature was negotiated,
whether regions overlap or a ring exists is the business of whoever holds the connection's state. Bytes come from a
peer, so all that `decode` raises is PeerError; values to encode come from the caller, so `encode` raises UsageError.

Numbers are in the machine's byte order, and not aligned: the document's tables have no gaps but those that they name.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from operator import attrgetter
from typing import Any, ClassVar, Self, TypeVar

from vhost_user.errors import PeerError, UsageError
from vhost_user.units import U64_MAX

_Member = TypeVar("_Member", bound=IntEnum)


class Payload(ABC):
    """What follows a message's header."""

    __slots__ = ()

    @classmethod
    @abstractmethod
    def max_size(cls) -> int:
        """Bytes of the largest payload of this kind."""

    @abstractmethod
    def encode(self) -> bytes:
        """The bytes on the wire. Raises UsageError for a value that its field has no room for."""

    @classmethod
    @abstractmethod
    def decode(cls, data: bytes) -> Self:
        """The payload that these bytes are, all of them. Raises PeerError where they are none."""

    @property
    def fd_bounds(self) -> tuple[int, int] | None:
        """How few and how many descriptors belong to this very payload; None where the kind of message decides."""
        return None


class Fixed(Payload):
    """A payload of one layout whose fields follow each other as the class has them.

    A class whose wire fields are not its own overrides `_values` and `_build`, one with something to refuse `_check`.
    """

    __slots__ = ()

    layout: ClassVar[struct.Struct]
    __match_args__: ClassVar[tuple[str, ...]]

    @classmethod
    def max_size(cls) -> int:
        """Bytes of the layout."""
        return cls.layout.size

    def encode(self) -> bytes:
        """The fields, packed."""
        try:
            return self.layout.pack(*self._values())
        except struct.error as error:
            raise _too_large(self, error) from None

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The fields, unpacked from exactly as many bytes as the layout has."""
        layout = cls.layout
        if len(data) != layout.size:
            raise wrong_size(cls, data, str(layout.size))
        payload = cls._build(*layout.unpack(data))
        payload._check()
        return payload

    def _values(self) -> tuple[Any, ...]:
        return _fields_of(type(self))(self)

    @classmethod
    def _build(cls, *values: Any) -> Self:
        return cls(*values)

    def _check(self) -> None:
        pass


@cache
def _fields_of(kind: type[Fixed]) -> Callable[[Fixed], tuple[Any, ...]]:
    """What gets the fields of such a payload. Found once: each message has one."""
    names = kind.__match_args__
    if len(names) > 1:
        return attrgetter(*names)
    return lambda payload: tuple([getattr(payload, name) for name in names])


class Tailed(Fixed):
    """A fixed payload that most peers send as a C compiler lays it out, with `tail` zero bytes behind.

    Both sizes are accepted; the last field of the class, `wire_size`, is the one that came or that will be sent.
    """

    __slots__ = ()

    tail: ClassVar[int]
    wire_size: int

    @classmethod
    def max_size(cls) -> int:
        """Bytes with the tail."""
        return cls.layout.size + cls.tail

    def encode(self) -> bytes:
        """The fields, packed, and zeros up to `wire_size`."""
        if self.wire_size not in {self.layout.size, self.max_size()}:
            raise UsageError("wire_size", self.wire_size, f"has to be {self.layout.size} or {self.max_size()}")
        return super().encode().ljust(self.wire_size, b"\0")

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The fields, unpacked; what is in the tail does not matter."""
        if len(data) not in {cls.layout.size, cls.max_size()}:
            raise wrong_size(cls, data, f"{cls.layout.size} or {cls.max_size()}")
        payload = cls._build(*cls.layout.unpack_from(data), len(data))
        payload._check()
        return payload

    def _values(self) -> tuple[Any, ...]:
        return super()._values()[:-1]


def pack(payload: Payload, layout: struct.Struct, *values: int) -> bytes:
    """`values` in `layout`. Raises UsageError, with the payload they are of, where one is too large for its field."""
    try:
        return layout.pack(*values)
    except struct.error as error:
        raise _too_large(payload, error) from None


def _too_large(payload: Payload, error: struct.error) -> UsageError:
    return UsageError("payload", payload, f"each value has to fit its field: {error}")


def wrong_size(kind: type[Payload], data: bytes, limit: str) -> PeerError:
    """The refusal of `data`, whose size is none that a payload of this kind has."""
    wanted = "0, as there is no payload" if limit == "0" else f"{limit}, the bytes of a {kind.__name__}"
    return PeerError("size", len(data), f"has to be {wanted}")


def check_end(field: str, start: int, size: int) -> None:
    """Raise PeerError for a range whose end is beyond 2**64."""
    if start + size - 1 > U64_MAX:
        raise PeerError(field, f"{start:#x}+{size:#x}", "has to end at 2**64 or before")


def check_not_empty(field: str, size: int) -> None:
    """Raise PeerError for a size of 0 where nothing can be meant by it."""
    if size == 0:
        raise PeerError(field, size, "has to be at least one byte")


def member(kind: type[_Member], field: str, value: int) -> _Member:
    """The member of an enumeration that `value` is. Raises PeerError where it is none."""
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(f"{each.value} ({each.name})" for each in kind)
        raise PeerError(field, value, f"has to be one of {names}") from None
