"""Rings of small requests in batches: what goes back and who is called, how long is looked, and whose turn it is."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests import counts
from tests.backend.rig import DATA, EVERYTHING, SPLIT, Pair, Ram, Running, pair, start_ring
from tests.backend.test_notices import wait_for_calls
from tests.rings.answerer import PythonAnswerer
from tests.rings.two_processes import other_process
from vhost_user.awake import LONGEST_LOOK
from vhost_user.backend import Device, Vring, batches
from vhost_user.backend.batches import RingBatches
from vhost_user.errors import PeerError
from vhost_user.memory import GuestMemory
from vhost_user.message import FrontendRequest, VringFd
from vhost_user.units import GuestAddress
from vhost_user.vring import Batch, BatchedQueue, SplitDriver, SplitLayout, SplitQueue

SIZE = 8
"""Bytes of a request, and of an answer."""

FORMATS = pytest.mark.parametrize("features", [SPLIT, EVERYTHING], ids=["split", "packed"])


class Same(PythonAnswerer):
    """Answers each request at once, in the C core's hands, by itself; `most` of them each time that it is asked."""

    def __init__(self, most: int = 256) -> None:
        self.asked = 0

        def answer(_: int, _keys: int, requests: int, count: int, answers: int) -> int:
            self.asked += 1
            ctypes.memmove(answers, requests, SIZE * min(count, most))
            return min(count, most)

        super().__init__(answer)


class Batched(Device):
    """Answers a request by itself, and refuses one that begins with `!`."""

    name = "batched"
    queue_count = 2
    max_queue_size = 256

    def __init__(self, *, at_once: bool = False, most: int = 16) -> None:
        self._answerer = Same() if at_once else None
        self._most = most
        self._rings: dict[int, RingBatches] = {}
        self.turns = 0
        self.more = False
        self.in_between: Callable[[Vring], object] = lambda _: None
        """Called while a batch is handled."""

    def on_kick(self, vring: Vring) -> bool:
        self.more = True
        self.turns += 1
        ring = self._rings.get(vring.index)
        if ring is None or not ring.fits(vring):
            batch = Batch(vring.size, self._most, SIZE, SIZE)
            ring = self._rings[vring.index] = RingBatches(vring, batch, self._handle, self._answerer)
        self.more = ring.serve()
        return self.more

    def stay_awake(self) -> None:
        """At the next kick the driver of ring 0 is one that asks again at once."""
        self._rings[0]._idle_since = time.monotonic_ns() + 10**12

    def until_served(self) -> None:
        """Wait until rings have been looked at as often as they are going to be."""
        while self.more:
            time.sleep(0.001)

    def _handle(self, ring: RingBatches) -> None:
        self.in_between(ring._vring)
        batch = ring.batch
        for first, end in batch.asking():
            _, requests, answers = batch.part(first, end)
            for at in range(0, SIZE * (end - first), SIZE):
                if requests[at] == ord("!"):
                    raise PeerError("request", "!", "one that can be answered")
                answers[at : at + SIZE] = requests[at : at + SIZE]


KINDS = ("good", "in pieces", "malformed", "request too short", "no room for the answer")


def exchange(ring: Running, kinds: list[str]) -> None:
    """Send a chain of each kind; all of them come back, in order, each with what it is to have."""
    sent = []
    for number, kind in enumerate(kinds):
        at, answer = (GuestAddress(DATA + 64 * number + part) for part in (0, 32))
        request = b"no. %4d" % ring.next_data
        ring.next_data += 1
        ring.memory.write(at, request)
        readable, room, written = [(int(at), SIZE)], [(int(answer), SIZE)], 0
        match kind:
            case "good":
                written = SIZE
            case "in pieces":
                readable, room = [(at, 3), (at + 3, SIZE - 3)], [(answer, 1), (answer + 1, SIZE - 1)]
                written = SIZE
            case "malformed":
                readable = [(2**40, SIZE)]  # where there is no memory
            case "request too short":
                readable = [(at, SIZE - 1)]
            case _:
                room = [(answer, SIZE - 1)]
        sent.append((ring.driver.add(readable, room), written, answer, request))
    ring.kick()
    for token, written, answer, request in sent:
        while (used := ring.driver.get_used()) is None:
            if not ring.driver.enable_interrupts():
                assert ring.vring.wait(5), "no call came"
        assert used == (token, written)
        assert ring.memory.read(answer, written) == request[:written]


@FORMATS
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("structure", ["nothing", "inflight area", "log"])
def test_a_driver_hears_of_whatever_goes_back(features: int, at_once: bool, structure: str, rng: random.Random) -> None:
    """Malformed chains too, alone or before good ones; one that asks to be called waits for nothing else. With a log
    chains are looked at one by one."""
    with pair(Batched(at_once=at_once), features=features) as both:
        if structure == "inflight area":
            both.frontend.track_inflight(2, 16)
        ring = start_ring(both.frontend, both.ram)
        if structure == "log":
            both.frontend.start_logging(GuestAddress(both.ram.region.guest_address + both.ram.region.size - 1))
            ring.vring.set_log(GuestAddress(0))
        ring.echo(b"is there")  # and the call that a ring is started with has come
        for kinds in (["malformed"], ["malformed", "good"], ["good"] * 5):
            exchange(ring, kinds)
        for _ in range(20):
            exchange(ring, rng.choices(KINDS, k=rng.randrange(1, 5)))


