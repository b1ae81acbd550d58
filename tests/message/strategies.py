"""Payloads of every kind as a well-behaved peer would make them, and the two tables as one list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from vhost_user.message import (
    BACKEND_MESSAGES,
    FRONTEND_MESSAGES,
    MAX_CONFIG_SIZE,
    MAX_REGIONS,
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
    MessageSpec,
    Mmap,
    Opaque,
    Payload,
    Shared,
    ShmemConfig,
    SingleMemoryRegion,
    VringAddr,
    VringArea,
    VringFd,
    VringState,
    XenMemoryRegion,
    XenMemoryTable,
    XenSingleMemoryRegion,
)

U8, U16, U32 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32))
NUMBERS = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1])


@st.composite
def ranges(draw: st.DrawFn, smallest: int = 0) -> tuple[int, int]:
    """Start and size of a range that ends at 2**64 or before."""
    size = draw(st.integers(smallest, 2**64 - 1) | st.sampled_from([smallest, 0x1000, 2**63]))
    return draw(st.integers(0, 2**64 - size) | st.just(2**64 - size)) & 2**64 - 1, size


@st.composite
def two_ranges(draw: st.DrawFn, smallest: int = 0) -> tuple[int, int, int]:
    """Two starts and the size of both ranges."""
    first, size = draw(ranges(smallest))
    return first, draw(st.integers(0, 2**64 - max(size, 1))), size


def memory_regions() -> SearchStrategy[MemoryRegion]:
    return st.builds(_region, two_ranges(1), NUMBERS)


def _region(place: tuple[Any, Any, Any], offset: Any) -> MemoryRegion:
    guest, user, size = place
    return MemoryRegion(guest, size, user, offset)


def xen_regions() -> SearchStrategy[XenMemoryRegion]:
    def build(region: MemoryRegion, flags: int, domid: int) -> XenMemoryRegion:
        return XenMemoryRegion(region.guest_address, region.size, region.user_address, region.mmap_offset, flags, domid)

    return st.builds(build, memory_regions(), U32, U32)


def tables(of: SearchStrategy[Any]) -> SearchStrategy[tuple[Any, ...]]:
    return st.lists(of, max_size=MAX_REGIONS).map(tuple)


def iotlb_messages() -> SearchStrategy[Iotlb]:
    def build(place: Any, perm: IotlbPermission, kind: IotlbType, wire_size: int) -> Iotlb:
        iova, user, size = place
        return Iotlb(iova, size, user, perm, kind, wire_size)

    types = st.sampled_from(IotlbType)
    return st.builds(build, two_ranges(), st.sampled_from(IotlbPermission), types, st.sampled_from([26, 32]))


def inflight_areas() -> SearchStrategy[Inflight]:
    def build(place: Any, queues: int, size: int, wire_size: int) -> Inflight:
        return Inflight(place[1], place[0], queues, size, wire_size)

    return st.builds(build, ranges(), U16, U16, st.sampled_from([20, 24]))


def shmem_configs() -> SearchStrategy[ShmemConfig]:
    def build(some: dict[int, Any]) -> ShmemConfig:
        return ShmemConfig(tuple(some.get(shmid, 0) for shmid in range(SHMEM_REGIONS)))

    return st.builds(build, st.dictionaries(U8, NUMBERS, max_size=8))


def configs() -> SearchStrategy[Config]:
    def build(data: bytes, offset: int, flags: int) -> Config:
        return Config(min(offset, 2**32 - len(data), 2**32 - 1), flags, data)

    return st.builds(build, st.binary(max_size=300) | st.just(bytes(MAX_CONFIG_SIZE)), U32, U32)


def _opened(build: Callable[..., Payload], drawn: SearchStrategy[Any]) -> SearchStrategy[Payload]:
    return drawn.map(lambda values: build(*values))


PAYLOADS: dict[type[Payload], SearchStrategy[Any]] = {
    Empty: st.just(Empty()),
    U64: st.builds(U64, NUMBERS),
    MacAddress: st.builds(MacAddress, st.binary(min_size=6, max_size=6)),
    VringState: st.builds(VringState, U32, U32),
    VringFd: st.builds(VringFd, U8, st.booleans()),
    VringAddr: st.builds(VringAddr, U32, U32, NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    VringArea: _opened(
        lambda place, index, no_fd: VringArea(index, no_fd, place[1], place[0]), st.tuples(ranges(), U8, st.booleans())
    ),
    MemoryRegion: memory_regions(),
    MemoryTable: st.builds(MemoryTable, tables(memory_regions())),
    SingleMemoryRegion: st.builds(SingleMemoryRegion, memory_regions()),
    XenMemoryRegion: xen_regions(),
    XenMemoryTable: st.builds(XenMemoryTable, tables(xen_regions())),
    XenSingleMemoryRegion: st.builds(XenSingleMemoryRegion, xen_regions()),
    Log: _opened(lambda offset, size: Log(size, offset), ranges(1)),
    Iotlb: iotlb_messages(),
    Inflight: inflight_areas(),
    Mmap: _opened(
        lambda place, shmid, fd_offset, flags: Mmap(shmid, fd_offset, place[0], place[1], flags),
        st.tuples(ranges(1), U8, NUMBERS, NUMBERS),
    ),
    ShmemConfig: shmem_configs(),
    Config: configs(),
    Shared: st.builds(Shared, st.uuids()),
    DeviceState: st.builds(DeviceState, U32, U32),
    DeviceStateReply: st.builds(DeviceStateReply, U8, st.booleans()),
    Opaque: st.builds(Opaque, st.binary(max_size=64)),
    CryptoSession: st.builds(CryptoSession, st.binary(max_size=1200)),
}


def all_specs() -> list[MessageSpec]:
    """Every entry of both tables, and every variant."""
    entries = [*FRONTEND_MESSAGES.values(), *BACKEND_MESSAGES.values()]
    return entries + [variant for entry in entries for _, variant in entry.variants]
