"""Starts the service, and stays as its supervisor: sockets first, then a line `ready` on stdout, and systemd is told.

Little is imported here, and no device: what serves is the worker (worker.py), which the supervisor starts, and starts
again when it dies. The first one is a fork of this process. The order: the state directory is locked, each socket
listens, the worker has made its devices and attached them; then `ready`, and front ends are accepted.

Under systemd, with FileDescriptorStoreMax= in the unit, nothing that a front end has to do with ends with this process
(vhost_user/supervisor/ledger.py): the next `serve` of the unit goes on where this one was, whether that was killed or
told to end. It has to be told to serve the same. With other options it begins anew, unless a front end is connected:
then it is refused, and what is stored stays as it is.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vhost_user import unix_socket
from vhost_user.errors import HostError, UsageError
from vhost_user.supervisor import Supervisor
from vhost_user.supervisor.process import fork_first, spawn
from virtio_mem.serve import files
from virtio_mem.serve.logs import log_to_stderr
from virtio_mem.serve.plan import ServePlan

if TYPE_CHECKING:
    from vhost_user.supervisor.ledger import Ledger
    from vhost_user.supervisor.process import Start

log = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "virtio_mem.serve.worker")
"""The command that starts a worker."""

API_BACKLOG = 128

_API_MODE = 0o600

_PLAN, _SOCKETS, _API = "plan", "sockets", "api"
"""What is kept: the plan, and the API's listener, for workers; and where who may connect, for the next `serve`."""


def serve(
    plan: ServePlan,
    sockets: Mapping[str, str | Path],
    *,
    api_socket: str | Path | None = None,
    worker: Sequence[str] | Start = WORKER,
    prepare: Callable[[Supervisor], object] = lambda _: None,
    announce: Callable[[], object] | None = None,
    snapshot: str | Path | None = None,
) -> int:
    """Serve the plan's zones at `sockets`, by id, until SIGTERM or SIGINT; the exit status.

    `worker` starts one, see `Supervisor`: the command of a module which calls `worker.run` with an extension, say.
    `forks_first()` is quicker than the command, for a process that has a single thread.
    `prepare` is called with the supervisor before it runs, for children and files of the caller's that it is to watch.
    `announce` is called when all listens, in place of `ready()`. With `snapshot`, a directory, the zones are what they
    were when it was taken, paused, unless a service before this one had restored it; UsageError where it is not one of
    them.
    HostError where a socket or the state directory can't be had; UsageError where something else is at its place.
    """
    log_to_stderr(plan.verbose)
    with ExitStack() as stack:
        if plan.state_dir is not None:
            stack.enter_context(files.lock(plan.state_dir))
        where = {zone.id: str(sockets[zone.id]) for zone in plan.zones}
        kept = {_PLAN: plan.encode(), _SOCKETS: json.dumps([where, api_socket and str(api_socket)]).encode()}
        # A machine's QEMU is a child of ours, and ends with us: nobody could be gone on with.
        ledger = None if plan.qmp else _open_ledger(plan, kept)
        if ledger is not None and not ledger.blank:
            supervisor = Supervisor.resume(worker, ledger, on_ready=announce or ready)
            supervisor.kept.put(_PLAN, kept[_PLAN])
        else:
            kept_fds: dict[str, int] = {}
            if snapshot is not None:
                keep_snapshot(Path(snapshot), plan, kept, kept_fds, stack)
            if api_socket is not None:
                listener = _listen_for_api(api_socket)
                kept_fds[_API] = stack.enter_context(listener).fileno()
                if ledger is None:
                    stack.callback(unix_socket.remove, api_socket, unix_socket.identity(api_socket))
            supervisor = Supervisor(worker, _listen(where), kept, kept_fds, on_ready=announce or ready, book=ledger)
        prepare(supervisor)
        status = supervisor.run()
        notify_service_manager("STOPPING=1")
        return status


