"""What is refused besides sizes: lies about counts, ranges that wrap, numbers too large; and how the refusal reads."""

from __future__ import annotations

import struct

import pytest

from tests.message.golden import LOW, NONE, XEN_REGION
from vhost_user.errors import PeerError, UsageError
from vhost_user.message import (
    MAX_CONFIG_SIZE,
    MAX_PAYLOAD,
    U64,
    Config,
    CryptoSession,
    DeviceStateReply,
    Header,
    Inflight,
    Iotlb,
    Log,
    MacAddress,
    MemoryRegion,
    MemoryTable,
    Mmap,
    Opaque,
    PackedBase,
    Payload,
    ShmemConfig,
    SingleMemoryRegion,
    SplitBase,
    VringArea,
    VringFd,
    VringState,
    XenMemoryTable,
    XenSingleMemoryRegion,
    decode_payload,
    encode_message,
    spec_of,
)

TOP = 2**64
LAST = TOP - 1


def region(guest: int = 0, size: int = 0x1000, user: int = 0, offset: int = 0) -> bytes:
    return struct.pack("=QQQQ", guest, size, user, offset)


def iotlb(iova: int = 0, size: int = 0x1000, user: int = 0, perm: int = 3, kind: int = 2) -> bytes:
    return struct.pack("=QQQBB", iova, size, user, perm, kind)


def mmap(shm_offset: int, length: int, fd_offset: int = 0) -> bytes:
    return struct.pack("=B7xQQQQ", 0, fd_offset, shm_offset, length, 0)


# Kind, bytes, and the field and value of the refusal.
VIOLATIONS: list[tuple[type[Payload], bytes, str, object]] = [
    (MemoryRegion, region(size=0), "size", 0),
    (MemoryRegion, region(guest=LAST, size=2), "guest_address", "0xffffffffffffffff+0x2"),
    (MemoryRegion, region(guest=2, size=LAST), "guest_address", "0x2+0xffffffffffffffff"),
    (MemoryRegion, region(user=TOP - 0x1000, size=0x1001), "user_address", "0xfffffffffffff000+0x1001"),
    (SingleMemoryRegion, bytes(8) + region(size=0), "size", 0),
    (XenSingleMemoryRegion, bytes(8) + region(size=0) + bytes(8), "size", 0),
    (MemoryTable, struct.pack("=II", 9, 0) + region() * 9, "num regions", 9),
    (MemoryTable, struct.pack("=II", 2**32 - 1, 0), "num regions", 2**32 - 1),
    (MemoryTable, struct.pack("=II", 2, 0) + region(), "size", 40),
    (MemoryTable, struct.pack("=II", 1, 0) + region() * 2, "size", 72),
    (MemoryTable, struct.pack("=II", 0, 0) + region(), "size", 40),
    (MemoryTable, struct.pack("=II", 2, 0) + region() + region(size=0), "size", 0),
    (MemoryTable, struct.pack("=II", 8, 0) + region() * 7, "size", 232),
    (MemoryTable, b"", "size", 0),
    (MemoryTable, bytes(7), "size", 7),
    (XenMemoryTable, struct.pack("=II", 1, 0) + region(), "size", 40),
    (Log, struct.pack("=QQ", 0, 0), "size", 0),
    (Log, struct.pack("=QQ", 2, LAST), "offset", "0xffffffffffffffff+0x2"),
    (Iotlb, iotlb(iova=LAST, size=2), "iova", "0xffffffffffffffff+0x2"),
    (Iotlb, iotlb(user=LAST, size=2), "user_address", "0xffffffffffffffff+0x2"),
    (Iotlb, iotlb(perm=4), "perm", 4),
    (Iotlb, iotlb(kind=0), "type", 0),
    (Iotlb, iotlb(kind=5), "type", 5),
    (Inflight, struct.pack("=QQHH", 2, LAST, 1, 1), "mmap_offset", "0xffffffffffffffff+0x2"),
    (VringArea, struct.pack("=QQQ", 0, 0x1000, TOP - 0xFFF), "offset", "0xfffffffffffff001+0x1000"),
    (VringArea, struct.pack("=QQQ", 0x200, 0x1000, 0), "u64", "0x200"),
    (VringFd, struct.pack("=Q", 0x200), "u64", "0x200"),
    (VringFd, struct.pack("=Q", 1 << 63), "u64", "0x8000000000000000"),
    (Mmap, mmap(0, 0), "length", 0),
    (Mmap, mmap(LAST, 2), "shm_offset", "0xffffffffffffffff+0x2"),
    (ShmemConfig, struct.pack("=I4x256Q", 2, 1, *[0] * 255), "num regions", 2),
    (ShmemConfig, struct.pack("=I4x256Q", 0, 1, *[0] * 255), "num regions", 0),
    (ShmemConfig, struct.pack("=I4x256Q", 2**32 - 1, *[0] * 256), "num regions", 2**32 - 1),
    (Config, struct.pack("=III", 0, 4, 0) + bytes(3), "config size", 4),
    (Config, struct.pack("=III", 0, 2, 0) + bytes(3), "config size", 2),
    (Config, struct.pack("=III", 0, 2**32 - 1, 0), "config size", 2**32 - 1),
    (Config, struct.pack("=III", 2**32 - 3, 4, 0) + bytes(4), "offset", "0xfffffffd+0x4"),
    (Config, struct.pack("=III", 0, 4097, 0) + bytes(4097), "size", 4109),
    (Opaque, bytes(4097), "size", 4097),
    (CryptoSession, bytes(4097), "size", 4097),
]


