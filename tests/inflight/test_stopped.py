"""A back end that is stopped before each of its stores in turn, and another one that takes over.

For the guest every request comes back exactly once. For the device each life sees requests in the order in which they
were made, and none whose used entry the guest could see: what it sees a second time had not come back.
"""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from tests.inflight.world import BUFFERS, Guest, SharedBuffer, answer, make_queue, new_guest, number_of, shared_buffer
from tests.rings.rig import FORMATS, pop
from vhost_user.chain import Chain
from vhost_user.inflight import InflightArea
from vhost_user.units import GuestAddress
from vhost_user.vring import DeviceQueue, PackedLayout, SplitLayout

SIZES = {"split": (1, 2, 8), "packed": (1, 2, 3, 8)}
CASES = [(form, size) for form in FORMATS for size in SIZES[form]]

START = 65_530
"""Of a split ring's indices, which so come round."""


class Stopped(Exception):  # noqa: N818
    """The back end is no more."""


class Fuse:
    """Burns for `steps` steps, then stops the back end."""

    def __init__(self, steps: int | None) -> None:
        self.left = steps

    def step(self) -> None:
        if self.left is not None:
            if self.left == 0:
                raise Stopped
            self.left -= 1


class FusedView:
    """An area's memory, each store to which is a step."""

    def __init__(self, view: memoryview, fuse: Fuse) -> None:
        self._view, self._fuse = view, fuse

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)

    def __len__(self) -> int:
        return len(self._view)

    def __setitem__(self, at: Any, value: Any) -> None:
        self._fuse.step()
        self._view[at] = value


class FusedRing:
    """The C core's ring. A push is two steps: what it shows, and the word that shows it."""

    def __init__(self, ring: Any, fuse: Fuse, half: Callable[[], None]) -> None:
        self._ring, self._fuse, self._half = ring, fuse, half

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ring, name)

    def take(self, *arguments: Any) -> int:
        self._fuse.step()
        result: int = self._ring.take(*arguments)
        return result

    def push(self, *arguments: Any) -> int:
        self._fuse.step()
        try:
            self._fuse.step()
        except Stopped:
            self._half()
            raise
        result: int = self._ring.push(*arguments)
        return result


def fuse_area(area: InflightArea, fuse: Fuse) -> None:
    for name in ("_u8", "_u16", "_u32", "_u64"):
        setattr(area, name, FusedView(getattr(area, name), fuse))


class Life:
    """One back end, from its start to the end of its fuse."""

    def __init__(self, guest: Guest, layout: SplitLayout | PackedLayout, shared: SharedBuffer, fuse: Fuse) -> None:
        self.guest, self.layout = guest, layout
        self.buffer = shared.open()
        self.held: list[Chain] = []
        self.last = -1
        self._start(fuse)

    def _start(self, fuse: Fuse) -> None:
        try:
            area = self.buffer.queue(0)
            fuse_area(area, fuse)
            self.queue: DeviceQueue = make_queue(self.guest.memory, self.layout, area, START)
            assert self._flags() == len(area.retakes)
            self.queue._ring = FusedRing(self.queue._ring, fuse, self._half_push)  # type: ignore[assignment]
        except Stopped:
            self.end()
            raise

    def _flags(self) -> int:
        """How many chains the area has in flight."""
        packed = isinstance(self.layout, PackedLayout)
        with self.buffer._window.view() as view:
            return sum(view[16 + 16 * packed :: 16 + 16 * packed][: self.layout.size])

    def _half_push(self) -> None:
        """What the C core stores of a used entry before the word that shows it."""
        (_, (position, _)) = self.queue._ring.positions()
        at = position % self.layout.size
        if isinstance(self.layout, SplitLayout):
            self.guest.memory.write(GuestAddress(self.layout.used + 4 + 8 * at), struct.pack("<II", 77, 77))
        else:
            self.guest.memory.write(GuestAddress(self.layout.desc + 16 * at + 8), struct.pack("<IH", 77, 77))

    def end(self) -> None:
        self.buffer.close()

    def pop(self) -> bool:
        chain = self.queue.pop()
        if chain is None:
            return False
        number = number_of(chain)
        assert number > self.last, "in order, and none twice"
        assert not self.guest.answered[number], "the guest has its answer already"
        self.last = number
        self.held.append(chain)
        return True

    def push(self, rng: random.Random) -> None:
        answer(self.queue, self.held.pop(rng.randrange(len(self.held))))

    def work(self, rng: random.Random, steps: int) -> None:
        for _ in range(steps):
            match rng.randrange(4):
                case 0:
                    self.guest.send()
                case 1:
                    self.pop()
                case 2 if self.held:
                    self.push(rng)
                case _:
                    self.guest.receive()

    def finish(self, rng: random.Random) -> None:
        """Serve all that is there."""
        while self.pop() or self.queue.enable_notifications():
            pass
        while self.held:
            self.push(rng)


