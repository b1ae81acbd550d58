"""Start-up: what importing costs, how soon `virtio-mem serve` is ready, and what its processes take."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.measure import Row, in_turn, limit_row

MIB = 1 << 20


def rows(*, quick: bool) -> Iterator[Row]:
    """The table's lines."""
    pairs = in_turn(5 if quick else 20, lambda: run("import virtio_mem"), lambda: run("pass"))
    yield limit_row("import virtio_mem, beyond an empty program", "ms", [1e3 * (a - b) for a, b in pairs], 60)
    starts = 5 if quick else 20
    ready, resident, private = zip(*(serve_once("2G") for _ in range(starts)), strict=True)
    yield limit_row("virtio-mem serve to ready", "ms", [1e3 * seconds for seconds in ready], 200)
    yield limit_row("its processes, resident (RSS, summed)", "MiB", resident, 40)
    yield limit_row("its processes, their share (PSS, summed)", "MiB", private, 40)
    small = [serve_once("2G")[2] for _ in range(3)]
    large = [serve_once("16T")[2] for _ in range(3)]
    more = [b - a for a, b in zip(small, large, strict=True)]
    yield limit_row("the same for 16 TiB of blocks, beyond 2 GiB (PSS)", "MiB", more, 2)


def run(program: str) -> float:
    """Seconds that a Python program takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.perf_counter() - start


def serve_once(hotplug_size: str) -> tuple[float, float, float]:
    """Seconds to ready; then the MiB of all its processes, as RSS and as PSS."""
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        with served(Path(directory), hotplug_size) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            seconds = time.perf_counter() - start
            assert line == b"ready\n", line
            time.sleep(0.3)  # what is imported after it is ready is its own too
            pids = tree(process.pid)
            return seconds, sum(memory(pid, "Rss") for pid in pids), sum(memory(pid, "Pss") for pid in pids)


@contextmanager
def served(directory: Path, hotplug_size: str) -> Iterator[subprocess.Popen[bytes]]:
    """`virtio-mem serve` with one zone and the API."""
    zone = f"id=mem0,socket={directory / 'mem0.sock'},addr=4G,hotplug_size={hotplug_size}"
    command = [sys.executable, "-m", "virtio_mem", "serve", "--zone", zone, "--api-socket", str(directory / "api")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.terminate()


def tree(pid: int) -> list[int]:
    """A process and those that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in tree(int(child)))]


def memory(pid: int, kind: str) -> float:
    """MiB, from /proc/PID/smaps_rollup."""
    found = re.search(rf"^{kind}: +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / MIB
