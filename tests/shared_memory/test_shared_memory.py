"""Tables of regions: what is where, what replaces what, and what becomes of memory that is still in use."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import counts
from tests.leaks import open_files
from tests.rings.rig import FORMATS, make_rig, pop
from tests.shared_memory.helpers import HUGE, SMALL, USER, Held, Pages, mappings, region
from vhost_user.errors import HostError, PeerError, UsageError
from vhost_user.mapping import PAGE_SIZE
from vhost_user.memory import GuestMemory
from vhost_user.message import MemoryRegion
from vhost_user.owned_fd import OwnedFd
from vhost_user.shared_memory import MAX_REGIONS, SharedMemory
from vhost_user.units import GuestAddress, HostOffset, UserAddress


@pytest.fixture
def shared() -> Iterator[SharedMemory]:
    with SharedMemory() as shared:
        yield shared


def filled(size: int, fill: bytes) -> OwnedFd:
    fd = SMALL.file(0)
    os.write(fd.fileno(), fill * size)
    return fd


def test_a_region_is_the_files_part(shared: SharedMemory, pages: Pages) -> None:
    fd = pages.file(3)
    same = fd.duplicate()
    shared.add(region(0x10000000, pages.size, pages.size), fd)
    shared.guest_memory.write(GuestAddress(0x10000000), b"here")
    with SharedMemory() as other:
        other.add(region(0, 3 * pages.size), same)
        assert other.guest_memory.read(GuestAddress(pages.size), 4) == b"here"


@pytest.mark.parametrize(("offset", "size"), [(1, 2), (PAGE_SIZE - 1, 2), (5, 3 * PAGE_SIZE), (7000, 9000), (0, 12001)])
def test_a_part_of_any_size_anywhere(shared: SharedMemory, offset: int, size: int) -> None:
    data = os.urandom(20000)
    fd = SMALL.file(0)
    os.write(fd.fileno(), data)
    shared.add(region(0x10000000, size, offset), fd)
    assert shared.guest_memory.read(GuestAddress(0x10000000), size) == data[offset : offset + size]
    with pytest.raises(PeerError):
        shared.guest_memory.read(GuestAddress(0x10000000), size + 1)


@pytest.mark.needs_hugetlb
@pytest.mark.parametrize("offset", [PAGE_SIZE, HUGE - 1, HUGE + 5])
def test_a_part_of_huge_pages_anywhere(shared: SharedMemory, pages: Pages, offset: int) -> None:
    fd = pages.file(max(2, 3 * HUGE // pages.size))
    same = fd.duplicate()
    shared.add(region(0x10000000, 2 * PAGE_SIZE, offset), fd)
    shared.guest_memory.write(GuestAddress(0x10000000), b"x" * 2 * PAGE_SIZE)
    shared.add(region(0x20000000, 3 * HUGE), same)
    whole = GuestAddress(0x20000000 + offset)
    assert shared.guest_memory.read(GuestAddress(whole - 1), 2 * PAGE_SIZE + 1).strip(b"\0") == b"x" * 2 * PAGE_SIZE


def test_the_last_page_of_both_address_spaces(shared: SharedMemory) -> None:
    top = 2**64 - PAGE_SIZE
    shared.add(region(top, PAGE_SIZE, user=top), SMALL.file(1))
    assert shared.to_guest(UserAddress(2**64 - 1), 1) == 2**64 - 1
    with pytest.raises(PeerError):
        shared.to_guest(UserAddress(2**64 - 1), 2)


def test_descriptors_are_closed_at_once(shared: SharedMemory) -> None:
    before = open_files()
    fds = [SMALL.file(1) for _ in range(5)]
    shared.replace([(region(PAGE_SIZE * at, PAGE_SIZE), fd) for at, fd in enumerate(fds[:4])])
    shared.add(region(PAGE_SIZE * 4, PAGE_SIZE), fds[4])
    assert all(fd.closed for fd in fds)
    assert open_files() == before


def test_as_many_regions_as_there_may_be(shared: SharedMemory) -> None:
    with SMALL.file(1) as fd:
        for at in range(MAX_REGIONS):
            shared.add(region(2 * PAGE_SIZE * at, PAGE_SIZE), fd.duplicate())
        with pytest.raises(PeerError, match="regions=510: have to be at most 509"):
            shared.add(region(2 * PAGE_SIZE * MAX_REGIONS, PAGE_SIZE), fd.duplicate())
    for at in reversed(range(MAX_REGIONS)):
        assert shared.to_guest(UserAddress(USER + 2 * PAGE_SIZE * at + 8), 8) == 2 * PAGE_SIZE * at + 8
        shared.remove(region(2 * PAGE_SIZE * at, PAGE_SIZE))
    assert shared.guest_memory.regions == ()


def test_a_region_is_removed_whatever_its_offset_is_said_to_be(shared: SharedMemory) -> None:
    shared.add(region(0, PAGE_SIZE, PAGE_SIZE), SMALL.file(2))
    shared.add(region(PAGE_SIZE, PAGE_SIZE), SMALL.file(1))
    shared.remove(region(0, PAGE_SIZE, 12345))
    assert [each.guest_address for each in shared.guest_memory.regions] == [PAGE_SIZE]


def test_a_region_that_was_removed_can_come_again(shared: SharedMemory) -> None:
    held = Held()
    for number in range(20):
        shared.add(region(0, PAGE_SIZE), filled(PAGE_SIZE, bytes([number])))
        assert shared.guest_memory.read(GuestAddress(0), 1) == bytes([number])
        shared.remove(region(0, PAGE_SIZE))
    held.check(20)


def test_an_empty_table_and_closing_twice(shared: SharedMemory) -> None:
    held = Held()
    for _ in range(20):
        shared.add(region(0, PAGE_SIZE), SMALL.file(1))
        shared.replace([])
        shared.add(region(0, PAGE_SIZE), SMALL.file(1))
        shared.clear()
        shared.add(region(0, PAGE_SIZE), SMALL.file(1))
        shared.close()
        shared.close()
    held.check(20)


def test_where_a_region_is_in_this_process(shared: SharedMemory) -> None:
    there = region(0x5000, 100, 4321)
    shared.add(there, filled(2 * PAGE_SIZE, b"."))
    shared.guest_memory.write(GuestAddress(0x5000), b"here")
    assert ctypes.string_at(shared.host_address(there), 6) == b"here.."


# Views and calls that outlive their region.


def test_a_view_keeps_its_memory_and_nothing_else(shared: SharedMemory) -> None:
    held = Held()
    for _ in range(20):
        shared.replace([(region(0, PAGE_SIZE), filled(PAGE_SIZE, b"x"))])
        views = shared.guest_memory.views(GuestAddress(0), 4)
        shared.replace([(region(0, PAGE_SIZE), filled(PAGE_SIZE, b"y"))])
        assert shared.lingering == 1
        assert (bytes(views[0]), shared.guest_memory.read(GuestAddress(0), 4)) == (b"xxxx", b"yyyy")
        del views
        assert shared.lingering == 0
        shared.clear()
    held.check(20)


def test_a_view_outlives_the_whole_memory_guarded() -> None:
    shared, fd = SharedMemory(), SMALL.file(1)
    with fd.duplicate() as same:
        shared.add(region(0, PAGE_SIZE), fd)
        views = shared.guest_memory.views(GuestAddress(0), 4)
        shared.close()
        os.ftruncate(same.fileno(), 0)
    assert bytes(views[0]) == bytes(4)


def test_views_do_not_pile_up_without_bound() -> None:
    most = 3
    with SharedMemory(max_regions=most) as shared:
        views = []
        for _ in range(most + 1):
            shared.add(region(0, PAGE_SIZE), SMALL.file(1))
            views.append(shared.guest_memory.views(GuestAddress(0), 1))
            shared.remove(region(0, PAGE_SIZE))
        before = Held()
        for _ in range(20):
            with pytest.raises(HostError, match=f"views may hold at most {most} mappings"):
                shared.add(region(0, PAGE_SIZE), SMALL.file(1))
            with pytest.raises(HostError, match="let go of the views"):
                shared.replace([(region(0, PAGE_SIZE), SMALL.file(1))])
        before.check(20)
        views.pop()
        shared.add(region(0, PAGE_SIZE), SMALL.file(1))


@contextmanager
def reading(memory: GuestMemory, address: GuestAddress, size: int) -> Iterator[None]:
    """Another thread copies this range all the time: it is all of one table, or all of another."""
    done = threading.Event()

    def read() -> int:
        copies = 0
        while not done.is_set() or not copies:
            data = memory.read(address, size)
            assert data == data[:1] * size
            copies += 1
        return copies

    with ThreadPoolExecutor(1) as pool:
        copies = pool.submit(read)
        try:
            yield
        finally:
            done.set()
        assert copies.result() > 0


@pytest.mark.parametrize("form", FORMATS)
def test_tables_are_replaced_while_a_ring_and_copies_run(form: str, shared: SharedMemory) -> None:
    """The ring's region comes again with each table; behind the other one's address another file's memory does."""
    low, high = region(0, 32 * PAGE_SIZE), region(0x100000, 2 * PAGE_SIZE)
    memory, tables = shared.guest_memory, 0
    with SMALL.file(32) as ring, filled(2 * PAGE_SIZE, b"a") as first, filled(2 * PAGE_SIZE, b"b") as second:

        def next_table() -> None:
            nonlocal tables
            tables += 1
            shared.replace([(low, ring.duplicate()), (high, (first, second)[tables % 2].duplicate())])

        next_table()
        rig = make_rig(form, 8, memory=memory)
        with reading(memory, high.guest_address, high.size):
            while tables < counts.TABLES_UNDER_LOAD:
                rig.driver.add([(high.guest_address, 64)], [(0x1000, 64)])
                next_table()
                chain = pop(rig.queue)
                chain.write(chain.read())
                next_table()
                rig.queue.push(chain, 64)
                next_table()
                assert rig.driver.get_used() is not None
                assert memory.read(GuestAddress(0x1000), 64) in {b"a" * 64, b"b" * 64}
    assert memory is shared.guest_memory
    shared.clear()
    assert shared.lingering == 0


