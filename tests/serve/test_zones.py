"""Several zones of one service: one whose discard takes long holds up no other, whatever happens to the worker."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests import counts
from tests.peers.processes import wait_until
from tests.serve.rig import FORMS, Guest, guest, zone
from tests.serve.supervised import Supervised, supervised
from tests.serve.test_device import served
from tests.serve.test_kills import Killer, random_request
from tests.supervisor.rig import Board
from vhost_user.frontend import Frontend
from vhost_user.units import ByteCount, HostOffset
from virtio_mem.client import Client
from virtio_mem.protocol import RequestType, ResponseType
from virtio_mem.serve import worker
from virtio_mem.serve.memory import FrontendMemory
from virtio_mem.serve.plan import ServePlan

PLUG, UNPLUG = RequestType.PLUG, RequestType.UNPLUG
ACK = ResponseType.ACK

SLOW_BLOCKS = 8
"""The zone whose discards wait is the one of this size."""

HELD, DISCARDS = 0, 1
"""Words of the board: whether that zone's discards wait, and how many began."""


@contextmanager
def board(monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    """By which the test holds the slow zone's discards, in whatever process they are."""
    made = Board()
    discard = FrontendMemory.discard

    def wait_and_discard(memory: FrontendMemory, offset: HostOffset, size: ByteCount) -> None:
        if memory.size == zone(SLOW_BLOCKS).hotplug_size:
            made[DISCARDS] += 1
            while made[HELD]:
                time.sleep(0.001)
        discard(memory, offset, size)

    monkeypatch.setattr(FrontendMemory, "discard", wait_and_discard)
    yield made
    made[HELD] = 0
    made.close()


class Slow:
    """A service of a slow zone and a quick one, their guests, and their front ends."""

    def __init__(self, directory: Path, on: Board, stack: ExitStack) -> None:
        self.board = on
        self.slow_guest = stack.enter_context(guest(nb_blocks=SLOW_BLOCKS))
        self.quick_guest = stack.enter_context(guest())
        plan = ServePlan(zones=(zone(SLOW_BLOCKS, id_="slow"), zone(id_="quick")), api=True)
        self.service = stack.enter_context(supervised(plan, directory))
        self.slow, self.quick = (
            stack.enter_context(Frontend.connect(str(path), features=self.slow_guest.features, timeout=20))
            for path in self.service.sockets.values()
        )
        self.slow_guest.start(self.slow)
        self.quick_guest.start(self.quick)
        stack.callback(self.let_go)

    def hold(self) -> None:
        """Have the slow zone begin to discard four blocks."""
        assert self.slow_guest.ask(self.slow, PLUG, 0, 4) is ACK
        self.board[HELD] = 1
        self.slow_guest.send_typed(self.slow, UNPLUG, 0, 4)
        self.wait_for_discards(1)

    def wait_for_discards(self, least: int) -> None:
        deadline = time.monotonic() + 10
        while self.board[DISCARDS] < least:
            assert time.monotonic() < deadline, f"{self.board[DISCARDS]} discards, not {least}"
            time.sleep(0.001)

    def use_quick(self) -> None:
        """The quick zone's requests and messages are answered."""
        for type_ in (PLUG, UNPLUG):
            assert self.quick_guest.ask(self.quick, type_, 1, 2) is ACK
        assert self.quick_guest.ask(self.quick, PLUG, 5) is ACK
        self.quick_guest.check(self.quick)
        assert self.quick_guest.ask(self.quick, UNPLUG, 5) is ACK

    def let_go(self) -> None:
        self.board[HELD] = 0

    def finish(self) -> None:
        """The slow zone's discard ends, and is answered."""
        self.let_go()
        response = self.slow_guest.wait(self.slow, 20)
        assert self.slow_guest.took(UNPLUG, 0, 4, response) is ACK
        self.slow_guest.check(self.slow)
        self.use_quick()


@contextmanager
def slow_zone(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    with board(monkeypatch) as on, ExitStack() as stack:
        yield Slow(directory, on, stack)


def test_a_discard_holds_up_no_other_zone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does who looks at all zones, and waits for the one that discards."""
    monkeypatch.setattr(worker, "POLL_INTERVAL", 0.01)
    with slow_zone(tmp_path, monkeypatch) as here:
        here.hold()
        asking = threading.Thread(target=Client(here.service.api_socket).info)
        asking.start()
        time.sleep(0.05)
        here.use_quick()
        with guest() as other, ExitStack() as stack:
            here.quick.close()
            path = str(here.service.sockets["quick"])
            again = stack.enter_context(Frontend.connect(path, features=other.features, timeout=20))
            assert other.config(again).plugged_size == 0
        here.quick_guest.plugged.clear()
        here.let_go()
        asking.join()
        assert here.slow_guest.took(UNPLUG, 0, 4, here.slow_guest.wait(here.slow, 20)) is ACK


def test_the_worker_is_killed_in_a_discard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one finds it begun and takes it up; the other zone does not wait for that either."""
    with slow_zone(tmp_path, monkeypatch) as here:
        here.hold()
        for number in range(2):
            here.service.replace_worker()
            here.wait_for_discards(2 + number)
            here.use_quick()
        here.finish()


def test_an_upgrade_in_a_discard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with slow_zone(tmp_path, monkeypatch) as here:
        before = here.service.worker()
        here.hold()
        here.service.upgrade()
        here.quick_guest.send_typed(here.quick, PLUG, 3)
        time.sleep(0.02)
        assert here.service.worker() == before
        here.let_go()
        assert here.quick_guest.took(PLUG, 3, 1, here.quick_guest.wait(here.quick, 20)) is ACK
        assert here.quick_guest.ask(here.quick, UNPLUG, 3) is ACK
        here.finish()
        wait_until(lambda: here.service.worker() not in {None, before}, "another worker is there")
        here.use_quick()
        assert here.board[DISCARDS] == 1


@pytest.mark.parametrize("form", FORMS)
def test_no_guest_of_several_notices(
    form: str, tmp_path: Path, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    """Workers are killed and replaced while three guests plug and unplug at the same time."""
    plan = ServePlan(zones=tuple(zone(id_=f"mem{number}") for number in range(3)))
    with supervised(plan, tmp_path) as service, ExitStack() as stack:
        machines = [stack.enter_context(driven(service, f"mem{number}", form)) for number in range(3)]
        killer = Killer(service, rng)
        while killer.kills < counts.ZONES_KILLS:
            sent = []
            for machine, frontend in machines:
                request = random_request(machine, rng)
                machine.send_typed(frontend, *request)
                sent.append(request)
            killer.perhaps(0.5)
            for (machine, frontend), request in zip(machines, sent, strict=True):
                assert machine.took(*request, machine.wait(frontend, 20)) is ACK, request
            if rng.random() < 0.05:
                service.upgrade()
        for machine, frontend in machines:
            machine.check(frontend)
    figure(f"workers killed under three guests, {form} rings", killer.kills)


@contextmanager
def driven(service: Supervised, name: str, form: str) -> Iterator[tuple[Guest, Frontend]]:
    path = str(service.sockets[name])
    with guest(form) as machine, Frontend.connect(path, features=machine.features, timeout=20) as frontend:
        machine.start(frontend)
        yield machine, frontend


def test_one_zone_at_a_time_takes_memory_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each looks at how much is left first, and two that look at once would both find enough."""
    populate = FrontendMemory.populate
    within: list[int] = []
    most = []

    def noting(memory: FrontendMemory, offset: HostOffset, size: ByteCount) -> None:
        within.append(1)
        most.append(len(within))
        time.sleep(0.01)
        populate(memory, offset, size)
        within.pop()

    monkeypatch.setattr(FrontendMemory, "populate", noting)
    with ExitStack() as stack:
        pairs = []
        for _ in range(3):
            machine = stack.enter_context(guest())
            pairs.append((machine, stack.enter_context(served(zone())).start(machine)))
        for machine, frontend in pairs:
            machine.send_typed(frontend, PLUG, 0, 2)
        for machine, frontend in pairs:
            assert machine.took(PLUG, 0, 2, machine.wait(frontend)) is ACK
    assert most == [1, 1, 1]
