"""Devices in threads of their own: one that takes its time, or fails, or dies with its worker, is alone with that."""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests import counts
from tests.backend.rig import Ram, Running, start_ring
from tests.supervisor.rig import RESUMED, WORKER, WORKERS, Board, Counter, Service, service
from vhost_user.backend import Device, Server
from vhost_user.backend.answer import Deferred
from vhost_user.backend.structures import StructureHandlers
from vhost_user.chain import Chain
from vhost_user.errors import Disconnected, FieldError
from vhost_user.frontend import PROTOCOL_FEATURES, Frontend
from vhost_user.message import U64, DeviceState, DeviceStateReply, FrontendRequest, ProtocolFeature
from vhost_user.owned_fd import OwnedFd
from vhost_user.supervisor import supervisor, worker
from vhost_user.supervisor.book import Book
from vhost_user.supervisor.endpoint import HandedEndpoint
from vhost_user.supervisor.packets import Kind, Packet, receive

CLOSED, WAITING, GONE, LISTENS = 20, 21, 22, 23
"""Words of the board: whether the first device waits when it is asked to, whether it does, front ends that went; which
thread last read what the supervisor said."""


class Slow(Counter):
    """The first device waits in its ring as long as the board says, if it is asked to."""

    def echo(self, chain: Chain) -> int:
        if self.number == 0 and chain.read(0, min(4, chain.readable)) == b"wait":
            self.wait()
        return super().echo(chain)

    def wait(self) -> None:
        self.board[WAITING] += 1
        while self.board[CLOSED]:
            time.sleep(0.001)

    def disconnected(self) -> None:
        self.board[GONE] += 1


@contextmanager
def ring_of(supervised: Service, number: int) -> Iterator[tuple[Frontend, Running]]:
    ram = Ram()
    with supervised.connect(number) as frontend:
        frontend.regions.share([ram.region])
        yield frontend, start_ring(frontend, ram)
    ram.close()


@contextmanager
def two_of(supervised: Service) -> Iterator[tuple[Running, Running, Frontend]]:
    """The rings of the first device and the second, and the second one's front end."""
    with ring_of(supervised, 0) as (_, first), ring_of(supervised, 1) as (frontend, second):
        yield first, second, frontend


def hold(supervised: Service, ring: Running) -> None:
    """Have the first device wait."""
    supervised.board[CLOSED] = 1
    ring.send(b"wait")
    ring.kick()
    supervised.wait_for(WAITING, 1)


def test_a_device_that_takes_its_time_holds_up_no_other(tmp_path: Path) -> None:
    with (
        service(tmp_path, Slow, devices=2, threads=True) as supervised,
        two_of(supervised) as (first, second, frontend),
    ):
        hold(supervised, first)
        second.echo(b"meanwhile")
        assert frontend.get_config(0, 4) == b"conf"
        supervised.board[CLOSED] = 0
        first.collect(1)


def test_the_others_go_on_when_a_worker_dies_in_the_middle(tmp_path: Path) -> None:
    """The next worker takes up the first device's request, and waits again."""
    with (
        service(tmp_path, Slow, devices=2, threads=True) as supervised,
        two_of(supervised) as (first, second, frontend),
    ):
        hold(supervised, first)
        supervised.kill_worker()
        supervised.wait_for(WAITING, 2)
        second.echo(b"meanwhile")
        assert frontend.get_config(0, 4) == b"conf"
        assert supervised.board[RESUMED] == 2
        supervised.board[CLOSED] = 0
        first.collect(1)
        second.echo(b"after")
        assert (supervised.board[WORKERS], supervised.board[GONE]) == (2, 0)


class SlowToResume(Slow):
    """The first device waits when it is taken over."""

    def resumed(self) -> None:
        if self.number == 0:
            self.wait()
        super().resumed()