# User addresses.


def test_translation_by_user_address(shared: SharedMemory) -> None:
    shared.add(region(0x10000, 0x2000, user=0x700000), SMALL.file(2))
    shared.add(region(0x12000, 0x1000, user=0x702000), SMALL.file(1))  # adjoins in both
    shared.add(region(0x20000, 0x1000, user=0x703000), SMALL.file(1))  # in user addresses
    shared.add(region(0x21000, 0x1000, user=0x900000), SMALL.file(1))  # in guest addresses
    for user, size, guest in (
        (0x700000, 1, 0x10000),
        (0x700000, 0x3000, 0x10000),
        (0x701FFF, 2, 0x11FFF),
        (0x702FFF, 1, 0x12FFF),
        (0x703000, 0x1000, 0x20000),
        (0x900FFF, 1, 0x21FFF),
    ):
        assert shared.to_guest(UserAddress(user), size) == guest
    for user, size in (
        (0x6FFFFF, 1),
        (0x6FFFFF, 2),
        (0x702FFF, 2),
        (0x703FFF, 2),
        (0x901000, 1),
        (0x10000, 1),
        (2**64 - 1, 2),
        (0x700000, 2**64),
    ):
        with pytest.raises(PeerError, match="adjoin in both address spaces") as refusal:
            shared.to_guest(UserAddress(user), size)
        assert refusal.value.field == "user address"
    with pytest.raises(UsageError, match="size=0"):
        shared.to_guest(UserAddress(0x700000), 0)


