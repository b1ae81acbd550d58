"""Starts the service, and stays as its supervisor: sockets first, then a line `ready` on stdout, and systemd is told.

Little is imported here, and no device: what serves is the worker (worker.py), which the supervisor starts, and starts
again when it dies. The order: the state directory is locked, each socket listens, the worker has made its devices and
attached them; then `ready`, and front ends are accepted.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from vhost_user import unix_socket
from vhost_user.errors import UsageError
from vhost_user.supervisor import Supervisor
from virtio_mem.serve import files
from virtio_mem.serve.logs import log_to_stderr
from virtio_mem.serve.plan import ServePlan

WORKER = (sys.executable, "-m", "virtio_mem.serve.worker")
"""The command that starts a worker."""

API_BACKLOG = 128

_API_MODE = 0o600


def serve(
    plan: ServePlan,
    sockets: Mapping[str, str | Path],
    *,
    api_socket: str | Path | None = None,
    worker: Sequence[str] = WORKER,
    prepare: Callable[[Supervisor], object] = lambda _: None,
    announce: Callable[[], object] | None = None,
    snapshot: str | Path | None = None,
) -> int:
    """Serve the plan's zones at `sockets`, by id, until SIGTERM or SIGINT; the exit status.

    `worker` is the command that starts one: that of a module which calls `worker.run` with an extension, say.
    `prepare` is called with the supervisor before it runs, for children and files of the caller's that it is to watch.
    `announce` is called when all listens, in place of `ready()`. With `snapshot`, a directory, the zones are what they
    were when it was taken, paused; UsageError where it is not one of them.
    HostError where a socket or the state directory can't be had; UsageError where something else is at its place.
    """
    log_to_stderr(plan.verbose)
    with ExitStack() as stack:
        if plan.state_dir is not None:
            stack.enter_context(files.lock(plan.state_dir))
        kept_fds: dict[str, int] = {}
        kept = {"plan": plan.encode()}
        if snapshot is not None:
            keep_snapshot(Path(snapshot), plan, kept, kept_fds, stack)
        if api_socket is not None:
            kept_fds["api"] = stack.enter_context(_listen_for_api(stack, api_socket)).fileno()
        with ExitStack() as listening:
            listeners: dict[str, socket.socket] = {}
            for zone in plan.zones:
                path = sockets[zone.id]
                listeners[zone.id] = listening.enter_context(unix_socket.listen(path))
                listening.callback(unix_socket.remove, path, unix_socket.identity(path))
            listening.pop_all()  # the supervisor's from here on
        supervisor = Supervisor(worker, listeners, kept, kept_fds, on_ready=announce or ready)
        prepare(supervisor)
        status = supervisor.run()
        notify_service_manager("STOPPING=1")
        return status


def keep_snapshot(
    directory: Path, plan: ServePlan, kept: dict[str, bytes], fds: dict[str, int], stack: ExitStack
) -> None:
    """Have a supervisor keep what workers need to go on from a snapshot; the descriptors are closed with `stack`."""
    from virtio_mem.serve.snapshot import prepare  # noqa: PLC0415 - it knows devices
    from virtio_mem.serve.worker import CONTENT, STATE  # noqa: PLC0415

    for zone, state, content, facts in prepare(directory, plan):
        fds[STATE + zone.id] = stack.enter_context(state).fileno()
        if content is not None:
            fds[CONTENT + zone.id] = stack.enter_context(content).fileno()
        kept[CONTENT + zone.id] = facts


def _listen_for_api(stack: ExitStack, path: str | Path) -> socket.socket:
    if find_spec("h11") is None:
        raise UsageError("--api-socket", path, "needs the Python package h11", "pip install virtio-mem[api]")
    listener = unix_socket.listen(path, backlog=API_BACKLOG, mode=_API_MODE)
    stack.callback(unix_socket.remove, path, unix_socket.identity(path))
    return listener


def ready() -> None:
    """Tell whoever started us."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    notify_service_manager("READY=1")


def notify_service_manager(state: str) -> None:
    """Send a state to who named a socket in NOTIFY_SOCKET, sd_notify(3): systemd. Nobody has to be there."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError as error:
            sys.stderr.write(f"NOTIFY_SOCKET: {error}\n")