@FORMATS
@pytest.mark.parametrize("at_once", [False, True])
def test_a_call_may_be_a_pipe_or_nothing(features: int, at_once: bool) -> None:
    with pair(Batched(at_once=at_once), features=features) as both:
        ring = start_ring(both.frontend, both.ram)
        ring.echo(b"is there")
        reader, writer = os.pipe()
        requests, index = both.frontend.requests, VringFd(0)
        requests.tell(FrontendRequest.SET_VRING_CALL, index, [writer])
        os.close(writer)
        assert not ring.driver.enable_interrupts()
        assert os.read(reader, 64), "the call that comes with another descriptor"
        ring.send(b"by pipes")
        ring.kick()
        assert os.read(reader, 64)
        ring.collect(1)
        requests.tell(FrontendRequest.SET_VRING_CALL, VringFd(0, no_fd=True), [])
        os.close(reader)
        ring.send(b"no calls")
        ring.kick()
        while (used := ring.driver.get_used()) is None:
            pass
        assert used[1] == SIZE


class Watched:
    """What a queue is told about patience; its clock is the test's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 10**12
        self.patience: list[int] = []
        monkeypatch.setattr(time, "monotonic_ns", lambda: self.now)
        serve, look = BatchedQueue.serve, BatchedQueue.look

        def watched_serve(
            queue: BatchedQueue, batch: Batch, most: int, answerer: Same, call: int, patience: int
        ) -> int:
            self.patience.append(patience)
            return serve(queue, batch, most, answerer, call, patience)

        def watched_look(queue: BatchedQueue, nanoseconds: int) -> bool:
            self.patience.append(nanoseconds)
            return look(queue, nanoseconds)

        monkeypatch.setattr(BatchedQueue, "serve", watched_serve)
        monkeypatch.setattr(BatchedQueue, "look", watched_look)

    def take(self) -> set[int]:
        """How long was looked since the last call, other than not at all."""
        found, self.patience = set(self.patience) - {0}, []
        return found


@pytest.mark.parametrize("at_once", [False, True])
def test_only_a_quick_driver_is_waited_for(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    with pair(Batched(at_once=at_once)) as both:
        ring = start_ring(both.frontend, both.ram)

        def ask() -> set[int]:
            ring.echo(b"question")
            wait_for_calls(both)
            both.frontend.requests.confirm()
            return watched.take()

        ask()
        watched.now += 10 * LONGEST_LOOK
        assert ask() == set(), "it was away"
        watched.now += LONGEST_LOOK
        assert ask() == set(), "it took too long"
        watched.now += LONGEST_LOOK - 1
        assert ask() == {LONGEST_LOOK}, "it was quick"
        # It ended LONGEST_LOOK before the look's end, which is where the clock stands.
        assert ask() == set(), "it came after the look"
        assert ask() == {LONGEST_LOOK}, "it was quick again"


@pytest.fixture
def turns_of_five(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn ends with the first batch, and whoever is alone may stay for long."""
    monkeypatch.setattr(batches, "LONGEST_TURN", 0)
    monkeypatch.setattr(batches, "LONGEST_STAY", 10**12)


def turns_for_eight(both: Pair, device: Batched, in_between: Callable[[Vring], object]) -> int:
    """How often the loop has the device serve eight requests, of which it takes five at a time; what is to happen in
    between is done while it handles a batch."""
    ring = start_ring(both.frontend, both.ram)
    ring.echo(b"is there")
    device.until_served()
    device.stay_awake()
    device.in_between = in_between
    turns = device.turns
    exchange(ring, ["good"] * 8)
    device.until_served()
    return device.turns - turns


@FORMATS
def test_who_is_alone_is_served_on(features: int, turns_of_five: None) -> None:
    """Its own kicks call nobody away."""
    device = Batched(most=5)
    with pair(device, features=features) as both:
        assert turns_for_eight(both, device, kick_again) == 1


def kick_again(vring: Vring) -> None:
    """As a driver does that doesn't look whether a kick is wanted."""
    assert vring.kick is not None
    vring.kick.signal()


@FORMATS
def test_others_have_their_turn_in_between(features: int, turns_of_five: None) -> None:
    device = Batched(most=5)
    with pair(device, features=features) as both:
        heard: list[int] = []

        def ask(_: Vring) -> None:
            both.server.loop.call_soon(lambda: heard.append(device.turns))

        assert turns_for_eight(both, device, ask) == 3
        assert len(set(heard)) == 2, "each was called before the next turn"


