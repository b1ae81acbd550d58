"""What a supervisor does beside handing on messages: upgrades, messages that kill, what is kept, and the end."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.backend.rig import EVERYTHING, SPLIT, Ram, Running, start_ring
from tests.iotlb.rig import FEATURES, Behind
from tests.supervisor.numbered import Load, Numbered
from tests.supervisor.rig import RESUMED, WORKER, WORKERS, Board, Counter, Service, service
from vhost_user.chain import Chain
from vhost_user.device_status import Status
from vhost_user.errors import Disconnected, FieldError, UsageError
from vhost_user.frontend import Frontend
from vhost_user.message import LOG_PAGE, U64, VIRTIO_F_IOMMU_PLATFORM, FrontendRequest, VringState
from vhost_user.message.table import MAX_PAYLOAD
from vhost_user.owned_fd import OwnedFd
from vhost_user.supervisor import Worker, front_end, sessions, supervisor
from vhost_user.units import GuestAddress

NOTE, ARMED = 20, 21
"""Words of the board that are the test's: what it counts, and whether a device may die of a status by now."""


@contextmanager
def memory() -> Iterator[Ram]:
    ram = Ram()
    try:
        yield ram
    finally:
        ram.close()


@contextmanager
def running(supervised: Service, ram: Ram, number: int = 0) -> Iterator[tuple[Frontend, Running]]:
    with supervised.connect(number) as frontend:
        frontend.regions.share([ram.region])
        yield frontend, start_ring(frontend, ram)


