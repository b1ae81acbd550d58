"""Four zones of one service, equally busy, while one of them also gives 1 GiB back to the host; and while none does.

Each zone has a process that sends a request, waits for the answer, sleeps for a millisecond, and so on. The first one's
also writes to 1 GiB of its zone, again and again, as a guest would that uses its memory; and in a third of the time it
has that unplugged each time, by one request, and plugs it anew. In another third it punches the hole by itself, without
the service: what holds up the others then is the machine. What counts is how long the other three wait for their
answers. A discard that holds them up does so seldom, and for long: that is in no p99, but in the longest wait.
"""

from __future__ import annotations

import mmap
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks.measure import Row, plain_row, quantile, ratio_row
from tests.serve.rig import BLOCK_SIZE, Guest, zone
from tests.serve.supervised import supervised
from vhost_user.frontend import Frontend
from vhost_user.units import ByteCount, HostOffset
from virtio_mem.hostmem.files import punch_hole
from virtio_mem.protocol import RequestType, ResponseType
from virtio_mem.serve.plan import ServePlan

ZONES = 4
KINDS = 3
"""Of phases, in turn: nothing is given back, the zone discards, its guest punches."""

BLOCKS = 513
"""1 GiB of 2 MiB blocks, and one that is plugged and unplugged all the time."""


def rows(*, quick: bool) -> Iterator[Row]:
    """The table's lines."""
    pairs, seconds = (3, 1.2) if quick else (10, 5.0)
    found = measure(pairs, seconds)
    for name, part in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("longest", 1.0)):
        kept, discarded, punched = ([1e6 * quantile(waits, part) for waits in phases] for phases in found)
        what = f"three zones' requests while a fourth discards 1 GiB, {name}"
        yield ratio_row(what, "all kept, as busy", "us", list(zip(discarded, kept, strict=True)), 1.5)
        what = f"the same while its guest punches the hole, without us, {name}"
        yield plain_row(what, "all kept, as busy", "us", list(zip(punched, kept, strict=True)))


def measure(pairs: int, seconds: float) -> list[list[list[float]]]:
    """The waits of the other zones, for each pair: where all is kept, with discards, and where the guest punches."""
    plan = ServePlan(zones=tuple(zone(BLOCKS, id_=f"mem{number}", prefault=False) for number in range(ZONES)))
    with TemporaryDirectory() as directory, supervised(plan, Path(directory)) as service:
        begin = time.monotonic() + 1
        pipes = []
        for number in range(ZONES):
            read, write = os.pipe()
            if os.fork() == 0:
                _drive(str(service.sockets[f"mem{number}"]), number == 0, begin, KINDS * pairs, seconds, write)
            os.close(write)
            pipes.append(read)
        waits = [pickle.loads(_all(read)) for read in pipes][1:]
        for _ in range(ZONES):
            os.wait()
    phases = [[wait for zone_waits in waits for wait in zone_waits[phase]] for phase in range(KINDS * pairs)]
    return [phases[kind::KINDS] for kind in range(KINDS)]


def _all(fd: int) -> bytes:
    with open(fd, "rb") as pipe:
        return pipe.read()


def _drive(path: str, first: bool, begin: float, phases: int, seconds: float, result: int) -> None:
    """Never returns. What the `first` zone does besides is the phase's kind."""
    machine = Guest(nb_blocks=BLOCKS)
    found: list[list[float]] = []
    with Frontend.connect(path, features=machine.features) as frontend:
        machine.start(frontend)
        for phase in range(phases):
            end = begin + (phase + 1) * seconds
            time.sleep(max(0.0, end - seconds - time.monotonic()))
            found.append(
                _requests(machine, frontend, end, works=first, discards=phase % KINDS == 1, punches=phase % KINDS == 2)
            )
    with open(result, "wb") as pipe:
        pickle.dump(found, pipe)
    os._exit(0)


def _requests(
    machine: Guest, frontend: Frontend, end: float, *, works: bool, discards: bool, punches: bool
) -> list[float]:
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
        if works and punches:
            punch_hole(machine.fd, HostOffset(0), ByteCount((BLOCKS - 1) * BLOCK_SIZE))
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
