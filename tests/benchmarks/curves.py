"""How cost grows: over the size of a region, of its blocks, over requests in a kick, zones, and fragmentation.

What has no ring and no process in it is measured on the device in service, in this process, on a sparse memfd. Each
point is the median of some tries, taken round by round over all points of a curve, so that a while in which the machine
is slower is in all of them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.benchmarks.fragmented import random_bits
from tests.benchmarks.ours import OurDevice, block_requests, our_vmm
from tests.benchmarks.start import Start
from vhost_user.units import GIB, MIB, TIB, ByteCount, GuestAddress
from virtio_mem.blocks import BlockMap
from virtio_mem.device import VirtioMemDevice
from virtio_mem.geometry import Geometry
from virtio_mem.hostmem.backing import Memfd
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, Request, RequestType, Response, ResponseType
from virtio_mem.service import DeviceService

ADDR = GuestAddress(TIB)
_ONE_BY_ONE = 50
"""Requests of a kind that a point's try is the median of."""


@dataclass(frozen=True)
class Series:
    """Medians at each x of its curve. `growth` is how it should grow: "flat", "linear", or why it does neither."""

    name: str
    growth: str
    y: Sequence[float]


@dataclass(frozen=True)
class Curve:
    """A plot: `x_label` says in what x is, `unit` in what y is."""

    title: str
    x_label: str
    unit: str
    x: Sequence[float]
    series: Sequence[Series]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Point = Callable[[], Sequence[float]]
"""Measures each series once, at one x."""


def curves(*, quick: bool) -> Iterator[Curve]:
    """All of them; the quick ones of fewer points and tries."""
    tries = 3 if quick else 15
    step = 4 if quick else 1
    yield from _over_region_size([GIB << shift for shift in range(0, 17, 4 if quick else 2)], tries)
    yield _over_block_size([MIB << shift for shift in range(0, 11, 2 if quick else 1)], tries)
    yield _over_requests([1, *range(16 * step, 129, 16 * step)], tries)
    yield from _over_zones([1, 16, 64] if quick else [1, 8, 16, 32, 48, 64], 1 if quick else 5)
    region_size = TIB if quick else 16 * TIB
    yield from _over_fragmentation([part / 8 for part in range(0, 9, 4 if quick else 1)], tries, region_size)


def _measured(points: Sequence[Point], tries: int) -> list[list[float]]:
    """For each series, the medians at each point."""
    found: list[list[Sequence[float]]] = [[] for _ in points]
    for measure in points:
        measure()  # what is done for the first time only
    for number in range(tries):
        order = range(len(points)) if number % 2 == 0 else reversed(range(len(points)))
        for at in order:
            found[at].append(points[at]())
    medians = [[statistics.median(values) for values in zip(*tried, strict=True)] for tried in found]
    return [list(values) for values in zip(*medians, strict=True)]


def _curve(
    title: str,
    x_label: str,
    unit: str,
    x: Sequence[float],
    names: Sequence[tuple[str, str]],
    y: Sequence[Sequence[float]],
) -> Curve:
    series = [Series(name, growth, values) for (name, growth), values in zip(names, y, strict=True)]
    return Curve(title, x_label, unit, x, series)


# The device in service.


class InService:
    """A device of `region_size` bytes that serves requests; nothing is plugged, and all of it may be."""

    def __init__(self, region_size: int, block_size: int) -> None:
        self.block_size = block_size
        self._geometry = Geometry(addr=ADDR, region_size=ByteCount(region_size), block_size=ByteCount(block_size))
        fd = os.memfd_create("region", os.MFD_CLOEXEC)
        os.ftruncate(fd, region_size)
        self.memory = HostMemory(Memfd(fd), ByteCount(region_size))
        self.service = self._service(BlockMap(self._geometry.nb_blocks))

    def _service(self, blocks: BlockMap) -> DeviceService:
        device = VirtioMemDevice(self._geometry)
        device.adopt(self._geometry.region_size, self._geometry.region_size, blocks)
        return DeviceService(device, self.memory)

    def plug(self, bits: bytes) -> None:
        """Be a device whose blocks are as in this map."""
        self.service = self._service(BlockMap(self._geometry.nb_blocks, memoryview(bytearray(bits))))

    def ask(self, type_: RequestType, block: int = 0) -> float:
        """Seconds that a request takes that the device grants."""
        request = memoryview(Request(type_, GuestAddress(ADDR + block * self.block_size), 1).encode())
        answer = memoryview(bytearray(RESPONSE_SIZE))
        start = time.perf_counter()
        served = self.service.serve(request, answer)
        seconds = time.perf_counter() - start
        assert (served, len(request)) == (1, REQUEST_SIZE)
        assert Response.decode(bytes(answer)).type is ResponseType.ACK
        return seconds

    def one_block(self, block: int) -> list[float]:
        """Microseconds of a STATE, a PLUG and an UNPLUG of a block that is unplugged."""
        types = RequestType.STATE, RequestType.PLUG, RequestType.UNPLUG
        took = [[self.ask(type_, block) for type_ in types] for _ in range(_ONE_BY_ONE)]
        return [1e6 * statistics.median(values) for values in zip(*took, strict=True)]

    def everything(self, bits: bytes) -> list[float]:
        """Milliseconds of an UNPLUG ALL and of a system reset of blocks that are as in the map, and of a walk."""
        self.plug(bits)
        start = time.perf_counter()
        runs = sum(len(some) for some in self.service.device.blocks.plugged_runs().arrays())
        walk = time.perf_counter() - start
        assert bool(runs) is any(bits)
        unplug_all = self.ask(RequestType.UNPLUG_ALL)
        self.plug(bits)
        start = time.perf_counter()
        assert self.service.system_reset()
        return [1e3 * unplug_all, 1e3 * (time.perf_counter() - start), 1e3 * walk]

    def close(self) -> None:
        """Let go of the memory."""
        self.memory.close()