def _open_ledger(plan: ServePlan, kept: Mapping[str, bytes]) -> Ledger | None:
    """What the service manager keeps for this service, if it does: of a `serve` of the same before this one, or blank.

    UsageError where a front end is connected that was served something else, HostError where that can't be read, and
    where the manager is not there.
    """
    if not os.environ.get("FDSTORE"):
        return None
    from vhost_user.supervisor.book import BYTES  # noqa: PLC0415 - for those who have a store
    from vhost_user.supervisor.fd_store import FdStore  # noqa: PLC0415
    from vhost_user.supervisor.ledger import Ledger  # noqa: PLC0415
    from vhost_user.supervisor.restore import abandon  # noqa: PLC0415

    if (store := FdStore.from_environment()) is None:
        return None
    try:
        ledger = Ledger(store)
        if ledger.blank:
            return ledger
        before, sockets = _plan_before(ledger), ledger.peek(BYTES + _SOCKETS.encode())
        if before is not None and plan.serves_the_same(before) and sockets == kept[_SOCKETS]:
            return ledger
        if before is None and ledger.sessions:
            remedy = "start that one, or stop the unit first, which the VMM will notice"
            raise HostError("plan", "another version's", "a VMM is connected that was served by it", remedy)
        if before is not None and ledger.sessions:
            remedy = "start it with those, or stop the unit first, which the VMM will notice"
            raise UsageError("options", plan.options, f"a VMM is connected that was served {before.options}", remedy)
        log.warning("begins anew: the service before this one had other options")
        abandon(ledger, [_API])
    except OSError as error:
        raise HostError.from_os_error("NOTIFY_SOCKET", os.environ["NOTIFY_SOCKET"], "FDSTORE", error) from error
    return ledger


def _plan_before(ledger: Ledger) -> ServePlan | None:
    """What the `serve` before this one was told; None where that is for another version to read."""
    from vhost_user.supervisor.book import BYTES  # noqa: PLC0415 - as above

    try:
        return ServePlan.decode(ledger.peek(BYTES + _PLAN.encode()))
    except (KeyError, TypeError, ValueError):
        return None


def _listen(where: Mapping[str, str]) -> dict[str, socket.socket]:
    """The sockets of zones, by id; all or none."""
    with ExitStack() as stack:
        listeners: dict[str, socket.socket] = {}
        for name, path in where.items():
            listeners[name] = stack.enter_context(unix_socket.listen(path))
            stack.callback(unix_socket.remove, path, unix_socket.identity(path))
        stack.pop_all()  # the supervisor's from here on
    return listeners


def keep_snapshot(
    directory: Path, plan: ServePlan, kept: dict[str, bytes], fds: dict[str, int], stack: ExitStack
) -> None:
    """Have a supervisor keep what workers need to go on from a snapshot; the descriptors are closed with `stack`."""
    from virtio_mem.serve.snapshot import prepare  # noqa: PLC0415 - it knows devices
    from virtio_mem.serve.worker import CONTENT, STATE  # noqa: PLC0415

    for zone, state, content, facts in prepare(directory, plan):
        fds[STATE + zone.id] = stack.enter_context(state).fileno()
        if facts is not None:
            kept[CONTENT + zone.id] = facts
            if content is not None:
                fds[CONTENT + zone.id] = stack.enter_context(content).fileno()


def forks_first() -> Start:
    """Starts the first worker by a fork of this process, unless that has several threads, and others by WORKER."""
    return fork_first(_work, spawn(WORKER))


def _work() -> int:
    """What the command does, in a fork of the supervisor."""
    from virtio_mem.serve.worker import main  # noqa: PLC0415 - it knows devices

    return main()


def _listen_for_api(path: str | Path) -> socket.socket:
    if find_spec("h11") is None:
        raise UsageError("--api-socket", path, "needs the Python package h11", "pip install h11")
    return unix_socket.listen(path, backlog=API_BACKLOG, mode=_API_MODE, field="--api-socket")


def ready() -> None:
    """Tell whoever started us. Nobody has to read it."""
    try:
        if sys.stdout is not None:
            sys.stdout.write("ready\n")
            sys.stdout.flush()
    except OSError as error:
        log.warning("standard output: %s", error.strerror)
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
