"""A supervisor in a process of its own, whose workers are forked, so that a new one is there within milliseconds."""

from __future__ import annotations

import logging
import mmap
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tests.backend.rig import SPLIT
from vhost_user.backend import Device, Endpoint, Server, Vring
from vhost_user.chain import Chain
from vhost_user.frontend import PROTOCOL_FEATURES, Frontend
from vhost_user.message import ProtocolFeature
from vhost_user.supervisor import Supervisor, Worker
from vhost_user.supervisor.packets import SIGNALS
from vhost_user.unix_socket import listen

NO_INFLIGHT = PROTOCOL_FEATURES & ~ProtocolFeature.INFLIGHT_SHMFD & ~ProtocolFeature.PAGEFAULT

WORKER, WORKERS, REQUESTS, RESUMED = range(4)
"""Words of the board: the worker's process id, how many there were, requests served, sessions taken over."""


class Board:
    """Numbers that the test, the supervisor and workers see."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("board", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, 4096)
        self._map = mmap.mmap(self._fd, 4096)
        self._words = memoryview(self._map).cast("Q")

    def __getitem__(self, index: int) -> int:
        return int(self._words[index])

    def __setitem__(self, index: int, value: int) -> None:
        self._words[index] = value

    def close(self) -> None:
        self._words.release()
        self._map.close()
        os.close(self._fd)


class Counter(Device):
    """Gives each chain back with what was readable in what is writable, and counts."""

    name = "counter"
    queue_count = 2
    max_queue_size = 256

    endpoint: Endpoint
    number: int

    def __init__(self, board: Board) -> None:
        self.board = board

    @property
    def config(self) -> bytes:
        return b"configuration..."

    def on_kick(self, vring: Vring) -> bool:
        return vring.serve(self.echo)

    def echo(self, chain: Chain) -> int:
        data = chain.read(0, min(chain.readable, chain.writable))
        chain.write(data)
        self.board[REQUESTS] += 1
        return len(data)

    def resumed(self) -> None:
        self.board[RESUMED] += 1
        self.endpoint.config_changed()


MakeDevice = Callable[[Board], Device]
Prepare = Callable[[Worker, Board], None]


@dataclass
class Service:
    """The supervisor's process and the socket."""

    pid: int
    paths: list[str]
    board: Board

    @property
    def path(self) -> str:
        return self.paths[0]

    def connect(
        self, number: int = 0, *, features: int = SPLIT, protocol_features: ProtocolFeature = NO_INFLIGHT
    ) -> Frontend:
        path = self.paths[number]
        return Frontend.connect(path, features=features, protocol_features=protocol_features, timeout=20)

    def open_files(self) -> int:
        """How many descriptors the supervisor has."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def kill_worker(self, number: int = signal.SIGKILL) -> int:
        """Kill the worker that there is; its process id. The supervisor waits for it, so the id may be gone."""
        pid = self.board[WORKER]
        send_signal(pid, number)
        return pid

    def wait_for(self, word: int, least: int, timeout: float = 10.0) -> None:
        deadline = time.monotonic() + timeout
        while self.board[word] < least:
            assert time.monotonic() < deadline, f"board[{word}] is {self.board[word]}, not {least}"
            time.sleep(0.001)


def send_signal(pid: int, number: int) -> None:
    """Signal a process, which may have ended. Not what 0 means to kill(2): the test's own process group."""
    assert pid > 0, "no process is there yet"
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def kill(pid: int) -> None:
    """SIGKILL a child, and wait for it, unless it has ended and was waited for."""
    with suppress(ChildProcessError):
        send_signal(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def fork(work: Callable[[], object]) -> int:
    """A process that does `work` and ends. What SIGTERM, SIGHUP and SIGINT do to it by default they do from its
    beginning on: a handler of this process's would take them for its own, and be gone with them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        pid = os.fork()
        if pid == 0:
            _work(work, before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _work(work: Callable[[], object], mask: Iterable[int]) -> NoReturn:
    status = 1
    try:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


@contextmanager
def now_and_then(act: Callable[[random.Random], object], rng: random.Random) -> Iterator[None]:
    """`act` is called again and again in a thread, as long as the context lasts, after pauses that nobody chose."""
    done = threading.Event()
    pauses = random.Random(rng.random())

    def run() -> None:
        while not done.wait(pauses.choice([0.005, 0.05, 0.1]) * pauses.random()):
            act(pauses)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def serve(
    control: socket.socket, board: Board, names: list[str], make: MakeDevice, prepare: Prepare, *, threads: bool
) -> None:
    """A worker's life: one server for all devices, or one for each, in threads of their own."""
    worker = Worker.adopt(control.dup())
    board[WORKER] = os.getpid()
    board[WORKERS] += 1
    prepare(worker, board)
    with ExitStack() as stack:
        servers = [stack.enter_context(Server()) for _ in (names if threads else names[:1])]
        for number, name in enumerate(names):
            device = make(board)
            endpoint = worker.attach(servers[number % len(servers)], name, device)
            if isinstance(device, Counter):
                device.endpoint, device.number = endpoint, number
        worker.ready()
        if threads:
            worker.run()
        else:
            servers[0].run()
    worker.close()


@contextmanager
def service(
    directory: Path,
    make: MakeDevice = Counter,
    prepare: Prepare = lambda *_: None,
    *,
    devices: int = 1,
    threads: bool = False,
    ends: bool = True,
    level: int = logging.CRITICAL,
) -> Iterator[Service]:
    """Supervised devices. In the end the supervisor is told to go, and nothing of it is left; unless not `ends`."""
    names = [f"device{number}" for number in range(devices)]
    paths = [str(directory / f"{name}.sock") for name in names]
    board = Board()
    listeners = dict(zip(names, map(listen, paths), strict=True))

    def supervise() -> None:
        logging.basicConfig(level=level, force=True)
        logging.getLogger("vhost_user").setLevel(level)

        def start(control: socket.socket) -> int:
            return fork(lambda: serve(control, board, names, make, prepare, threads=threads))

        assert Supervisor(start, listeners).run() == 0

    pid = fork(supervise)
    for listener in listeners.values():
        listener.close()
    try:
        yield Service(pid, paths, board)
        if not ends:
            return
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert not list(directory.iterdir())
    finally:
        kill(pid)
        board.close()