@contextmanager
def _in_service(region_size: int, block_size: int) -> Iterator[InService]:
    device = InService(region_size, block_size)
    try:
        yield device
    finally:
        device.close()


_REQUESTS = (("STATE", "flat"), ("PLUG", "flat"), ("UNPLUG", "flat"))


def _over_region_size(sizes: Sequence[int], tries: int) -> Iterator[Curve]:
    gigabytes = [size / GIB for size in sizes]
    with ExitStack() as stack:
        devices = [stack.enter_context(_in_service(size, 2 * MIB)) for size in sizes]
        maps = [random_bits(size // (2 * MIB), 0.5) for size in sizes]
        pairs = list(zip(devices, maps, strict=True))
        requests = _measured([partial(device.one_block, 8 * len(bits) - 1) for device, bits in pairs], tries)
        everything = _measured([partial(device.everything, bits) for device, bits in pairs], tries)
    x_label = "region, GiB"
    yield _curve("One request, 2 MiB blocks", x_label, "us", gigabytes, _REQUESTS, requests)
    reason = "up to 1024 runs the host is asked about each, beyond about all; and a bit a block is cleared"
    growths = [("UNPLUG ALL", reason), ("system reset", reason), ("walk over all runs", "linear")]
    title = "All of it, half plugged at random, nothing held"
    yield _curve(title, x_label, "ms", gigabytes, growths, everything)


def _over_block_size(sizes: Sequence[int], tries: int) -> Curve:
    with ExitStack() as stack:
        devices = [stack.enter_context(_in_service(TIB, size)) for size in sizes]
        points = [partial(device.one_block, TIB // size - 1) for device, size in zip(devices, sizes, strict=True)]
        y = _measured(points, tries)
    return _curve("One request, region of 1 TiB", "block, MiB", "us", [size / MIB for size in sizes], _REQUESTS, y)


def _over_fragmentation(parts: Sequence[float], tries: int, region_size: int) -> Iterator[Curve]:
    """Half of the blocks are plugged; of those, so many are alone, and the others are one run."""
    nb_blocks = region_size // (2 * MIB)
    percent = [100 * part for part in parts]
    with _in_service(region_size, 2 * MIB) as device:
        maps = [fragmented_bits(nb_blocks, part) for part in parts]
        unplug_all, reset, walk = _measured([partial(device.everything, bits) for bits in maps], tries)
    what, x_label = f"region of {region_size // TIB} TiB, half plugged", "blocks that are alone, %"
    reason = "flat beyond 1024 runs: the host is asked about each of fewer, and about all of it otherwise"
    names = [("UNPLUG ALL", reason), ("system reset", reason)]
    yield _curve(f"All of it, {what}", x_label, "ms", percent, names, [unplug_all, reset])
    yield _curve(f"A walk over all runs, {what}", x_label, "ms", percent, [("walk", "linear")], [walk])


def fragmented_bits(nb_blocks: int, part: float) -> bytes:
    """A map of which every second block is plugged in the first `part`, and half of the rest in one run."""
    size = nb_blocks // 8
    alone = int(size * part)
    rest = size - alone
    return b"\x55" * alone + b"\xff" * (rest // 2) + bytes(rest - rest // 2)


# As users have it.


def _over_requests(counts: Sequence[int], tries: int) -> Curve:
    with our_vmm() as vmm:
        device = OurDevice(vmm, entries=128)

        def kick(count: int) -> list[float]:
            types = RequestType.STATE, RequestType.PLUG, RequestType.UNPLUG
            return [1e6 * device.kick(block_requests(type_, count)) for type_ in types]

        y = _measured([partial(kick, count) for count in counts], 3 * tries)
    names = [("STATE", "linear"), ("PLUG of neighbours", "linear"), ("UNPLUG of neighbours", "linear")]
    return _curve("One kick, virtio-mem serve", "requests", "us", list(counts), names, y)


def _over_zones(counts: Sequence[int], tries: int) -> Iterator[Curve]:
    with TemporaryDirectory() as bytecode:
        start = Start(bytecode)

        def serve(count: int) -> list[float]:
            served = start.serve("2G", zones=count)
            return [1e3 * served.seconds, served.share]

        ready, share = _measured([partial(serve, count) for count in counts], tries)
    zones = list(counts)
    yield _curve("virtio-mem serve, to ready", "zones", "ms", zones, [("to ready", "linear")], [ready])
    yield _curve("virtio-mem serve, memory (PSS)", "zones", "MiB", zones, [("all processes", "linear")], [share])


def save(directory: Path, *, quick: bool, machine: str) -> None:
    """Measure all, and write curves.json and curves.svg."""
    import json  # noqa: PLC0415 - what only this needs

    from tests.benchmarks.plot import picture  # noqa: PLC0415 - the extra `plot`

    found = [curve.to_json() for curve in curves(quick=quick)]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "curves.json").write_text(
        json.dumps({"machine": machine, "quick": quick, "curves": found}, indent=1) + "\n"
    )
    (directory / "curves.svg").write_bytes(picture(found))
