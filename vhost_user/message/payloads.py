"""The payloads that are about neither a ring nor memory: plain numbers, configuration space, objects, device state."""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from typing import ClassVar, Self

from vhost_user.errors import PeerError, UsageError
from vhost_user.message.numbers import MAX_CONFIG_SIZE, MAX_OPAQUE_SIZE, NO_FD, PHASE_STOPPED
from vhost_user.message.payload import Fixed, Payload, pack, wrong_size


@dataclass(frozen=True, slots=True)
class Empty(Fixed):
    """No payload at all."""

    layout: ClassVar = struct.Struct("=")


@dataclass(frozen=True, slots=True)
class U64(Fixed):
    """A number: features, a count, a status, or the acknowledgement of a request, 0 where it was carried out."""

    layout: ClassVar = struct.Struct("=Q")

    value: int


@dataclass(frozen=True, slots=True)
class MacAddress(Fixed):
    """SEND_RARP: the six bytes of a guest's hardware address, the first six of the number's bytes in memory."""

    layout: ClassVar = struct.Struct("=6s2x")

    address: bytes

    def _values(self) -> tuple[bytes]:
        if len(self.address) != 6:
            raise UsageError("address", self.address.hex(":"), "has to be six bytes")
        return (self.address,)


@dataclass(frozen=True, slots=True)
class Config(Payload):
    """GET_CONFIG and SET_CONFIG: `data`, the bytes of configuration space from `offset` on.

    A request to get some has as many bytes in it as it asks for, of no meaning: `Config(offset, 0, bytes(size))`. The
    answer has the same size; one without any payload says that the back end could not, and is decoded to `Empty()`.
    `flags` is CONFIG_WRITABLE or CONFIG_LIVE_MIGRATION; what else a peer writes there the back end has to judge.
    """

    head: ClassVar = struct.Struct("=III")

    offset: int
    flags: int
    data: bytes

    @classmethod
    def max_size(cls) -> int:
        """Bytes of the three numbers and of the longest data."""
        return cls.head.size + MAX_CONFIG_SIZE

    def encode(self) -> bytes:
        """Offset, size and flags, then the data. Raises UsageError for data longer than MAX_CONFIG_SIZE."""
        if len(self.data) > MAX_CONFIG_SIZE:
            raise UsageError(
                "data", len(self.data), f"has to be at most {MAX_CONFIG_SIZE} bytes", "take several messages"
            )
        return pack(self, self.head, self.offset, len(self.data), self.flags) + self.data

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises PeerError too where the size is not that of the data, or the range ends beyond 2**32."""
        if not cls.head.size <= len(data) <= cls.max_size():
            raise wrong_size(cls, data, f"{cls.head.size} to {cls.max_size()}")
        offset, size, flags = cls.head.unpack_from(data)
        if size != len(data) - cls.head.size:
            raise PeerError("config size", size, f"has to be the size of the data behind, {len(data) - cls.head.size}")
        if offset + size > 1 << 32:
            raise PeerError("offset", f"{offset:#x}+{size:#x}", "has to end at 2**32 or before")
        return cls(offset, flags, bytes(data[cls.head.size :]))


@dataclass(frozen=True, slots=True)
class Shared(Fixed):
    """The name of a shared object. Its first three components are big-endian, which is the order of `UUID.bytes`."""

    layout: ClassVar = struct.Struct("=16s")

    uuid: uuid.UUID

    def _values(self) -> tuple[bytes]:
        return (self.uuid.bytes,)

    @classmethod
    def _build(cls, value: bytes) -> Self:
        return cls(uuid.UUID(bytes=value))


@dataclass(frozen=True, slots=True)
class DeviceState(Fixed):
    """SET_DEVICE_STATE_FD: which way the state goes, a TransferDirection, and in which phase of a migration.

    There is one phase, PHASE_STOPPED, and more may come. The message's own answer can say that one of the two isn't
    known, so any number is a number here.
    """

    layout: ClassVar = struct.Struct("=II")

    direction: int
    phase: int = PHASE_STOPPED


@dataclass(frozen=True, slots=True)
class DeviceStateReply(Fixed):
    """The reply to SET_DEVICE_STATE_FD: an error of eight bits, 0 for none, and whether the front end's channel serves.

    Unless `no_fd` is set the back end's own channel comes along; never with an error. Bits above the flag are ignored.
    """

    layout: ClassVar = struct.Struct("=Q")

    error: int
    no_fd: bool

    @property
    def fd_bounds(self) -> tuple[int, int]:
        """One where neither an error nor the flag forbids it."""
        return (0, 0) if self.error or self.no_fd else (1, 1)

    def _values(self) -> tuple[int]:
        if not 0 <= self.error <= 0xFF:
            raise UsageError("error", self.error, "has to be 0 to 255")
        return (self.error | (NO_FD if self.no_fd else 0),)

    @classmethod
    def _build(cls, value: int) -> Self:
        return cls(value & 0xFF, bool(value & NO_FD))


@dataclass(frozen=True, slots=True)
class Opaque(Payload):
    """Bytes whose layout the document doesn't give, or that peers don't agree on.

    The reply to SET_LOG_BASE has 8 bytes from some back ends, 16 or none from others; the one to GET_SHARED_OBJECT is
    empty, or has the request's 16. All that counts is that it came. Send `U64(0)` for the one, `Empty()` for the other.
    """

    data: bytes

    @classmethod
    def max_size(cls) -> int:
        """MAX_OPAQUE_SIZE."""
        return MAX_OPAQUE_SIZE

    def encode(self) -> bytes:
        """The bytes. Raises UsageError for more than MAX_OPAQUE_SIZE."""
        if len(self.data) > MAX_OPAQUE_SIZE:
            raise UsageError("data", len(self.data), f"has to be at most {MAX_OPAQUE_SIZE} bytes")
        return self.data

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The bytes, up to MAX_OPAQUE_SIZE."""
        if len(data) > MAX_OPAQUE_SIZE:
            raise wrong_size(cls, data, f"at most {MAX_OPAQUE_SIZE}")
        return cls(bytes(data))


@dataclass(frozen=True, slots=True)
class CryptoSession(Opaque):
    """CREATE_CRYPTO_SESSION, both ways.

    The document has no layout for it. Peers exchange a C structure with pointers in it that changed between versions
    of both QEMU and DPDK, its session id once in front and now at the end: whoever has such a device knows its peer's.
    """
