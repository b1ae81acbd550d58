"""Whole messages as bytes, one request for every row of the document's tables and one answer for every kind of it.

Written by hand from the document's layouts, each number in the byte order of a little-endian machine; a column of the
header is four bytes: request, flags, size. Where a comment says "seen", the bytes or their number are those that a
daemon or a VMM sent: QEMU 11.1.3, its storage daemon, virtiofsd 1.13, passt, DPDK 24.11, libblkio 1.5.
"""

from __future__ import annotations

import uuid
from typing import NamedTuple

from vhost_user.message import (
    SHMEM_REGIONS,
    U64,
    Config,
    CryptoSession,
    DeviceState,
    DeviceStateReply,
    Empty,
    Inflight,
    Iotlb,
    IotlbPermission,
    IotlbType,
    Log,
    MacAddress,
    MemoryRegion,
    MemoryTable,
    Mmap,
    Opaque,
    Payload,
    ProtocolFeature,
    Shared,
    ShmemConfig,
    SingleMemoryRegion,
    TransferDirection,
    VringAddr,
    VringArea,
    VringFd,
    VringState,
    XenMemoryRegion,
    XenMemoryTable,
    XenSingleMemoryRegion,
)
from vhost_user.units import ByteCount, GuestAddress, HostOffset, UserAddress

NONE = ProtocolFeature.NONE
XEN = ProtocolFeature.XEN_MMAP
SHMFD = ProtocolFeature.LOG_SHMFD


class Golden(NamedTuple):
    """`text` is the message of `payload` in hexadecimal, `fds` the number of descriptors; the rest is for `spec_of`."""

    payload: Payload
    text: str
    fds: int = 0
    acked: ProtocolFeature = NONE
    postcopy: bool = False

    @property
    def data(self) -> bytes:
        return bytes.fromhex(self.text)


LOW = MemoryRegion(GuestAddress(0), ByteCount(0xA0000), UserAddress(0x7F0000000000), HostOffset(0))
HIGH = MemoryRegion(GuestAddress(0x100000000), ByteCount(0x3B10), UserAddress(0x7F1000000000), HostOffset(0x80000000))
XEN_REGION = XenMemoryRegion(LOW.guest_address, LOW.size, LOW.user_address, LOW.mmap_offset, 0x101, 7)

LOW_TEXT = "0000000000000000 00000a0000000000 00000000007f0000 0000000000000000"
HIGH_TEXT = "0000000001000000 103b000000000000 00000000107f0000 0000008000000000"
XEN_TEXT = LOW_TEXT + "01010000 07000000"

UUID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
UUID_TEXT = "00112233 4455 6677 8899 aabbccddeeff"

