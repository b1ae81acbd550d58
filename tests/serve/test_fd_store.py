"""`virtio-mem serve` with a service manager's descriptor store: the whole service is killed, or started again, and no
front end notices."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import counts
from tests.peers.processes import kill_worker_of, wait_until
from tests.serve.rig import BLOCK_SIZE, FORMS, guest, zone
from tests.serve.supervised import _fork_worker
from tests.serve.test_daemon import COMMAND, ROOT, zone_text
from tests.serve.test_kills import asked_under_kills
from tests.supervisor.manager import FAILED, MAIN, STARTS, STORED, Managed, managed
from vhost_user.errors import HostError
from vhost_user.frontend import Frontend
from virtio_mem.client import Client
from virtio_mem.protocol import RequestType, ResponseType
from virtio_mem.serve.daemon import notify_service_manager, serve
from virtio_mem.serve.plan import ServePlan

PLUG, ACK = RequestType.PLUG, ResponseType.ACK


def started(manager: Managed, starts: int) -> None:
    wait_until(lambda: manager.board[STARTS] >= starts, f"the service is ready for the {starts}th time")


class Killer:
    """Kills the supervisor or its worker every now and then."""

    def __init__(self, manager: Managed, rng: random.Random) -> None:
        self._manager, self._rng = manager, rng
        self.supervisors = self.workers = 0

    def perhaps(self, share: float = 0.3) -> None:
        if self._rng.random() >= share:
            return
        time.sleep(self._rng.choice([0.004, 0.04]) * self._rng.random())
        if self._rng.random() < 0.7:
            self._manager.kill_main(after=self._rng.choice([0, 0.003]))
            self.supervisors += 1
            return
        self.workers += kill_worker_of(self._manager.board[MAIN])


@pytest.mark.parametrize("form", FORMS)
def test_a_guest_never_notices(
    form: str, tmp_path: Path, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    answers: Counter[str] = Counter()
    plan = ServePlan(zones=(zone(),))
    sockets = {"mem0": tmp_path / "mem0.sock"}

    def service() -> None:
        assert serve(plan, sockets, worker=_fork_worker, announce=lambda: notify_service_manager("READY=1")) == 0

    with guest(form) as machine, managed(tmp_path, service) as manager:
        started(manager, 1)
        with Frontend.connect(str(sockets["mem0"]), features=machine.features, timeout=30) as frontend:
            killer = Killer(manager, rng)
            killer.perhaps()
            machine.start(frontend)
            while killer.supervisors < counts.SERVE_STORE_KILLS or not (answers["PLUG"] and answers["UNPLUG"]):
                answers[asked_under_kills(machine, frontend, killer.perhaps, rng, restarts=0.05)] += 1
            machine.check(frontend)
    figure(f"services killed under a guest, {form} ring", killer.supervisors)
    figure(f"workers killed besides, {form} ring", killer.workers)
    figure(f"requests served while services are killed, {form} ring", answers.total())


class Program:
    """The program itself, whose options may be others each time that it is started."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "arguments"
        self.options()

    def options(self, *words: str) -> None:
        directory = self._file.parent
        zones = ("--zone", zone_text(directory), "--api-socket", str(directory / "api.sock"))
        self._file.write_text("\n".join(words or zones))

    def __call__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        os.execve(sys.executable, [*COMMAND, *self._file.read_text().splitlines()], environment)


def zone_told(directory: Path) -> dict[str, Any]:
    """What the API says of the one zone."""
    (zone,) = Client(directory / "api.sock").info()["zones"]
    return dict(zone)


