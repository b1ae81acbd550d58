"""A guest asks without end, and its host asks too: who else wants the device waits for one turn of the ring.

No time is measured, but what the ring gave back between the question and its turn: the used ring's index tells.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests import counts
from tests.serve.rig import BLOCK_SIZE, REQUESTS, RING_SIZE, Guest, guest, request_for, zone
from vhost_user.backend import Server, batches
from vhost_user.backend.batches import RingBatches
from vhost_user.connection import Connection
from vhost_user.frontend import Frontend
from vhost_user.message import Config, FrontendRequest, encode_message
from vhost_user.message.header import HEADER
from vhost_user.units import GuestAddress
from vhost_user.unix_socket import listen
from virtio_mem.api.server import ApiServer
from virtio_mem.client import Client
from virtio_mem.control import Control, ControlledZone
from virtio_mem.protocol import CONFIG_SIZE, REQUEST_SIZE, RESPONSE_SIZE, ConfigSpace, RequestType
from virtio_mem.serve.device import MemDevice
from virtio_mem.serve.files import state_memfd
from virtio_mem.serve.state import state_size
from virtio_mem.turn_lock import TurnLock

ZONE = zone(prefault=False)
STOP = GuestAddress(0xF0000)
KINDS = {
    "answered at once": [RequestType.STATE],
    "the host acts": [RequestType.PLUG, RequestType.UNPLUG],
}
"""What the guest asks, again and again."""

RING_THREAD = "vhost-user-server"


class Queued(TurnLock):
    """Notes how much the ring gives back while somebody else is seen to wait for the lock.

    After `hold()` the ring has the lock until somebody waits for it, so that there is a queue to be seen.
    """

    __slots__ = ("_held", "_seen", "_to_hold", "_used", "_waiting", "waits")

    def __init__(self, used: Callable[[], int]) -> None:
        super().__init__()
        self.waits: list[int] = []
        self._used = used
        self._to_hold, self._held = threading.Event(), threading.Event()
        self._waiting: int | None = None
        self._seen: int | None = None

    def hold(self) -> None:
        self._held.clear()
        self._to_hold.set()
        assert self._held.wait(60)

    def __enter__(self) -> None:
        if self._is_mine():
            super().__enter__()
        elif threading.current_thread().name == RING_THREAD:
            super().__enter__()
            if self._to_hold.is_set():
                self._to_hold.clear()
                self._held.set()
                self._wait_for_queue()
        else:
            self._waiting = threading.get_native_id()
            super().__enter__()
            self._waiting = None
            if self._seen is not None:
                self.waits.append((self._used() - self._seen) % (1 << 16))
                self._seen = None

    def _wait_for_queue(self) -> None:
        """Until a thread is asleep in `__enter__`, again and again: it may have slept for something else before."""
        looks = 0
        while looks < 3:
            time.sleep(0.001)
            looks = looks + 1 if self._waiting is not None and is_asleep(self._waiting) else 0
        self._seen = self._used()


def is_asleep(thread: int) -> bool:
    """Whether a thread of this process waits for something: proc_pid_stat(5)."""
    return Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()[0] == "S"


class Watched(MemDevice):
    """Asks itself for its configuration over a socket, and notes how much the ring gave back before it was asked."""

    def __init__(self, state_fd: int, used: Callable[[], int]) -> None:
        super().__init__(ZONE, state_fd)
        self.service.lock = Queued(used)  # before anybody has it
        self.ask = threading.Event()
        self.used = used
        self.waits: list[int] = []
        self._asked = 0

    def turn(self, sock: socket.socket) -> None:
        """A turn of the ring begins. If somebody is to ask, the question comes now, and no later."""
        if self.ask.is_set():
            self.ask.clear()
            self._asked = self.used()
            sock.send(encode_message(FrontendRequest.GET_CONFIG, Config(0, 0, bytes(CONFIG_SIZE)).encode()))

    def read_config(self, offset: int, size: int) -> bytes:
        self.waits.append((self.used() - self._asked) % (1 << 16))
        return super().read_config(offset, size)


def ask_without_end(machine: Guest, frontend: Frontend, kinds: list[RequestType]) -> None:
    """Be a driver that has always asked for more, and is always quick."""
    number = 0
    while not machine.ram.memory.load16(STOP):
        while machine.driver.free >= 2:
            at = REQUESTS + number % 64 * 64
            machine.ram.memory.write(GuestAddress(at), request_for(kinds[number % len(kinds)]).encode())
            machine.driver.add([(GuestAddress(at), REQUEST_SIZE)], [(GuestAddress(at + 32), RESPONSE_SIZE)])
            number += 1
        if machine.driver.needs_kick():
            frontend.vring(0).kick.signal()
        while machine.driver.get_used() is not None:
            pass


@contextmanager
def flooded(kinds: list[RequestType], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Watched, socket.socket]]:
    """A device whose ring is never empty, and the front end's end of its socket."""
    with (
        guest() as machine,
        state_memfd("test", state_size(ZONE.geometry)) as state,
        ExitStack() as last,
        Server() as server,
    ):
        index = GuestAddress(machine.layout.areas["used"].address + 2)
        device = Watched(state.fileno(), lambda: machine.ram.memory.load16(index))
        last.callback(device.close)
        ours, theirs = socket.socketpair()
        asking = last.enter_context(ours.dup())
        turn = RingBatches._turn

        def noted_turn(ring: RingBatches, patience: int) -> bool:
            device.turn(asking)
            return turn(ring, patience)

        monkeypatch.setattr(RingBatches, "_turn", noted_turn)
        monkeypatch.setattr(batches, "LONGEST_LOOK", 10_000_000)  # so that a driver in Python is a quick one
        device.endpoint = server.serve(theirs, device)
        with server.in_thread(), Frontend(Connection(ours), features=machine.features) as frontend:
            machine.start(frontend)
            pid = os.fork()
            if pid == 0:
                try:
                    ask_without_end(machine, frontend, kinds)
                finally:
                    os._exit(0)
            try:
                yield device, asking
            finally:
                machine.ram.memory.store16(STOP, 1)
                os.waitpid(pid, 0)


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_the_hosts_questions_wait_for_one_turn(
    kinds: list[RequestType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with flooded(kinds, monkeypatch) as (device, _), ExitStack() as stack:
        lock = device.service.lock
        assert isinstance(lock, Queued)
        controlled = ControlledZone(id=ZONE.id, service=device.service, notify=device.notify)
        control = stack.enter_context(Control([controlled]))
        listener = stack.enter_context(listen(tmp_path / "api.sock"))
        stack.enter_context(ApiServer(control, listener))
        client = Client(str(tmp_path / "api.sock"))
        for number in range(counts.QUESTIONS_UNDER_LOAD):
            target = (1 + number % 8) * BLOCK_SIZE
            lock.hold()
            client.resize_zone(ZONE.id, target)
            lock.hold()
            assert client.info()["zones"][0]["requested_size"] == target
        assert len(lock.waits) == 2 * counts.QUESTIONS_UNDER_LOAD
        assert max(lock.waits) <= RING_SIZE


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_the_front_ends_questions_wait_for_one_turn(kinds: list[RequestType], monkeypatch: pytest.MonkeyPatch) -> None:
    with flooded(kinds, monkeypatch) as (device, sock):
        frame = HEADER.size + len(Config(0, 0, bytes(CONFIG_SIZE)).encode())
        for _ in range(counts.QUESTIONS_UNDER_LOAD):
            device.ask.set()
            assert select.select([sock], [], [], 60)[0]
            reply = sock.recv(frame)
            assert ConfigSpace.decode(reply[-CONFIG_SIZE:]).block_size == BLOCK_SIZE
        # The turn that it came in, and that of a kick which came before it.
        assert len(device.waits) == counts.QUESTIONS_UNDER_LOAD
        assert max(device.waits) <= 2 * RING_SIZE
