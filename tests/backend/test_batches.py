"""A device that serves its ring in batches: what its driver sees, however the ring has to be looked at."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.backend.devices import Echo
from tests.backend.rig import DATA, EVERYTHING, SIZE, SPLIT, Pair, Running, pair, start_ring
from vhost_user.backend import Vring, batches
from vhost_user.backend.batches import RingBatches
from vhost_user.units import GuestAddress
from vhost_user.vring import Batch

FORMATS = pytest.mark.parametrize("features", [SPLIT, EVERYTHING], ids=["split", "packed"])

REQUEST, ANSWER, MOST = 8, 4, 5
NOWHERE = 1 << 40


class InBatches(Echo):
    """Answers 8 bytes by the first 4 of them."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: RingBatches | None = None
        self.turns = 0
        self.more = True

    def on_kick(self, vring: Vring) -> bool:
        self.turns += 1
        self.more = True
        if self.batches is None or not self.batches.fits(vring):
            self.batches = RingBatches(vring, Batch(vring.size, MOST, REQUEST, ANSWER), self.answer)
        self.more = self.batches.serve()
        return self.more

    def keep_awake(self, *, others: bool) -> None:
        """At the next kick the driver is one that asks again at once, and others wait, or do not."""
        assert self.batches is not None
        self.batches._vring.others_wait = lambda: others
        self.batches._idle_since = time.monotonic_ns() + 10**12

    def answer(self, served: RingBatches) -> None:
        batch = served.batch
        for first, end in batch.asking():
            for member in range(first, end):
                _, requests, answers = batch.part(member, member + 1)
                answers[:] = requests[:ANSWER]
            served.give(end)
            self.served += end - first


class World:
    """Sends requests of all kinds, and knows what each gets."""

    def __init__(self, both: Pair, device: InBatches) -> None:
        self.both, self.device = both, device
        self.ring: Running = start_ring(both.frontend, both.ram)
        self.sent: dict[int, tuple[GuestAddress, bytes]] = {}
        self.order: list[int] = []
        self._number = 0

    def send(self, kind: str) -> None:
        """A chain; without a kick."""
        self._number += 1
        at = GuestAddress(DATA + 64 * (self._number % 64))
        request, answer = self._number.to_bytes(REQUEST, "little"), GuestAddress(at + 32)
        self.ring.memory.write(at, request)
        readable: list[tuple[int, int]] = [(at, REQUEST)]
        room: list[tuple[int, int]] = [(answer, ANSWER)]
        want = request[:ANSWER]
        match kind:
            case "in pieces":
                readable, room = [(at, 3), (at + 3, 5)], [(answer, 1), (answer + 1, 3)]
            case "malformed":
                readable, want = [(NOWHERE, REQUEST)], b""
            case "request_too_short":
                readable, want = [(at, REQUEST - 1)], b""
            case "no_room_for_response":
                room, want = [(answer, ANSWER - 1)], b""
        token = self.ring.driver.add(readable, room)
        self.sent[token] = answer, want
        self.order.append(token)

    def collect(self) -> None:
        """Wait until all is back, in order, each with what it is to have."""
        while self.order:
            used = self.ring.driver.get_used()
            if used is None:
                if not self.ring.driver.enable_interrupts():
                    assert self.ring.vring.wait(5), "no call came"
                continue
            answer, want = self.sent.pop(used[0])
            assert used == (self.order.pop(0), len(want))
            assert self.ring.memory.read(answer, len(want)) == want

    def until_served(self) -> None:
        """Wait until the back end has looked at its ring as often as it is going to."""
        while self.device.more:
            time.sleep(0.001)


@contextmanager
def world(features: int) -> Iterator[World]:
    device = InBatches()
    with pair(device, features=features) as both:
        here = World(both, device)
        here.send("")
        here.ring.kick()
        here.collect()  # the call that a ring is started with has come
        yield here


def look_alone(here: World) -> None:
    """Have the back end look at each chain by itself: it has to mark what it writes."""
    here.both.frontend.start_logging(GuestAddress(SIZE - 1))
    here.ring.vring.set_log(GuestAddress(0))


@pytest.mark.parametrize("alone", [False, True], ids=["together", "alone"])
@FORMATS
def test_a_chain_that_the_ring_gives_back_is_told_of(features: int, alone: bool) -> None:
    with world(features) as here:
        if alone:
            look_alone(here)
        here.send("malformed")
        here.ring.kick()
        here.collect()


@pytest.mark.parametrize("alone", [False, True], ids=["together", "alone"])
@FORMATS
def test_chains_of_all_kinds_come_back_in_order(features: int, alone: bool, rng: random.Random) -> None:
    kinds = ["", "in pieces", "malformed", "request_too_short", "no_room_for_response"]
    with world(features) as here:
        if alone:
            look_alone(here)
        for _ in range(50):
            for _ in range(rng.randrange(1, 5)):
                here.send(rng.choice(kinds))
            here.ring.kick()
            here.collect()


@pytest.mark.parametrize("others", [True, False])
@FORMATS
def test_others_have_their_turn_in_between(features: int, others: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are any; who is alone is served on."""
    with world(features) as here:
        here.until_served()
        monkeypatch.setattr(batches, "LONGEST_TURN", 0)
        here.device.keep_awake(others=others)
        turns = here.device.turns
        for _ in range(2 * MOST - 2):
            here.send("")
        here.ring.kick()
        here.collect()
        here.until_served()
        assert here.device.turns == turns + (3 if others else 1)


def test_a_process_with_one_processor_looks_at_no_ring() -> None:
    """Who looks there keeps the driver from asking."""
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from vhost_user.backend import batches; raise SystemExit(batches._looking.acquire(blocking=False))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