FRONTEND_REQUESTS = [
    Golden(Empty(), "01000000 01000000 00000000"),
    Golden(U64(0x140000000), "02000000 01000000 08000000 0000004001000000"),
    Golden(Empty(), "03000000 01000000 00000000"),
    Golden(Empty(), "04000000 01000000 00000000"),
    Golden(MemoryTable((LOW, HIGH)), f"05000000 01000000 48000000 02000000 00000000 {LOW_TEXT} {HIGH_TEXT}", fds=2),
    # Seen: QEMU's acknowledgement in postcopy, and the only one that its storage daemon takes.
    Golden(MemoryTable(()), "05000000 01000000 08000000 00000000 00000000"),
    Golden(XenMemoryTable((XEN_REGION,)), f"05000000 01000000 30000000 01000000 00000000 {XEN_TEXT}", 1, XEN),
    Golden(U64(0x7F00DEADB000), "06000000 01000000 08000000 00b0adde007f0000"),
    Golden(
        Log(ByteCount(0x20000), HostOffset(0x1000)),
        "06000000 01000000 10000000 0000020000000000 0010000000000000",
        1,
        SHMFD,
    ),
    Golden(Empty(), "07000000 01000000 00000000", fds=1),
    Golden(VringState(1, 256), "08000000 01000000 08000000 01000000 00010000"),
    Golden(
        VringAddr(
            1,
            1,
            UserAddress(0x7F0000001000),
            used=UserAddress(0x7F0000003000),
            avail=UserAddress(0x7F0000002000),
            log=GuestAddress(0x3000),
        ),
        # The used ring stands before the available ring.
        "09000000 01000000 28000000 01000000 01000000"
        "00100000007f0000 00300000007f0000 00200000007f0000 0030000000000000",
    ),
    Golden(VringState(0, 0xFFFE), "0a000000 01000000 08000000 00000000 feff0000"),
    Golden(VringState(2, 0), "0b000000 01000000 08000000 02000000 00000000"),
    Golden(VringFd(3), "0c000000 01000000 08000000 0300000000000000", fds=1),
    Golden(VringFd(3, no_fd=True), "0c000000 01000000 08000000 0301000000000000"),
    Golden(VringFd(255), "0d000000 01000000 08000000 ff00000000000000", fds=1),
    Golden(VringFd(0, no_fd=True), "0e000000 01000000 08000000 0001000000000000"),
    Golden(Empty(), "0f000000 01000000 00000000"),
    # Seen: what QEMU acknowledges of a daemon that offers these six.
    Golden(U64(0x8629), "10000000 01000000 08000000 2986000000000000"),
    Golden(Empty(), "11000000 01000000 00000000"),
    Golden(VringState(1, 1), "12000000 01000000 08000000 01000000 01000000"),
    Golden(MacAddress(bytes.fromhex("525400aabbcc")), "13000000 01000000 08000000 525400aabbcc 0000"),
    Golden(U64(1500), "14000000 01000000 08000000 dc05000000000000"),
    Golden(Empty(), "15000000 01000000 00000000", fds=1),
    # 32 bytes: the C structure, which QEMU and DPDK send.
    Golden(
        Iotlb(
            GuestAddress(0x5000),
            ByteCount(0x1000),
            UserAddress(0x7F0000005000),
            IotlbPermission.READ_WRITE,
            IotlbType.UPDATE,
        ),
        "16000000 01000000 20000000 0050000000000000 0010000000000000 00500000007f0000 03 02 000000000000",
    ),
    Golden(VringState(0, 1), "17000000 01000000 08000000 00000000 01000000"),
    # Seen: QEMU reads 57 bytes of a disk.
    Golden(Config(0, 0, bytes(57)), "18000000 01000000 45000000 00000000 39000000 00000000" + "00" * 57),
    Golden(Config(0x20, 1, b"\1\2\3"), "19000000 01000000 0f000000 20000000 03000000 01000000 010203"),
    Golden(CryptoSession(b"\xaa" * 16), "1a000000 01000000 10000000" + "aa" * 16),
    Golden(U64(5), "1b000000 01000000 08000000 0500000000000000"),
    Golden(Empty(), "1c000000 01000000 00000000"),
    Golden(Empty(), "1d000000 01000000 00000000"),
    Golden(Empty(), "1e000000 01000000 00000000"),
    # Seen: QEMU sends 24 bytes.
    Golden(
        Inflight(ByteCount(0), HostOffset(0), 1, 128),
        "1f000000 01000000 18000000 0000000000000000 0000000000000000 0100 8000 00000000",
    ),
    Golden(
        Inflight(ByteCount(0x840), HostOffset(0x1000), 1, 128, wire_size=20),
        "20000000 01000000 14000000 4008000000000000 0010000000000000 0100 8000",
        fds=1,
    ),
    Golden(Empty(), "21000000 01000000 00000000", fds=1),
    Golden(Empty(), "22000000 01000000 00000000"),
    Golden(VringState(4, 0), "23000000 01000000 08000000 04000000 00000000"),
    Golden(Empty(), "24000000 01000000 00000000"),
    # Seen: libblkio registers a region of 0x3b10 bytes.
    Golden(SingleMemoryRegion(HIGH), f"25000000 01000000 28000000 0000000000000000 {HIGH_TEXT}", fds=1),
    Golden(
        XenSingleMemoryRegion(XEN_REGION), f"25000000 01000000 30000000 0000000000000000 {XEN_TEXT}", fds=1, acked=XEN
    ),
    Golden(SingleMemoryRegion(LOW), f"26000000 01000000 28000000 0000000000000000 {LOW_TEXT}"),
    Golden(XenSingleMemoryRegion(XEN_REGION), f"26000000 01000000 30000000 0000000000000000 {XEN_TEXT}", 1, XEN),
    Golden(U64(0xF), "27000000 01000000 08000000 0f00000000000000"),
    Golden(Empty(), "28000000 01000000 00000000"),
    Golden(Shared(UUID), f"29000000 01000000 10000000 {UUID_TEXT}"),
    Golden(DeviceState(TransferDirection.LOAD), "2a000000 01000000 08000000 01000000 00000000", fds=1),
    Golden(Empty(), "2b000000 01000000 00000000"),
    Golden(Empty(), "2c000000 01000000 00000000"),
]