def live(guest: Guest, layout: SplitLayout | PackedLayout, shared: SharedBuffer, fuse: Fuse, steps: int) -> bool:
    """Whether a life of so many steps ended by itself. The guest then goes on for a while without a back end."""
    with suppress(Stopped):
        life = Life(guest, layout, shared, fuse)
        try:
            life.work(guest.rng, steps)
        except Stopped:
            life.end()
        else:
            life.end()
            return True
    guest.receive_all()
    while guest.rng.random() < 0.5:
        guest.send()
    return False


def settle(guest: Guest, layout: SplitLayout | PackedLayout, shared: SharedBuffer) -> None:
    life = Life(guest, layout, shared, Fuse(None))
    try:
        life.finish(guest.rng)
        guest.receive_all()
        assert not guest.flying
        assert sorted(guest.answered) == list(range(guest.number))
        assert life.queue.broken is None
    finally:
        life.end()


def whole(form: str, size: int, seed: object, steps: int, fuses: list[int]) -> bool:
    """A story of lives with these fuses; whether the last one was long enough."""
    rng = random.Random(f"{seed}")
    with shared_buffer(form, size) as shared:
        guest, layout = new_guest(form, size, rng, START)
        try:
            ended = [live(guest, layout, shared, Fuse(fuse), steps) for fuse in fuses]
            settle(guest, layout, shared)
        finally:
            guest.memory.replace([])
    return ended[-1]


@pytest.mark.parametrize(("form", "size"), CASES)
def test_stopped_before_each_step(form: str, size: int, rng: random.Random) -> None:
    seed = rng.random()
    points = next(steps for steps in itertools.count() if whole(form, size, seed, 60, [steps]))
    assert points > 10, "there was something to stop"


@pytest.mark.long
@pytest.mark.parametrize(("form", "size"), CASES)
def test_stopped_again_while_taking_over(form: str, size: int, rng: random.Random) -> None:
    """The second life is stopped before each of its first steps, wherever the first one was."""
    for _ in range(20):
        seed, first = rng.random(), rng.randrange(1, 150)
        for second in range(12):
            whole(form, size, seed, 60, [first, second, rng.randrange(40)])


@pytest.mark.parametrize(("size", "length"), [(1, 1), (2, 2), (3, 3), (4, 4), (3, 2), (4, 3), (5, 2), (5, 4), (8, 7)])
def test_long_chains_in_a_packed_ring(size: int, length: int) -> None:
    """The use of one that fills the ring leaves the index where it was: only the wrap counter tells.

    And one that reaches over the end leaves slots behind that look as if they were available in the lap before.
    """
    assert next(steps for steps in itertools.count() if _use_long_chains(size, length, steps)) > 30


def _use_long_chains(size: int, length: int, steps: int) -> bool:
    """Whether the first of two lives ended by itself."""
    with shared_buffer("packed", size) as shared:
        guest, layout = new_guest("packed", size, random.Random(0))
        pieces = [(BUFFERS + 2 * at, 2) for at in range(length)]
        try:
            sent, received, ended = _long_chains(guest, layout, shared, Fuse(steps), pieces)
            more = _long_chains(guest, layout, shared, Fuse(None), pieces)
        finally:
            guest.memory.replace([])
    assert more[2]
    assert sent + more[0] == received + more[1]
    assert guest.driver.free == size
    return ended


def _long_chains(
    guest: Guest, layout: SplitLayout | PackedLayout, shared: SharedBuffer, fuse: Fuse, pieces: list[tuple[int, int]]
) -> tuple[int, int, bool]:
    """Chains sent, chains that came back, and whether the life ended by itself."""
    sent = received = 0
    ended = False
    with suppress(Stopped):
        life = Life(guest, layout, shared, fuse)
        try:
            for _ in range(5):
                if guest.driver.free >= len(pieces):
                    guest.driver.add(pieces)
                    sent += 1
                life.queue.push(pop(life.queue), 0)
                received += guest.driver.get_used() is not None
            while (chain := life.queue.pop()) is not None:
                life.queue.push(chain, 0)
                received += guest.driver.get_used() is not None
            ended = True
        finally:
            life.end()
    received += guest.driver.get_used() is not None
    return sent, received, ended
