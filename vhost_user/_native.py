"""The seam to the C core: the only Python file that imports `ffi` and `lib`.

Lengths are checked by the callers, return codes here: a negated errno becomes an OSError. Every call releases the
GIL while it is in C, so a long populate or discard holds up no other thread.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Sequence

from vhost_user._core import ffi, lib

_BITS_PER_WORD = 8 * ffi.sizeof("unsigned long")


def _error(result: int) -> OSError:
    return OSError(-result, os.strerror(-result))


def _checked(result: int) -> int:
    if result < 0:
        raise _error(result)
    return result


def address_of(buffer: object) -> int:
    """Where a writable buffer lies in this process; the buffer is not kept alive."""
    with ffi.from_buffer(buffer, require_writable=True) as pointer:
        return int(ffi.cast("uintptr_t", pointer))


def map_fixed(address: int, length: int, prot: int, flags: int, fd: int, offset: int) -> None:
    """mmap(2) with MAP_FIXED, over addresses that the caller owns."""
    _checked(lib.vu_map_fixed(address, length, prot, flags, fd, offset))


def madvise(address: int, length: int, advice: int) -> None:
    """madvise(2) on any range."""
    _checked(lib.vu_madvise(address, length, advice))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), with a mode."""
    _checked(lib.vu_fallocate(fd, mode, offset, length))