@pytest.mark.parametrize(("kind", "data", "field", "value"), VIOLATIONS)
def test_violation(kind: type[Payload], data: bytes, field: str, value: object) -> None:
    with pytest.raises(PeerError) as refusal:
        kind.decode(data)
    assert (refusal.value.field, refusal.value.value) == (field, value)
    assert refusal.value.limit


# Just inside of what is refused above.
AT_THE_LIMIT: list[tuple[type[Payload], bytes]] = [
    (MemoryRegion, region(guest=TOP - 0x1000, user=TOP - 0x1000)),
    (MemoryRegion, region(guest=1, size=LAST, user=1)),
    # Who maps the file judges it, and REM_MEM_REG's is to be ignored.
    (MemoryRegion, region(offset=LAST)),
    (MemoryTable, struct.pack("=II", 8, 0) + region() * 8),
    (Log, struct.pack("=QQ", 1, LAST)),
    (Iotlb, iotlb(iova=LAST, size=1, user=LAST)),
    (Iotlb, iotlb(size=0)),
    # A user address counts in an update only.
    (Iotlb, iotlb(user=LAST, kind=3)),
    (Inflight, struct.pack("=QQHH", 0, LAST, 0, 0)),
    (VringFd, struct.pack("=Q", 0x1FF)),
    (Mmap, mmap(LAST, 1, LAST)),
    (ShmemConfig, struct.pack("=I4x256Q", 256, *[1] * 256)),
    (Config, struct.pack("=III", 2**32 - 4, 4, 2) + bytes(4)),
    (Config, struct.pack("=III", 0, 4096, 0) + bytes(4096)),
    (Config, struct.pack("=III", 0, 0, 0)),
    (Opaque, bytes(4096)),
]


@pytest.mark.parametrize(("kind", "data"), AT_THE_LIMIT)
def test_at_the_limit(kind: type[Payload], data: bytes) -> None:
    payload = kind.decode(data)
    assert payload.encode() == data


@pytest.mark.parametrize(
    ("data", "field", "value"),
    [
        (struct.pack("=III", 1, 0, 0), "version", 0),
        (struct.pack("=III", 1, 2, 0), "version", 2),
        (struct.pack("=III", 1, 3, 0), "version", 3),
        (struct.pack("=III", 5, 1, MAX_PAYLOAD + 1), "size", MAX_PAYLOAD + 1),
        (struct.pack("=III", 5, 1, 2**32 - 1), "size", 2**32 - 1),
        (bytes(11), "header", "11 bytes"),
        (bytes(13), "header", "13 bytes"),
        (b"", "header", "0 bytes"),
    ],
)
def test_header_that_is_refused(data: bytes, field: str, value: object) -> None:
    with pytest.raises(PeerError) as refusal:
        Header.decode(data)
    assert (refusal.value.field, refusal.value.value) == (field, value)


def test_header_of_the_largest_payload() -> None:
    header = Header.decode(struct.pack("=III", 77, 1, MAX_PAYLOAD))
    assert (header.request, header.flags, header.size) == (77, 1, MAX_PAYLOAD)


