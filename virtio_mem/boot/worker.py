"""What a worker of `boot` does besides serving devices: it listens to QEMU's monitor.

RESET says that the machine was reset, by the guest or by its operator: every block is unplugged, and the guest that
boots next plugs anew, up to the target. (A machine that wakes up says WAKEUP, and keeps its memory.) The event is old
before the new guest has run a line, and it stays in the socket until the blocks are gone (qmp.py). The time of the last
reset that was carried out is kept, so that a worker that finds the event of one that died does not reset a second time
a guest which by then may have plugged: the order is unplug, keep the time, take the event away.

`vm.pause` stops QEMU's processors, then pauses the devices; `vm.resume` the other way round.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from vhost_user.errors import HostError, UsageError
from vhost_user.supervisor import Worker
from virtio_mem.boot.qmp import PATIENCE, QemuRefused, Qmp
from virtio_mem.control import ControlledZone, Hooks
from virtio_mem.serve.worker import Extension, Serving, main

log = logging.getLogger(__name__)

QMP = "qmp"
MACHINE = "machine"
_LAST_RESET = "last-reset"

_NOTICE_SECONDS = 1.0
"""QEMU reads a notice at once; where it doesn't, it is not waited for longer."""


class BootExtension(Extension):
    """QEMU's part in the control of the machine that `worker` serves."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._machine: dict[str, Any] = json.loads(worker.bytes[MACHINE])
        self._monitor: Qmp | None = None
        self._serving: Serving | None = None
        self._reset_done = False
        self._was_reset = threading.Event()

    def hooks(self) -> Hooks:
        """QEMU's processors stop and go on; QEMU resets the machine, and has a part in its core dumps."""
        return Hooks(
            pause=self._stop,
            resume=lambda: self._execute("cont"),
            running=lambda: bool(self._execute("query-status")["running"]),
            system_reset=self._system_reset,
            coredump=self._coredump,
        )

    def control_options(self, zones: Sequence[ControlledZone]) -> dict[str, Any]:
        """The zones in the user's order, those without a device among them, with their options."""
        served = {zone.id: zone for zone in zones}
        return {
            "zones": [_described(served.get(known["id"]), known) for known in self._machine["zones"]],
            "memory_options": self._machine["memory"],
            "config": {"cpus": self._machine["cpus"]},
        }

    def begin(self, serving: Serving, stack: ExitStack) -> None:
        """Listen to the monitor."""
        self._serving = serving
        sock = socket.socket(fileno=os.dup(self._worker.fds[QMP].fileno()))
        self._monitor = Qmp(serving.loop, sock, self._event)
        stack.callback(self._monitor.close)

    def leave(self) -> None:
        """QEMU answers when its device is served again, and that is by another process."""
        if self._monitor is not None:
            self._monitor.close()

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """QEMU is about to stop the devices, after which it must find no notice."""
        assert self._serving is not None
        with ExitStack() as stack:
            for device in self._serving.devices:
                if device.endpoint is not None:
                    stack.enter_context(device.endpoint.quiet(_NOTICE_SECONDS))
            yield

    def _execute(self, command: str) -> Any:
        assert self._monitor is not None
        return self._monitor.execute(command)

    def _stop(self) -> None:
        assert self._serving is not None and self._monitor is not None
        with self._quiet():
            try:
                self._execute("stop")
            except QemuRefused:
                raise
            except HostError:  # it is late, and would stop when nobody knows of it
                if self._serving.control is None or not self._serving.control.paused:
                    with suppress(HostError):
                        self._monitor.execute("cont", timeout=0.0)
                raise

    def _coredump(self, path: Path) -> None:
        from virtio_mem.boot.dump import dump_machine  # noqa: PLC0415 - for those who want one

        assert self._monitor is not None and self._serving is not None
        if (places := self._machine.get("places")) is None:
            limit = "needs a machine that was booted by a version which has core dumps"
            raise UsageError("vm.coredump", path, limit, "boot it anew, or dump it by QEMU's own monitor")
        files = self._worker.fds
        dump_machine(path, self._monitor, places, files, self._serving.devices)

    def _system_reset(self) -> bool:
        self._was_reset.clear()
        with self._quiet():
            self._execute("system_reset")
            was_reset = self._was_reset.wait(PATIENCE)
        if not was_reset:
            raise HostError("qemu", "system_reset", f"no RESET event within {PATIENCE:g} s")
        return self._reset_done

    def _event(self, event: dict[str, Any]) -> None:
        if event["event"] != "RESET":
            return
        when = json.dumps(event.get("timestamp")).encode()
        if self._worker.bytes.get(_LAST_RESET) != when:
            self._reset_done = self._unplug_all()
            self._worker.put(_LAST_RESET, when)
        self._was_reset.set()

    def _unplug_all(self) -> bool:
        assert self._serving is not None
        if self._serving.control is not None:
            done = self._serving.control.machine_was_reset()
        else:
            resets = [device.service.system_reset() for device in self._serving.devices]
            done = all(resets)
            for device in self._serving.devices:
                device.notify()
        if not done:
            log.warning("the machine was reset, and the host could not take all memory back: the guest's driver will")
        return done


def _described(zone: ControlledZone | None, known: dict[str, Any]) -> ControlledZone:
    """A zone with what is known of it besides what is served; None for one that has no device."""
    return replace(zone or ControlledZone(id=known["id"], service=None), **known)


if __name__ == "__main__":
    sys.exit(main(BootExtension))