@FORMATS
def test_nobody_stays_for_ever(features: int, turns_of_five: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "LONGEST_STAY", 0)
    device = Batched(most=5)
    with pair(device, features=features) as both:
        assert turns_for_eight(both, device, lambda _: None) == 3


def test_a_process_with_one_processor_looks_at_no_ring() -> None:
    """Who looks there keeps the driver from asking."""
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from vhost_user import awake; raise SystemExit(awake.looking.acquire(blocking=False))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@FORMATS
def test_a_request_that_a_handler_refuses_fails_its_ring_only(features: int) -> None:
    """What was answered before it may have gone back or not; the other ring goes on, and so does this one, anew."""
    with pair(Batched(), features=features) as both:
        first, second = (start_ring(both.frontend, both.ram, index) for index in range(2))
        first.send(b"good one")
        first.send(b"!refused")
        first.kick()
        second.echo(b"goes on.")
        while not first.vring.failed:
            both.frontend.requests.confirm()
        first.vring.stop()
        again = start_ring(both.frontend, both.ram, 0)
        again.echo(b"is anew.")
        second.echo(b"still so")


@FORMATS
def test_a_ring_of_another_size_has_room_of_its_own(features: int) -> None:
    with pair(Batched(at_once=True), features=features) as both:
        for size in (2, 256, 16):
            ring = start_ring(both.frontend, both.ram, size=size)
            for _ in range(3):
                for number in range(min(size // 2, 64)):
                    ring.send(b"no. %4d" % number)
                ring.kick()
                ring.collect(min(size // 2, 64))
            ring.vring.stop()


def keep_full(ring: Running, memory: GuestMemory) -> None:
    """Be a driver that has always asked for more, and is always quick."""
    while not memory.load16(STOP):
        while ring.driver.free >= 2:
            ring.send(b"endless.")
        ring.kick()
        while ring.driver.get_used() is not None:
            pass


STOP = GuestAddress(0x3F000)


@FORMATS
@pytest.mark.parametrize("at_once", [False, True])
def test_a_driver_that_never_stops_asking_holds_nobody_up(features: int, at_once: bool) -> None:
    """Messages are answered, the other ring is served, and the ring itself can be stopped and started under it."""
    with pair(Batched(at_once=at_once), features=features) as both:
        busy, quiet = (start_ring(both.frontend, both.ram, index, size=256) for index in range(2))
        pid = os.fork()
        if pid == 0:
            try:
                keep_full(busy, both.ram.memory)
            finally:
                os._exit(0)
        try:
            for _ in range(counts.MESSAGES_UNDER_LOAD):
                both.frontend.requests.confirm()
                quiet.echo(b"in turn.")
            busy.vring.stop()
            quiet.echo(b"alone...")
        finally:
            both.ram.memory.store16(STOP, 1)
            os.waitpid(pid, 0)


def serve_without_room(memory: GuestMemory) -> None:
    """As if a driver took back what it had made available whenever it is to be taken: one is seen, none is there."""
    layout = SplitLayout.place(256, GuestAddress(0x10000))
    queue, driver = SplitQueue(memory, **vars(layout)), SplitDriver(memory, layout)
    driver.add([(DATA, SIZE)], [(DATA, SIZE)])
    assert queue.look(1)
    for _ in range(3):
        assert queue.serve(Batch(2, 1, SIZE, SIZE), 256, Same(), -1, LONGEST_LOOK) == 0
    assert queue.serve(Batch(256, 1, SIZE, SIZE), 256, answerer := Same(), -1, LONGEST_LOOK) == 0
    assert answerer.raw.answered == 1


def test_what_is_seen_and_not_taken_is_not_looked_for_again() -> None:
    """Or a driver could hold its device for as long as it likes. In a process of its own, which can be killed."""
    with other_process(serve_without_room) as (memory, other):
        other.finish()
    memory.replace(())


@pytest.mark.parametrize(
    ("most", "once", "asked", "answered", "left"),
    [
        (2, False, 4, 7, 0),  # batches of 4 and of 3
        (2, True, 1, 2, 4),  # the batch that they are of is the caller's now
        (4, True, 1, 4, 0),  # and the rest is in the ring
    ],
)
def test_who_answers_at_once_is_asked_as_long_as_it_answers_or_once(
    most: int, once: bool, asked: int, answered: int, left: int
) -> None:
    ram = Ram(user=None)
    layout = SplitLayout.place(256, GuestAddress(0))
    queue, driver = SplitQueue(ram.memory, **vars(layout)), SplitDriver(ram.memory, layout)
    for _ in range(7):
        driver.add([(DATA, SIZE)], [(DATA, SIZE)])
    answerer, batch = Same(most), Batch(256, 4, SIZE, SIZE)
    answerer.raw.ask_once(once)
    answerer.raw.pointer.longest = 10**12  # however slow the machine is
    assert queue.serve(batch, 256, answerer, -1, 0) == left
    assert (answerer.asked, answerer.raw.answered) == (asked, answered)
    assert not left or batch.given == answered
    assert sum(driver.get_used() is not None for _ in range(7)) == answered
    ram.close()
