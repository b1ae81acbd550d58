"""A soak under pytest: a state machine in each worker of pytest-xdist, or one in the only process, until it is stopped.

One that runs can't be ended by pytest, so it looks for itself: for a signal to any of the processes, and for a test
that failed in another one. The latter is a file that is there then, in a directory of the run's.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import pytest

from virtio_mem.conformance.stop import Stop, asked_by_signals

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

_STOP, _COUNT = "virtio_mem_stop", "workercount"
"""What a worker is told by the process that started it: ours, and xdist's."""


class Soak:
    """What the processes of a run share. `workers` is how many machines there are."""

    def __init__(self, config: pytest.Config) -> None:
        if config.getoption("--virtio-mem-machines") is not None:
            raise pytest.UsageError("--virtio-mem-machines: with the profile soak each worker has one")
        self._config = config
        told: dict[str, Any] = getattr(config, "workerinput", {})
        self.workers: int = told.get(_COUNT, 1)
        self._path = Path(told[_STOP]) if told else self._make_path()
        self.stop = Stop(self._path)
        with ExitStack() as stack:
            stack.enter_context(asked_by_signals(self.stop.ask))
            config.add_cleanup(stack.pop_all().close)

    def _make_path(self) -> Path:
        directory = tempfile.mkdtemp(prefix="virtio-mem-soak-")
        self._config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
        return Path(directory, "stop")

    def add_worker(self, node: Any) -> None:
        """Tell it what it shares."""
        node.workerinput[_STOP] = str(self._path)

    def scheduling(self, log: Any) -> LoadScopeScheduling:
        """As many parts as there are workers, each with one of the machines at its end.

        Any other scheduler gives a worker its next test before it is done with the one at hand. That would be a second
        machine in vain, while another worker has none.
        """
        from xdist.scheduler import LoadScopeScheduling  # noqa: PLC0415 - it calls us, so it is there

        from virtio_mem.conformance.pytest_items import machine_of  # noqa: PLC0415 - a worker only needs it

        class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
            def _split_scope(self, nodeid: str) -> str:
                number = machine_of(nodeid)
                return str((crc32(nodeid.encode()) if number is None else number) % self.numnodes)

        return Scheduling(self._config, log)