FRONTEND_REPLIES = [
    # Seen: the features of QEMU's storage daemon, and the protocol features below.
    Golden(U64(0x175007E44), "01000000 05000000 08000000 447e007501000000"),
    Golden(MemoryTable((HIGH,)), f"05000000 05000000 28000000 01000000 00000000 {HIGH_TEXT}", postcopy=True),
    # Seen: 8 bytes from QEMU's storage daemon and passt, 16 from virtiofsd, none from DPDK.
    Golden(Opaque(bytes(8)), "06000000 05000000 08000000 0000000000000000", acked=SHMFD),
    Golden(Opaque(bytes(16)), "06000000 05000000 10000000" + "00" * 16, acked=SHMFD),
    Golden(Opaque(b""), "06000000 05000000 00000000", acked=SHMFD),
    Golden(VringState(2, 0x80058003), "0b000000 05000000 08000000 02000000 03800580"),
    Golden(U64(0x8F2B), "0f000000 05000000 08000000 2b8f000000000000"),
    # Seen: DPDK's, whatever it was told.
    Golden(U64(128), "11000000 05000000 08000000 8000000000000000"),
    Golden(U64(0), "16000000 05000000 08000000 0000000000000000"),
    Golden(Config(8, 0, b"\xff\0"), "18000000 05000000 0e000000 08000000 02000000 00000000 ff00"),
    # How QEMU's storage daemon was seen to refuse a range beyond the end.
    Golden(Empty(), "18000000 05000000 00000000"),
    Golden(CryptoSession(b"\xbb" * 8), "1a000000 05000000 08000000 bbbbbbbbbbbbbbbb"),
    Golden(Empty(), "1c000000 05000000 00000000", fds=1),
    Golden(U64(0), "1e000000 05000000 08000000 0000000000000000"),
    Golden(
        Inflight(ByteCount(0x840), HostOffset(0), 1, 128),
        "1f000000 05000000 18000000 4008000000000000 0000000000000000 0100 8000 00000000",
        fds=1,
    ),
    # Seen: QEMU's storage daemon and virtiofsd.
    Golden(U64(509), "24000000 05000000 08000000 fd01000000000000"),
    Golden(SingleMemoryRegion(LOW), f"25000000 05000000 28000000 0000000000000000 {LOW_TEXT}", postcopy=True),
    Golden(U64(0xB), "28000000 05000000 08000000 0b00000000000000"),
    Golden(Opaque(b""), "29000000 05000000 00000000", fds=1),
    Golden(Opaque(UUID.bytes), f"29000000 05000000 10000000 {UUID_TEXT}"),
    Golden(DeviceStateReply(0, no_fd=True), "2a000000 05000000 08000000 0001000000000000"),
    Golden(DeviceStateReply(0, no_fd=False), "2a000000 05000000 08000000 0000000000000000", fds=1),
    Golden(DeviceStateReply(1, no_fd=True), "2a000000 05000000 08000000 0101000000000000"),
    # Seen: virtiofsd, after it was given garbage.
    Golden(U64(1), "2b000000 05000000 08000000 0100000000000000"),
    Golden(
        ShmemConfig((ByteCount(0x100000), *[ByteCount(0)] * (SHMEM_REGIONS - 2), ByteCount(0x1000))),
        "2c000000 05000000 08080000 02000000 00000000 0000100000000000"
        + "00" * 8 * (SHMEM_REGIONS - 2)
        + "0010000000000000",
    ),
]

BACKEND_REQUESTS = [
    # Seen: DPDK's miss has neither size nor user address.
    Golden(
        Iotlb(GuestAddress(0x5000), ByteCount(0), UserAddress(0), IotlbPermission.READ, IotlbType.MISS),
        "01000000 01000000 20000000 0050000000000000 0000000000000000 0000000000000000 01 01 000000000000",
    ),
    Golden(
        Iotlb(GuestAddress(0x6000), ByteCount(1), UserAddress(0), IotlbPermission.WRITE, IotlbType.ACCESS_FAIL, 26),
        "01000000 01000000 1a000000 0060000000000000 0100000000000000 0000000000000000 02 04",
    ),
    Golden(Empty(), "02000000 01000000 00000000"),
    Golden(
        VringArea(1, False, ByteCount(0x1000), HostOffset(0x2000)),
        "03000000 01000000 18000000 0100000000000000 0010000000000000 0020000000000000",
        fds=1,
    ),
    Golden(
        VringArea(1, True, ByteCount(0), HostOffset(0)),
        "03000000 01000000 18000000 0101000000000000 0000000000000000 0000000000000000",
    ),
    Golden(VringState(1, 0), "04000000 01000000 08000000 01000000 00000000"),
    Golden(VringState(1, 0), "05000000 01000000 08000000 01000000 00000000"),
    Golden(Shared(UUID), f"06000000 01000000 10000000 {UUID_TEXT}"),
    Golden(Shared(UUID), f"07000000 01000000 10000000 {UUID_TEXT}"),
    Golden(Shared(UUID), f"08000000 01000000 10000000 {UUID_TEXT}"),
    # Seen: these forty bytes are what QEMU maps.
    Golden(
        Mmap(2, HostOffset(0x1000), HostOffset(0x3000), ByteCount(0x2000), 1),
        "09000000 01000000 28000000 02 00000000000000"
        "0010000000000000 0030000000000000 0020000000000000 0100000000000000",
        fds=1,
    ),
    Golden(
        Mmap(2, HostOffset(0), HostOffset(0x3000), ByteCount(0x2000)),
        "0a000000 01000000 28000000 02 00000000000000"
        "0000000000000000 0030000000000000 0020000000000000 0000000000000000",
    ),
]

BACKEND_REPLIES = [
    Golden(U64(0), "08000000 05000000 08000000 0000000000000000", fds=1),
    Golden(U64(22), "08000000 05000000 08000000 1600000000000000"),
    Golden(U64(0), "09000000 05000000 08000000 0000000000000000"),
]
