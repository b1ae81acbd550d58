"""The seam to the C core, csrc/*_api.h: only this module imports its `ffi` and `lib`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from bitarray import bitarray

from virtio_mem._core import ffi, lib

REASONS: list[str] = [
    ffi.typeof("enum vm_verdict").elements[number].removeprefix("VM_").lower() for number in range(lib.VM_VERDICTS)
]
"""The verdicts by their number."""

Buffer = bytes | bytearray | memoryview

MOST_CHAINS: int = lib.VM_MOST_CHAINS
"""How many chains a record has room for."""

RECORD: dict[str, int] = {
    name: ffi.offsetof("struct vm_record", name) // 8 for name, _ in ffi.typeof("struct vm_record").fields
}
"""By name, at which of its words each part of a record begins."""

RECORD_WORDS: int = ffi.sizeof("struct vm_record") // 8

_FEW_RUNS, _MANY_RUNS = 16, 4096
"""How many runs are looked for at once: few where that may be all, then as many as keep their cost to themselves."""

_bytes = ffi.from_buffer


def _numbers(array: Any, count: int) -> memoryview:
    """The first `count` of an array of uint64_t, at least one, which is kept as long as they are looked at."""
    return memoryview(ffi.buffer(array, 8 * count)).cast("Q")


class RunArrays:
    """Some runs: the first block of each, and its number of blocks, as flat arrays of 64-bit numbers, format Q.
    Iterates over pairs of both."""

    __slots__ = ("firsts", "sizes")

    def __init__(self, firsts: memoryview, sizes: memoryview) -> None:
        self.firsts, self.sizes = firsts, sizes

    def __len__(self) -> int:
        return len(self.firsts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.firsts.tolist(), self.sizes.tolist(), strict=True)


class Granted(NamedTuple):
    """What the host is to do so that requests of a type are granted: to `nb_blocks` blocks from `first` on."""

    type: int
    first: int
    nb_blocks: int


class Bits:
    """The memory of a bitarray, for C, until it is released; the bitarray can't change its length meanwhile."""

    __slots__ = ("pointer",)

    def __init__(self, bits: bitarray) -> None:
        self.pointer = ffi.from_buffer("uint8_t[]", bits)

    def runs(self, plugged: bool, start: int, end: int, room: int = _FEW_RUNS) -> Iterator[RunArrays]:
        """The maximal runs of set bits, or of clear ones, among those from `start` up to `end`, in order; some at a
        time, the first `room` at first. The bits must not change meanwhile."""
        while start < end:
            firsts, sizes = ffi.new("uint64_t[]", room), ffi.new("uint64_t[]", room)
            count = lib.vm_runs(self.pointer, start, end, plugged, firsts, sizes, room)
            if count:
                yield RunArrays(_numbers(firsts, count), _numbers(sizes, count))
            if count < room:
                return
            start, room = firsts[count - 1] + sizes[count - 1], _MANY_RUNS

    def release(self) -> None:
        """Let go of it. Rules that are given it from now on raise TypeError."""
        if self.pointer is not None:
            ffi.release(self.pointer)
            self.pointer = None


class Record:
    """The memory of a `struct vm_record`, for C, until it is released."""

    __slots__ = ("pointer",)

    def __init__(self, view: memoryview) -> None:
        self.pointer = ffi.from_buffer("struct vm_record *", view, require_writable=True)

    def release(self) -> None:
        """Let go of it."""
        if self.pointer is not None:
            ffi.release(self.pointer)
            self.pointer = None


class Plugs(NamedTuple):
    """What PLUGs are answered at once by: where they are put on record, and the file that the region begins in, at
    `offset`."""

    record: Record
    fd: int
    offset: int


class AnsweredAtOnce(NamedTuple):
    """How many blocks were plugged at once; and of the last requests what each was answered, where somebody looks."""

    plugged: int
    verdicts: bytes


class Rules:
    """The rules for a device whose region has `region_size` bytes at `addr`, in blocks of `block_size`."""

    __slots__ = ("_device", "_effect", "_room", "_state", "_verdicts")

    def __init__(self, addr: int, region_size: int, block_size: int) -> None:
        state = {"addr": addr, "region_size": region_size, "block_size": block_size}
        self._device = ffi.new("struct vm_device *", {"state": state})
        self._state = ffi.addressof(self._device, "state")
        self._effect = ffi.new("struct vm_effect *")
        self._room = 0
        self._verdicts: Any = None

    def decide(
        self, bits: Bits, sizes: tuple[int, int, int], paused: bool, requests: Buffer, answers: Buffer, count: int
    ) -> tuple[bytes, Granted | None]:
        """Decide on the first of `count` requests of 24 bytes, and put their answers, 10 bytes each, into `answers`.

        `sizes` are usable_region_size, plugged_size and requested_size. What comes back has a byte for each request
        that was decided on, its verdict below its type; and what those that are granted wait for, if anything.
        """
        if count > self._room:
            self._room, self._verdicts = count, ffi.new("char[]", count)
        self.set(bits, sizes, paused)
        effect = self._effect
        decided = lib.vm_decide(self._state, _bytes(requests), count, self._verdicts, _bytes(answers), effect)
        verdicts: bytes = ffi.unpack(self._verdicts, decided)
        return verdicts, Granted(effect.type, effect.first, effect.nb_blocks) if effect.nb_blocks else None

    def answering(self) -> tuple[int, int]:
        """The addresses of a function that answers requests as `decide` does where nothing waits for it, and of what it
        is given: this object's state, as `set` and `prepare` left it."""
        function = ffi.cast("uintptr_t", ffi.addressof(lib, "vm_answer"))
        return int(function), int(ffi.cast("uintptr_t", self._device))

    def set(self, bits: Bits, sizes: tuple[int, int, int], paused: bool) -> None:
        """Let the state be this; see `decide`."""
        state = self._state
        state.usable_region_size, state.plugged_size, state.requested_size = sizes
        state.blocks, state.paused = bits.pointer, paused

    def prepare(self, plugs: Plugs | None, looks: bool, answers: bool) -> None:
        """Requests are about to be answered at once, where it `answers` any: PLUGs, too, by `plugs`, where the file has
        their blocks. They are counted; where somebody `looks`, it is said what those of the last call were answered
        instead."""
        device = self._device
        device.record = ffi.NULL
        if plugs is not None:
            device.record, device.fd, device.offset = plugs.record.pointer, plugs.fd, plugs.offset
        device.looks, device.answers, device.answered, device.plugged = looks, answers, 0, 0

    def answered(self) -> AnsweredAtOnce:
        """What was answered at once since `prepare`, or since this was asked before."""
        device = self._device
        said = ffi.unpack(device.verdicts, device.answered) if device.looks and device.answered else b""
        plugged: int = device.plugged
        device.answered = device.plugged = 0
        return AnsweredAtOnce(plugged, said)

    def take_counts(self) -> dict[int, int]:
        """How often each verdict, below the request's type, was given since the last call."""
        counts = ffi.unpack(self._device.counts, lib.VM_VERDICT_KEYS)
        ffi.memmove(self._device.counts, bytes(ffi.sizeof(self._device.counts)), ffi.sizeof(self._device.counts))
        return {verdict: count for verdict, count in enumerate(counts) if count}
