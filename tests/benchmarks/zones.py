"""Four zones of one service, equally busy, while one of them also gives 1 GiB back to the host; and while none does.

Each zone has a process that sends a request, waits for the answer, sleeps for a millisecond, and so on. The first one's
also writes to 1 GiB of its zone, again and again, as a guest would that uses its memory; and in every second half of
the time it has that unplugged each time, by one request, and plugs it anew. What counts is how long the other three
wait for their answers. A discard that holds them up does so seldom, and for long: that is in no p99, but in the longest
wait.
"""

from __future__ import annotations

import mmap
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks.measure import Row, quantile, ratio_row
from tests.serve.rig import BLOCK_SIZE, Guest, zone
from tests.serve.supervised import supervised
from vhost_user.frontend import Frontend
from vhost_user.units import ByteCount, HostOffset
from virtio_mem.protocol import RequestType, ResponseType
from virtio_mem.serve.plan import ServePlan

ZONES = 4
BLOCKS = 513
"""1 GiB of 2 MiB blocks, and one that is plugged and unplugged all the time."""


def rows(*, quick: bool) -> Iterator[Row]:
    """The table's lines."""
    pairs, seconds = (3, 1.2) if quick else (10, 5.0)
    found = measure(pairs, seconds)
    for name, part in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("longest", 1.0)):
        values = [(1e6 * quantile(busy, part), 1e6 * quantile(calm, part)) for busy, calm in found]
        what = f"three zones' requests while a fourth discards 1 GiB, {name}"
        yield ratio_row(what, "all kept, as busy", "us", values, 1.5)


def measure(pairs: int, seconds: float) -> list[tuple[list[float], list[float]]]:
    """For each pair, the waits of the other zones: with discards, and without."""
    plan = ServePlan(zones=tuple(zone(BLOCKS, id_=f"mem{number}", prefault=False) for number in range(ZONES)))
    with TemporaryDirectory() as directory, supervised(plan, Path(directory)) as service:
        begin = time.monotonic() + 1
        pipes = []
        for number in range(ZONES):
            read, write = os.pipe()
            if os.fork() == 0:
                _drive(str(service.sockets[f"mem{number}"]), number == 0, begin, 2 * pairs, seconds, write)
            os.close(write)
            pipes.append(read)
        waits = [pickle.loads(_all(read)) for read in pipes][1:]
        for _ in range(ZONES):
            os.wait()
    phases = [[wait for zone_waits in waits for wait in zone_waits[phase]] for phase in range(2 * pairs)]
    return [(phases[number + 1], phases[number]) for number in range(0, 2 * pairs, 2)]


def _all(fd: int) -> bytes:
    with open(fd, "rb") as pipe:
        return pipe.read()


def _drive(path: str, first: bool, begin: float, phases: int, seconds: float, result: int) -> None:
    """Never returns. In the odd phases the `first` zone discards."""
    machine = Guest(nb_blocks=BLOCKS)
    found: list[list[float]] = []
    with Frontend.connect(path, features=machine.features) as frontend:
        machine.start(frontend)
        for phase in range(phases):
            end = begin + (phase + 1) * seconds
            time.sleep(max(0.0, end - seconds - time.monotonic()))
            found.append(_requests(machine, frontend, end, works=first, discards=phase % 2 == 1))
    with open(result, "wb") as pipe:
        pickle.dump(found, pipe)
    os._exit(0)


def _requests(machine: Guest, frontend: Frontend, end: float, *, works: bool, discards: bool) -> list[float]:
    """The waits for answers. One that works begins with nothing of its gibibyte plugged, and leaves it so."""
    waits = []
    if works:
        _timed(machine, frontend, RequestType.PLUG, 0, BLOCKS - 1)
    while time.monotonic() < end:
        for type_ in (RequestType.PLUG, RequestType.UNPLUG):
            waits.append(_timed(machine, frontend, type_, BLOCKS - 1, 1))
            time.sleep(0.001)
        if works:
            _fill(machine)
        if works and discards:
            _timed(machine, frontend, RequestType.UNPLUG, 0, BLOCKS - 1)
            _timed(machine, frontend, RequestType.PLUG, 0, BLOCKS - 1)
    if works:
        _timed(machine, frontend, RequestType.UNPLUG, 0, BLOCKS - 1)
    return waits


def _timed(machine: Guest, frontend: Frontend, type_: RequestType, block: int, nb_blocks: int) -> float:
    start = time.perf_counter()
    machine.send_typed(frontend, type_, block, nb_blocks)
    response = machine.wait(frontend, 60)
    seconds = time.perf_counter() - start
    assert response.type is ResponseType.ACK, response
    return seconds


def _fill(machine: Guest) -> None:
    """The guest uses all of it: a byte a page."""
    with machine.mapping.view(HostOffset(0), ByteCount((BLOCKS - 1) * BLOCK_SIZE)) as view:
        view[:: mmap.PAGESIZE] = bytes(len(view) // mmap.PAGESIZE)
