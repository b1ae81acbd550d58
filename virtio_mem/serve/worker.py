"""The process that serves: devices, rings and the API. It may be killed at any moment; another one goes on.

What it has to go on with: the plan, and each device's state, in memfds that the supervisor keeps or in files; the
sessions, which the supervisor replays; the resizes that somebody may wait for, as bytes.

Each zone has a server in a thread of its own: its messages, its ring, and so its requests, of which one that discards
gigabytes takes its time. Of several zones the main thread listens to the supervisor, and never waits for a device; a
single one's thread listens itself. What looks at all zones (the poll of the control, QEMU's monitor) may have to wait
for one of them, and has another thread.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vhost_user.backend import Server
from vhost_user.backend.loop import EventLoop
from vhost_user.errors import FieldError, UsageError
from vhost_user.owned_fd import OwnedFd
from vhost_user.supervisor import Worker
from virtio_mem.serve.device import MemDevice
from virtio_mem.serve.files import state_file, state_memfd, trace_path
from virtio_mem.serve.logs import log_to_stderr
from virtio_mem.serve.plan import ServedZone, ServePlan
from virtio_mem.serve.state import state_size

if TYPE_CHECKING:
    from virtio_mem.control import Control, ControlledZone, Hooks

log = logging.getLogger(__name__)

POLL_INTERVAL = 1.0
"""Seconds between two looks whether a driver that was told BUSY can be asked to try again."""

PLAN = "plan"
API = "api"
_CONTROL = "control"
STATE = "state:"
CONTENT = "content:"
TRACE = "trace:"
"""What is kept for each zone: its state, what is to be restored to its memory, and which file its trace goes to."""


@dataclass(frozen=True)
class Serving:
    """What is being served, for who adds to it. `control` is None where there is no API. `loop` is for what may have to
    wait for a device."""

    plan: ServePlan
    worker: Worker
    loop: EventLoop
    devices: Sequence[MemDevice]
    control: Control | None


class Extension:
    """What a worker does besides: `begin` is called when all is made, before front ends' messages are served, and may
    put things on `stack` that are closed at the end, before the devices."""

    def hooks(self) -> Hooks | None:
        """What `vm.pause` and `vm.resume` do besides."""
        return None

    def control_options(self, zones: Sequence[ControlledZone]) -> dict[str, Any]:
        """What the control of these zones is made with."""
        return {"zones": zones}

    def begin(self, serving: Serving, stack: ExitStack) -> None:
        """Add to what is served."""

    def leave(self) -> None:
        """Another process takes over, and there is nobody any more who would bring what requests of the API wait for:
        have them end."""


def run(worker: Worker, extension: Extension | None = None) -> None:
    """Serve until the supervisor says that it is enough. Raises what DeviceState and ApiServer do."""
    plan = ServePlan.decode(worker.bytes[PLAN])
    log_to_stderr(plan.verbose)
    with ExitStack() as stack:
        devices = [_device(plan, zone, worker) for zone in plan.zones]
        for device in devices:
            stack.callback(device.close)
        for device in devices:
            device.endpoint = worker.attach(stack.enter_context(Server()), device.zone.id, device)
        if extension is None:
            # The API takes half of the start-up time. Clients and front ends wait in their sockets' backlogs.
            _ready(worker)
        loop = EventLoop()
        stack.callback(loop.close)
        polls: list[Callable[[float], None]] = [device.poll for device in devices]
        control: Control | None = None
        if plan.api:
            control = stack.enter_context(_control(plan, devices, worker, extension or Extension()))
            polls = [control.poll]  # which polls the devices
        if extension is not None:
            extension.begin(Serving(plan, worker, loop, devices, control), stack)
        if control is not None:
            _serve_api(stack, control, worker.fds[API])
            stack.callback((extension or Extension()).leave)
            if control.goes_on:
                threading.Thread(target=_go_on, args=(control,), daemon=True).start()
        _poll_each_second(loop, polls)
        if extension is not None:
            _ready(worker)
        worker.run(loop)


def _ready(worker: Worker) -> None:
    worker.ready()
    import_module("vhost_user.backend.batches")  # what rings need: the first one is yet to come


def _device(plan: ServePlan, zone: ServedZone, worker: Worker) -> MemDevice:
    """The device as its state says that it was; or a new one, whose state outlives this process from here on."""
    size, kept = state_size(zone.geometry), STATE + zone.id
    if plan.state_dir is not None:
        with state_file(plan.state_dir, zone.id, size) as fd:
            return _with_content(_made(plan, zone, fd.fileno(), worker), worker)
    if kept not in worker.fds:
        with state_memfd(zone.id, size) as fd:
            worker.put_fd(kept, fd)
    return _with_content(_made(plan, zone, worker.fds[kept].fileno(), worker), worker)


def _made(plan: ServePlan, zone: ServedZone, state_fd: int, worker: Worker) -> MemDevice:
    """The device, traced if the plan says so."""
    kept = TRACE + zone.id
    if plan.trace is None:
        if kept in worker.bytes:
            worker.drop(kept)
        return MemDevice(zone, state_fd)
    from virtio_mem.serve.trace import TracedDevice  # noqa: PLC0415 - for those who trace
    from virtio_mem.serve.trace_file import TraceFile  # noqa: PLC0415

    path = trace_path(plan.trace, zone.id)
    return TracedDevice(
        zone, state_fd, TraceFile(path, worker.bytes.get(kept, b""), lambda data: worker.put(kept, data))
    )


def _with_content(device: MemDevice, worker: Worker) -> MemDevice:
    """The device, which has what is left to restore of a snapshot still to come."""
    name = CONTENT + device.zone.id
    if name in worker.bytes:
        from virtio_mem.serve.snapshot import Content  # noqa: PLC0415 - for those who restore

        fd = worker.fds.get(name)
        device.content = Content(None if fd is None else fd.fileno(), worker.bytes[name])
        device.content_written = lambda: worker.drop(name)
    elif device.state.unrestored:
        _require_no_content(device)
    return device


def _require_no_content(device: MemDevice) -> None:
    """Of a state that was made from a snapshot whose content nobody has any more: nothing may be plugged."""
    if device.device.plugged_size:
        device.close()
        limit = "has still to be restored from the snapshot that the state is of"
        raise UsageError(f"{device.name} content", "missing", limit, "give --restore as before, or remove the state")
    device.state.restored()


def _control(plan: ServePlan, devices: Sequence[MemDevice], worker: Worker, extension: Extension) -> Control:
    from virtio_mem.control import Control, ControlledZone, Hooks  # noqa: PLC0415 - for those who have an API

    def zone(device: MemDevice) -> ControlledZone:
        endpoint = device.endpoint
        assert endpoint is not None
        return ControlledZone(
            id=device.zone.id,
            service=device.service,
            boot_size=device.zone.boot_size,
            guest_numa_id=device.zone.guest_numa_id,
            notify=device.notify,
            connected=lambda: endpoint.connected,
            options={"prefault": device.zone.prefault},
        )

    control = Control(
        **extension.control_options([zone(device) for device in devices]),
        user_zones=plan.user_zones,
        hooks=_with_snapshot(extension.hooks() or Hooks(), devices, plan),
        save=lambda data: worker.put(_CONTROL, data),
    )
    if _CONTROL in worker.bytes:
        control.load(worker.bytes[_CONTROL])
    return control


def _with_snapshot(hooks: Hooks, devices: Sequence[MemDevice], plan: ServePlan) -> Hooks:
    """The hooks, which save snapshots too, but for a machine with a QEMU of ours: that one's CPUs and other memory are
    nobody else's to save."""

    def snapshot(directory: Path) -> None:
        from virtio_mem.serve.snapshot import save  # noqa: PLC0415 - for those who take one

        save(devices, plan.options, directory)

    return hooks if plan.qmp else replace(hooks, snapshot=snapshot)


def _go_on(control: Control) -> None:
    """What a process before this one was to do behind a core dump, in a thread, as others bring what it waits for."""
    try:
        control.resume()
    except FieldError as error:
        log.warning("the machine stays paused: %s", error)


def _serve_api(stack: ExitStack, control: Control, fd: OwnedFd) -> None:
    from virtio_mem.api.server import ApiServer  # noqa: PLC0415 - for those who have an API

    listener = stack.enter_context(socket.socket(fileno=os.dup(fd.fileno())))
    stack.enter_context(ApiServer(control, listener))


def _poll_each_second(loop: EventLoop, polls: Sequence[Callable[[float], None]]) -> None:
    loop.call_later(POLL_INTERVAL, lambda: _poll_each_second(loop, polls))
    for poll in polls:
        poll(time.monotonic())


def main(extended_by: Callable[[Worker], Extension] | None = None) -> int:
    """What a supervisor starts; the exit status is the program's if no worker was ready before.

    `extended_by` makes what this worker does besides.
    """
    try:
        worker = Worker.from_environment()
        try:
            run(worker, None if extended_by is None else extended_by(worker))
        finally:
            worker.close()
    except FieldError as error:
        sys.stderr.write(f"virtio-mem: {error}\n")
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
