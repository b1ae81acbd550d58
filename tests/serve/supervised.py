"""`virtio-mem serve` in a process of its own whose workers are forked: the next one is there in a few milliseconds."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.peers.processes import kill_worker_of, wait_until, worker_of
from tests.supervisor.rig import fork
from vhost_user import unix_socket
from vhost_user.errors import FieldError
from vhost_user.supervisor import Supervisor, Worker
from virtio_mem.serve.daemon import keep_snapshot
from virtio_mem.serve.plan import ServePlan
from virtio_mem.serve.worker import run


class Supervised:
    """The supervisor's process, and where it serves: `sockets` by zone, and the API's."""

    def __init__(self, plan: ServePlan, directory: Path, snapshot: Path | None = None) -> None:
        self.sockets = {zone.id: directory / f"{zone.id}.sock" for zone in plan.zones}
        self.api_socket = directory / "api.sock"
        self.listeners = {name: unix_socket.listen(path) for name, path in self.sockets.items()}
        self.api = unix_socket.listen(self.api_socket) if plan.api else None
        read, write = os.pipe()
        self.pid = fork(lambda: self._supervise(plan, write, snapshot))
        os.close(write)
        for listener in self.listeners.values():
            listener.close()
        if self.api is not None:
            self.api.close()
        self.workers = 0
        ready = os.read(read, 1)
        os.close(read)
        assert ready == b"R", "no worker became ready; the traceback is above"

    def _supervise(self, plan: ServePlan, write: int, snapshot: Path | None) -> None:
        fds = {} if self.api is None else {"api": self.api.fileno()}
        kept = {"plan": plan.encode()}
        with ExitStack() as stack:
            if snapshot is not None:
                keep_snapshot(snapshot, plan, kept, fds, stack)
            Supervisor(_fork_worker, self.listeners, kept, fds, on_ready=lambda: os.write(write, b"R")).run()

    def worker(self) -> int | None:
        """The worker's process, if there is one at this moment."""
        return worker_of(self.pid)

    def kill_worker(self) -> None:
        """SIGKILL for the worker of this moment, whatever it is doing."""
        kill_worker_of(self.pid)

    def replace_worker(self) -> None:
        """The same, and wait for another one."""
        wait_until(lambda: self.worker() is not None, "a worker is there")
        before = self.worker()
        self.kill_worker()
        wait_until(lambda: self.worker() not in (None, before), "another worker is there")

    def upgrade(self) -> None:
        """SIGHUP."""
        os.kill(self.pid, signal.SIGHUP)

    def end(self) -> int:
        os.kill(self.pid, signal.SIGTERM)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def _fork_worker(control: socket.socket) -> int:
    return fork(lambda: _work(control.dup()))


def _work(control: socket.socket) -> None:
    worker = Worker.adopt(control)
    with suppress(FieldError):  # the supervisor is gone
        run(worker)


@contextmanager
def supervised(plan: ServePlan, directory: Path, snapshot: Path | None = None) -> Iterator[Supervised]:
    """A service that runs; ended by SIGTERM, and it ends well."""
    service = Supervised(plan, directory, snapshot)
    try:
        yield service
    finally:
        status = service.end()
    assert status == 0
