"""A migration that never gets anywhere: while it runs, QEMU's device may neither plug nor unplug.

It goes to a socket that nobody reads from, at one byte a second, so it can't end by itself.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

from vhost_user.unix_socket import listen
from virtio_mem.conformance.targets.qtest.machine import Machine

_RUNNING = ("setup", "active")
_OVER = ("none", "cancelled", "failed", "completed")
_POLL_SECONDS = 0.001


class StuckMigration:
    """One that has begun when this is made, and is cancelled by `end()`. TargetFailure where QEMU does otherwise."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        with TemporaryDirectory(prefix="virtio-mem-") as directory:
            path = Path(directory, "nowhere")
            self._nowhere = listen(path)
            try:
                machine.execute("migrate-set-parameters", {"max-bandwidth": 1})
                machine.execute("migrate", {"uri": f"unix:{path}"})
                self._wait_for("active")
            except BaseException:
                self._nowhere.close()
                raise

    def end(self) -> None:
        """Cancel it, and wait until it is over. Ending twice is allowed."""
        if self._nowhere.fileno() < 0:
            return
        self._machine.execute("migrate_cancel")
        self._wait_for(*_OVER)
        self._nowhere.close()

    def _wait_for(self, *wanted: str) -> None:
        deadline = time.monotonic() + self._machine.patience
        while (status := self._machine.execute("query-migrate").get("status", "none")) not in wanted:
            if time.monotonic() > deadline or (status in _OVER and wanted != _OVER):
                raise self._machine.failure(f"QEMU's migration is {status}, not {' or '.join(wanted)}")
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Let go of the socket, whatever becomes of the migration."""
        self._nowhere.close()