def ended(pid: int, timeout: float = 5.0) -> bool:
    """Whether a process that is not our child ends."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.002)
    return False


def test_constants_are_those_of_the_protocol() -> None:
    assert front_end.MAX_PAYLOAD == MAX_PAYLOAD


# Upgrades.


def upgrade(supervised: Service) -> None:
    os.kill(supervised.pid, signal.SIGHUP)


def end_worker(supervised: Service) -> None:
    """As somebody does who sends SIGTERM to every process."""
    supervised.kill_worker(signal.SIGTERM)


ways_to_replace = pytest.mark.parametrize("replace", [upgrade, end_worker])


@ways_to_replace
def test_no_front_end_notices_an_upgrade(
    replace: Callable[[Service], None], tmp_path: Path, rng: random.Random
) -> None:
    with memory() as ram, service(tmp_path, Numbered) as supervised, running(supervised, ram) as (frontend, ring):
        load = Load(ring, supervised.board, rng)
        for number in range(1, 6):
            replace(supervised)
            while supervised.board[WORKERS] <= number:
                load.step()
                assert frontend.get_config(0, 4) == b"conf"
            load.step()
        load.finish()
        supervised.wait_for(RESUMED, 5)


class Upgraded(Counter):
    """Counts the front ends that went."""

    def disconnected(self) -> None:
        self.board[NOTE] += 1


@ways_to_replace
def test_an_upgrade_is_no_disconnection(replace: Callable[[Service], None], tmp_path: Path) -> None:
    with service(tmp_path, Upgraded) as supervised:
        with memory() as ram, running(supervised, ram) as (_, ring):
            replace(supervised)
            supervised.wait_for(RESUMED, 1)
            ring.echo(b"after")
            assert supervised.board[NOTE] == 0
        supervised.wait_for(NOTE, 1)


def test_a_device_may_tell_of_a_change_that_nobody_heard_of(tmp_path: Path) -> None:
    with memory() as ram, service(tmp_path) as supervised, running(supervised, ram) as (frontend, _):
        assert frontend.channel is not None
        supervised.kill_worker()
        assert select.select([frontend.channel], [], [], 10)[0]
        frontend.serve_channel()
        assert frontend.channel.config_changes == 1


@pytest.mark.clause("STATUS-4", "STATUS-5")
def test_a_ring_that_broke_is_broken_for_the_next_worker_too_until_a_reset(tmp_path: Path) -> None:
    with memory() as ram, service(tmp_path) as supervised, running(supervised, ram) as (frontend, ring):
        frontend.status = 15
        ram.memory.store16(GuestAddress(ring.layout.areas["avail"].address + 2), 9999)
        ring.vring.kick.signal()
        assert select.select([ring.vring.err], [], [], 10)[0]
        for worker in range(1, 3):
            supervised.kill_worker()
            supervised.wait_for(RESUMED, worker)
            assert frontend.status == 15 | Status.NEEDS_RESET
        frontend.status = 0
        supervised.kill_worker()
        supervised.wait_for(RESUMED, 3)
        assert frontend.status == 0
        ring.vring.stop()
        start_ring(frontend, ram).echo(b"made anew")
        frontend.status = 15
        assert frontend.status == 15


@pytest.mark.clause("STATUS-5")
def test_the_next_worker_tells_of_a_ring_that_broke(tmp_path: Path) -> None:
    class Silent(Counter):
        def resumed(self) -> None:
            self.board[RESUMED] += 1

    with memory() as ram, service(tmp_path, Silent) as supervised, running(supervised, ram) as (frontend, ring):
        assert frontend.channel is not None
        frontend.status = 15
        ram.memory.store16(GuestAddress(ring.layout.areas["avail"].address + 2), 9999)
        ring.vring.kick.signal()
        assert select.select([frontend.channel], [], [], 10)[0]
        frontend.serve_channel()
        assert frontend.channel.config_changes == 1
        supervised.kill_worker()
        assert select.select([frontend.channel], [], [], 10)[0]
        frontend.serve_channel()
        assert frontend.channel.config_changes == 2


@pytest.mark.parametrize("features", [SPLIT, EVERYTHING], ids=["split", "packed"])
def test_a_ring_is_marked_that_may_be_written_and_not_marked(tmp_path: Path, features: int) -> None:
    with memory() as ram, service(tmp_path) as supervised, supervised.connect(features=features) as frontend:
        frontend.regions.share([ram.region])
        ring = start_ring(frontend, ram)
        ring.echo(b"x")
        used = GuestAddress(0x10000)  # for the log, the ring lies where nothing else is
        ring.vring.set_log(used)
        frontend.start_logging(GuestAddress(0xFFFFF))
        frontend.take_dirty_pages()
        supervised.kill_worker()
        supervised.wait_for(RESUMED, 1)
        frontend.get_config(0, 4)
        assert used // LOG_PAGE in frontend.take_dirty_pages()


class Translated(Counter):
    """Can live behind an IOMMU."""

    features = VIRTIO_F_IOMMU_PLATFORM


@pytest.mark.parametrize("form", FEATURES)
def test_translations_are_asked_for_again(tmp_path: Path, form: str) -> None:
    with (
        memory() as ram,
        service(tmp_path, Translated) as supervised,
        supervised.connect(features=FEATURES[form]) as frontend,
    ):
        frontend.regions.share([ram.region])
        rig = Behind(frontend, ram)
        ring = rig.ready()
        ring.echo(b"before")
        for number in range(3):
            supervised.kill_worker()
            ring.echo(b"after %d" % number)
        rig.memory.replace(())


def test_nothing_of_a_session_stays_behind(tmp_path: Path) -> None:
    with memory() as ram, service(tmp_path, Upgraded) as supervised:
        found = set()
        for number in range(4):
            with running(supervised, ram) as (frontend, ring):
                ring.echo(b"x")
                supervised.kill_worker()
                ring.echo(b"y")
                frontend.vring(0).stop()
            supervised.wait_for(NOTE, number + 1)
            with supervised.connect() as frontend:
                frontend.get_config(0, 4)
                found.add(supervised.open_files())
            supervised.wait_for(NOTE, number + 2)
            supervised.board[NOTE] = number + 1
        assert len(found) == 1


# What kills workers.


class Deadly(Counter):
    """Ends its process where it is asked to."""

    def echo(self, chain: Chain) -> int:
        if chain.read(0, 3) == b"die":
            self.board[NOTE] += 1
            os._exit(1)
        return super().echo(chain)

    def write_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        self.board[NOTE] += 1
        os._exit(1)

    def set_status(self, status: int) -> None:
        if status == 13 and self.board[ARMED]:
            self.board[NOTE] += 1
            os._exit(1)


class Greedy(Counter):
    """Is killed where it is written to."""

    def write_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def two_deadly(directory: Path, threads: bool) -> Iterator[tuple[Service, Running]]:
    """Two deadly devices, and the ring of an innocent front end's at the second."""
    with (
        memory() as ram,
        service(directory, Deadly, devices=2, threads=threads) as supervised,
        running(supervised, ram, 1) as (_, ring),
    ):
        yield supervised, ring


