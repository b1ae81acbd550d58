"""Regions that can't be: each is refused by its field, changes nothing, and leaves nothing open or mapped."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.shared_memory.helpers import SMALL, USER, Held, Pages, region
from vhost_user import _native
from vhost_user.errors import FieldError, HostError, PeerError, UsageError
from vhost_user.mapping import PAGE_SIZE, map_part
from vhost_user.message import MemoryRegion
from vhost_user.owned_fd import OwnedFd
from vhost_user.shared_memory import SharedMemory
from vhost_user.units import ByteCount, GuestAddress, HostOffset

TOP = 2**64
PAGES = 4
SIZE = PAGES * PAGE_SIZE
PRESENT = region(0x100000, SIZE)

TRIES = 20


@pytest.fixture
def shared() -> Iterator[SharedMemory]:
    """One region, and `good` in it."""
    with SharedMemory(max_regions=4) as shared:
        shared.add(PRESENT, SMALL.file(PAGES))
        shared.guest_memory.write(PRESENT.guest_address, b"good")
        yield shared


Table = list[tuple[MemoryRegion, OwnedFd]]


def check_refusal(shared: SharedMemory, bad: Callable[[], Table], kind: type[FieldError], field: str) -> None:
    """By add() where it is one region, by replace(), and by replace() behind one that is good."""
    before, table, held = shared.guest_memory.regions, shared.guest_memory.table, Held()

    def attempt(regions: Table, *, add: bool = False) -> None:
        with pytest.raises(kind) as refusal:
            shared.add(*regions[0]) if add else shared.replace(regions)
        assert refusal.value.field == field
        assert type(refusal.value) is kind
        assert all(fd.closed for _, fd in regions)

    for _ in range(TRIES):
        if len(bad()) == 1:
            attempt(bad(), add=True)
        attempt(bad())
        attempt([(region(0, PAGE_SIZE), SMALL.file(1)), *bad()])
    held.check(TRIES)
    assert (shared.guest_memory.regions, shared.guest_memory.table) == (before, table)
    assert shared.guest_memory.read(PRESENT.guest_address, 4) == b"good"


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (region(SIZE, 0), "size"),
        (region(TOP - PAGE_SIZE + 1, PAGE_SIZE, user=0), "guest_address"),
        (region(TOP - 1, 2, user=0), "guest_address"),
        (region(SIZE, SIZE, user=TOP - SIZE + 1), "user_address"),
        (region(SIZE, TOP - 1, user=1), "guest_address"),
        (region(SIZE, PAGE_SIZE, TOP - 1), "mmap_offset"),
        (region(SIZE, PAGE_SIZE, TOP - PAGE_SIZE), "mmap_offset"),
        (region(SIZE, PAGE_SIZE, 2**63), "mmap_offset"),
        (region(SIZE, PAGE_SIZE, 2**63 - PAGE_SIZE), "mmap_offset"),
        (region(SIZE, PAGE_SIZE, SIZE), "mmap_offset"),
        (region(SIZE, PAGE_SIZE, SIZE - PAGE_SIZE + 1), "mmap_offset"),
        (region(SIZE, SIZE + 1), "mmap_offset"),
        (region(SIZE, 1, SIZE), "mmap_offset"),
    ],
)
def test_a_region_that_can_not_be(shared: SharedMemory, bad: MemoryRegion, field: str) -> None:
    check_refusal(shared, lambda: [(bad, SMALL.file(PAGES))], PeerError, field)


def test_a_part_beyond_a_file_of_huge_pages(shared: SharedMemory, pages: Pages) -> None:
    check_refusal(shared, lambda: [(region(2**32, 2 * pages.size + 1), pages.file(2))], PeerError, "mmap_offset")
    check_refusal(shared, lambda: [(region(2**32, 2, 2 * pages.size - 1), pages.file(2))], PeerError, "mmap_offset")


def pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def read_only(path: Path) -> int:
    path.write_bytes(bytes(SIZE))
    return os.open(path, os.O_RDONLY)


def write_only(path: Path) -> int:
    path.write_bytes(bytes(SIZE))
    return os.open(path, os.O_WRONLY)


def sealed(_: Path) -> int:
    fd = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    return fd


@pytest.mark.parametrize(
    "open_it",
    [
        lambda _: pipe(),
        lambda path: os.open(path.parent, os.O_RDONLY),
        lambda _: socket.socket(socket.AF_UNIX).detach(),
        lambda _: os.eventfd(0),
        lambda _: os.open("/dev/zero", os.O_RDWR),
        lambda _: os.open("/proc/self/mem", os.O_RDWR),
        lambda path: os.open(path.parent, os.O_PATH),
        read_only,
        write_only,
        sealed,
    ],
    ids=["pipe", "directory", "socket", "eventfd", "device", "memory", "path", "read-only", "write-only", "sealed"],
)
def test_a_descriptor_that_can_not_be_mapped(
    shared: SharedMemory, tmp_path: Path, open_it: Callable[[Path], int], request: pytest.FixtureRequest
) -> None:
    # /proc/self/mem is a regular file by its mode, and an empty one.
    field = "mmap_offset" if request.node.callspec.id == "memory" else "fd"
    bad = region(SIZE, PAGE_SIZE)
    check_refusal(shared, lambda: [(bad, OwnedFd(open_it(tmp_path / "file")))], PeerError, field)


@pytest.mark.parametrize("size", [0, -1])
def test_a_part_of_nothing(size: int) -> None:
    with SMALL.file(1) as fd, pytest.raises(PeerError, match=f"size={size}: has to be 1 byte or more"):
        map_part(fd.fileno(), 0, size)


def test_more_than_the_address_space(shared: SharedMemory) -> None:
    """A file without blocks can have any size; the host's refusal to map it is not the peer's fault as such."""

    def bad() -> Table:
        fd = SMALL.file(0)
        os.ftruncate(fd.fileno(), 2**62)
        return [(region(SIZE, 2**62, user=PRESENT.user_address + SIZE), fd)]

    with SharedMemory() as empty, pytest.raises(HostError) as refusal:
        empty.replace(bad())
    assert refusal.value.field == "size"
    shared.remove(PRESENT)
    shared.add(region(2**62 + SIZE, SIZE, user=USER - SIZE), SMALL.file(PAGES))
    held = Held()
    for _ in range(TRIES):
        with pytest.raises(HostError):
            shared.add(*bad()[0])
    held.check(TRIES)


def pair(first: MemoryRegion, second: MemoryRegion) -> Callable[[], Table]:
    return lambda: [(first, SMALL.file(PAGES)), (second, SMALL.file(PAGES))]


OVERLAPS = [0, 1, PAGE_SIZE - 1, 1 - PAGE_SIZE]


@pytest.mark.parametrize("apart", OVERLAPS)
@pytest.mark.parametrize("field", ["guest_address", "user_address"])
def test_overlap(shared: SharedMemory, field: str, apart: int) -> None:
    free = {"guest_address": 0x40000000, "user_address": 0x40000000}
    there = {"guest_address": PRESENT.guest_address, "user_address": PRESENT.user_address}
    at = free | {field: there[field] + apart + (SIZE - PAGE_SIZE if apart > 0 else 0)}
    bad = region(at["guest_address"], PAGE_SIZE, user=at["user_address"])
    held, before = Held(), shared.guest_memory.regions
    for _ in range(TRIES):
        with pytest.raises(PeerError, match="overlaps the region at 0x") as refusal:
            shared.add(bad, SMALL.file(1))
        assert refusal.value.field == field
    held.check(TRIES)
    assert shared.guest_memory.regions == before
    check_refusal(shared, pair(PRESENT, bad), PeerError, field)
    check_refusal(shared, pair(bad, PRESENT), PeerError, field)


def test_neighbours_do_not_overlap(shared: SharedMemory) -> None:
    shared.add(region(PRESENT.guest_address - PAGE_SIZE, PAGE_SIZE), SMALL.file(1))
    shared.add(region(PRESENT.guest_address + SIZE, PAGE_SIZE), SMALL.file(1))
    assert len(shared.guest_memory.regions) == 3


def test_too_many(shared: SharedMemory) -> None:
    def table(count: int) -> Table:
        return [(region(2 * PAGE_SIZE * at, PAGE_SIZE), SMALL.file(1)) for at in range(count)]

    check_refusal(shared, lambda: table(5), PeerError, "regions")
    shared.replace(table(4))
    before, held = shared.guest_memory.regions, Held()
    for _ in range(TRIES):
        with pytest.raises(PeerError, match="regions=5: have to be at most 4 at a time; remove others first"):
            shared.add(region(0x100000, PAGE_SIZE), SMALL.file(1))
    held.check(TRIES)
    assert shared.guest_memory.regions == before


def sparse(size: int) -> OwnedFd:
    fd = SMALL.file(0)
    os.ftruncate(fd.fileno(), size)
    return fd


def test_what_is_removed_and_still_looked_at_counts() -> None:
    with SharedMemory() as greedy, SharedMemory() as other:
        views = []

        def look_at(new: MemoryRegion) -> None:
            greedy.add(new, sparse(new.size))
            views.append(greedy.guest_memory.regions[0].mapping.view(HostOffset(0), ByteCount(1)))
            greedy.remove(new)

        for number in range(7):
            look_at(region(number << 44, 2**44))
        with pytest.raises(HostError, match="at most"):
            look_at(region(0, 2**44))
        other.add(region(0, 2**43), sparse(2**43))
        views.clear()
        other.add(region(2**46, 2**46), sparse(2**46))


def test_whoever_takes_all_there_is_leaves_some_for_others() -> None:
    """By regions that cost nothing, one after the other and in one table; each of three."""
    with ExitStack() as stack:
        for number in range(3):
            greedy = stack.enter_context(SharedMemory())
            at, size = 0, 2**46
            while size >= PAGE_SIZE:
                try:
                    if number % 2:
                        greedy.replace([(region(0, at + size), sparse(at + size))])
                    else:
                        greedy.add(region(at, size), sparse(size))
                except HostError:
                    size //= 2
                else:
                    at += size
            taken = sum(each.size for each in greedy.guest_memory.regions)
            assert taken > 2 ** (45 - 3 * number)
        with SharedMemory() as other:
            other.add(region(0, 2**36), sparse(2**36))
            held = Held()
            for _ in range(TRIES):
                with pytest.raises(HostError, match="at most"):
                    other.replace([(region(0, 2**40), sparse(2**40))])
            held.check(TRIES)
    with SharedMemory() as again:
        again.add(region(0, 2**46), sparse(2**46))


@pytest.mark.parametrize(
    "other",
    [
        region(PRESENT.guest_address + PAGE_SIZE, SIZE, user=PRESENT.user_address),
        region(PRESENT.guest_address, SIZE, user=PRESENT.user_address + PAGE_SIZE),
        region(PRESENT.guest_address, SIZE - PAGE_SIZE),
        region(PRESENT.guest_address, SIZE + 1),
        region(0, SIZE),
    ],
)
def test_a_region_that_is_not_there_is_not_removed(shared: SharedMemory, other: MemoryRegion) -> None:
    before = shared.guest_memory.regions
    for use in (shared.remove, shared.host_address):
        with pytest.raises(PeerError, match="a region of the memory table") as refusal:
            use(other)
        assert refusal.value.field == "region"
    assert shared.guest_memory.regions == before


def test_user_addresses_that_are_guest_addresses_must_be_the_same() -> None:
    with SharedMemory(gpa_addresses=True) as shared:
        shared.add(region(0x1000, PAGE_SIZE, user=0x1000), SMALL.file(1))
        bad = region(0x8000, PAGE_SIZE, user=0x9000)
        held = Held()
        for _ in range(TRIES):
            with pytest.raises(
                PeerError, match="user_address=0x9000: has to be the guest address, 0x8000, under GPA_ADDRESSES"
            ):
                shared.add(bad, SMALL.file(1))
        held.check(TRIES)


def test_a_descriptor_that_is_gone_is_the_callers_mistake(shared: SharedMemory) -> None:
    gone = SMALL.file(1)
    gone.close()
    with pytest.raises(UsageError, match="fd=closed"):
        shared.add(region(0, PAGE_SIZE), gone)
    assert shared.guest_memory.read(GuestAddress(PRESENT.guest_address), 4) == b"good"


def test_the_kernel_refuses_the_nth_mapping(shared: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = _native.Mapped, 0

    def refuse(*arguments: Any) -> _native.Mapped:
        nonlocal left
        left -= 1
        if left < 0:
            raise _native.MapError(-errno.ENOMEM, _native.MAP)
        return real(*arguments)

    table = [region(at * PAGE_SIZE, PAGE_SIZE) for at in range(4)]
    held, before = Held(), shared.guest_memory.regions
    with monkeypatch.context() as patch:
        patch.setattr(_native, "Mapped", refuse)
        for at in range(4):
            left = at
            with pytest.raises(HostError, match="ENOMEM"):
                shared.replace([(each, SMALL.file(1)) for each in table])
    held.check(8)
    assert shared.guest_memory.regions == before
