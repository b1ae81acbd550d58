"""What a queue marks: every byte that changed in guest memory, and no page that it did not write.

Two oracles, each checked after every step of the device. A model says which ranges a step writes, and so which bits
there are; and guest memory is compared with what it was before the step, so that nothing is missing that the model
forgot too. The front end's log has the used ring where it lies in guest memory, or far away, outside of every region.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.dirty_log.shared import clear, pages, touched
from tests.rings.rig import BORDER, END, FORMATS, ISLAND, RING, Rig, guest_memory, make_rig
from vhost_user.chain import Chain
from vhost_user.dirty_log import DirtyLog
from vhost_user.inflight import InflightBuffer
from vhost_user.message import LOG_PAGE
from vhost_user.units import GuestAddress
from vhost_user.vring import PackedLayout, PackedQueue, QueueFull, SplitDriver, SplitLayout, SplitQueue

LOG_SIZE = 0x9000
"""Covers all of the rig's memory up to ISLAND's page, and the far used ring."""

FAR = GuestAddress(0x42000F80)
"""A used ring's place in the log that is no guest memory, and where its parts lie in other pages than in the ring."""

BUFFERS = (0x100000, BORDER - 0x3000, END - 0x8000, ISLAND)
"""Where rooms begin: at several places of one region, across the border of two, and in a region of one page."""

TABLES = 0x180000
"""Of four descriptors each, more of them than chains can be in flight."""


BASES = ("there", "far", None)


@dataclass
class Sent:
    """What the model knows of a chain."""

    good: bool
    descriptors: int
    rooms: list[tuple[int, int]]