THREADS = pytest.mark.parametrize("threads", [False, True], ids=["one thread", "threads"])


def use_until_closed(frontend: Frontend) -> None:
    with suppress(FieldError):
        while True:
            frontend.get_config(0, 4)
    assert not frontend.connected


@THREADS
def test_a_message_that_kills_workers_ends_its_front_end_alone(tmp_path: Path, threads: bool) -> None:
    with two_deadly(tmp_path, threads) as (supervised, ring):
        with supervised.connect(0) as guilty, pytest.raises(Disconnected):
            guilty.set_config(0, b"die")
        assert supervised.board[NOTE] == 3
        ring.echo(b"innocent")
        with supervised.connect(0) as next_one:
            assert next_one.get_config(0, 4) == b"conf"


def test_a_message_that_workers_are_killed_for_ends_its_front_end_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a kernel without memory; after many more of them."""
    monkeypatch.setattr(sessions, "TOO_MUCH", 6)
    with service(tmp_path, Greedy) as supervised, supervised.connect() as guilty, pytest.raises(Disconnected):
        guilty.set_config(0, b"die")


@THREADS
def test_a_request_that_kills_workers_ends_its_front_end_alone(tmp_path: Path, threads: bool) -> None:
    with two_deadly(tmp_path, threads) as (supervised, ring):
        with memory() as other, running(supervised, other, 0) as (guilty, deadly):
            deadly.send(b"die")
            deadly.kick()
            use_until_closed(guilty)
        assert supervised.board[NOTE] == 4  # the first one, and three that took it over
        ring.echo(b"innocent")


@THREADS
def test_a_session_that_can_not_be_rebuilt_ends_alone(tmp_path: Path, threads: bool) -> None:
    with two_deadly(tmp_path, threads) as (supervised, ring):
        with supervised.connect(0) as guilty:
            guilty.status = 13
            supervised.kill_worker()  # takes it over, and looks harmless
            ring.echo(b"innocent")
            supervised.wait_for(RESUMED, 2)
            supervised.board[ARMED] = 1
            supervised.kill_worker()
            use_until_closed(guilty)
        assert supervised.board[NOTE] == 3
        ring.echo(b"innocent")


def test_workers_that_die_of_nothing_are_started_less_and_less_often(tmp_path: Path) -> None:
    def fail(_: Worker, board: Board) -> None:
        if board[WORKERS] > 1:
            os._exit(1)

    with service(tmp_path, prepare=fail) as supervised, supervised.connect() as frontend:
        assert frontend.get_config(0, 4) == b"conf"
        supervised.kill_worker()
        supervised.wait_for(WORKERS, 6)
        time.sleep(0.5)
        assert supervised.board[WORKERS] < 10


# What is kept.


def keep(worker: Worker, board: Board) -> None:
    """The first worker keeps things; each later one tells whether they are there, and changes them."""
    if worker.first:
        worker.put("large", b"x" * (1 << 20))
        worker.put("small", b"1")
        worker.put("gone", b"gone")
        worker.put("gone", b"")
        fd = os.memfd_create("kept", os.MFD_CLOEXEC)
        os.write(fd, b"in a file")
        worker.put_fd("file", fd)
        worker.put_fd("other", fd)
        worker.drop("other")
        os.close(fd)
        with pytest.raises(UsageError):
            worker.put("large", b"x" * ((1 << 20) + 1))
        with pytest.raises(UsageError):
            worker.put_fd("", worker.fds["file"])
        return
    number = int(worker.bytes["small"])
    assert worker.bytes == {"large": b"x" * (1 << 20), "small": b"%d" % number}
    assert list(worker.fds) == ["file"]
    assert os.pread(worker.fds["file"].fileno(), 100, 0) == b"in a file"
    worker.put("small", b"%d" % (number + 1))
    worker.put_fd("file", worker.fds["file"].duplicate())
    board[NOTE] = number


def test_bytes_and_descriptors_are_kept(tmp_path: Path) -> None:
    with service(tmp_path, prepare=keep) as supervised, supervised.connect() as frontend:
        for number in range(1, 4):
            frontend.get_config(0, 4)
            supervised.kill_worker()
            supervised.wait_for(NOTE, number)


def test_many_regions_are_handed_on(tmp_path: Path) -> None:
    with service(tmp_path) as supervised, memory() as ram, running(supervised, ram) as (frontend, ring):
        more = [Ram(0x1000, guest=1 << 30 | page << 12, user=1 << 40 | page << 12) for page in range(64)]
        for each in more:
            frontend.regions.add(each.region)
        supervised.kill_worker()
        ring.echo(b"after")
        for each in more:
            frontend.regions.remove(each.region)
            each.close()
        supervised.kill_worker()
        ring.echo(b"after")


# Front ends that misbehave.


def silent(path: str, data: bytes) -> float:
    """Send so much, and nothing more; after how many seconds the connection is closed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(5)
        before = time.monotonic()
        sock.connect(path)
        sock.sendall(data)
        assert sock.recv(1) == b""
        return time.monotonic() - before