def mbind(address: int, length: int, mode: int, nodes: Iterable[int]) -> None:
    """mbind(2) of a range to host NUMA `nodes`."""
    mask = sum(1 << node for node in set(nodes))
    words = max(1, -(-mask.bit_length() // _BITS_PER_WORD))
    raw = mask.to_bytes(words * ffi.sizeof("unsigned long"), "little")
    _checked(lib.vu_mbind(address, length, mode, ffi.from_buffer("unsigned long[]", raw), words))


def private_held(pagemap: int, address: int, length: int, *, scan: bool) -> int:
    """Bytes of private pages, present or swapped, that the host holds for a range of this process.

    With `scan` without the shared zero page, or ENOTTY before Linux 6.7; otherwise zero pages count as held.
    """
    return _checked(lib.vu_private_held(pagemap, address, length, scan))


def hugetlb_held(fd: int, offset: int, length: int, page_size: int) -> int:
    """Bytes of huge pages that a hugetlb file holds in a range, whichever process touched them."""
    return _checked(lib.vu_hugetlb_held(fd, offset, length, page_size))


READ: int = lib.VU_READ
WRITE: int = lib.VU_WRITE

REGION = struct.Struct("=QQQQ")
"""`struct vu_region`: guest address, size, host address, denied accesses (READ, WRITE)."""

assert REGION.size == ffi.sizeof("struct vu_region")


class MemoryTable:
    """Guest memory for the C core: rows of guest address, size and host address, sorted and without overlap.

    It never changes. `keep` holds the mappings open: whoever calls into C has the table on its stack, so nothing is
    unmapped under the call, whatever other threads do.
    """

    __slots__ = ("keep", "pointer")

    def __init__(self, rows: Sequence[tuple[int, int, int]], keep: object) -> None:
        self.keep = keep
        regions = [(guest, size, host, 0) for guest, size, host in rows]
        self.pointer = ffi.new("struct vu_memory *", {"count": len(rows), "regions": regions})

    @classmethod
    def of_regions(cls, regions: Sequence[bytes], keep: object) -> MemoryTable:
        """The same of rows that were packed as REGION."""
        table = cls([], keep)
        table.pointer = ffi.new("struct vu_memory *", {"count": len(regions), "regions": len(regions)})
        ffi.memmove(table.pointer.regions, b"".join(regions), REGION.size * len(regions))
        return table


_CHARS = ffi.typeof("char[]")
_uncleared = ffi.new_allocator(should_clear_after_alloc=False)


def memory_read(table: MemoryTable, address: int, size: int) -> bytes:
    """`size` bytes from guest memory; OSError, before any room is made for them, where a part lies in no region."""
    if not lib.vu_memory_covers(table.pointer, address, size, READ):
        raise _error(-errno.EFAULT)
    buffer = _uncleared(_CHARS, size)
    _checked(lib.vu_memory_read(table.pointer, address, buffer, size))
    data: bytes = ffi.unpack(buffer, size)
    return data


def memory_write(table: MemoryTable, address: int, data: bytes | bytearray | memoryview) -> None:
    """`data` into guest memory: all of it, or OSError as `GuestMemory.write` says."""
    source = data if type(data) is bytes else ffi.from_buffer(data)
    _checked(lib.vu_memory_write(table.pointer, address, source, len(source)))


def memory_lacks(table: MemoryTable, address: int, size: int, access: int) -> int | None:
    """The first address of a range that can't be accessed so, None where all of it can."""
    missing = ffi.new("uint64_t *")
    return int(missing[0]) if lib.vu_memory_lacks(table.pointer, address, size, access, missing) else None


def memory_contiguous(table: MemoryTable, address: int, size: int, alignment: int) -> bool:
    """Whether a range lies in one region, aligned in guest and in host memory."""
    return bool(lib.vu_memory_contiguous(table.pointer, address, size, alignment))


def load16(table: MemoryTable, address: int) -> int:
    """A little-endian integer, loaded whole, with acquire order."""
    return _checked(lib.vu_load16(table.pointer, address))


def load32(table: MemoryTable, address: int) -> int:
    """A little-endian integer, loaded whole, with acquire order."""
    return _checked(lib.vu_load32(table.pointer, address))


def store16(table: MemoryTable, address: int, value: int) -> None:
    """A little-endian integer, stored whole, with release order."""
    _checked(lib.vu_store16(table.pointer, address, value))


def store32(table: MemoryTable, address: int, value: int) -> None:
    """A little-endian integer, stored whole, with release order."""
    _checked(lib.vu_store32(table.pointer, address, value))


def page_size(fd: int) -> int:
    """The size of the pages that a mapping of the file has: of its huge pages on a hugetlbfs."""
    return _checked(lib.vu_page_size(fd))


def install_guard() -> None:
    """Have a SIGBUS inside the C core make the call fail that met it, and one in a guarded range be survived anywhere.

    Others go where they would have gone.
    """
    _checked(lib.vu_guard_install())


GUARD_SLOTS: int = lib.VU_GUARD_SLOTS
"""How many ranges can be guarded at a time."""


def guard_add(address: int, size: int, page_size: int) -> int:
    """Guard a range of whole pages; returns the slot that it has until `guard_remove`. OSError where all are taken."""
    return _checked(lib.vu_guard_add(address, size, page_size))


def guard_remove(slot: int) -> None:
    """Guard a range no longer: nothing touches it any more."""
    lib.vu_guard_remove(slot)


def guard_dead(slot: int) -> bool:
    """Whether an access to a guarded range met missing memory."""
    return bool(lib.vu_guard_dead(slot))


def guard_faults() -> int:
    """How many guarded ranges of this process met missing memory so far."""
    count: int = lib.vu_guard_faults()
    return count


def fence() -> None:
    """A full barrier between the stores before it and the loads after it."""
    lib.vu_fence()


def userfault_open() -> int:
    """A userfaultfd for this process's own faults."""
    return _checked(lib.vu_userfault_open())


def userfault_register(uffd: int, address: int, size: int) -> None:
    """Have faults on pages that are missing from a range wait for an answer through `uffd`."""
    _checked(lib.vu_userfault_register(uffd, address, size))


def userfault_unregister(uffd: int, address: int, size: int) -> None:
    """Have faults in a range be the kernel's again, and wake who waits for one."""
    _checked(lib.vu_userfault_unregister(uffd, address, size))


def event_signal(fd: int) -> None:
    """Adds 1 to an eventfd, and never waits, whatever its flags; OSError with EINVAL where `fd` is none."""
    _checked(lib.vu_event_signal(fd))


def event_take(fd: int) -> bool:
    """Takes what an eventfd or a pipe holds, and never waits; whether there was something. EPIPE at a pipe's end."""
    return bool(_checked(lib.vu_event_take(fd)))


def _names(enum: str, prefix: str) -> list[str]:
    elements = ffi.typeof(enum).elements
    return [elements[number].removeprefix(prefix).lower() for number in sorted(elements)]


_MALFORMED = _names("enum vu_malformed", "VU_MALFORMED_")[1:-1]
_BROKEN = _names("enum vu_broken", "VU_BROKEN_")

CHAIN = struct.Struct("=5I4xQQ")
"""`struct vu_chain` up to its segments: id, slots, visited, readables, writables, readable, writable."""

SEGMENT = struct.Struct("=QQ")
"""`struct vu_segment`: address, length."""

assert CHAIN.size == ffi.offsetof("struct vu_chain", "segments") and SEGMENT.size == ffi.sizeof("struct vu_segment")

RING_BROKEN: int = lib.VU_RING_BROKEN
RING_UNMAPPED: int = lib.VU_RING_UNMAPPED
RING_MALFORMED: int = lib.VU_RING_MALFORMED
RING_MISS: int = lib.VU_RING_MISS

DESCRIPTOR = struct.Struct("=QIHH")
"""`struct vu_descriptor`: address, length; then flags and next (split), or buffer id and flags (packed)."""

assert DESCRIPTOR.size == ffi.sizeof("struct vu_descriptor")


class Ring:
    """The device side of a ring. Each call walks the one table that it is given.

    Calls return what csrc/ring_api.h says: a result of zero or more, RING_BROKEN, RING_UNMAPPED or, of a `translated`
    ring, RING_MISS. An area is its guest
    address, size and alignment; a position a slot and its wrap counter.
    """

    __slots__ = ("_chain", "_chain_bytes", "_descriptors", "_queue")

    def __init__(
        self,
        size: int,
        areas: Sequence[tuple[int, int, int]],
        *,
        packed: bool,
        event_idx: bool,
        indirect: bool,
        avail: tuple[int, bool],
        used: tuple[int, bool],
        translated: bool = False,
    ) -> None:
        fields: dict[str, object] = dict(zip(("desc", "driver", "device"), areas, strict=True))
        fields |= {"size": size, "packed": packed, "event_idx": event_idx, "indirect": indirect}
        fields["translated"] = translated
        fields |= {"next_avail": avail[0], "avail_wrap": avail[1], "next_used": used[0], "used_wrap": used[1]}
        self._queue = ffi.new("struct vu_queue *", fields)
        self._chain = ffi.new("struct vu_chain *", {"segments": size})
        self._chain_bytes = ffi.cast("char *", self._chain)
        self._descriptors = ffi.NULL

    def keep_descriptors(self) -> None:
        """From now on let `take` keep a packed chain's descriptors of the ring."""
        self._descriptors = ffi.new("struct vu_descriptor[]", self._queue.size)

    def pop(self, table: MemoryTable) -> int:
        """The number of segments of the next good chain, which `chain()` then copies; or 0."""
        result: int = lib.vu_queue_pop(self._queue, table.pointer, self._chain)
        return result

    def take(self, table: MemoryTable) -> int:
        """The number of segments of the next chain; 0; or RING_MALFORMED for one that the caller has to give back."""
        result: int = lib.vu_queue_take(self._queue, table.pointer, self._chain, self._descriptors)
        return result

    def reload(self, table: MemoryTable, head: int) -> int:
        """What `take` said of a split queue's chain with this head, which is in flight."""
        result: int = lib.vu_queue_reload(self._queue, table.pointer, self._chain, head)
        return result

    def rebuild(self, table: MemoryTable, descriptors: bytes) -> int:
        """What `take` said of a packed queue's chain of these descriptors, 1 to the queue's size, in flight."""
        ring, count = ffi.from_buffer("struct vu_descriptor[]", descriptors), len(descriptors) // DESCRIPTOR.size
        result: int = lib.vu_queue_rebuild(self._queue, table.pointer, self._chain, ring, count)
        return result

    def chain(self, segments: int) -> bytes:
        """The `struct vu_chain` that the last pop, take, reload or rebuild left."""
        data: bytes = ffi.unpack(self._chain_bytes, CHAIN.size + SEGMENT.size * segments)
        return data

    def descriptors(self, slots: int) -> bytes:
        """The descriptors of the ring, `slots` of them, that the last `take` kept."""
        if not self._descriptors:
            return b""
        data: bytes = ffi.unpack(ffi.cast("char *", self._descriptors), DESCRIPTOR.size * slots)
        return data

    def push(self, table: MemoryTable, chain_id: int, slots: int, written: int) -> int:
        """Gives a chain back."""
        result: int = lib.vu_queue_push(self._queue, table.pointer, chain_id, slots, written)
        return result

    def should_notify(self, table: MemoryTable) -> int:
        """Whether the driver wants to hear of what was given back since the last call."""
        result: int = lib.vu_queue_should_notify(self._queue, table.pointer)
        return result

    def disable_notifications(self, table: MemoryTable) -> int:
        """Advises the driver not to notify."""
        result: int = lib.vu_queue_disable_notifications(self._queue, table.pointer)
        return result

    def enable_notifications(self, table: MemoryTable) -> int:
        """Asks the driver to notify; 1 if something is available already."""
        result: int = lib.vu_queue_enable_notifications(self._queue, table.pointer)
        return result

    def positions(self) -> tuple[tuple[int, bool], tuple[int, bool]]:
        """Where the next available and the next used chain are."""
        queue = self._queue
        return (queue.next_avail, bool(queue.avail_wrap)), (queue.next_used, bool(queue.used_wrap))

    def broken(self) -> tuple[str, int]:
        """Why the ring is broken, "not" if it is not, and the value that broke it."""
        return _BROKEN[self._queue.broken], self._queue.broken_value

    def miss(self) -> tuple[int, int]:
        """The address that the last RING_MISS is about, and what was to be done there: READ, WRITE or both."""
        return self._queue.miss.address, self._queue.miss.access

    def malformed(self) -> dict[str, int]:
        """How many chains went back with length 0, by reason."""
        return dict(zip(_MALFORMED, self._queue.malformed[1 : len(_MALFORMED) + 1], strict=True))


def chain_read(table: MemoryTable, chain: bytes, offset: int, size: int) -> bytes:
    """`size` bytes of a chain's readable part, from `offset` on; OSError where its memory is gone."""
    buffer = _uncleared(_CHARS, size)
    if result := lib.vu_chain_read(table.pointer, chain, offset, buffer, size):
        raise _error(result)
    data: bytes = ffi.unpack(buffer, size)
    return data


def chain_write(table: MemoryTable, chain: bytes, offset: int, data: bytes | bytearray | memoryview) -> None:
    """`data` into a chain's writable part, from `offset` on: all of it, or OSError as `Chain.write` says."""
    source = data if type(data) is bytes else ffi.from_buffer(data)
    if result := lib.vu_chain_write(table.pointer, chain, offset, source, len(source)):
        raise _error(result)


def log_mark(log: int, first: int, count: int) -> None:
    """Sets the bits of `count` pages from page `first` on in the dirty log at `log`; OSError where it has no memory."""
    _checked(lib.vu_log_mark(log, first, count))


def log_take(log: int, words: int) -> bytes:
    """All bits of the dirty log at `log`, which are clear then, as `words` words of 64 bits; OSError as `log_mark`."""
    taken = ffi.new("uint64_t[]", words)
    _checked(lib.vu_log_take(log, words, taken))
    return bytes(ffi.buffer(taken))


def fault_take(uffd: int) -> int | None:
    """The address of the next page fault that a userfaultfd tells of, without waiting. OSError for what is none."""
    address = ffi.new("uint64_t *")
    return int(address[0]) if _checked(lib.vu_fault_take(uffd, address)) else None


def fault_fill(uffd: int, address: int, page: bytes) -> bool:
    """Have `page` at `address` of a userfaultfd's process, unless one is there already, and wake who waits for it.

    Whether it was put there. OSError with EAGAIN while that process changes its mappings, ENOENT or ESRCH where its
    mapping or itself is gone.
    """
    return bool(_checked(lib.vu_fault_fill(uffd, address, page, len(page))))
