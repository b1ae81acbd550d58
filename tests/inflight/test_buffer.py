"""The buffer: how it is made, and which descriptions of one are refused."""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.inflight.world import layout_of, make_driver, make_queue, shared_buffer
from tests.rings.rig import FORMATS, guest_memory
from vhost_user.errors import HostError, PeerError, UsageError
from vhost_user.inflight import MAX_QUEUES, InflightBuffer, area_size
from vhost_user.owned_fd import OwnedFd


@contextmanager
def file_of(size: int) -> Iterator[OwnedFd]:
    with OwnedFd(os.memfd_create("inflight", os.MFD_CLOEXEC)) as fd:
        os.ftruncate(fd.fileno(), size)
        yield fd


@pytest.mark.parametrize("packed", [False, True])
def test_a_new_one_is_empty_sealed_and_not_mapped(packed: bool) -> None:
    with InflightBuffer.create(4, 128, packed=packed).fd as fd:
        size = 4 * area_size(128, packed)
        assert os.fstat(fd.fileno()).st_size == size
        assert os.pread(fd.fileno(), size + 1, 0) == bytes(size)
        assert fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        with pytest.raises(PermissionError):
            os.ftruncate(fd.fileno(), size - 1)
        assert fcntl.fcntl(fd.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC


@pytest.mark.parametrize(
    ("num_queues", "queue_size", "field"),
    [
        (0, 128, "num_queues"),
        (MAX_QUEUES + 1, 128, "num_queues"),
        (65535, 128, "num_queues"),
        (1, 0, "queue_size"),
        (1, 32769, "queue_size"),
        (1, 65535, "queue_size"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_numbers_that_no_device_has(num_queues: int, queue_size: int, field: str, packed: bool) -> None:
    with pytest.raises(PeerError, match=f"inflight {field}"):
        InflightBuffer.create(num_queues, queue_size, packed=packed)
    with file_of(1 << 40) as fd, pytest.raises(PeerError, match=f"inflight {field}"):
        InflightBuffer.open(fd, 1 << 40, 0, num_queues, queue_size, packed=packed)


@pytest.mark.parametrize(
    ("limit", "most", "call"), [(resource.RLIMIT_NOFILE, 3, "memfd_create"), (resource.RLIMIT_FSIZE, 64, "ftruncate")]
)
def test_a_host_that_has_no_room(limit: int, most: int, call: str) -> None:
    soft, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (most, hard))
    try:
        with pytest.raises(HostError, match=call):
            InflightBuffer.create(1, 128, packed=False)
    finally:
        resource.setrlimit(limit, (soft, hard))


NEEDED = 2 * 128
"""Bytes of two split queues' areas of four entries."""


@pytest.mark.parametrize(
    ("mmap_size", "mmap_offset", "field"),
    [
        (0, 0, "mmap_size"),
        (NEEDED - 1, 0, "mmap_size"),
        (8193, 0, "mmap_offset"),
        (NEEDED, 8192, "mmap_offset"),
        (NEEDED, 8192 - NEEDED + 8, "mmap_offset"),
        (NEEDED, 4, "mmap_offset"),
        (NEEDED, 2**64 - 8, "mmap_offset"),
        (2**64 - 1, 0, "mmap_offset"),
        (2**64 - 8192, 8192, "mmap_offset"),
    ],
)
def test_a_part_that_cannot_be_the_buffer(mmap_size: int, mmap_offset: int, field: str) -> None:
    with file_of(8192) as fd, pytest.raises(PeerError) as refusal:
        InflightBuffer.open(fd, mmap_size, mmap_offset, 2, 4, packed=False)
    assert refusal.value.field == f"inflight {field}"


@pytest.mark.parametrize("offset", [0, 8, 4096 - 128, 4096, 8192 - NEEDED])
def test_the_buffer_may_lie_anywhere_in_its_file(offset: int) -> None:
    with file_of(8192) as fd:
        buffer = InflightBuffer.open(fd, NEEDED, offset, 2, 4, packed=False)
        memory, layout = guest_memory(), layout_of("split", 4)
        make_driver(memory, layout)
        make_queue(memory, layout, buffer.queue(1))
        expected = bytearray(8192)
        expected[offset + 128 + 8 : offset + 128 + 12] = b"\1\0\4\0"
        assert os.pread(fd.fileno(), 8192, 0) == expected
        buffer.close()
        memory.replace([])


@pytest.mark.parametrize("path", ["/dev/null", "/proc/self"])
def test_a_descriptor_of_no_such_file(path: str) -> None:
    with OwnedFd(os.open(path, os.O_RDONLY)) as fd, pytest.raises(PeerError, match="inflight fd"):
        InflightBuffer.open(fd, NEEDED, 0, 2, 4, packed=False)


def test_a_descriptor_that_cannot_be_written() -> None:
    with (
        file_of(8192) as fd,
        OwnedFd(os.open(f"/proc/self/fd/{fd.fileno()}", os.O_RDONLY)) as reader,
        pytest.raises(PeerError, match="inflight fd"),
    ):
        InflightBuffer.open(reader, NEEDED, 0, 2, 4, packed=False)


def test_a_buffer_larger_than_the_address_space() -> None:
    with file_of(1 << 62) as fd, pytest.raises(HostError):
        InflightBuffer.open(fd, 1 << 62, 0, 2, 4, packed=False)


@pytest.mark.parametrize("form", FORMATS)
def test_queues_that_the_buffer_has_not(form: str) -> None:
    with shared_buffer(form, 4) as shared:
        buffer = shared.open()
        for index in (-1, 1, 65535):
            with pytest.raises(UsageError, match=f"queue={index}"):
                buffer.queue(index)
        buffer.close()
        buffer.close()
        assert not buffer.dead


@pytest.mark.parametrize("form", FORMATS)
def test_a_ring_that_does_not_fit(form: str) -> None:
    other = "split" if form == "packed" else "packed"
    memory = guest_memory()
    with shared_buffer(form, 4) as shared:
        buffer = shared.open()
        large, alien = layout_of(form, 8), layout_of(other, 4)
        for layout in (large, alien):
            make_driver(memory, layout)
        with pytest.raises(PeerError, match="inflight queue_size=4: has to be the 8 entries"):
            make_queue(memory, large, buffer.queue(0))
        with pytest.raises(UsageError, match=f"inflight={form.title()}Inflight"):
            make_queue(memory, alien, buffer.queue(0))
        with buffer._window.view() as view:
            assert not any(view)
        # A smaller one does: a driver may use fewer entries than the device has.
        small = layout_of(form, 2)
        make_driver(memory, small)
        make_queue(memory, small, buffer.queue(0))
        buffer.close()
    memory.replace([])


def test_a_truncated_buffer_is_dead_and_the_process_lives() -> None:
    with file_of(8192) as fd:
        buffer = InflightBuffer.open(fd, NEEDED, 0, 2, 4, packed=False)
        memory, layout = guest_memory(), layout_of("split", 4)
        driver = make_driver(memory, layout)
        queue = make_queue(memory, layout, buffer.queue(0))
        token = driver.add([(0x100000, 1)])
        os.ftruncate(fd.fileno(), 0)
        chain = queue.pop()
        assert chain is not None
        queue.push(chain, 0)
        assert driver.get_used() == (token, 0)
        assert buffer.dead
        buffer.close()
        memory.replace([])
