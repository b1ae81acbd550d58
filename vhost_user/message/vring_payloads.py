"""Payloads about one ring: its size and state, its addresses, its notifications, its base.

The base, where a stopped ring goes on, is the number of a vring state. Its reading depends on the ring's format, which
is negotiated: `SplitBase` and `PackedBase` convert it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Self

from vhost_user.errors import PeerError, UsageError
from vhost_user.message.numbers import NO_FD, VRING_INDEX_MASK
from vhost_user.message.payload import Fixed, check_end
from vhost_user.units import ByteCount, GuestAddress, HostOffset, UserAddress


@dataclass(frozen=True, slots=True)
class VringState(Fixed):
    """Ring `index` and a number: a size, a base, 0 or 1, or a reserved 0, as the request says."""

    layout: ClassVar = struct.Struct("=II")

    index: int
    num: int = 0


@dataclass(frozen=True, slots=True)
class VringAddr(Fixed):
    """Where the parts of ring `index` lie. `flags` is VHOST_VRING_F_LOG or 0.

    The three addresses are user addresses; I/O virtual ones under VIRTIO_F_IOMMU_PLATFORM, else guest-physical ones
    under GPA_ADDRESSES. `log` is where writes to the used ring are logged, always guest-physical. On the wire the used
    ring comes before the available ring.
    """

    layout: ClassVar = struct.Struct("=IIQQQQ")

    index: int
    flags: int
    desc: UserAddress
    used: UserAddress
    avail: UserAddress
    log: GuestAddress = GuestAddress(0)


@dataclass(frozen=True, slots=True)
class VringFd(Fixed):
    """SET_VRING_KICK, _CALL or _ERR: the descriptor for ring `index` comes with it, unless `no_fd`.

    An index has eight bits. Bits above the flag have no meaning, so a value with one of them is refused: a front end
    that wrote a larger index there would have another ring's descriptor replaced.
    """

    layout: ClassVar = struct.Struct("=Q")

    index: int
    no_fd: bool = False

    @property
    def fd_bounds(self) -> tuple[int, int]:
        """One, or none with the flag."""
        return (0, 0) if self.no_fd else (1, 1)

    def _values(self) -> tuple[int]:
        return (_join(self.index, self.no_fd),)

    @classmethod
    def _build(cls, value: int) -> Self:
        return cls(*_cut(value))


@dataclass(frozen=True, slots=True)
class VringArea(Fixed):
    """VRING_HOST_NOTIFIER_MSG: `size` bytes from `offset` on, of the descriptor that comes along, notify ring `index`.

    The document has "index and flags" in the first field without saying which flags. Peers write `VringFd`'s there; a
    message without a descriptor ends the notification, with or without the flag.
    """

    layout: ClassVar = struct.Struct("=QQQ")

    index: int
    no_fd: bool
    size: ByteCount
    offset: HostOffset

    @property
    def fd_bounds(self) -> tuple[int, int]:
        """One at most, and none with the flag."""
        return (0, 0) if self.no_fd else (0, 1)

    def _values(self) -> tuple[int, int, int]:
        return (_join(self.index, self.no_fd), self.size, self.offset)

    @classmethod
    def _build(cls, value: int, size: int, offset: int) -> Self:
        return cls(*_cut(value), ByteCount(size), HostOffset(offset))

    def _check(self) -> None:
        check_end("offset", self.offset, self.size)


def _join(index: int, no_fd: bool) -> int:
    if not 0 <= index <= VRING_INDEX_MASK:
        raise UsageError("index", index, f"has to be at most {VRING_INDEX_MASK}, which this message has room for")
    return index | (NO_FD if no_fd else 0)


def _cut(value: int) -> tuple[int, bool]:
    if value & ~(VRING_INDEX_MASK | NO_FD):
        raise PeerError(
            "u64",
            f"{value:#x}",
            "has to have the ring's index in bits 0-7, the flag in bit 8, and nothing in the others",
        )
    return value & VRING_INDEX_MASK, bool(value & NO_FD)


@dataclass(frozen=True, slots=True)
class SplitBase:
    """The base of a split ring: the free-running index of the next available entry. The used index is in memory."""

    avail: int

    @classmethod
    def from_num(cls, num: int) -> Self:
        """The base that a vring state's number is. Raises PeerError unless its upper 16 bits are zero, as they must."""
        if not 0 <= num < 1 << 16:
            raise PeerError(
                "num", f"{num:#x}", "has to be 16 bits, as a split ring's base, and 16 zero bits above them"
            )
        return cls(num)

    def to_num(self) -> int:
        """The number for a vring state. Raises UsageError for an index of more than 16 bits."""
        if not 0 <= self.avail < 1 << 16:
            raise UsageError("avail", self.avail, "has to have 16 bits, as a split ring's index")
        return self.avail


@dataclass(frozen=True, slots=True)
class PackedBase:
    """The base of a packed ring: where the next available and the next used descriptor are, and the wrap counters."""

    next_avail: int
    avail_wrap: bool
    next_used: int
    used_wrap: bool

    @classmethod
    def from_num(cls, num: int) -> Self:
        """The base that a vring state's number is. Raises PeerError for a number of more than 32 bits."""
        if not 0 <= num < 1 << 32:
            raise PeerError("num", f"{num:#x}", "has to have 32 bits, as a packed ring's base")
        return cls(num & 0x7FFF, bool(num & 0x8000), num >> 16 & 0x7FFF, bool(num & 0x80000000))

    def to_num(self) -> int:
        """The number for a vring state. Raises UsageError for an index of more than 15 bits."""
        for field, index in (("next_avail", self.next_avail), ("next_used", self.next_used)):
            if not 0 <= index < 1 << 15:
                raise UsageError(field, index, "has to have 15 bits, as a packed ring's index")
        return self.next_avail | self.avail_wrap << 15 | self.next_used << 16 | self.used_wrap << 31