def test_the_program_is_started_again(tmp_path: Path) -> None:
    """By SIGKILL, and by SIGTERM as `systemctl restart` does: the front end, the API and the resize are there."""
    program = Program(tmp_path)
    with guest() as machine, managed(tmp_path, program, restarts=True) as manager:
        started(manager, 1)
        with Frontend.connect(str(tmp_path / "mem0.sock"), features=machine.features, timeout=30) as frontend:
            machine.start(frontend)
            assert machine.ask(frontend, PLUG, 0, 4) is ACK
            operation = Client(tmp_path / "api.sock").resize_zone("mem0", 8 * BLOCK_SIZE)
            for number, starts in ((signal.SIGKILL, 2), (signal.SIGTERM, 3)):
                os.kill(manager.board[MAIN], number)
                assert machine.ask(frontend, PLUG, 2 * starts) is ACK
                machine.check(frontend, prefault=False)
                started(manager, starts)
                # A moment after the API is there: its process takes sessions over when it is ready.
                wait_until(lambda: zone_told(tmp_path)["connected"], "the session is taken over")
                told = zone_told(tmp_path)
                assert told["plugged_size"] == len(machine.plugged) * BLOCK_SIZE
                assert told["requested_size"] == 8 * BLOCK_SIZE
                assert Client(tmp_path / "api.sock").operation(operation)["state"] == "running"
        wait_until(lambda: not zone_told(tmp_path)["connected"], "the session has ended")
        with guest() as other, Frontend.connect(str(tmp_path / "mem0.sock"), features=other.features) as frontend:
            other.start(frontend)
            assert other.config(frontend).plugged_size == len(machine.plugged) * BLOCK_SIZE


def test_other_options_begin_anew_unless_a_front_end_is_connected(tmp_path: Path) -> None:
    program = Program(tmp_path)
    with guest() as machine, managed(tmp_path, program, restarts=True) as manager:
        started(manager, 1)
        stored = manager.board[STORED]
        with Frontend.connect(str(tmp_path / "mem0.sock"), features=machine.features, timeout=30) as frontend:
            machine.start(frontend)
            assert machine.ask(frontend, PLUG, 0, 4) is ACK
            other = ("--zone", zone_text(tmp_path, addr="8G"))
            program.options(*other)
            manager.kill_main()
            wait_until(lambda: manager.board[FAILED], "it is refused, and the manager tries again")
            assert manager.board[STARTS] == 1
            program.options("-v", "--zone", zone_text(tmp_path), "--api-socket", str(tmp_path / "api.sock"))
            assert machine.ask(frontend, PLUG, 4) is ACK
            machine.check(frontend, prefault=False)
        program.options(*other)
        wait_until(lambda: manager.board[STORED] <= stored, "what the front end had leaves the store")
        starts = manager.board[STARTS]
        manager.kill_main()
        started(manager, starts + 1)
        with guest() as another, Frontend.connect(str(tmp_path / "mem0.sock"), features=another.features) as frontend:
            another.start(frontend)
            config = another.config(frontend)
            assert (config.addr, config.plugged_size) == (8 << 30, 0)


@pytest.mark.parametrize("connected", [False, True])
def test_what_another_version_was_told(tmp_path: Path, connected: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """The first supervisor is of a later version, whose plans have a field that this one doesn't know."""
    sockets = {"mem0": tmp_path / "mem0.sock"}
    encode, decode = ServePlan.encode, ServePlan.decode

    def encode_later(plan: ServePlan) -> bytes:
        return json.dumps({**json.loads(encode(plan)), "later": 1}).encode()

    def decode_later(data: bytes) -> ServePlan:
        return decode(json.dumps({key: value for key, value in json.loads(data).items() if key != "later"}).encode())

    def service() -> None:
        if os.environ["LISTEN_FDS"] == "0":
            ServePlan.encode = encode_later  # type: ignore[method-assign, assignment]
            ServePlan.decode = decode_later  # type: ignore[method-assign]
        try:
            plan = ServePlan(zones=(zone(),))
            assert serve(plan, sockets, worker=_fork_worker, announce=lambda: notify_service_manager("READY=1")) == 0
        except HostError as error:
            sys.stderr.write(f"{error}\n")
            sys.stderr.flush()
            os._exit(1)

    with guest() as machine, managed(tmp_path, service, status=int(connected)) as manager, ExitStack() as stack:
        started(manager, 1)
        if connected:
            stack.enter_context(Frontend.connect(str(sockets["mem0"]), features=machine.features, timeout=30))
        manager.kill_main()
        if connected:
            wait_until(lambda: manager.board[FAILED] == 1, "it is refused")
        else:
            started(manager, 2)
    assert ("a VMM is connected that was served by it" in capfd.readouterr().err) is connected


def test_a_store_that_is_too_small_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with managed(tmp_path, Program(tmp_path), room=20, status=2) as manager:
        wait_until(lambda: manager.board[FAILED] == 1, "it is refused")
    assert "FileDescriptorStoreMax=20: has to be at least 48" in capfd.readouterr().err
