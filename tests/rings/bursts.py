"""Bursts of chains, good and bad, written by hand into two equal rings: what one device makes of them, and another.

A chain asks where it has a request's bytes to read and an answer's to write; its answer follows from its request.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from tests.rings.rig import BORDER, END, INDIRECT, NEXT, RING, WRITE, Bench, PackedPen, Raw, SplitPen, anonymous
from vhost_user.mapping import Mapping
from vhost_user.memory import GuestMemory, Region
from vhost_user.units import ByteCount, GuestAddress
from vhost_user.vring import BatchedQueue, PackedLayout, PackedQueue, SplitLayout, SplitQueue

REQUEST, ANSWER = 24, 10

PAGE = 4096
CUT_OFF = GuestAddress(0x40000000)
"""Where some requests lie: a page of a file, behind it one that the file no longer has, where a touch is a SIGBUS."""

CUT_ANSWERS = GuestAddress(0x48000000)
"""The same again, for answers: a request that an earlier answer wrote to would not be the same for all devices."""

COMES_AND_GOES = GuestAddress(0x50000000)
"""A region that is removed between the look at requests and their answers, in some bursts."""

MIDDLE = GuestAddress(0x280000)
"""Where two more regions meet."""

BUFFERS = 0x100000
TABLES = 0x180000
_PLACE, _TABLE_PLACE = 0x200, 0x1000


def answer_to(request: bytes) -> bytes:
    return bytes(byte ^ 0x5A for byte in request[:ANSWER])


class Sent(NamedTuple):
    """A chain: its descriptors as pieces (address, length, flags), and whether they are in a table of their own."""

    pieces: list[tuple[int, int, int]]
    indirect: bool

    def slots(self) -> int:
        return 1 if self.indirect else len(self.pieces)


def cut(rng: random.Random, address: int, length: int, flags: int, most: int) -> list[tuple[int, int, int]]:
    """A range in pieces, `most` at most."""
    ends = sorted(rng.sample(range(1, length), min(rng.choice((0, 0, 1, 3)), most - 1, length - 1)))
    starts = [0, *ends]
    return [(address + start, end - start, flags) for start, end in zip(starts, [*ends, length], strict=True)]


def good_pieces(rng: random.Random, base: int, most: int) -> list[tuple[int, int, int]]:
    """What asks, with more to read and to write at times than it takes, and memory that is not what it seems."""
    readable, writable = REQUEST + rng.choice((0, 0, 0, 9)), ANSWER + rng.choice((0, 0, 0, 50))
    asked = rng.choice((base, base, base, base, MIDDLE - rng.randrange(REQUEST), CUT_OFF + PAGE - rng.randrange(30)))
    answer = rng.choice(
        (base + 64, base + 64, base + 64, BORDER - 4, CUT_ANSWERS + PAGE - rng.randrange(12), COMES_AND_GOES + 8)
    )
    first = cut(rng, asked, readable, 0, max(1, most - 1))
    return first + cut(rng, answer, writable, WRITE, max(1, most - len(first)))


def bad_pieces(rng: random.Random, base: int, most: int) -> list[tuple[int, int, int]]:
    """What asks nothing."""
    read, write = (base, REQUEST, 0), (base + 64, ANSWER, WRITE)
    return rng.choice(
        (
            [(base, REQUEST - 1, 0), write],
            [write],
            [read],
            [read, (base + 64, ANSWER - 1, WRITE)],
            [read, (base + 64, 0, WRITE)],
            [(END, REQUEST, 0), write],
            [read, (2**64 - 4, ANSWER, WRITE)],
            [write, read],
            [(base, 1, 0)] * most,
            [*[(base, 1, 0)] * (most - 1), write],
        )
    )


def burst(rng: random.Random, size: int, indirect: bool) -> list[Sent]:
    """As many chains as fit, or fewer, of a ring of `size`."""
    chains: list[Sent] = []
    left = rng.randint(1, size)
    while left > 0 and rng.random() < 0.97:
        base = BUFFERS + _PLACE * len(chains)
        table = indirect and rng.random() < 0.3
        make = good_pieces if rng.random() < 0.7 else bad_pieces
        sent = Sent(make(rng, base, size if table else left), table)
        if sent.slots() <= left:
            chains.append(sent)
            left -= sent.slots()
        elif rng.random() < 0.5:
            break
    return chains


@contextmanager
def memory() -> Iterator[GuestMemory]:
    """Regions as above, each a mapping of its own."""
    borders = {GuestAddress(0): BORDER, BORDER: MIDDLE, MIDDLE: END, COMES_AND_GOES: COMES_AND_GOES + PAGE}
    with ExitStack() as stack:
        places = {start: anonymous(end - start) for start, end in borders.items()}
        places |= {start: cut_off() for start in (CUT_OFF, CUT_ANSWERS)}
        for mapping in places.values():
            stack.enter_context(mapping)
        made = GuestMemory([Region(start, mapping.size, mapping) for start, mapping in places.items()])
        stack.callback(made.replace, ())
        yield made


def cut_off() -> Mapping:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, 2 * PAGE)
    mapping = Mapping(ByteCount(2 * PAGE), mmap.MAP_SHARED, fd)
    os.ftruncate(fd, PAGE)
    os.close(fd)
    return mapping


def make_bench(form: str, size: int, memory: GuestMemory, *, event_idx: bool, indirect: bool, start: int = 0) -> Bench:
    """`start` is where a split ring's indices begin, and in which lap and slot a packed ring does."""
    if form == "split":
        split = SplitLayout.place(size, RING)
        pen = SplitPen(memory, split)
        pen.next_avail = pen.next_used = start
        queue: BatchedQueue = SplitQueue(
            memory, **vars(split), event_idx=event_idx, indirect=indirect, next_avail=start, next_used=start
        )
        memory.store16(GuestAddress(split.avail + 2), start)
        memory.store16(GuestAddress(split.used + 2), start)
        return Bench(memory, split, pen, queue)
    packed = PackedLayout.place(size, RING)
    slot, wrap = start % size, start // size % 2 == 0
    packed_pen = PackedPen(memory, packed)
    packed_pen.position = packed_pen.used_position = start % (2 * size)
    packed_queue = PackedQueue(
        memory,
        **vars(packed),
        event_idx=event_idx,
        indirect=indirect,
        next_avail=slot,
        avail_wrap=wrap,
        next_used=slot,
        used_wrap=wrap,
    )
    if not wrap:  # what the first lap left: used descriptors
        for at in range(size):
            memory.store16(GuestAddress(packed.desc + 16 * at + 14), 0x8080)
    return Bench(memory, packed, packed_pen, packed_queue)


