"""Start-up: what importing costs, how soon `virtio-mem serve` is ready, and what its processes take.

As where it is installed, every module has been compiled before; whether the environment has bytecode written or not.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.api.rig import Client
from tests.benchmarks.measure import Row, in_turn, limit_row, number_row
from tests.peers.processes import children_of

MIB = 1 << 20

ASKED = ("/api/v1/vm.info", "/api/v1/vm.counters")


def rows(*, quick: bool) -> Iterator[Row]:
    """The table's lines."""
    with tempfile.TemporaryDirectory() as bytecode:
        start = Start(bytecode)
        start.run("import virtio_mem")
        start.serve("2G")
        pairs = in_turn(5 if quick else 20, lambda: start.run("import virtio_mem"), lambda: start.run("pass"))
        yield limit_row("import virtio_mem, beyond an empty program", "ms", [1e3 * (a - b) for a, b in pairs], 60)
        large = [start.serve("16T").share for _ in range(3)]
        found = [start.serve("2G") for _ in range(5 if quick else 20)]
        yield limit_row("virtio-mem serve to ready", "ms", [1e3 * one.seconds for one in found], 200)
        yield limit_row("its processes, resident (RSS, summed)", "MiB", [one.resident for one in found], 40)
        yield limit_row("the same with the API in use", "MiB", [one.resident_in_use for one in found], 40)
        scraped = [one.resident_scraped for one in found]
        yield number_row("the same once /metrics was read", "MiB", scraped)
        yield limit_row("its processes, their share (PSS, summed)", "MiB", [one.share for one in found], 40)
        more = [b - a.share for a, b in zip(found, large, strict=False)]
        yield limit_row("the same for 16 TiB of blocks, beyond 2 GiB (PSS)", "MiB", more, 2)


class Served(NamedTuple):
    """Seconds to ready; then the MiB of all processes, as RSS and as PSS; and as RSS once the API was asked, and once
    /metrics was, for which prometheus_client is loaded, an HTTP server and TLS with it."""

    seconds: float
    resident: float
    share: float
    resident_in_use: float
    resident_scraped: float


class Start:
    """Starts programs whose bytecode is in the directory `bytecode`."""

    def __init__(self, bytecode: str) -> None:
        self.environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def run(self, program: str) -> float:
        """Seconds that a Python program takes."""
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True, env=self.environment)
        return time.perf_counter() - start

    def serve(self, hotplug_size: str, zones: int = 1) -> Served:
        """Start the service once."""
        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            with served(Path(directory), hotplug_size, self.environment, zones) as process:
                assert process.stdout is not None
                line = process.stdout.readline()
                seconds = time.perf_counter() - start
                assert line == b"ready\n", line
                time.sleep(0.3)  # what is imported after it is ready is its own too
                pids = tree(process.pid)
                resident, share = (sum(memory(pid, kind) for pid in pids) for kind in ("Rss", "Pss"))
                client = Client(f"{directory}/api")
                later = []
                for paths in (ASKED, ("/metrics",)):
                    for path in paths:
                        assert client.ask("GET", path).status == 200
                    later.append(sum(memory(pid, "Rss") for pid in pids))
                return Served(seconds, resident, share, *later)


@contextmanager
def served(
    directory: Path, hotplug_size: str, environment: dict[str, str], zones: int = 1
) -> Iterator[subprocess.Popen[bytes]]:
    """`virtio-mem serve` with some zones and the API."""
    command = [sys.executable, "-m", "virtio_mem", "serve", "--api-socket", str(directory / "api")]
    for number in range(zones):
        where = f"socket={directory}/mem{number}.sock,addr={4 + 4 * number}G"
        command += ["--zone", f"id=mem{number},{where},hotplug_size={hotplug_size}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        try:
            yield process
        finally:
            process.terminate()


def tree(pid: int) -> list[int]:
    """A process and those that it started."""
    return [pid, *(each for child in children_of(pid) for each in tree(child))]


def memory(pid: int, kind: str) -> float:
    """MiB, from /proc/PID/smaps_rollup."""
    found = re.search(rf"^{kind}: +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / MIB