# What a caller may not encode, and the field of the refusal.
MISTAKES: list[tuple[Payload, str]] = [
    (U64(-1), "payload"),
    (U64(TOP), "payload"),
    (VringState(2**32), "payload"),
    (VringFd(256), "index"),
    (VringFd(-1, no_fd=True), "index"),
    (VringArea(256, False, *(1, 0)), "index"),  # type: ignore[arg-type]
    (MacAddress(b"12345"), "address"),
    (MacAddress(b"1234567"), "address"),
    (DeviceStateReply(256, no_fd=True), "error"),
    (DeviceStateReply(-1, no_fd=True), "error"),
    (Config(0, 0, bytes(MAX_CONFIG_SIZE + 1)), "data"),
    (Config(-1, 0, b""), "payload"),
    (Opaque(bytes(4097)), "data"),
    (Inflight(*(0, 0), 0, 0, wire_size=21), "wire_size"),  # type: ignore[arg-type]
    (Inflight(*(0, 0), 1 << 16, 0), "payload"),  # type: ignore[arg-type]
    (MemoryTable((LOW,) * 9), "regions"),
    (MemoryTable((XEN_REGION,)), "region"),
    (XenMemoryTable((LOW,)), "region"),
    (SingleMemoryRegion(XEN_REGION), "region"),
    (ShmemConfig(()), "sizes"),
    (ShmemConfig(tuple([0] * 255 + [TOP])), "payload"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("payload", "field"), MISTAKES)
def test_what_has_no_room_is_the_callers_mistake(payload: Payload, field: str) -> None:
    with pytest.raises(UsageError) as refusal:
        payload.encode()
    assert refusal.value.field == field


def test_message_that_cannot_be_encoded() -> None:
    with pytest.raises(UsageError, match="payload=4109: has to be at most 4108 bytes"):
        encode_message(1, bytes(MAX_PAYLOAD + 1))
    with pytest.raises(UsageError, match="need_reply"):
        encode_message(1, b"", reply=True, need_reply=True)


@pytest.mark.parametrize(
    ("num", "good"), [(0, True), (0xFFFF, True), (0x10000, False), (2**32 - 1, False), (-1, False)]
)
def test_split_base_has_sixteen_bits(num: int, good: bool) -> None:
    if good:
        assert SplitBase.from_num(num) == SplitBase(num)
        assert SplitBase(num).to_num() == num
        return
    with pytest.raises(PeerError) as refusal:
        SplitBase.from_num(num)
    assert refusal.value.field == "num"
    with pytest.raises(UsageError):
        SplitBase(num).to_num()


def test_packed_base_is_cut_as_the_document_says() -> None:
    assert PackedBase.from_num(0x80058003) == PackedBase(3, True, 5, True)
    assert PackedBase.from_num(0x00058003) == PackedBase(3, True, 5, False)
    assert PackedBase.from_num(0x7FFF7FFF) == PackedBase(0x7FFF, False, 0x7FFF, False)
    assert PackedBase(0, False, 0, True).to_num() == 1 << 31


@pytest.mark.parametrize("num", [-1, 2**32])
def test_packed_base_has_thirty_two_bits(num: int) -> None:
    with pytest.raises(PeerError, match="num="):
        PackedBase.from_num(num)


@pytest.mark.parametrize("index", [-1, 1 << 15])
def test_packed_index_has_fifteen_bits(index: int) -> None:
    with pytest.raises(UsageError, match="next_avail="):
        PackedBase(index, True, 0, True).to_num()
    with pytest.raises(UsageError, match="next_used="):
        PackedBase(0, True, index, True).to_num()


def test_refusals_read_well() -> None:
    with pytest.raises(PeerError) as refusal:
        decode_payload(spec_of(12, NONE), U64(3).encode(), 0)
    assert str(refusal.value) == "descriptors=0: has to be 1 with this message"
    with pytest.raises(PeerError) as refusal:
        decode_payload(spec_of(38, NONE), bytes(8) + region(), 2)
    assert str(refusal.value) == "descriptors=2: has to be 0 or 1 with this message"
    with pytest.raises(PeerError) as refusal:
        decode_payload(spec_of(5, NONE), struct.pack("=II", 2, 0) + region(), 2)
    assert str(refusal.value) == "size=40: has to be 72 bytes for 2 regions, or 264 with all slots"
    with pytest.raises(PeerError) as refusal:
        decode_payload(spec_of(1, NONE), bytes(8), 0)
    assert str(refusal.value) == "size=8: has to be 0, as there is no payload"
    with pytest.raises(PeerError) as refusal:
        decode_payload(spec_of(2, NONE), bytes(4), 0)
    assert str(refusal.value) == "size=4: has to be 8, the bytes of a U64"
    with pytest.raises(PeerError) as refusal:
        Iotlb.decode(iotlb(kind=9))
    assert str(refusal.value) == "type=9: has to be one of 1 (MISS), 2 (UPDATE), 3 (INVALIDATE), 4 (ACCESS_FAIL)"
