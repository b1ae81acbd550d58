"""Payloads about memory: regions and tables, the dirty log, IOTLB entries, inflight areas, shared memory regions.

A region's offset into its file is judged when it is mapped, not here: only the file's size says what is too much, and
REM_MEM_REG carries one that has to be ignored. The offset of a mapping into a shared memory region is left for the same
reasons: SHMEM_UNMAP has no file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from vhost_user.errors import PeerError, UsageError
from vhost_user.message.numbers import MAP_READ_WRITE, MAX_REGIONS, SHMEM_REGIONS, IotlbPermission, IotlbType
from vhost_user.message.payload import Fixed, Payload, Tailed, check_end, check_not_empty, member, pack, wrong_size
from vhost_user.units import ByteCount, GuestAddress, HostOffset, UserAddress


@dataclass(frozen=True, slots=True)
class MemoryRegion(Fixed):
    """`size` bytes of guest memory: from `mmap_offset` on in the file that comes along.

    Under GPA_ADDRESSES the user address repeats the guest address. In a back end's reply during postcopy it is where
    the back end has mapped the region.
    """

    layout: ClassVar[struct.Struct] = struct.Struct("=QQQQ")

    guest_address: GuestAddress
    size: ByteCount
    user_address: UserAddress
    mmap_offset: HostOffset

    def _check(self) -> None:
        check_not_empty("size", self.size)
        check_end("guest_address", self.guest_address, self.size)
        check_end("user_address", self.user_address, self.size)


@dataclass(frozen=True, slots=True)
class XenMemoryRegion(MemoryRegion):
    """A region under XEN_MMAP: how it is mapped, and the domain that it is of."""

    layout: ClassVar[struct.Struct] = struct.Struct("=QQQQII")

    xen_flags: int
    domid: int


_PADDING = bytes(8)


@dataclass(frozen=True, slots=True)
class SingleMemoryRegion(Payload):
    """ADD_MEM_REG and REM_MEM_REG: one region, behind padding."""

    region_type: ClassVar[type[MemoryRegion]] = MemoryRegion

    region: MemoryRegion

    @classmethod
    def max_size(cls) -> int:
        """Bytes of padding and region."""
        return len(_PADDING) + cls.region_type.layout.size

    def encode(self) -> bytes:
        """Zeros, then the region."""
        return _PADDING + _encode_region(self.region_type, self.region)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The region; what is in the padding does not matter."""
        if len(data) != cls.max_size():
            raise wrong_size(cls, data, str(cls.max_size()))
        return cls(cls.region_type.decode(data[len(_PADDING) :]))


@dataclass(frozen=True, slots=True)
class XenSingleMemoryRegion(SingleMemoryRegion):
    """One region under XEN_MMAP."""

    region_type: ClassVar[type[MemoryRegion]] = XenMemoryRegion


@dataclass(frozen=True, slots=True)
class MemoryTable(Payload):
    """SET_MEM_TABLE: up to eight regions, and as many descriptors, in the same order.

    Every known front end sends only the regions that it has, and some back ends accept nothing else; the document
    draws all eight slots. So that is encoded, and both are decoded. Without regions it is eight zero bytes: an empty
    table, and the acknowledgement that ends the exchange of addresses in postcopy.
    """

    head: ClassVar = struct.Struct("=I4x")
    region_type: ClassVar[type[MemoryRegion]] = MemoryRegion

    regions: tuple[MemoryRegion, ...]

    @property
    def fd_bounds(self) -> tuple[int, int]:
        """One for each region."""
        return len(self.regions), len(self.regions)

    @classmethod
    def max_size(cls) -> int:
        """Bytes of a table of eight slots."""
        return cls.head.size + MAX_REGIONS * cls.region_type.max_size()

    def encode(self) -> bytes:
        """The count, then the regions. Raises UsageError for more than eight of them."""
        if len(self.regions) > MAX_REGIONS:
            raise UsageError(
                "regions",
                len(self.regions),
                f"has to be at most {MAX_REGIONS}, the slots of a table",
                "use ADD_MEM_REG",
            )
        regions = (_encode_region(self.region_type, region) for region in self.regions)
        return pack(self, self.head, len(self.regions)) + b"".join(regions)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """As many regions as the count says, in that many slots or in eight; what is in the others does not matter."""
        if len(data) < cls.head.size:
            raise wrong_size(cls, data, f"at least {cls.head.size}")
        (count,) = cls.head.unpack_from(data)
        if count > MAX_REGIONS:
            raise PeerError("num regions", count, f"has to be at most {MAX_REGIONS}, the slots of a table")
        slot = cls.region_type.max_size()
        end = cls.head.size + count * slot
        if len(data) not in {end, cls.max_size()}:
            limit = f"has to be {end} bytes for {count} regions, or {cls.max_size()} with all slots"
            raise PeerError("size", len(data), limit)
        return cls(tuple(cls.region_type.decode(data[at : at + slot]) for at in range(cls.head.size, end, slot)))


@dataclass(frozen=True, slots=True)
class XenMemoryTable(MemoryTable):
    """A table under XEN_MMAP."""

    region_type: ClassVar[type[MemoryRegion]] = XenMemoryRegion


