"""The device's side of a ring, and the chains that come from it."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vhost_user._core import ffi, lib
from vhost_user._native.memory import MemoryTable
from vhost_user._native.result import error

_CHARS = ffi.typeof("char[]")
_uncleared = ffi.new_allocator(should_clear_after_alloc=False)


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

    __slots__ = ("_chain", "_chain_bytes", "_descriptors", "queue")

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
        self.queue = ffi.new("struct vu_queue *", fields)
        self._chain = ffi.new("struct vu_chain *", {"segments": size})
        self._chain_bytes = ffi.cast("char *", self._chain)
        self._descriptors = ffi.NULL

    def keep_descriptors(self) -> None:
        """From now on let `take` keep a packed chain's descriptors of the ring."""
        self._descriptors = ffi.new("struct vu_descriptor[]", self.queue.size)

    def pop(self, table: MemoryTable) -> int:
        """The number of segments of the next good chain, which `chain()` then copies; or 0."""
        result: int = lib.vu_queue_pop(self.queue, table.pointer, self._chain)
        return result

    def take(self, table: MemoryTable) -> int:
        """The number of segments of the next chain; 0; or RING_MALFORMED for one that the caller has to give back."""
        result: int = lib.vu_queue_take(self.queue, table.pointer, self._chain, self._descriptors)
        return result

    def reload(self, table: MemoryTable, head: int) -> int:
        """What `take` said of a split queue's chain with this head, which is in flight."""
        result: int = lib.vu_queue_reload(self.queue, table.pointer, self._chain, head)
        return result

    def rebuild(self, table: MemoryTable, descriptors: bytes) -> int:
        """What `take` said of a packed queue's chain of these descriptors, 1 to the queue's size, in flight."""
        ring, count = ffi.from_buffer("struct vu_descriptor[]", descriptors), len(descriptors) // DESCRIPTOR.size
        result: int = lib.vu_queue_rebuild(self.queue, table.pointer, self._chain, ring, count)
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
        result: int = lib.vu_queue_push(self.queue, table.pointer, chain_id, slots, written)
        return result

    def should_notify(self, table: MemoryTable) -> int:
        """Whether the driver wants to hear of what was given back since the last call."""
        result: int = lib.vu_queue_should_notify(self.queue, table.pointer)
        return result

    def disable_notifications(self, table: MemoryTable) -> int:
        """Advises the driver not to notify."""
        result: int = lib.vu_queue_disable_notifications(self.queue, table.pointer)
        return result

    def enable_notifications(self, table: MemoryTable) -> int:
        """Asks the driver to notify; 1 if something is available already."""
        result: int = lib.vu_queue_enable_notifications(self.queue, table.pointer)
        return result

    def positions(self) -> tuple[tuple[int, bool], tuple[int, bool]]:
        """Where the next available and the next used chain are."""
        queue = self.queue
        return (queue.next_avail, bool(queue.avail_wrap)), (queue.next_used, bool(queue.used_wrap))

    def broken(self) -> tuple[str, int]:
        """Why the ring is broken, "not" if it is not, and the value that broke it."""
        return _BROKEN[self.queue.broken], self.queue.broken_value

    def miss(self) -> tuple[int, int]:
        """The address that the last RING_MISS is about, and what was to be done there: READ, WRITE or both."""
        return self.queue.miss.address, self.queue.miss.access

    def malformed(self) -> dict[str, int]:
        """How many chains went back with length 0, by reason."""
        return dict(zip(_MALFORMED, self.queue.malformed[1 : len(_MALFORMED) + 1], strict=True))


def chain_read(table: MemoryTable, chain: bytes, offset: int, size: int) -> bytes:
    """`size` bytes of a chain's readable part, from `offset` on; OSError where its memory is gone."""
    buffer = _uncleared(_CHARS, size)
    if result := lib.vu_chain_read(table.pointer, chain, offset, buffer, size):
        raise error(result)
    data: bytes = ffi.unpack(buffer, size)
    return data


def chain_write(table: MemoryTable, chain: bytes, offset: int, data: bytes | bytearray | memoryview) -> None:
    """`data` into a chain's writable part, from `offset` on: all of it, or OSError as `Chain.write` says."""
    source = data if type(data) is bytes else ffi.from_buffer(data)
    if result := lib.vu_chain_write(table.pointer, chain, offset, source, len(source)):
        raise error(result)
