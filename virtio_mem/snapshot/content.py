"""The content of memory in a sparse file, chunk by chunk: what is zero is a hole.

The digest is over the chunks that are not zero, each with its number, so it doesn't depend on how a file system places
holes. Chunks are 1 MiB, the smallest block that a device can have: none lies in two blocks.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vhost_user.errors import HostError
from vhost_user.units import MIB, ByteCount, HostOffset, align_up
from virtio_mem.hostmem.backed import ZEROS, BackedMemory
from virtio_mem.hostmem.backing import Hugetlb, PrivateFile
from virtio_mem.hostmem.files import next_data, write_at
from virtio_mem.hostmem.memory import HostMemory

CHUNK = MIB


class Range(NamedTuple):
    """`size` bytes of a part of memory from `offset` on; both are multiples of the page size."""

    offset: int
    size: int


class Digest:
    """Of chunks, in ascending order."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=32)

    def add(self, offset: int, data: bytes | memoryview) -> None:
        """A chunk that is not zero."""
        self._hash.update(offset.to_bytes(8, "little") + len(data).to_bytes(8, "little"))
        self._hash.update(data)

    def __str__(self) -> str:
        return self._hash.hexdigest()


def write_content(memory: BackedMemory, ranges: Iterable[Range], fd: int) -> str:
    """Write what ranges of `memory` hold to the file, which is as long as it and empty; their digest. HostError as of
    `held_chunks`."""
    digest = Digest()
    for offset, data in held_chunks(memory, ranges):
        digest.add(offset, data)
        write_at(fd, data, offset)
    return str(digest)


def held_chunks(memory: BackedMemory, ranges: Iterable[Range]) -> Iterator[tuple[int, bytes]]:
    """What ranges of `memory` hold, chunk by chunk, each with its offset; those that are zero are left out. HostError
    where somebody truncates the memory's own file meanwhile.

    Nothing is allocated by looking: what the host doesn't hold is not read where reading would allocate it.
    """
    backing = memory.backing
    chunks = _data_chunks(backing.fd, backing.offset, ranges) if backing.shared else _chunks(ranges)
    for offset, size in chunks:
        if not _worth_reading(memory, offset, size):
            continue
        data = _read(memory, offset, size)
        if not ZEROS.startswith(data):
            yield offset, data
    if backing.fd >= 0:
        require_length(memory, os.fstat(backing.fd).st_size)


def _read(memory: BackedMemory, offset: int, size: int) -> bytes:
    """What memory holds. Where a file is the memory it is read from there: others may truncate it at any time, and then
    to look at the mapping is a SIGBUS. Private copies of a file's pages go with those, and are read by way of the
    kernel, which has an error for that, proc_pid_mem(5)."""
    start, backing = memory.backing.offset + offset, memory.backing
    if backing.shared:
        data = os.pread(backing.fd, size, start)
    else:
        assert isinstance(memory, HostMemory)
        if backing.fd < 0:
            with memory.view(HostOffset(offset), ByteCount(size)) as view:
                return bytes(view)
        data = _read_own(memory.address + offset, size)
    if len(data) < size:
        require_length(memory, start + len(data))
    return data


def _read_own(address: int, size: int) -> bytes:
    """Of this process's memory so much as there is."""
    fd = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, size, address)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return b""
    finally:
        os.close(fd)


def require_length(memory: BackedMemory, length: int) -> None:
    """HostError where a file of this length lacks some of the memory that is in it."""
    if length < (wanted := memory.backing.offset + memory.size):
        raise HostError("file", f"{length} bytes", f"was truncated; it had {wanted} or more", "don't truncate it")


def _worth_reading(memory: BackedMemory, offset: int, size: int) -> bool:
    """False for shared memory that the host doesn't hold: it is zero, and reading would have the host allocate it."""
    if not memory.backing.shared:
        return True
    start = offset // memory.page_size * memory.page_size
    end = align_up(offset + size, memory.page_size)
    return memory.held(HostOffset(start), ByteCount(end - start)) > 0


def read_content(fd: int, ranges: Iterable[Range], memory: BackedMemory | None) -> str:
    """Write what the file holds to ranges of `memory`, if that is given; its digest.

    Memory that is zero already is not touched where the file is zero. HostError where the host lacks the memory, and
    where others truncate its file meanwhile, see `BackedMemory.write`.
    """
    digest = Digest()
    overwrite = memory is not None and isinstance(memory.backing, PrivateFile)  # begins with what its file has
    for offset, size in _chunks(ranges) if overwrite else _data_chunks(fd, 0, ranges):
        data = os.pread(fd, size, offset)
        if not ZEROS.startswith(data):
            digest.add(offset, data)
        elif not overwrite:
            continue
        if memory is not None:
            populate(memory, Range(offset, size))
            memory.write(HostOffset(offset), data)
    return str(digest)


def populate(memory: BackedMemory, wanted: Range) -> None:
    """Have the host hold the whole pages that a range lies in: to touch what it has no memory for can be a signal."""
    start = wanted.offset // memory.page_size * memory.page_size
    end = align_up(wanted.offset + wanted.size, memory.page_size)
    if isinstance(memory.backing, Hugetlb) and memory.held(HostOffset(start), ByteCount(end - start)) == end - start:
        return
    memory.populate(HostOffset(start), ByteCount(end - start))


def _chunks(ranges: Iterable[Range]) -> Iterator[Range]:
    for start, size in ranges:
        for offset in range(start, start + size, CHUNK):
            yield Range(offset, min(CHUNK, start + size - offset))


def _data_chunks(fd: int, start: int, ranges: Iterable[Range]) -> Iterator[Range]:
    """The chunks in which a file has data, offsets being from its byte `start` on. Millions of ranges may lie in one
    hole: the file is asked once for all of them."""
    data = 0
    for first, size in ranges:
        at, end = first, first + size
        while at < end:
            if data < at:
                data = next_data(fd, start + at) - start
            if data >= end:
                break
            at += max(0, data - at) // CHUNK * CHUNK
            yield Range(at, min(CHUNK, end - at))
            at += CHUNK
