"""One type per unit, so that a guest address can't be handed to something that wants a file offset.

All are plain integers at run time; the type checker tells them apart. A range is `start, size` or `start, end`:
`end` is exclusive, `last` inclusive.
"""

from __future__ import annotations

from typing import NewType, TypeGuard

GuestAddress = NewType("GuestAddress", int)
"""A guest-physical address, 0 to 2**64 - 1."""

UserAddress = NewType("UserAddress", int)
"""An address in the vhost-user front end's own address space, as the protocol's messages carry it."""

HostAddress = NewType("HostAddress", int)
"""An address in this process."""

HostOffset = NewType("HostOffset", int)
"""A byte offset into one file or one host mapping."""

ByteCount = NewType("ByteCount", int)
"""A size in bytes."""

U64_MAX = 2**64 - 1

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40


def is_whole(value: object, maximum: int = U64_MAX) -> TypeGuard[int]:
    """Whether `value` is an integer from 0 to `maximum`. A bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= maximum


def is_power_of_two(value: int) -> bool:
    """Whether `value` is 1, 2, 4, 8 ..."""
    return value > 0 and value & (value - 1) == 0


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment`, in bytes, that is not below `value`."""
    return -(-value // alignment) * alignment


def format_size(size: int) -> str:
    """`size` bytes with the largest of the suffixes T, G, M, K that divides it: 1536M, 2G, 4097."""
    for suffix, unit in (("T", TIB), ("G", GIB), ("M", MIB), ("K", KIB)):
        if size and size % unit == 0:
            return f"{size // unit}{suffix}"
    return str(size)
