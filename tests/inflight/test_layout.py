"""The bytes of an area, worked out by hand from the document's two structures, after each step of a short story."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.inflight.world import layout_of, make_driver, make_queue, shared_buffer
from tests.rings.rig import AVAIL, FORMATS, NEXT, USED, WRITE, guest_memory, pop
from vhost_user.inflight import InflightBuffer, area_size
from vhost_user.vring import DeviceQueue, DriverQueue

BUFFER = 0x100000


@pytest.mark.parametrize(
    ("queue_size", "packed", "size"),
    [
        # Split: 16 + 16 n; packed: 32 + 32 n; both rounded up to 64, as QEMU's library and DPDK do.
        (1, False, 64),
        (3, False, 64),
        (4, False, 128),
        (128, False, 2112),
        (32768, False, 524352),
        (1, True, 64),
        (2, True, 128),
        (3, True, 128),
        (128, True, 4160),
        (32768, True, 1048640),
    ],
)
def test_sizes(queue_size: int, packed: bool, size: int) -> None:
    assert area_size(queue_size, packed) == size


@contextmanager
def story(form: str, size: int, start: int = 0) -> Iterator[tuple[DriverQueue, DeviceQueue, memoryview]]:
    """A driver, a queue with an area, and the area's bytes."""
    memory, layout = guest_memory(), layout_of(form, size)
    driver = make_driver(memory, layout, start)
    with shared_buffer(form, size) as shared:
        buffer = shared.open()
        other = shared.open()
        with other._window.view() as view:
            assert view.tobytes() == bytes(len(view))
            yield driver, make_queue(memory, layout, buffer.queue(0), start), view
        other.close()
        buffer.close()
        memory.replace([])


def split_area(batch_head: int, used_idx: int, *entries: tuple[int, int, int]) -> bytes:
    """features, version, desc_num, last_batch_head, used_idx; then inflight, next and counter of each entry."""
    head = struct.pack("=QHHHH", 0, 1, len(entries), batch_head, used_idx)
    return head + b"".join(struct.pack("=B5xHQ", *entry) for entry in entries)


def test_split() -> None:
    with story("split", 4, start=65535) as (driver, queue, area):

        def expect(batch_head: int, used_idx: int, *entries: tuple[int, int, int]) -> None:
            expected = split_area(batch_head, used_idx, *entries)
            assert area[: len(expected)].tobytes() == expected
            assert not any(area[len(expected) :])

        expect(0, 65535, (0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0))
        first = driver.add([(BUFFER, 8)], [(BUFFER + 8, 8)])
        second = driver.add([(BUFFER + 16, 8)])
        third = driver.add([], [(BUFFER + 24, 8)])
        assert (first, second, third) == (2, 1, 0)
        chains = {chain.id: chain for chain in (pop(queue), pop(queue), pop(queue))}
        expect(0, 65535, (1, 0, 2), (1, 0, 1), (1, 0, 0), (0, 0, 0))
        queue.push(chains[1], 0)
        expect(1, 0, (1, 0, 2), (0, 0, 1), (1, 0, 0), (0, 0, 0))
        queue.push(chains[0], 8)
        expect(0, 1, (0, 1, 2), (0, 0, 1), (1, 0, 0), (0, 0, 0))
        queue.push(chains[2], 8)
        expect(2, 2, (0, 1, 2), (0, 0, 1), (0, 0, 0), (0, 0, 0))


Entry = tuple[int, int, int, int, int, int, int, int, int]


def packed_head(size: int, free_head: int, used_idx: int, wrap: int) -> bytes:
    """features, version, desc_num, free_head and old, used_idx and old, used_wrap_counter and old; padding."""
    return struct.pack("=QHHHHHHBB10x", 0, 1, size, free_head, free_head, used_idx, used_idx, wrap, wrap)


def test_packed() -> None:
    with story("packed", 3) as (driver, queue, area):

        def entry(at: int) -> Entry:
            """inflight, next, last, num, counter, id, flags, len, addr"""
            fields: Entry = struct.unpack_from("=BxHHHQHHIQ", area, 32 + 32 * at)
            return fields

        def head() -> bytes:
            return area[:32].tobytes()

        assert head() == packed_head(3, 0, 0, 1)
        assert [entry(at) for at in range(3)] == [(0, at + 1, 0, 0, 0, 0, 0, 0, 0) for at in range(3)]

        first = driver.add([(BUFFER, 8)], [(BUFFER + 8, 9)])
        chain = pop(queue)
        assert chain.id == first
        assert head() == packed_head(3, 2, 0, 1)
        # The counter begins at 0. A slot is available in the first lap with AVAIL set and USED clear.
        assert entry(0) == (1, 1, 1, 2, 0, first, AVAIL | NEXT, 8, BUFFER)
        assert entry(1)[1] == 2
        assert entry(1)[5:] == (first, AVAIL | WRITE, 9, BUFFER + 8)

        second = driver.add([(BUFFER + 32, 10)])
        later = pop(queue)
        assert head() == packed_head(3, 3, 0, 1)
        assert entry(2) == (1, 3, 2, 1, 1, second, AVAIL, 10, BUFFER + 32)

        queue.push(later, 0)
        assert head() == packed_head(3, 2, 1, 1)
        assert entry(2)[:2] == (0, 3)
        queue.push(chain, 4)
        assert head() == packed_head(3, 0, 0, 0)
        assert entry(0)[:3] == (0, 1, 1)
        assert entry(1)[1] == 2
        assert driver.get_used() == (second, 0)
        assert driver.get_used() == (first, 4)

        # The second lap: AVAIL clear and USED set.
        third = driver.add([(BUFFER + 64, 11)])
        queue.push(pop(queue), 0)
        assert entry(0) == (0, 1, 0, 1, 2, third, USED, 11, BUFFER + 64)
        assert head() == packed_head(3, 0, 1, 0)


@pytest.mark.parametrize("form", FORMATS)
def test_areas_are_one_behind_the_other(form: str) -> None:
    packed = form == "packed"
    fd, mmap_size, mmap_offset = InflightBuffer.create(3, 5, packed=packed)
    memory, layout = guest_memory(), layout_of(form, 4)
    make_driver(memory, layout)
    with fd:
        buffer = InflightBuffer.open(fd, mmap_size, mmap_offset, 3, 5, packed=packed)
        assert (mmap_size, mmap_offset) == (3 * area_size(5, packed), 0)
        assert buffer.queue(2) is buffer.queue(2)
        make_queue(memory, layout, buffer.queue(2))
        with buffer._window.view() as view:
            start = 2 * area_size(5, packed)
            assert not any(view[:start])
            assert view[start + 8 : start + 12].cast("H").tolist() == [1, 5]
        buffer.close()
    memory.replace([])
