"""The table of translations alone, against a naive one, and rings on it without a back end."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.rings.rig import INDIRECT, NEXT, WRITE, PackedPen, Raw, SplitPen
from vhost_user.errors import PeerError
from vhost_user.iotlb import Iotlb
from vhost_user.mapping import Mapping
from vhost_user.memory import GuestMemory, Region
from vhost_user.message import IotlbPermission, MemoryRegion
from vhost_user.owned_fd import OwnedFd
from vhost_user.shared_memory import SharedMemory
from vhost_user.units import ByteCount, GuestAddress, HostOffset, UserAddress
from vhost_user.vring import DeviceQueue, PackedLayout, PackedQueue, SplitLayout, SplitQueue
from vhost_user.vring.device import Miss

READ, READ_WRITE = IotlbPermission.READ, IotlbPermission.READ_WRITE
UNIT = 16
"""Bytes of the model's pages. Nothing asks for larger ones."""

USER = 0x7000_0000
UNITS = 24
"""Of IOVAs. User addresses are many more, in two regions with nothing between them, and a third one apart."""

REGIONS = [(0x10000, 0), (0x50000, 64 * UNIT), (0x90000, 160 * UNIT)]
"""Guest address, and user address beyond USER, of regions of 64 units."""


def shared_memory() -> tuple[SharedMemory, int]:
    """Regions whose bytes tell where they are in the file; and a descriptor of it."""
    size = 3 * mmap.PAGESIZE
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    for at in range(3):
        content = b"".join((at * 64 + unit).to_bytes(2, "little") * (UNIT // 2) for unit in range(64))
        os.pwrite(fd, content, at * mmap.PAGESIZE)
    shared = SharedMemory()
    for at in range(3):
        shared.add(region(at), OwnedFd(os.dup(fd)))
    return shared, fd


def region(at: int) -> MemoryRegion:
    guest, user = REGIONS[at]
    return MemoryRegion(
        GuestAddress(guest), ByteCount(64 * UNIT), UserAddress(USER + user), HostOffset(at * mmap.PAGESIZE)
    )


class Model(RuleBasedStateMachine):
    """A dictionary of units: which unit of user addresses each IOVA's unit is, and what may be done with it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.fd = shared_memory()
        self.iotlb = Iotlb(self.shared)
        self.model: dict[int, tuple[int, IotlbPermission]] = {}
        self.present = {0, 1, 2}

    def is_shared(self, unit: int) -> bool:
        return any(REGIONS[at][1] <= unit * UNIT < REGIONS[at][1] + 64 * UNIT for at in self.present)

    @rule(
        iova=st.integers(0, UNITS - 1),
        units=st.integers(1, 12),
        user=st.integers(0, 230),
        permission=st.sampled_from(IotlbPermission),
    )
    def update(self, iova: int, units: int, user: int, permission: IotlbPermission) -> None:
        good = all(self.is_shared(unit) for unit in range(user, user + units))
        try:
            self.iotlb.update(iova * UNIT, units * UNIT, USER + user * UNIT, permission)
        except PeerError:
            assert not good
            return
        assert good
        for at in range(units):
            self.model[iova + at] = user + at, permission
            if permission is IotlbPermission.NO_ACCESS:
                del self.model[iova + at]

    @rule(iova=st.integers(0, UNITS - 1), units=st.integers(0, 30))
    def invalidate(self, iova: int, units: int) -> None:
        self.iotlb.invalidate(iova * UNIT, units * UNIT)
        for at in range(iova, iova + units if units else 1000):
            self.model.pop(at, None)

    @rule(at=st.integers(0, 2))
    def take_region(self, at: int) -> None:
        """Entries that were joined go with it as far as they reach, so nothing is known but what must be gone."""
        if at in self.present:
            self.shared.remove(region(at))
            self.present.remove(at)
        else:
            self.shared.add(region(at), OwnedFd(os.dup(self.fd)))
            self.present.add(at)
        self.iotlb.memory_changed()
        for iova, (unit, _) in list(self.model.items()):
            if not self.is_shared(unit) or self.iotlb.lacks(iova * UNIT, 1, 0) is not None:
                del self.model[iova]

    @invariant()
    def agrees(self) -> None:
        for iova in range(UNITS + 12):
            unit, permission = self.model.get(iova, (None, IotlbPermission.NO_ACCESS))
            for access, at in ((1, 0), (2, UNIT - 1)):
                lacks = self.iotlb.lacks(iova * UNIT + at, 1, access) is not None
                assert lacks == bool(access & ~permission)
            if permission & READ:
                assert unit is not None
                where = unit if unit < 128 else unit - 32
                address = GuestAddress(iova * UNIT)
                assert self.iotlb.read(address, UNIT) == where.to_bytes(2, "little") * (UNIT // 2)
                assert b"".join(self.iotlb.views(address, UNIT)) == self.iotlb.read(address, UNIT)
                guest = REGIONS[where // 64][0] + where % 64 * UNIT
                assert self.iotlb.physical(address, UNIT) == [(guest, UNIT)]

    def teardown(self) -> None:
        self.iotlb.clear()
        self.shared.close()
        assert self.shared.lingering == 0
        os.close(self.fd)


TestAgainstModel = Model.TestCase


@pytest.fixture
def iotlb() -> Iterator[Iotlb]:
    shared, fd = shared_memory()
    os.close(fd)
    with shared:
        iotlb = Iotlb(shared, max_pieces=4)
        yield iotlb
        iotlb.clear()


def test_neighbours_that_go_on_in_each_other_are_one_entry(iotlb: Iotlb) -> None:
    for unit in (1, 3, 2, 0):
        iotlb.update(unit * UNIT, UNIT, USER + unit * UNIT, READ)
    assert len(iotlb) == 1
    assert iotlb.contiguous(GuestAddress(0), 4 * UNIT)
    iotlb.update(4 * UNIT, UNIT, USER + 4 * UNIT, READ_WRITE)
    iotlb.update(5 * UNIT, UNIT, USER + 6 * UNIT, READ_WRITE)
    assert len(iotlb) == 3


def test_the_oldest_make_room(iotlb: Iotlb) -> None:
    for at in range(10):
        iotlb.update(at * 2 * UNIT, UNIT, USER, READ)
        assert len(iotlb) == min(at + 1, 4)
    assert [at for at in range(10) if iotlb.lacks(at * 2 * UNIT, UNIT, READ) is None] == [6, 7, 8, 9]


def test_parts_that_are_left_and_pieces_that_grow_are_counted(iotlb: Iotlb) -> None:
    iotlb.update(0, 64 * UNIT, USER, READ)
    for unit in range(1, 40, 2):
        iotlb.invalidate(unit * UNIT, UNIT)
    assert len(iotlb) == 4
    iotlb.invalidate(0, 0)
    for at in range(4):
        iotlb.update(at << 20, 64 * UNIT, USER, READ)
    shared = iotlb._shared
    shared.remove(region(0))
    fd = os.memfd_create("halves", os.MFD_CLOEXEC)
    os.ftruncate(fd, mmap.PAGESIZE)
    for user in (0, 32 * UNIT):
        half = MemoryRegion(
            GuestAddress(0x10000 + user), ByteCount(32 * UNIT), UserAddress(USER + user), HostOffset(user)
        )
        shared.add(half, OwnedFd(os.dup(fd)))
    os.close(fd)
    iotlb.memory_changed()
    assert len(iotlb) == 2  # of two pieces each


def test_the_last_addresses_can_be_mapped_and_all_of_them_taken_back(iotlb: Iotlb) -> None:
    iotlb.update(2**64 - UNIT, UNIT, USER, READ)
    assert len(iotlb.read(GuestAddress(2**64 - UNIT), UNIT)) == UNIT
    with pytest.raises(PeerError):
        iotlb.update(2**64 - UNIT, 2 * UNIT, USER, READ)
    iotlb.invalidate(0, 0)  # 2**64 bytes
    assert len(iotlb) == 0


def test_a_mapping_goes_with_its_region(iotlb: Iotlb) -> None:
    iotlb.update(0, 64 * UNIT, USER, READ_WRITE)
    assert iotlb.read(GuestAddress(0), 1)
    shared = iotlb._shared
    shared.remove(region(0))
    iotlb.memory_changed()
    assert (len(iotlb), shared.lingering) == (0, 0)


# Rings. Their areas are mapped from the start, and what the chains need only when a test says so.

RING, BUFFER, TABLE = 0x10000, 0x20000, 0x30000


class Bench:
    """A device on a ring that a test writes by hand."""

    def __init__(self, form: str) -> None:
        fd = os.memfd_create("ring", os.MFD_CLOEXEC)
        os.ftruncate(fd, 0x40000)
        self.shared = SharedMemory()
        self.mapping = Mapping(ByteCount(0x40000), mmap.MAP_SHARED, fd)
        whole = MemoryRegion(GuestAddress(0), ByteCount(0x40000), UserAddress(USER), HostOffset(0))
        self.shared.add(whole, OwnedFd(fd))
        self.iotlb = Iotlb(self.shared)
        self.memory = GuestMemory([Region(GuestAddress(0), ByteCount(0x40000), self.mapping)])
        self.give(RING, 0x1000)
        self.pen: SplitPen | PackedPen
        self.queue: DeviceQueue
        if form == "split":
            split = SplitLayout.place(8, GuestAddress(RING))
            self.pen, self.queue = SplitPen(self.memory, split), SplitQueue(self.iotlb, **vars(split), indirect=True)
        else:
            packed = PackedLayout.place(8, GuestAddress(RING))
            self.pen, self.queue = (
                PackedPen(self.memory, packed),
                PackedQueue(self.iotlb, **vars(packed), indirect=True),
            )

    def give(self, iova: int, size: int, permission: IotlbPermission = READ_WRITE) -> None:
        self.iotlb.update(iova, size, USER + iova, permission)

    def close(self) -> None:
        self.iotlb.clear()
        self.memory.replace(())
        self.shared.close()
        self.mapping.close()


@pytest.fixture(params=["split", "packed"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.close()


def test_a_chain_that_misses_is_still_the_next_one(bench: Bench) -> None:
    bench.pen.offer([Raw(BUFFER, 16, NEXT), Raw(BUFFER + 0x1000, 32, WRITE)])
    before = bench.queue.state()
    for iova, access in ((BUFFER, 1), (BUFFER + 0x1000, 2)):
        for _ in range(3):
            assert bench.queue.pop() is None
            assert (bench.queue.miss, bench.queue.state()) == (Miss(iova, access), before)
            assert not bench.queue.enable_notifications(), "it would be served again and again"
        bench.give(iova, 0x1000, IotlbPermission(access))
    chain = bench.queue.pop()
    assert chain is not None
    assert bench.queue.miss is None
    chain.write(b"written")
    bench.queue.push(chain, 7)
    assert [length for _, length in bench.pen.used()] == [7]
    assert not bench.queue.malformed


def test_the_byte_that_is_missing_is_named(bench: Bench) -> None:
    bench.give(BUFFER, 0x1000)
    bench.pen.offer([Raw(BUFFER + 0xFFF, 2)])
    assert bench.queue.pop() is None
    assert bench.queue.miss == Miss(BUFFER + 0x1000, 1)


def test_an_indirect_table_is_missed_and_then_what_is_in_it(bench: Bench) -> None:
    bench.memory.write(GuestAddress(TABLE), bench.pen.table([Raw(BUFFER, 16)]))
    bench.pen.offer([Raw(TABLE, 16, INDIRECT)])
    for iova in (TABLE, BUFFER):
        assert bench.queue.pop() is None
        assert bench.queue.miss == Miss(iova, 1)
        bench.give(iova, 0x1000, READ)
    assert bench.queue.pop() is not None


def test_other_faults_are_the_drivers_still(bench: Bench) -> None:
    bench.give(BUFFER, 0x1000)
    bench.pen.offer([Raw(BUFFER, 0)])
    assert bench.queue.pop() is None
    assert (bench.queue.miss, bench.queue.malformed) == (None, {"zero_length": 1})


def test_what_was_taken_back_since_the_pop_is_refused(bench: Bench) -> None:
    bench.give(BUFFER, 0x1000)
    bench.pen.offer([Raw(BUFFER, 16, NEXT), Raw(BUFFER, 16, WRITE)])
    chain = bench.queue.pop()
    assert chain is not None
    bench.give(BUFFER, 0x1000, READ)
    assert len(chain.read()) == 16
    with pytest.raises(PeerError):
        chain.write(b"forbidden by now")
    bench.iotlb.invalidate(BUFFER, 0x1000)
    with pytest.raises(PeerError):
        chain.read()


def test_without_its_own_memory_a_ring_owes_and_settles_in_order(bench: Bench) -> None:
    bench.give(BUFFER, 0x1000)
    chains = []
    for at in range(3):
        bench.pen.offer([Raw(BUFFER, 16, WRITE)], at)
        chain = bench.queue.pop()
        assert chain is not None
        chains.append(chain)
    bench.iotlb.invalidate(RING, 0x1000)
    for chain in chains:
        bench.queue.push(chain, chain.id + 1)
    assert bench.queue.miss is not None
    assert bench.queue.miss.address == RING
    assert not bench.queue.settle()
    assert not bench.pen.used()
    bench.give(RING, 0x1000)
    assert bench.queue.settle()
    assert bench.pen.used() == [(0, 1), (1, 2), (2, 3)]
    assert bench.queue.should_notify()
