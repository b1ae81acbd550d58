"""The supervisor is killed as its workers are, and what it had comes back from the service manager's store."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from tests import counts
from tests.backend.rig import EVERYTHING, SPLIT, Ram, start_ring
from tests.supervisor.manager import STARTS, Managed, managed
from tests.supervisor.numbered import Load, Numbered
from tests.supervisor.rig import NO_INFLIGHT, Board, Counter, MakeDevice, Prepare, Service, fork, now_and_then, serve
from tests.supervisor.test_kills import WITH_INFLIGHT
from tests.supervisor.test_steps import FIRST, SECOND, STEP, live
from vhost_user.message import FrontendRequest, ProtocolFeature, encode_message
from vhost_user.supervisor import Supervisor, Worker, front_end
from vhost_user.supervisor.fd_store import FdStore
from vhost_user.supervisor.ledger import Ledger
from vhost_user.supervisor.listening import Listening
from vhost_user.units import GuestAddress
from vhost_user.unix_socket import listen
from vhost_user.vring import SplitLayout


def ready() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])


def supervise(path: Path, board: Board, make: MakeDevice, prepare: Prepare, arm: Callable[[Board], None]) -> None:
    """The main process of a service."""

    def start(control: socket.socket) -> int:
        return fork(lambda: work(control))

    def work(control: socket.socket) -> None:
        sys.setprofile(None)
        serve(control, board, ["device0"], make, prepare, threads=False)

    if os.environ["LISTEN_FDS"] != "0":
        arm(board)
    store = FdStore.from_environment()
    assert store is not None
    ledger = Ledger(store)
    if ledger.blank:
        supervisor = Supervisor(start, {"device0": listen(path)}, on_ready=ready, book=ledger)
    else:
        supervisor = Supervisor.resume(start, ledger, on_ready=ready)
    arm(board)
    assert supervisor.run() == 0


@contextmanager
def stored(
    directory: Path,
    make: MakeDevice = Counter,
    prepare: Prepare = lambda *_: None,
    arm: Callable[[Board], None] = lambda _: None,
) -> Iterator[tuple[Service, Managed]]:
    """A supervised device whose supervisor may die. `arm` is called when it begins with something to go on with, and
    before it runs."""
    board = Board()
    path = directory / "device0.sock"
    with managed(directory, lambda: supervise(path, board, make, prepare, arm)) as manager:
        wait(manager, 1)
        yield Service(manager.pid, [str(path)], board), manager
    board.close()


def wait(manager: Managed, starts: int, timeout: float = 20.0) -> None:
    """Until the service was ready so often."""
    deadline = time.monotonic() + timeout
    while manager.board[STARTS] < starts:
        assert time.monotonic() < deadline
        time.sleep(0.001)


PUT, LOST = 24, 25
"""Words of the board: what a worker was told is kept, and whether another one found less."""


def keep_counting(worker: Worker, board: Board) -> None:
    """Have this worker put a number all the time, small and in several parts, and tell the board afterwards."""
    data = worker.bytes.get("number", bytes(8))
    kept = int.from_bytes(data[:8], "little")
    board[LOST] |= kept < board[PUT] or len(data) != 8 + kept % 2 * 100_000

    def count(number: int) -> None:
        while True:
            number += 1
            worker.put("number", number.to_bytes(8, "little") + bytes(number % 2 * 100_000))
            board[PUT] = number

    threading.Thread(target=count, args=(kept,), daemon=True).start()


def test_what_was_put_is_kept_though_nobody_had_read_it(tmp_path: Path) -> None:
    with stored(tmp_path, prepare=keep_counting) as (service, manager):
        for _ in range(counts.STORE_KILLS):
            service.wait_for(PUT, service.board[PUT] + 1)
            starts = manager.board[STARTS]
            manager.kill_main(after=0.003)
            wait(manager, starts + 1)
            assert not service.board[LOST]


def killing(service: Service, manager: Managed, kills: list[int]) -> Callable[[random.Random], None]:
    """Kills the supervisor, or a worker; `kills` counts."""

    def kill(pauses: random.Random) -> None:
        if pauses.random() < 0.3:
            service.kill_worker()
        elif pauses.random() < 0.5 or manager.board[STARTS] > kills[0]:  # it need not be ready, but mostly
            manager.kill_main(after=pauses.choice([0, 0.003]))
            kills[0] += 1

    return kill


@pytest.mark.parametrize("protocol_features", [NO_INFLIGHT, WITH_INFLIGHT], ids=["private area", "shared buffer"])
@pytest.mark.parametrize("features", [SPLIT, EVERYTHING], ids=["split", "packed"])
def test_messages_while_supervisors_die(
    tmp_path: Path,
    features: int,
    protocol_features: ProtocolFeature,
    rng: random.Random,
    figure: Callable[[str, object], None],
) -> None:
    """Rings are stopped and started, and regions come and go, and each message has its one answer."""
    rams = [Ram(), Ram(guest=1 << 30, user=1 << 40)]
    kills = [0]
    with (
        stored(tmp_path, Numbered) as (service, manager),
        service.connect(features=features, protocol_features=protocol_features) as frontend,
    ):
        frontend.regions.share([rams[0].region])
        if frontend.has(ProtocolFeature.INFLIGHT_SHMFD):
            frontend.track_inflight(2, 256)
        ring = start_ring(frontend, rams[0], size=32)
        load = Load(ring, service.board, rng)
        with now_and_then(killing(service, manager, kills), rng):
            while kills[0] < counts.STORE_KILLS:
                load.step()
                frontend.regions.add(rams[1].region)
                ring.vring.enable(False)
                base = ring.vring.stop()
                load.receive()
                if isinstance(ring.layout, SplitLayout):
                    assert base == ring.memory.load16(GuestAddress(ring.layout.used + 2))
                load.step()
                ring.vring.start(ring.layout, base)
                frontend.regions.remove(rams[1].region)
        load.finish()
    for ram in rams:
        ram.close()
    figure(f"supervisors killed ({features:#x}, {protocol_features:#x})", kills[0])


def count_steps(board: Board) -> None:
    """Have this supervisor count, and die at the step that the board says."""
    accepting = [False]

    def step(frame: FrameType, event: str, _: object) -> None:
        if frame.f_code is Listening._accept.__code__:
            accepting[0] = event == "call"  # a front end that is accepted, and not kept yet, is lost: ledger.py
        if accepting[0]:
            return
        at = board[STEP] = board[STEP] + 1
        if at in (board[FIRST], board[SECOND]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(step)


@pytest.mark.parametrize("inflight", [False, True], ids=["private area", "shared buffer"])
def test_a_supervisor_may_die_between_any_two_steps(
    tmp_path: Path, inflight: bool, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    with stored(tmp_path, Numbered, arm=count_steps) as (service, manager):
        board = service.board

        def attempt(first: int, second: int) -> None:
            ram, more = Ram(), Ram(guest=1 << 30, user=1 << 40)
            board[STEP], board[FIRST], board[SECOND] = 0, first, second
            live(service, ram, more, EVERYTHING, inflight)
            for each in (ram, more):
                each.close()

        attempt(0, 0)
        steps, before = board[STEP], manager.board[STARTS]
        chosen = sorted(rng.sample(range(1, steps), min(steps - 1, counts.STORE_STEPS // 2)))
        for first in chosen:
            # Half of the second deaths are while the next supervisor begins.
            attempt(first, first + rng.randrange(1, rng.choice([1000, steps])))
        assert manager.board[STARTS] > before
    kind = "shared buffer" if inflight else "private area"
    figure(f"steps of a supervisor in a session's life ({kind})", steps)
    figure(f"of these, at which it died ({kind})", len(chosen))


def test_one_that_reads_no_reply_is_closed_by_the_next_supervisor_too(tmp_path: Path) -> None:
    """Or it would keep its device from others, and what it was sent in memory, for good."""

    def arm(_: Board) -> None:
        if os.environ.get("LISTEN_FDS", "0") != "0":
            front_end.TIME_LIMIT = 0.2

    with stored(tmp_path, arm=arm) as (service, manager), socket.socket(socket.AF_UNIX) as silent:
        silent.connect(service.paths[0])
        silent.settimeout(1)
        questions = encode_message(FrontendRequest.GET_FEATURES, b"") * 100_000  # more than there is room for
        with pytest.raises(TimeoutError):  # a reply finds no room either, and no question is read any more
            silent.sendall(questions)
        poll = select.poll()
        poll.register(silent, 0)
        assert not poll.poll(0)
        manager.kill_main()
        wait(manager, 2)
        assert poll.poll(20_000) == [(silent.fileno(), select.POLLHUP)]