def test_sessions_are_rebuilt_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a worker which dies of one has not begun with the next, whose front end is not to blame."""
    monkeypatch.setattr(worker, "PATIENCE", 1000.0)
    with (
        service(tmp_path, SlowToResume, devices=2, threads=True) as supervised,
        two_of(supervised) as (first, second, _),
    ):
        supervised.board[CLOSED] = 1
        supervised.kill_worker()
        supervised.wait_for(WAITING, 1)
        time.sleep(0.05)
        assert supervised.board[RESUMED] == 0
        supervised.board[CLOSED] = 0
        first.echo(b"after")
        second.echo(b"after")
        assert supervised.board[RESUMED] == 2


def test_an_upgrade_waits_for_each_device(tmp_path: Path) -> None:
    with service(tmp_path, Slow, devices=2, threads=True) as supervised, two_of(supervised) as (first, second, _):
        hold(supervised, first)
        os.kill(supervised.pid, signal.SIGHUP)
        second.send(b"for whom it may concern")
        second.kick()
        supervised.board[CLOSED] = 0
        first.collect(1)
        second.collect(1)
        supervised.wait_for(RESUMED, 2)
        assert (supervised.board[WORKERS], supervised.board[WAITING], supervised.board[GONE]) == (2, 1, 0)


def test_an_end_in_the_middle_of_an_upgrade_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another supervisor goes on, a worker is told the same for both, and once: one of its threads has left."""
    monkeypatch.setattr(Book, "lasting", True)
    monkeypatch.setattr(supervisor, "RETIRE_SECONDS", 1000.0)
    with (
        service(tmp_path, Slow, devices=2, threads=True, ends=False) as supervised,
        two_of(supervised) as (first, _, _),
    ):
        hold(supervised, first)
        for number in (signal.SIGHUP, signal.SIGTERM):
            os.kill(supervised.pid, number)
            time.sleep(0.05)
        supervised.board[CLOSED] = 0
        deadline, ended = time.monotonic() + 10, 0
        while not ended and time.monotonic() < deadline:
            time.sleep(0.01)
            ended, status = os.waitpid(supervised.pid, os.WNOHANG)
        assert (ended, status) == (supervised.pid, 0)


def test_front_ends_that_go_meanwhile_are_gone(tmp_path: Path) -> None:
    with service(tmp_path, Slow, devices=2, threads=True) as supervised:
        with ring_of(supervised, 1) as (_, second):
            with ring_of(supervised, 0) as (_, first):
                hold(supervised, first)
            second.echo(b"meanwhile")
            assert supervised.board[GONE] == 0
            supervised.board[CLOSED] = 0
            supervised.wait_for(GONE, 1)
            with ring_of(supervised, 0) as (_, first):
                first.echo(b"the next one")
        supervised.wait_for(GONE, 3)


class Failing(Slow):
    """What happens to the first device in the first worker is no Exception."""

    def wait(self) -> None:
        if self.board[WORKERS] == 1:
            raise SystemExit


def test_a_thread_that_fails_ends_the_worker_and_no_session(tmp_path: Path) -> None:
    with service(tmp_path, Failing, devices=2, threads=True) as supervised, two_of(supervised) as (first, second, _):
        first.echo(b"wait")
        second.echo(b"after")
        assert (supervised.board[WORKERS], supervised.board[GONE]) == (2, 0)


class Refusing(Slow):
    """Fails when its first front end comes."""

    def connected(self) -> None:
        self.board[WAITING] += 1
        if self.board[WAITING] == 1:
            raise ZeroDivisionError


def test_a_session_that_can_not_begin_ends(tmp_path: Path) -> None:
    with service(tmp_path, Refusing, threads=True) as supervised:
        with pytest.raises(Disconnected):
            supervised.connect()
        with supervised.connect() as frontend:
            assert frontend.get_config(0, 4) == b"conf"


class Telling(Slow):
    """Its configuration is whether its thread is the one that was told of the message."""

    def read_config(self, offset: int, size: int) -> bytes:
        del offset, size
        return bytes([threading.get_ident() == self.board[LISTENS]])


