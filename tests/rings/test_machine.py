"""Driver and device take any steps in any order, beside a model made of lists."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.rings.rig import BORDER, FORMATS, Rig, make_rig, pop
from vhost_user.chain import Chain
from vhost_user.units import GuestAddress
from vhost_user.vring import PackedQueue, QueueFull, SplitQueue

SLOT = 256
"""Guest memory for each chain: 64 bytes to read, 64 to write, and an indirect table."""

SLOTS = 64
"""More than chains can be in flight."""


@dataclass
class Sent:
    """What the model knows of a chain."""

    token: int
    slot: int
    data: bytes
    room: int
    descriptors: int
    good: bool = True
    answer: bytes = b""


class Rings(RuleBasedStateMachine):
    """`waiting`, `held` and `used` are where each chain is: available, with the device, or on its way back."""

    @initialize(form=st.sampled_from(FORMATS), exponent=st.integers(0, 4), event_idx=st.booleans())
    def make(self, form: str, exponent: int, event_idx: bool) -> None:
        self.form, self.event_idx = form, event_idx
        self.rig: Rig = make_rig(form, 2**exponent, event_idx=event_idx)
        self.waiting: deque[Sent] = deque()
        self.held: list[tuple[Chain, Sent]] = []
        self.used: deque[Sent] = deque()
        self.slots = set(range(SLOTS))
        self.malformed = 0
        self.device_sleeps = self.driver_sleeps = False

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.memory.replace([])

    # The driver.

    @rule(
        sizes=st.lists(st.integers(1, 16), max_size=4),
        rooms=st.lists(st.integers(1, 16), max_size=4),
        indirect=st.booleans(),
        good=st.integers(0, 9).map(bool),
        fill=st.integers(0, 255),
    )
    def send(self, sizes: list[int], rooms: list[int], indirect: bool, good: bool, fill: int) -> None:
        size = self.rig.layout.size
        sizes = sizes[:size] or [1]
        rooms = rooms[: size - len(sizes)]
        slot = min(self.slots)
        base = BORDER - SLOT * SLOTS // 2 - SLOT // 2 + SLOT * slot  # the middle one lies on the border
        data = bytes((fill + at) % 256 for at in range(sum(sizes)))
        self.rig.memory.write(GuestAddress(base), data)
        readable = _ranges(base, sizes)
        if not good:
            readable[-1] = (base, 0)
        table = GuestAddress(base + 128) if indirect else None
        needed = 1 if indirect else len(sizes) + len(rooms)
        free = self.rig.driver.free
        try:
            token = self.rig.driver.add(readable, _ranges(base + 64, rooms), indirect_table=table)
        except QueueFull:
            assert needed > free
            return
        assert needed <= free
        self.slots.remove(slot)
        self.waiting.append(Sent(token, slot, data, sum(rooms), needed, good))

    @precondition(lambda self: not self.driver_sleeps)
    @rule()
    def take_back(self) -> None:
        got = self.rig.driver.get_used()
        if not self.used:
            assert got is None
            return
        sent = self.used.popleft()
        assert got == (sent.token, len(sent.answer))
        base = BORDER - SLOT * SLOTS // 2 - SLOT // 2 + SLOT * sent.slot
        assert self.rig.memory.read(GuestAddress(base + 64), len(sent.answer)) == sent.answer
        self.slots.add(sent.slot)

    @rule()
    def driver_goes_to_sleep(self) -> None:
        self.rig.queue.should_notify()
        self.driver_sleeps = not self.rig.driver.enable_interrupts()
        assert self.driver_sleeps == (not self.used)

    @rule()
    def driver_works_on(self) -> None:
        self.rig.driver.disable_interrupts()
        self.driver_sleeps = False

    @rule()
    def kick(self) -> None:
        kicked = self.rig.driver.needs_kick()
        if self.device_sleeps and self.waiting:
            assert kicked
            self.device_works_on()

    # The device.

    @precondition(lambda self: not self.device_sleeps)
    @rule()
    def pop(self) -> None:
        while self.waiting and not self.waiting[0].good:
            self.malformed += 1
            self.used.append(self.waiting.popleft())
        if not self.waiting:
            assert self.rig.queue.pop() is None
            return
        sent = self.waiting.popleft()
        chain = pop(self.rig.queue)
        assert (chain.readable, chain.writable) == (len(sent.data), sent.room)
        assert chain.read() == sent.data
        self.held.append((chain, sent))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 63), answer=st.binary(max_size=64))
    def push(self, which: int, answer: bytes) -> None:
        chain, sent = self.held.pop(which % len(self.held))
        sent.answer = answer[: sent.room]
        chain.write(sent.answer)
        self.rig.queue.push(chain, len(sent.answer))
        self.used.append(sent)

    @rule()
    def interrupt(self) -> None:
        interrupted = self.rig.queue.should_notify()
        if self.driver_sleeps and self.used:
            assert interrupted
            self.driver_works_on()

    @rule()
    def device_goes_to_sleep(self) -> None:
        self.rig.driver.needs_kick()
        self.device_sleeps = not self.rig.queue.enable_notifications()
        assert self.device_sleeps == (not self.waiting)

    @rule()
    def device_works_on(self) -> None:
        self.rig.queue.disable_notifications()
        self.device_sleeps = False

    @precondition(lambda self: not self.held)
    @rule()
    def device_is_made_anew_from_its_state(self) -> None:
        before = self.rig.queue
        assert isinstance(before, SplitQueue | PackedQueue)
        self.interrupt()
        state = before.state()
        kind = SplitQueue if isinstance(before, SplitQueue) else PackedQueue
        queue = kind(
            self.rig.memory, **vars(self.rig.layout), event_idx=self.event_idx, indirect=True, **state._asdict()
        )
        self.rig = self.rig._replace(queue=queue)
        self.malformed = 0

    # Memory.

    @rule()
    def table_is_swapped(self) -> None:
        self.rig.memory.replace(self.rig.memory.regions)

    @invariant()
    def accounts_are_right(self) -> None:
        if not hasattr(self, "rig"):
            return
        there = [*self.waiting, *(sent for _, sent in self.held), *self.used]
        assert self.rig.driver.free == self.rig.layout.size - sum(sent.descriptors for sent in there)
        assert self.rig.queue.malformed.total() == self.malformed
        assert self.rig.queue.broken is None


def _ranges(base: int, sizes: list[int]) -> list[tuple[int, int]]:
    return [(base + sum(sizes[:at]), size) for at, size in enumerate(sizes)]


TestRings = Rings.TestCase