class Logged(RuleBasedStateMachine):
    """`expected` are the pages that the device wrote while its log was on and that the front end has not taken out."""

    @initialize(
        form=st.sampled_from(FORMATS),
        size=st.sampled_from([1, 4, 512, 1024]),
        start=st.integers(0, 2**16 - 1),
        event_idx=st.booleans(),
        inflight=st.booleans(),
        base=st.sampled_from(BASES),
    )
    def make(self, form: str, size: int, start: int, event_idx: bool, inflight: bool, base: str | None) -> None:
        self.rig = self._make_rig(form, size, start, event_idx)
        self.event_idx = event_idx
        self.fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, LOG_SIZE)
        self.log = DirtyLog(self.fd, LOG_SIZE)
        self.buffer: InflightBuffer | None = None
        if inflight:
            self._note_inflight(form, size, self.position)
        self.expected: set[int] = set()
        self.waiting: deque[Sent] = deque()
        self.held: list[tuple[Chain, Sent, list[memoryview]]] = []
        self.sent = 0
        self.before = self._memory()
        self.switch_on(base)

    def _make_rig(self, form: str, size: int, start: int, event_idx: bool) -> Rig:
        """As `make_rig`; a split ring's indices begin at `start`, so that any page of it may be the first one used."""
        self.position = 0  # of the next used slot, without end
        if form == "packed":
            return make_rig(form, size, event_idx=event_idx)
        self.position = start
        memory, layout = guest_memory(), SplitLayout.place(size, RING)
        driver = SplitDriver(memory, layout, event_idx=event_idx, start=start)
        queue = SplitQueue(
            memory, **vars(layout), event_idx=event_idx, indirect=True, next_avail=start, next_used=start
        )
        return Rig(memory, layout, driver, queue)

    def _note_inflight(self, form: str, size: int, start: int) -> None:
        packed = form == "packed"
        fd, mmap_size, mmap_offset = InflightBuffer.create(1, size, packed=packed)
        with fd:
            self.buffer = InflightBuffer.open(fd, mmap_size, mmap_offset, 1, size, packed=packed)
        kind = PackedQueue if packed else SplitQueue
        queue = kind(
            self.rig.memory,
            **vars(self.rig.layout),
            event_idx=self.event_idx,
            indirect=True,
            next_avail=start,
            inflight=self.buffer.queue(0),
        )
        self.rig = self.rig._replace(queue=queue)

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.held.clear()
            self.log.close()
            os.close(self.fd)
            self.rig.memory.replace([])
            if self.buffer is not None:
                self.buffer.close()

    # What is seen from outside.

    def _memory(self) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        for region in self.rig.memory.regions:
            for view in self.rig.memory.views(region.guest_address, region.size):
                found[region.guest_address] = bytes(view)
        return found

    def _changed(self) -> set[int]:
        """The pages that changed since the last look."""
        before, self.before = self.before, self._memory()
        return {
            (start + at) // LOG_PAGE
            for start, now in self.before.items()
            if now != before[start]
            for at in range(0, len(now), LOG_PAGE)
            if now[at : at + LOG_PAGE] != before[start][at : at + LOG_PAGE]
        }

    @property
    def on(self) -> bool:
        return self.rig.queue.log is not None

    def _wrote(self, *ranges: tuple[int, int]) -> None:
        """Note what the device should have marked, and look whether it did."""
        if self.on:
            self.expected |= {page for each in ranges if each[1] for page in touched(*each)}
        assert pages(self.fd, LOG_SIZE) == self.expected
        changed = self._changed()
        if self.on and self.rig.queue.log_used == self.rig.layout.areas[self._used_area].address:
            assert changed <= self.expected

    # Where the ring's own bytes lie, as the standard has them.

    @property
    def _used_area(self) -> str:
        return "used" if isinstance(self.rig.layout, SplitLayout) else "desc"

    def _used(self, descriptors: int) -> list[tuple[int, int]]:
        """What it writes to use the next chain, of so many descriptors of the ring."""
        base, layout = self.rig.queue.log_used, self.rig.layout
        at, self.position = self.position, self.position + (1 if isinstance(layout, SplitLayout) else descriptors)
        if base is None:
            return []
        if isinstance(layout, SplitLayout):
            return [(base + 4 + 8 * (at % layout.size), 8), (base + 2, 2)]
        return [(place + 16 * (at % layout.size) + 8, 8) for place in (base, layout.desc)]

    def _advice(self, enable: bool) -> list[tuple[int, int]]:
        base, layout = self.rig.queue.log_used, self.rig.layout
        if base is None:
            return []
        if isinstance(layout, PackedLayout):
            return [(layout.device, 4)]
        if not self.event_idx:
            return [(base, 2)]
        return [(base + 4 + 8 * layout.size, 2)] if enable else []

    # The driver.

    @rule(
        place=st.sampled_from(BUFFERS),
        start=st.integers(0, 0x800),
        rooms=st.lists(st.integers(1, 0x700), max_size=3),
        indirect=st.booleans(),
        good=st.integers(0, 3).map(bool),
    )
    def send(self, place: int, start: int, rooms: list[int], indirect: bool, good: bool) -> None:
        rooms = rooms[: self.rig.layout.size - 1]
        writable, at = [], place + start
        for room in rooms:
            writable.append((at, room))
            at += room if place == ISLAND else 2 * room
        if place == ISLAND:
            writable = [each for each in writable if sum(each) <= ISLAND + 4096]
        readable = [(0x110000, 8 if good else 0)]
        table = GuestAddress(TABLES + 64 * (self.sent % 2048)) if indirect else None
        free = self.rig.driver.free
        try:
            self.rig.driver.add(readable, writable, indirect_table=table)
        except QueueFull:
            return
        self.waiting.append(Sent(good, free - self.rig.driver.free, writable))
        self.sent += 1
        self._changed()

    @rule()
    def take_back(self) -> None:
        while self.rig.driver.get_used() is not None:
            pass
        self._changed()

    # The front end.

    @rule(base=st.sampled_from(BASES))
    def switch_on(self, base: str | None) -> None:
        there = self.rig.layout.areas[self._used_area].address
        self.rig.queue.log_used = {"there": there, "far": FAR, None: None}[base]
        self.rig.queue.log = self.log

    @precondition(lambda self: self.on)
    @rule()
    def switch_off(self) -> None:
        self.rig.queue.log = None

    @rule()
    def copy_pages(self) -> None:
        clear(self.fd, LOG_SIZE)
        self.expected.clear()

    # The device.

    @rule()
    def pop(self) -> None:
        used = []
        while self.waiting and not self.waiting[0].good:
            used += self._used(self.waiting.popleft().descriptors)
        chain = self.rig.queue.pop()
        self._wrote(*used)
        if self.waiting:
            assert chain is not None
            self.held.append((chain, self.waiting.popleft(), []))
        else:
            assert chain is None

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 63), offset=st.integers(0, 0x1000), data=st.binary(min_size=1, max_size=0x900))
    def write(self, which: int, offset: int, data: bytes) -> None:
        chain, sent, _ = self.held[which % len(self.held)]
        offset = min(offset, chain.writable)
        data = data[: chain.writable - offset]
        chain.write(data, offset)
        ranges, left = [], len(data)
        for address, room in sent.rooms:
            here = max(min(room - offset, left), 0)
            ranges.append((address + offset, here))
            offset, left = max(offset - room, 0), left - here
        assert left == 0
        self._wrote(*ranges)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 63))
    def take_views(self, which: int) -> None:
        chain, _, views = self.held[which % len(self.held)]
        views += chain.writable_views()
        self._wrote()

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 63), fill=st.integers(0, 255), more_views=st.booleans())
    def push(self, which: int, fill: int, more_views: bool) -> None:
        chain, sent, views = self.held.pop(which % len(self.held))
        views += chain.writable_views() if more_views else []
        for view in views:
            view[:] = bytes([fill]) * len(view)
        self.rig.queue.push(chain, 0)
        self._wrote(*(sent.rooms if views else ()), *self._used(sent.descriptors))
        views.clear()

    @rule(enable=st.booleans())
    def advise(self, enable: bool) -> None:
        if enable:
            self.rig.queue.enable_notifications()
        else:
            self.rig.queue.disable_notifications()
        self._wrote(*self._advice(enable))

    @rule()
    def should_notify(self) -> None:
        self.rig.queue.should_notify()
        self._wrote()

    @invariant()
    def all_is_in_range(self) -> None:
        if hasattr(self, "rig"):
            assert self.log.out_of_range == 0
            assert self.rig.queue.broken is None


TestLogged = Logged.TestCase