@pytest.mark.parametrize(
    "data", [b"", b"\1", bytes(12)[:11], b"\1\0\0\0\1\0\0\0\10\0\0\0half", b"\3\0\0\0\1" + bytes(7) + b"\1"], ids=len
)
def test_half_a_message_is_waited_for_for_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(front_end, "TIME_LIMIT", 0.2)
    with service(tmp_path) as supervised:
        assert 0.15 < silent(supervised.path, data) < 2
        with supervised.connect() as frontend:
            assert frontend.get_config(0, 4) == b"conf"


def test_who_reads_no_replies_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_end, "TIME_LIMIT", 0.2)
    question = b"\1\0\0\0\1\0\0\0\0\0\0\0"
    with service(tmp_path) as supervised:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(supervised.path)
            sock.settimeout(5)
            with suppress(BrokenPipeError, ConnectionResetError):
                while True:
                    sock.sendall(question * 1000)
        with supervised.connect() as frontend:
            assert frontend.get_config(0, 4) == b"conf"


def test_a_refusal_closes_the_connection(tmp_path: Path) -> None:
    with service(tmp_path) as supervised:
        with supervised.connect() as frontend, pytest.raises(Disconnected):
            frontend.requests.ask(FrontendRequest.GET_VRING_BASE, VringState, VringState(77, 0))
        with supervised.connect() as frontend, memory() as ram:
            frontend.regions.share([ram.region])
            start_ring(frontend, ram).echo(b"the next one")


def test_our_own_connection_is_no_channel(tmp_path: Path) -> None:
    with service(tmp_path) as supervised, supervised.connect() as frontend:
        supervised.kill_worker()
        own = OwnedFd.duplicate_of(frontend.requests.fileno())
        with own, pytest.raises(FieldError):
            frontend.requests.tell(FrontendRequest.SET_BACKEND_REQ_FD, fds=[own.fileno()])
        assert frontend.requests.ask(FrontendRequest.GET_FEATURES, U64).value & SPLIT


# The end.


def test_a_worker_does_not_outlive_its_supervisor(tmp_path: Path) -> None:
    with service(tmp_path, ends=False) as supervised, supervised.connect() as frontend:
        frontend.get_config(0, 4)
        os.kill(supervised.pid, signal.SIGKILL)
        assert ended(supervised.board[WORKER])


def test_the_end_of_the_service_ends_sessions(tmp_path: Path) -> None:
    with service(tmp_path, Upgraded, ends=False) as supervised, memory() as ram, running(supervised, ram):
        for pid in (supervised.board[WORKER], supervised.pid):
            os.kill(pid, signal.SIGTERM)
        supervised.wait_for(NOTE, 1)
        assert ended(supervised.board[WORKER])
        assert os.waitpid(supervised.pid, 0) == (supervised.pid, 0)
        assert supervised.board[WORKERS] <= 2


def test_a_worker_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "END_SECONDS", 0.2)
    monkeypatch.setattr(Worker, "_retire", lambda _: None)
    with service(tmp_path) as supervised, supervised.connect() as frontend:
        frontend.get_config(0, 4)


def test_a_worker_that_does_not_retire_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RETIRE_SECONDS", 0.2)
    monkeypatch.setattr(supervisor, "END_SECONDS", 0.2)  # nor does the last one
    monkeypatch.setattr(Worker, "_retire", lambda _: None)
    with service(tmp_path) as supervised, supervised.connect() as frontend:
        frontend.get_config(0, 4)
        os.kill(supervised.pid, signal.SIGHUP)
        supervised.wait_for(WORKERS, 2)
        frontend.get_config(0, 4)