def test_user_addresses_can_be_guest_addresses(shared: SharedMemory) -> None:
    shared.gpa_addresses = True
    shared.add(region(0x10000, 0x2000, user=0x10000), SMALL.file(2))
    shared.add(region(0x12000, 0x1000, user=0x12000), SMALL.file(1))
    assert shared.to_guest(UserAddress(0x11FFF), 2) == 0x11FFF
    with pytest.raises(PeerError):
        shared.to_guest(UserAddress(0x12FFF), 2)


@given(
    places=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 5)), max_size=8),
    start=st.integers(0, 40),
    size=st.integers(1, 12),
)
def test_translation_is_that_of_each_byte(places: list[tuple[int, int, int]], start: int, size: int) -> None:
    model: dict[int, int] = {}
    with SharedMemory() as shared, SMALL.file(1) as fd:
        for guest, user, length in places:
            bytes_of = dict(zip(range(user, user + length), range(guest, guest + length), strict=True))
            free = not (model.keys() & bytes_of.keys() or set(model.values()) & set(bytes_of.values()))
            try:
                shared.add(region(guest, length, user=user), fd.duplicate())
            except PeerError:
                assert not free
            else:
                assert free
                model |= bytes_of
        found = [model.get(at) for at in range(start, start + size)]
        try:
            first = shared.to_guest(UserAddress(start), size)
        except PeerError:
            assert None in found or any(found[at] != found[0] + at for at in range(size) if found[0] is not None)
        else:
            assert found == list(range(first, first + size))