def offer(bench: Bench, chains: list[Sent], requests: bytes) -> None:
    """Write each chain and its request, `requests` one behind the other, and make it available."""
    head = 0
    for number, sent in enumerate(chains):
        request = requests[REQUEST * number : REQUEST * (number + 1)]
        for address, length, flags in sent.pieces:
            if not flags & WRITE and BUFFERS <= address < TABLES:
                bench.memory.write(GuestAddress(address), request[:length])
                request = request[length:]
        last = len(sent.pieces) - 1
        raws = [Raw(at, size, flags | NEXT * (i < last)) for i, (at, size, flags) in enumerate(sent.pieces)]
        if sent.indirect:
            table = TABLES + _TABLE_PLACE * number
            flat = [raw._replace(flags=raw.flags & ~NEXT) for raw in raws] if isinstance(bench.pen, PackedPen) else raws
            bench.memory.write(GuestAddress(table), bench.pen.table(flat))
            raws = [Raw(table, 16 * len(raws), INDIRECT)]
        if isinstance(bench.pen, SplitPen):
            bench.pen.offer(raws, head)
            head += len(raws)
        else:
            bench.pen.offer(raws, number)


def ask_for_calls(bench: Bench, word: int) -> None:
    """Say when the driver wants to hear of used chains, anything at all."""
    if isinstance(bench.layout, SplitLayout):
        bench.memory.store16(bench.layout.avail, word & 1)
        used_event = bench.layout.avail + 4 + 2 * bench.layout.size
        bench.memory.store16(GuestAddress(used_event), (bench.queue.state()[1] + (word >> 1) % 9 - 2) % 2**16)
    else:
        slot, wrap = (word >> 3) % (bench.layout.size + 1), word & 4
        bench.memory.store32(bench.layout.driver, (word & 3) << 16 | (0x8000 if wrap else 0) | slot)


def everything(bench: Bench) -> bytes:
    """All of memory that is there, for a comparison: rings, requests, answers."""
    memory = bench.memory
    layout = [memory.read(area.address, area.size) for area in bench.layout.areas.values()]
    ends = [memory.read(GuestAddress(at), PAGE) for at in (BORDER - PAGE, BORDER, CUT_ANSWERS, COMES_AND_GOES)]
    buffers = memory.read(GuestAddress(BUFFERS), 64 * _PLACE)
    return struct.pack("=QQ", *bench.queue.state()[:2]) + b"".join([*layout, buffers, *ends])
