"""Guest memory: the table that the C core walks, copies, whole integers, the guard under them, and the dirty log."""

from __future__ import annotations

import errno
import struct

from vhost_user._core import ffi, lib
from vhost_user._native.result import checked, error

READ: int = lib.VU_READ
WRITE: int = lib.VU_WRITE

REGION = struct.Struct("=QQQQ")
"""`struct vu_region`: guest address, size, host address, denied accesses (READ, WRITE)."""

assert REGION.size == ffi.sizeof("struct vu_region")


_COUNT = struct.Struct("@N")
"""What `struct vu_memory` has in front of its regions."""

assert _COUNT.size == ffi.offsetof("struct vu_memory", "regions")

_TABLE = ffi.typeof("struct vu_memory *")


class MemoryTable:
    """Guest memory for the C core: rows that were packed as REGION, in one piece, sorted and without overlap.

    It never changes. `keep` holds the mappings open: whoever calls into C has the table on its stack, so nothing is
    unmapped under the call, whatever other threads do.
    """

    __slots__ = ("keep", "pointer")

    def __init__(self, rows: bytes, keep: object) -> None:
        self.keep = keep
        # The bytes themselves, which the pointer keeps alive: nobody writes to them.
        self.pointer = ffi.from_buffer(_TABLE, _COUNT.pack(len(rows) // REGION.size) + rows)


_CHARS = ffi.typeof("char[]")
_uncleared = ffi.new_allocator(should_clear_after_alloc=False)


def memory_read(table: MemoryTable, address: int, size: int) -> bytes:
    """`size` bytes from guest memory; OSError, before any room is made for them, where a part lies in no region."""
    if not lib.vu_memory_covers(table.pointer, address, size, READ):
        raise error(-errno.EFAULT)
    buffer = _uncleared(_CHARS, size)
    checked(lib.vu_memory_read(table.pointer, address, buffer, size))
    data: bytes = ffi.unpack(buffer, size)
    return data


def memory_write(table: MemoryTable, address: int, data: bytes | bytearray | memoryview) -> None:
    """`data` into guest memory: all of it, or OSError as `GuestMemory.write` says."""
    source = data if type(data) is bytes else ffi.from_buffer(data)
    checked(lib.vu_memory_write(table.pointer, address, source, len(source)))


def memory_lacks(table: MemoryTable, address: int, size: int, access: int) -> int | None:
    """The first address of a range that can't be accessed so, None where all of it can."""
    missing = ffi.new("uint64_t *")
    return int(missing[0]) if lib.vu_memory_lacks(table.pointer, address, size, access, missing) else None


def memory_contiguous(table: MemoryTable, address: int, size: int, alignment: int) -> bool:
    """Whether a range lies in one region, aligned in guest and in host memory."""
    return bool(lib.vu_memory_contiguous(table.pointer, address, size, alignment))


def load16(table: MemoryTable, address: int) -> int:
    """A little-endian integer, loaded whole, with acquire order."""
    return checked(lib.vu_load16(table.pointer, address))


def load32(table: MemoryTable, address: int) -> int:
    """A little-endian integer, loaded whole, with acquire order."""
    return checked(lib.vu_load32(table.pointer, address))


def store16(table: MemoryTable, address: int, value: int) -> None:
    """A little-endian integer, stored whole, with release order."""
    checked(lib.vu_store16(table.pointer, address, value))


def store32(table: MemoryTable, address: int, value: int) -> None:
    """A little-endian integer, stored whole, with release order."""
    checked(lib.vu_store32(table.pointer, address, value))


def install_guard() -> None:
    """Have a SIGBUS inside the C core make the call fail that met it, and one in a guarded range be survived anywhere.

    Others go where they would have gone.
    """
    checked(lib.vu_guard_install())


GUARD_SLOTS: int = lib.VU_GUARD_SLOTS
"""How many ranges can be guarded at a time."""


def guard_add(address: int, size: int, page_size: int) -> int:
    """Guard a range of whole pages; returns the slot that it has until `guard_remove`. OSError where all are taken."""
    return checked(lib.vu_guard_add(address, size, page_size))


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


def log_mark(log: int, first: int, count: int) -> None:
    """Sets the bits of `count` pages from page `first` on in the dirty log at `log`; OSError where it has no memory."""
    checked(lib.vu_log_mark(log, first, count))


def log_take(log: int, words: int) -> bytes:
    """All bits of the dirty log at `log`, which are clear then, as `words` words of 64 bits; OSError as `log_mark`."""
    taken = ffi.new("uint64_t[]", words)
    checked(lib.vu_log_take(log, words, taken))
    return bytes(ffi.buffer(taken))
