"""The table of regions: what it refuses, what reads and writes across borders do, and swaps while in use."""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rings.rig import BORDER, END, ISLAND, anonymous, guest_memory
from vhost_user.errors import PeerError, UsageError
from vhost_user.mapping import Mapping
from vhost_user.memory import GuestMemory, Region
from vhost_user.units import ByteCount, GuestAddress, HostOffset, UserAddress

PAGE = 4096
TOP = 2**64 - PAGE

TraceFunction = Callable[[FrameType, str, Any], Any]


@contextmanager
def open_memfd(size: int) -> Iterator[int]:
    fd = os.memfd_create("short", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def region(address: int, size: int = PAGE, mapping: Mapping | None = None, offset: int = 0) -> Region:
    return Region(GuestAddress(address), ByteCount(size), mapping or anonymous(2 * PAGE), HostOffset(offset))


@pytest.mark.parametrize(
    ("address", "size", "offset", "field"),
    [
        (0, 0, 0, "size"),
        (0, -1, 0, "size"),
        (-1, PAGE, 0, "guest_address"),
        (TOP + 1, PAGE, 0, "guest_address"),
        (2**64, 1, 0, "guest_address"),
        (0, 2 * PAGE + 1, 0, "offset"),
        (0, PAGE, PAGE + 1, "offset"),
        (0, PAGE, -1, "offset"),
    ],
)
def test_region_that_cannot_be_is_refused(address: int, size: int, offset: int, field: str) -> None:
    with pytest.raises(UsageError) as refusal:
        region(address, size, offset=offset)
    assert refusal.value.field == field


def test_user_address_may_not_wrap_either() -> None:
    with pytest.raises(UsageError, match="user_address=0xfffffffffffff001") as refusal:
        Region(GuestAddress(0), ByteCount(PAGE), anonymous(PAGE), user_address=UserAddress(TOP + 1))
    assert refusal.value.field == "user_address"


def test_last_page_of_the_address_space_is_memory() -> None:
    memory = GuestMemory([region(TOP)])
    memory.write(GuestAddress(2**64 - 3), b"end")
    assert memory.read(GuestAddress(2**64 - 3), 3) == b"end"
    assert bytes(memory.views(GuestAddress(2**64 - 3), 3)[0]) == b"end"
    for address, size in ((2**64 - 3, 4), (2**64, 1), (TOP, PAGE + 1), (-1, 1)):
        with pytest.raises(PeerError):
            memory.read(GuestAddress(address), size)


@pytest.mark.parametrize("size", [PAGE + 1, 2**40, 2**63, 2**64 - 1, 2**64])
def test_room_is_made_for_what_is_there_only(size: int) -> None:
    """2**40 bytes that nobody has would be a MemoryError, or a machine without memory."""
    memory = GuestMemory([region(0)])
    with pytest.raises(PeerError, match=f"guest address=0x0\\+{size:#x}"):
        memory.read(GuestAddress(0), size)
    with pytest.raises(PeerError):
        memory.views(GuestAddress(0), size)


@pytest.mark.parametrize("address", [0, PAGE, 2**64, -1])
def test_size_below_0_is_refused(address: int) -> None:
    memory = GuestMemory([region(0)])
    for access in (memory.read, memory.views):
        with pytest.raises(UsageError, match="size=-1: has to be 0 bytes or more"):
            access(GuestAddress(address), -1)


def test_range_may_not_wrap_around_to_address_zero() -> None:
    memory = GuestMemory([region(0), region(TOP)])
    for touch in (
        lambda: memory.read(GuestAddress(2**64 - 2), 4),
        lambda: memory.write(GuestAddress(2**64 - 2), b"wrap"),
        lambda: memory.views(GuestAddress(2**64 - 2), 4),
    ):
        with pytest.raises(PeerError):
            touch()
    assert memory.read(GuestAddress(0), 2) == bytes(2)


@pytest.mark.parametrize("address", [0x1000, 0x1FFF, 0x0001, 0x2000 - 1])
def test_overlap_is_refused_and_changes_nothing(address: int) -> None:
    first = region(0x1000)
    memory = GuestMemory([first])
    before = memory.table
    with pytest.raises(UsageError, match="overlaps"):
        memory.add(region(address))
    with pytest.raises(UsageError, match="overlaps"):
        memory.replace([first, region(address)])
    assert (memory.regions, memory.table) == ((first,), before)


def test_neighbours_do_not_overlap() -> None:
    memory = GuestMemory([region(0x1000)])
    memory.add(region(0x2000))
    memory.add(region(0x0000))
    assert [each.guest_address for each in memory.regions] == [0, 0x1000, 0x2000]
    assert str(memory.regions[1]) == "0x1000-0x1fff"


def test_removed_region_is_gone_and_the_others_stay() -> None:
    low, high = region(0), region(0x1000)
    memory = GuestMemory([low, high])
    memory.remove(low)
    assert memory.regions == (high,)
    with pytest.raises(PeerError):
        memory.read(GuestAddress(0), 1)
    assert memory.read(GuestAddress(0x1000), 1) == b"\0"
    with pytest.raises(UsageError, match="region=0x0-0xfff"):
        memory.remove(low)


def test_mapping_stays_open_as_long_as_a_table_holds_it() -> None:
    mapping = anonymous(PAGE)
    memory = GuestMemory([region(0, mapping=mapping)])
    with pytest.raises(BufferError):
        mapping.close()
    views = memory.views(GuestAddress(8), 8)
    memory.replace([])
    with pytest.raises(BufferError):
        mapping.close()
    del views
    mapping.close()


@pytest.mark.parametrize("step", range(1, 30))
def test_views_while_their_mapping_is_removed_and_closed(step: int) -> None:
    """Between any two lines: there are views, and the mapping is open, or the range is outside of memory."""
    low, high = region(0), region(PAGE)
    memory = GuestMemory([low, high])
    steps = 0

    def trace(frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        nonlocal steps
        if frame.f_code is not GuestMemory.views.__code__:
            return None
        steps += event == "line"
        if event == "line" and steps == step:
            memory.remove(high)
            with suppress(BufferError):
                high.mapping.close()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        views = memory.views(GuestAddress(0), 2 * PAGE)
    except PeerError:
        assert high not in memory.regions
    else:
        assert not high.mapping.closed
        assert [bytes(view) for view in views] == [bytes(PAGE)] * 2
    finally:
        sys.settrace(before)
    assert (high in memory.regions) == (steps < step)


def test_mapping_that_was_removed_and_closed_is_outside_of_memory() -> None:
    low, high = region(0), region(PAGE)
    memory = GuestMemory([low, high])
    memory.remove(high)
    high.mapping.close()
    for start, size in ((PAGE, 1), (PAGE - 1, 2)):
        with pytest.raises(PeerError):
            memory.views(GuestAddress(start), size)
    assert len(memory.views(GuestAddress(0), PAGE)) == 1


def test_region_shows_its_part_of_the_mapping() -> None:
    mapping = anonymous(4 * PAGE)
    memory = GuestMemory([region(0, PAGE, mapping, 2 * PAGE), region(0x8000, PAGE, mapping, PAGE)])
    memory.write(GuestAddress(1), b"low")
    memory.write(GuestAddress(0x8001), b"high")
    assert bytes(mapping.view(HostOffset(2 * PAGE + 1), ByteCount(3))) == b"low"
    assert bytes(mapping.view(HostOffset(PAGE + 1), ByteCount(4))) == b"high"


@given(start=st.integers(BORDER - 70, END + 10), data=st.binary(max_size=100))
def test_reads_and_writes_go_over_borders_or_not_at_all(start: int, data: bytes) -> None:
    memory, address = guest_memory(), GuestAddress(start)
    if data and start + len(data) > END:
        for touch in (
            lambda: memory.write(address, data),
            lambda: memory.read(address, len(data)),
            lambda: memory.views(address, len(data)),
        ):
            with pytest.raises(PeerError):
                touch()
        assert not any(memory.read(GuestAddress(END - 70), 70))
        return
    memory.write(address, data)
    assert memory.read(address, len(data)) == data
    assert b"".join(memory.views(address, len(data))) == data
    assert len(memory.views(address, len(data))) <= 2
    surroundings = memory.read(GuestAddress(BORDER - 100), 100) + memory.read(BORDER, 200)
    assert sum(map(bool, surroundings)) == sum(map(bool, data if start < BORDER + 200 else b""))


def test_write_over_a_border_leaves_what_lies_behind_in_the_host_alone() -> None:
    mapping = anonymous(3 * PAGE)
    memory = GuestMemory([region(0, PAGE, mapping), region(PAGE, PAGE, mapping, 2 * PAGE)])
    memory.write(GuestAddress(PAGE - 8), b"." * 16)
    held = bytes(mapping.view())
    assert (held.find(b"."), held.find(b"\0", PAGE - 8), held.rfind(b".")) == (PAGE - 8, PAGE, 2 * PAGE + 7)


def test_read_over_a_border_leaves_what_lies_behind_in_the_host_alone() -> None:
    """Behind the lower region the file ends: there a read would be the end of this process, so it is a child's."""
    with open_memfd(PAGE) as fd:
        short = Mapping(ByteCount(2 * PAGE), mmap.MAP_SHARED, fd)
        memory = GuestMemory([region(0, PAGE, short), region(PAGE)])
        child = os.fork()
        if child == 0:
            os._exit(memory.read(GuestAddress(PAGE - 8), 16) != bytes(16))
        assert os.waitpid(child, 0) == (child, 0)


def test_views_are_the_memory_itself() -> None:
    memory = guest_memory()
    below, above = memory.views(GuestAddress(BORDER - 2), 4)
    below[:], above[:] = b"ab", b"cd"
    assert memory.read(GuestAddress(BORDER - 2), 4) == b"abcd"


@pytest.mark.parametrize("data", [bytearray(b"abcd"), memoryview(b"abcd"), memoryview(b"abcd").cast("H")])
def test_any_buffer_can_be_written(data: bytearray | memoryview) -> None:
    memory = guest_memory()
    memory.write(GuestAddress(0), data)
    assert memory.read(GuestAddress(0), 5) == b"abcd\0"


def test_table_finds_the_right_one_of_many_regions() -> None:
    mapping = anonymous(512 * PAGE)
    # Every third page is a hole.
    regions = [region(0x1000 * at, PAGE, mapping, PAGE * at) for at in range(512) if at % 3]
    memory = GuestMemory(reversed(regions))
    for at in range(512):
        address = GuestAddress(0x1000 * at + 17)
        if at % 3:
            memory.write(address, at.to_bytes(2, "little"))
        else:
            with pytest.raises(PeerError):
                memory.write(address, b"..")
    for at in filter(lambda at: at % 3, range(512)):
        assert memory.read(GuestAddress(0x1000 * at + 17), 2) == at.to_bytes(2, "little")


def test_integers_are_little_endian_and_must_be_aligned() -> None:
    memory = guest_memory()
    memory.store16(GuestAddress(2), 0x1234)
    memory.store32(GuestAddress(4), 0xDEADBEEF)
    assert memory.read(GuestAddress(0), 8) == bytes.fromhex("0000 3412 efbeadde")
    assert memory.load16(GuestAddress(2)) == 0x1234
    assert memory.load32(GuestAddress(4)) == 0xDEADBEEF
    for address in (GuestAddress(1), END, GuestAddress(2**64)):
        for access in (
            lambda at=address: memory.load16(at),
            lambda at=address: memory.load32(at),
            lambda at=address: memory.store16(at, 1),
            lambda at=address: memory.store32(at, 1),
        ):
            with pytest.raises(PeerError):
                access()
    assert memory.read(GuestAddress(0), 8) == bytes.fromhex("0000 3412 efbeadde")


def test_contiguous_means_one_region_and_aligned_on_both_sides() -> None:
    memory = guest_memory()
    assert memory.contiguous(GuestAddress(BORDER - 16), 16, 16)
    assert not memory.contiguous(GuestAddress(BORDER - 16), 17, 16)
    assert not memory.contiguous(GuestAddress(8), 16, 16)
    assert not memory.contiguous(ISLAND, 4097)
    assert not memory.contiguous(GuestAddress(2**64), 1)
    for address, offset in ((0, 8), (8, 0)):
        shifted = GuestMemory([region(address, PAGE, anonymous(2 * PAGE), offset=offset)])
        assert shifted.contiguous(GuestAddress(address), 16, 8)
        assert not shifted.contiguous(GuestAddress(address), 16, 16)


def test_tables_are_swapped_and_mappings_closed_while_others_read() -> None:
    """One mapping after the other takes its place behind one address. A reader sees all of one, or all of another."""
    size = 64 * PAGE
    memory = GuestMemory([region(0, size, anonymous(size))])
    done = threading.Event()
    refused = closed = 0

    def swap() -> None:
        nonlocal refused, closed
        while not done.is_set():
            mapping, old = anonymous(size), memory.regions[0].mapping
            mapping.view()[:] = bytes([closed % 255 + 1]) * size
            memory.replace([region(0, size, mapping)])
            try:
                old.close()
                closed += 1
            except BufferError:  # a read is under way; the last table to go takes the mapping along
                refused += 1

    swapper = threading.Thread(target=swap)
    swapper.start()
    seen = [len(set(memory.read(GuestAddress(0), size))) for _ in range(500)]
    done.set()
    swapper.join()
    assert set(seen) == {1}
    assert closed + refused > 0