# Memory that the front end takes away.


def test_a_dead_region_is_found(shared: SharedMemory, pages: Pages) -> None:
    bad = region(2**32, pages.size)
    shared.add(region(0, PAGE_SIZE), SMALL.file(1))
    with pages.file(1) as fd, SharedMemory() as other:
        shared.add(bad, fd.duplicate())
        other.add(region(0, PAGE_SIZE), SMALL.file(1))
        os.ftruncate(fd.fileno(), 0)
        assert shared.dead_region() is None, "nobody has touched it"
        with pytest.raises(PeerError):
            shared.guest_memory.read(bad.guest_address, 1)
        for _ in range(2):
            dead = shared.dead_region()
            assert dead is not None
            assert dead.guest_address == bad.guest_address
            assert other.dead_region() is None, "it is not this one's"
        os.ftruncate(fd.fileno(), pages.size)
        shared.remove(bad)
        assert shared.dead_region() is None
        shared.add(bad, fd.duplicate())
        assert shared.dead_region() is None, "the address died with another mapping"
        os.ftruncate(fd.fileno(), 0)
        views = shared.guest_memory.views(bad.guest_address, 1)
        assert bytes(views[0]) == b"\0"
        assert shared.dead_region() is not None
        del views


def test_a_dead_part_of_the_same_file_leaves_the_others_alive(shared: SharedMemory) -> None:
    with SMALL.file(2) as fd:
        shared.add(region(0, PAGE_SIZE), fd.duplicate())
        shared.add(region(PAGE_SIZE, PAGE_SIZE, PAGE_SIZE), fd.duplicate())
        os.ftruncate(fd.fileno(), PAGE_SIZE)
    shared.guest_memory.write(GuestAddress(0), b"alive")
    with pytest.raises(PeerError):
        shared.guest_memory.write(GuestAddress(PAGE_SIZE), b"dead")
    dead = shared.dead_region()
    assert dead is not None
    assert dead.guest_address == PAGE_SIZE
    assert shared.guest_memory.read(GuestAddress(0), 5) == b"alive"


def test_a_region_from_the_wire() -> None:
    made = MemoryRegion.decode(region(0x1000, 5, 3).encode())
    with SharedMemory() as shared:
        shared.add(made, SMALL.file(1))
        (there,) = shared.guest_memory.regions
        assert (there.guest_address, there.size, there.user_address) == (made.guest_address, 5, made.user_address)
        assert there.offset == HostOffset(3)
        before = mappings()
        shared.close()
        assert mappings() < before