@pytest.mark.parametrize("devices", [1, 2])
def test_only_a_single_server_listens_to_the_supervisor_itself(
    tmp_path: Path, devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is woken in between. Of several, a thread of no device's listens."""
    boards: list[Board] = []

    def make(board: Board) -> Telling:
        boards.append(board)
        return Telling(board)

    def note(sock: socket.socket) -> Packet | None:
        boards[0][LISTENS] = threading.get_ident()
        return receive(sock)

    monkeypatch.setattr(worker, "receive", note)
    with (
        service(tmp_path, make, devices=devices, threads=True) as supervised,
        supervised.connect(devices - 1) as frontend,
    ):
        assert frontend.get_config(0, 1) == bytes([devices == 1])


def test_a_single_server_that_fails_or_makes_room_loses_nothing(tmp_path: Path) -> None:
    with service(tmp_path, Failing, threads=True) as supervised, ring_of(supervised, 0) as (frontend, ring):
        ring.echo(b"wait")
        assert supervised.board[WORKERS] == 2
        os.kill(supervised.pid, signal.SIGHUP)
        supervised.wait_for(WORKERS, 3)
        ring.echo(b"after")
        assert frontend.get_config(0, 4) == b"conf"
        assert supervised.board[GONE] == 0


def test_a_worker_that_is_told_to_end_says_so_whatever_its_only_device_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one whose device never ends would never be replaced."""
    monkeypatch.setattr(supervisor, "RETIRE_SECONDS", 0.05)
    with service(tmp_path, Slow, threads=True) as supervised, ring_of(supervised, 0) as (_, ring):
        hold(supervised, ring)
        supervised.kill_worker(signal.SIGTERM)
        supervised.wait_for(WORKERS, 2)
        supervised.wait_for(WAITING, 2)
        supervised.board[CLOSED] = 0
        ring.collect(1)


class Full(Slow):
    """Has its process open nothing more from the moment on at which it is asked for this byte."""

    def read_config(self, offset: int, size: int) -> bytes:
        if offset == 8:
            with OwnedFd.duplicate_of(0) as free:
                resource.setrlimit(resource.RLIMIT_NOFILE, (free.fileno(), free.fileno()))
        return super().read_config(offset, size)


def test_a_worker_without_room_for_descriptors_ends_only_the_session_that_they_are_for(tmp_path: Path) -> None:
    ram = Ram()
    with (
        service(tmp_path, Full, devices=2, threads=True) as supervised,
        supervised.connect(0) as first,
        supervised.connect(1) as second,
    ):
        assert first.get_config(8, 1) == b"a"
        with pytest.raises(Disconnected):
            first.regions.share([ram.region])
        assert second.get_config(0, 4) == b"conf"
        supervised.wait_for(GONE, 1)
        assert (supervised.board[WORKERS], supervised.board[GONE]) == (1, 1)
    ram.close()


class Stateful(Slow):
    """Has a state, and takes any."""

    protocol_features = ProtocolFeature.DEVICE_STATE

    def load_state(self, data: bytes) -> None:
        self.board[WAITING] = len(data)


@pytest.mark.parametrize("threads", [False, True], ids=["one thread", "threads"])
def test_an_upgrade_waits_for_an_answer_that_is_not_known_yet(
    tmp_path: Path, threads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = StructureHandlers._check_device_state

    def note(handlers: StructureHandlers, payload: object, fds: list[OwnedFd]) -> Deferred:
        os.eventfd_write(asked.fileno(), 1)
        return check(handlers, payload, fds)

    monkeypatch.setattr(StructureHandlers, "_check_device_state", note)
    with (
        OwnedFd(os.eventfd(0)) as asked,
        service(tmp_path, Stateful, devices=2, threads=threads) as supervised,
        supervised.connect(0, protocol_features=PROTOCOL_FEATURES) as frontend,
        ring_of(supervised, 1) as (_, second),
    ):
        reader, writer = os.pipe()  # of which the supervisor, a fork, has no copy
        with OwnedFd(reader):
            to_load = (FrontendRequest.SET_DEVICE_STATE_FD, DeviceStateReply, DeviceState(1), [reader])
            assert not frontend.requests.ask(*to_load).error

        def load() -> None:
            os.eventfd_read(asked.fileno())
            os.kill(supervised.pid, signal.SIGHUP)
            time.sleep(0.05)
            workers.append(supervised.board[WORKERS])
            os.write(writer, b"state")
            os.close(writer)

        workers: list[int] = []
        thread = threading.Thread(target=load)
        thread.start()
        assert frontend.requests.ask(FrontendRequest.CHECK_DEVICE_STATE, U64).value == 0
        thread.join()
        supervised.wait_for(WORKERS, 2)
        second.echo(b"after")
        assert (workers, supervised.board[WAITING], supervised.board[GONE]) == ([1], len(b"state"), 0)


def test_the_connection_of_another_thread_is_no_channel(tmp_path: Path) -> None:
    with (
        service(tmp_path, devices=2, threads=True) as supervised,
        supervised.connect(0) as first,
        supervised.connect(1) as second,
    ):
        second.get_config(0, 4)
        other = OwnedFd.duplicate_of(second.requests.fileno())
        with other, pytest.raises(FieldError):
            first.requests.tell(FrontendRequest.SET_BACKEND_REQ_FD, fds=[other.fileno()])
        assert second.get_config(0, 4) == b"conf"


def test_guests_of_several_threads_never_notice(
    tmp_path: Path, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    """Workers are killed, replaced, and die by a thread that fails, while three guests send and receive."""
    with service(tmp_path, devices=3, threads=True) as supervised, ExitStack() as stack:
        rings = [stack.enter_context(ring_of(supervised, number)) for number in range(3)]
        killed = 0
        for _ in range(counts.SUPERVISOR_KILLS):
            while supervised.board[WORKER] == killed:
                time.sleep(0.001)
            for number, (_, ring) in enumerate(rings):
                for _ in range(rng.randrange(1, 8)):
                    ring.send(b"request %d" % number)
                ring.kick()
            time.sleep(rng.choice([0.001, 0.01]) * rng.random())
            if rng.random() < 0.1:
                os.kill(supervised.pid, signal.SIGHUP)
            killed = supervised.kill_worker()
            for frontend, ring in rings:
                assert frontend.get_config(0, 4) == b"conf"
                ring.collect(len(ring.sent))
    figure("workers killed that served three devices in threads", counts.SUPERVISOR_KILLS)


# What is left to another thread.


class Deaf:
    """A supervisor that is told nothing."""

    retired = False

    def tell(self, kind: Kind, *fields: bytes, fds: object = ()) -> None:
        pass

    def connected_names(self) -> set[object]:
        return set()


@pytest.mark.parametrize("runs", [False, True], ids=["stopped", "the session has ended"])
def test_descriptors_that_nobody_takes_are_closed(runs: bool) -> None:
    with Server() as server:
        endpoint = HandedEndpoint(server, Device(), "device", Deaf())
        server.add(endpoint)
        endpoint.begin(1, set(), rebuild=False)
        endpoint.post(lambda link, _: link.close(), [])
        fd = OwnedFd.duplicate_of(0)
        endpoint.post(lambda link, fds: link.message(1, False, b"", fds), [fd])
        if runs:
            server.loop.run_once(0)
            assert fd.closed
    assert fd.closed


def test_errands_are_run_in_order_for_their_own_session() -> None:
    done: list[str] = []
    with Server() as server:
        endpoint = HandedEndpoint(server, Device(), "device", Deaf())
        server.add(endpoint)
        for number in (1, 2):
            endpoint.begin(number, set(), rebuild=False)
            endpoint.post(lambda link, _: done.append(f"errand of {link.number}"), [])
            endpoint.when_done(lambda: done.append("done"))
            endpoint.post(lambda link, _: link.close(), [])
            endpoint.post(lambda link, _: done.append(f"too late for {link.number}"), [])
        server.loop.run_once(0)
    assert done == ["errand of 1", "done", "errand of 2", "done"]
