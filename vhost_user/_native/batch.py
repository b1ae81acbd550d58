"""Batches of chains that hold requests of one size; see csrc/ring_batch_api.h."""

from __future__ import annotations

from vhost_user._core import ffi, lib
from vhost_user._native.inflight import Inflight
from vhost_user._native.memory import MemoryTable
from vhost_user._native.ring import CHAIN, SEGMENT, Ring

ASKS: int = lib.VU_MEMBER_ASKS
MALFORMED: int = lib.VU_MEMBER_MALFORMED
TOO_SHORT: int = lib.VU_MEMBER_TOO_SHORT
NO_ROOM: int = lib.VU_MEMBER_NO_ROOM
MEMORY_GONE: int = lib.VU_MEMBER_MEMORY_GONE

KEY_SIZE: int = ffi.sizeof("struct vu_key")

LONGEST_CALL = 1_000_000
"""Nanoseconds after which requests are not answered any longer without a step of Python's."""

_SEGMENTS_OF_ONE = 4
"""A chain of a small request has two, or four where the driver cuts it up; others take the room of several."""


class Answerer:
    """A `vu_answer` function and what it is given as `device`, by their addresses; both stay the caller's."""

    __slots__ = ("pointer",)

    def __init__(self, function: int, device: int) -> None:
        fields = {
            "answer": ffi.cast("vu_answer *", function),
            "device": ffi.cast("void *", device),
            "longest": LONGEST_CALL,
        }
        self.pointer = ffi.new("struct vu_answerer *", fields)

    def ask_once(self, once: bool) -> None:
        """Whether a call is over once the function has answered something; else it is asked as long as it answers."""
        self.pointer.once = once

    @property
    def answered(self) -> int:
        """How many requests the last call answered."""
        return int(self.pointer.answered)

    @property
    def lost(self) -> bool:
        """Whether some of those have not gone back to the driver, since it failed."""
        return bool(self.pointer.lost)

    @property
    def idle(self) -> bool:
        """Whether it ended because nothing more was to be answered."""
        return bool(self.pointer.idle)

    def clear(self) -> None:
        """None were, and nobody knows what is to come."""
        self.pointer.answered, self.pointer.lost, self.pointer.idle = 0, False, True


class Batch:
    """Room for `most` members, and for chains of a queue of `size`; and views of what there is of each member."""

    __slots__ = ("_keep", "_pointer", "answers", "keys", "kinds", "requests")

    def __init__(self, size: int, most: int, request_size: int, answer_size: int) -> None:
        segments = 2 * size + _SEGMENTS_OF_ONE * most
        room = SEGMENT.size * segments + CHAIN.size * (most + 1)
        areas = {
            "kinds": ffi.new("uint8_t[]", most),
            "keys": ffi.new("struct vu_key[]", most),
            "requests": ffi.new("uint8_t[]", most * request_size),
            "answers": ffi.new("uint8_t[]", most * answer_size),
            "places": ffi.new("uint32_t[]", most),
            "entries": ffi.new("uint32_t[]", most),
            "chains": ffi.cast("uint8_t *", words := ffi.new("uint64_t[]", room // 8)),
        }
        self._keep = areas, words
        sizes = {"most": most, "request_size": request_size, "answer_size": answer_size, "room": room}
        self._pointer = ffi.new("struct vu_batch *", {**sizes, **areas})
        self.kinds, self.keys, self.requests, self.answers = (
            memoryview(ffi.buffer(areas[name])).cast("B") for name in ("kinds", "keys", "requests", "answers")
        )

    def take(self, ring: Ring, table: MemoryTable, most: int, inflight: Inflight | None) -> int:
        """How many chains were taken, `most` at most; or what `Ring.take` says where none could be."""
        noted = ffi.NULL if inflight is None else inflight.pointer
        result: int = lib.vu_batch_take(ring.queue, table.pointer, self._pointer, most, noted)
        return result

    def serve(
        self,
        ring: Ring,
        table: MemoryTable,
        most: int,
        inflight: Inflight | None,
        answerer: Answerer,
        call: int,
        patience: int,
    ) -> int:
        """Answers up to `most` chains at once, looks for more for `patience` nanoseconds, signals the eventfd `call`.

        How many members are left in the batch, the first `given` of them done with; or what `Ring.take` says.
        """
        noted = ffi.NULL if inflight is None else inflight.pointer
        pointer = answerer.pointer
        pointer.call, pointer.patience = call, patience
        result: int = lib.vu_batch_serve(ring.queue, table.pointer, self._pointer, most, noted, pointer)
        return result

    def give(self, ring: Ring, table: MemoryTable, end: int, inflight: Inflight | None) -> int:
        """Gives back the members before `end` that were not; how many went back empty, or what `Ring.push` says."""
        noted = ffi.NULL if inflight is None else inflight.pointer
        result: int = lib.vu_batch_give(ring.queue, table.pointer, self._pointer, end, noted)
        return result

    @property
    def given(self) -> int:
        """How many members went back, also where a give has failed."""
        return int(self._pointer.given)

    def chain(self, member: int) -> bytes:
        """The `struct vu_chain` of a member."""
        place = self._pointer.chains + self._pointer.places[member]
        chain = ffi.cast("struct vu_chain *", place)
        segments = chain.readables + chain.writables
        data: bytes = ffi.unpack(ffi.cast("char *", place), CHAIN.size + SEGMENT.size * segments)
        return data


def queue_await(ring: Ring, table: MemoryTable, nanoseconds: int) -> int:
    """Looks for an available chain for so long; 1 if there is one, 0, or what `Ring.take` says."""
    result: int = lib.vu_queue_await(ring.queue, table.pointer, nanoseconds)
    return result