def _encode_region(kind: type[MemoryRegion], region: MemoryRegion) -> bytes:
    if type(region) is not kind:
        raise UsageError(
            "region", region, f"has to be a {kind.__name__}", "XEN_MMAP decides which kind a connection has"
        )
    return region.encode()


@dataclass(frozen=True, slots=True)
class Log(Fixed):
    """SET_LOG_BASE under LOG_SHMFD: the dirty log's `size` bytes, from `offset` on in the file that comes along."""

    layout: ClassVar = struct.Struct("=QQ")

    size: ByteCount
    offset: HostOffset

    def _check(self) -> None:
        check_not_empty("size", self.size)
        check_end("offset", self.offset, self.size)


@dataclass(frozen=True, slots=True)
class Iotlb(Tailed):
    """An IOTLB message: what happened or shall happen to `size` bytes from `iova` on.

    The user address, a guest-physical one from the front end under GPA_ADDRESSES, counts in an update only. A size of
    0 is left to the reader: a miss has none, and some front ends write one of 2**64 that way. 26 bytes by the
    document, 32 as a C structure, which is what peers send.
    """

    layout: ClassVar = struct.Struct("=QQQBB")
    tail: ClassVar = 6

    iova: GuestAddress
    size: ByteCount
    user_address: UserAddress
    perm: IotlbPermission
    type: IotlbType
    wire_size: int = 32

    @classmethod
    def _build(cls, iova: int, size: int, user_address: int, perm: int, kind: int, wire_size: int) -> Self:
        addresses = GuestAddress(iova), ByteCount(size), UserAddress(user_address)
        return cls(*addresses, member(IotlbPermission, "perm", perm), member(IotlbType, "type", kind), wire_size)

    def _check(self) -> None:
        check_end("iova", self.iova, self.size)
        if self.type is IotlbType.UPDATE:
            check_end("user_address", self.user_address, self.size)


@dataclass(frozen=True, slots=True)
class Inflight(Tailed):
    """GET_ and SET_INFLIGHT_FD: `mmap_size` bytes from `mmap_offset` on in the file that comes along, for these queues.

    A front end that asks for an area knows only the queues. 20 bytes by the document, 24 as a C structure, which is
    what peers send, and some accept nothing else; so an answer has the size of its question.
    """

    layout: ClassVar = struct.Struct("=QQHH")
    tail: ClassVar = 4

    mmap_size: ByteCount
    mmap_offset: HostOffset
    num_queues: int
    queue_size: int
    wire_size: int = 24

    def answer(self, mmap_size: ByteCount, mmap_offset: HostOffset) -> Inflight:
        """The reply to this request: the area's place, and the rest as it was asked for."""
        return replace(self, mmap_size=mmap_size, mmap_offset=mmap_offset)

    def _check(self) -> None:
        check_end("mmap_offset", self.mmap_offset, self.mmap_size)


@dataclass(frozen=True, slots=True)
class Mmap(Fixed):
    """SHMEM_MAP and SHMEM_UNMAP: `length` bytes at `shm_offset` of shared memory region `shmid`.

    A map takes them from `fd_offset` on in the file that comes along; an unmap has no file, and no use for `flags`.
    The document doesn't say how wide the padding is: seven bytes, as QEMU has it.
    """

    layout: ClassVar = struct.Struct("=B7xQQQQ")

    shmid: int
    fd_offset: HostOffset
    shm_offset: HostOffset
    length: ByteCount
    flags: int = 0

    @property
    def writable(self) -> bool:
        """Whether pages are mapped read-write."""
        return bool(self.flags & MAP_READ_WRITE)

    def _check(self) -> None:
        check_not_empty("length", self.length)
        check_end("shm_offset", self.shm_offset, self.length)


@dataclass(frozen=True, slots=True)
class ShmemConfig(Payload):
    """The reply to GET_SHMEM_CONFIG: the size of each of the 256 shared memory regions, 0 for one that there isn't."""

    layout: ClassVar = struct.Struct(f"=I4x{SHMEM_REGIONS}Q")

    sizes: tuple[ByteCount, ...]

    @classmethod
    def max_size(cls) -> int:
        """Bytes of the layout."""
        return cls.layout.size

    def encode(self) -> bytes:
        """The number of regions that there are, then all sizes. Raises UsageError unless there are 256."""
        if len(self.sizes) != SHMEM_REGIONS:
            raise UsageError(
                "sizes", len(self.sizes), f"have to be one for each of {SHMEM_REGIONS} ids, 0 where there is no region"
            )
        return pack(self, self.layout, self._count(), *self.sizes)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The sizes. Raises PeerError too where the count is not that of the sizes above 0."""
        if len(data) != cls.layout.size:
            raise wrong_size(cls, data, str(cls.layout.size))
        count, *sizes = cls.layout.unpack(data)
        config = cls(tuple(sizes))
        if count != config._count():
            raise PeerError("num regions", count, f"has to be the number of sizes above 0, {config._count()}")
        return config

    def _count(self) -> int:
        return sum(size > 0 for size in self.sizes)
