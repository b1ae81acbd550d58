"""What a request costs, ours over vhost-user and QEMU's by qtest in turn; and how long one waits for its answer.

A kick with 60 requests and one with a single request differ by 59 requests: waking up, and whatever either way of
driving a device costs by the kick, is in both. The blocks are 2 MiB of a shared memfd and hold nothing.

How long one request takes from kick to call is set against two processes in C that do nothing but wake each other by
eventfds. Who kicks and waits is the same C program for both, on a processor of its own, as a guest's would be.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, Protocol

from tests.benchmarks.floor import Floor, Ring
from tests.benchmarks.measure import Row, in_turn, plain_row, quantile, ratio_row
from tests.benchmarks.ours import ADDR, Vmm, block_requests, our_device, our_vmm
from tests.benchmarks.processors import a_processor_each
from tests.benchmarks.qemu import qemu_device
from vhost_user.errors import HostError
from vhost_user.units import GuestAddress
from vhost_user.vring import SplitLayout
from vhost_user.vring.driver import DESCRIPTOR, NEXT, WRITE
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, BlockState, Request, RequestType, Response, ResponseType

MANY = 60
"""Requests of a kick."""

_REQUESTS = GuestAddress(0x4000)


class Timed(Protocol):
    """A device whose requests can be timed."""

    addr: GuestAddress

    def kick(self, requests: list[Request]) -> float:
        """Have the requests served by one kick, all of them granted; seconds from the kick on."""


class Costs(NamedTuple):
    """Seconds of one request among many. PLUG and UNPLUG are of blocks that hold nothing."""

    plug: float
    state: float
    unplug: float


class Waits(NamedTuple):
    """Seconds from a kick to its call."""

    p50: float
    p99: float


def rows(*, quick: bool) -> Iterator[Row]:
    """The table's lines."""
    for packed in (False, True):
        yield from _against_qemu(pairs=5 if quick else 20, kicks=10 if quick else 40, packed=packed)
    yield from _against_echo(pairs=5 if quick else 20, times=2_000 if quick else 5_000)


def costs(device: Timed, kicks: int) -> Costs:
    """What the device takes, by as many kicks of each kind."""
    took: dict[tuple[RequestType, int], list[float]] = {}
    for _ in range(kicks):
        for nb_requests in (1, MANY):
            for type_ in (RequestType.PLUG, RequestType.STATE, RequestType.UNPLUG):
                seconds = device.kick(block_requests(type_, nb_requests, device.addr))
                took.setdefault((type_, nb_requests), []).append(seconds)
    median = {key: statistics.median(seconds) for key, seconds in took.items()}
    return Costs(
        *(
            (median[type_, MANY] - median[type_, 1]) / (MANY - 1)
            for type_ in (RequestType.PLUG, RequestType.STATE, RequestType.UNPLUG)
        )
    )


def _against_qemu(pairs: int, kicks: int, *, packed: bool) -> Iterator[Row]:
    with ExitStack() as stack:
        ours = stack.enter_context(our_device(packed=packed))
        try:
            theirs = stack.enter_context(qemu_device(packed=packed))
        except HostError as error:
            sys.stderr.write(f"requests against QEMU: left out: {error}\n")
            return
        for device in (ours, theirs):
            costs(device, 2)  # what is done for the first time only
        found = in_turn(pairs, lambda: costs(ours, kicks), lambda: costs(theirs, kicks))
    for name, other, most in (("state", "plug", 0.1), ("plug", "plug", 0.25), ("unplug", "unplug", 0.6)):
        values = [(1e6 * getattr(a, name), 1e6 * getattr(b, other)) for a, b in found]
        what = f"{name.upper()}{' of an empty block' if name == 'unplug' else ''}, one of {MANY} in a kick"
        against = f"{theirs.name}, {other.upper()}"
        yield (
            plain_row(f"{what}, packed ring", against, "us", values)
            if packed
            else ratio_row(what, against, "us", values, most)
        )


def _against_echo(pairs: int, times: int) -> Iterator[Row]:
    with ExitStack() as stack:
        floor = Floor(Path(stack.enter_context(TemporaryDirectory())))
        vmm, echo = stack.enter_context(our_vmm()), stack.enter_context(floor.echo())
        ring = OneRequestRing(vmm, floor)
        stack.enter_context(a_processor_each(vmm.service, echo.pid))
        found = [
            in_turn(pairs, partial(asked, times), lambda: _waits(floor.trips(echo.kick, echo.call, times)))
            for asked in (ring.state_waits, ring.plug_waits)
        ]
    for kind, waits in zip(("request that asks", "PLUG of an empty block"), found, strict=True):
        for name, most in (("p50", 1.15), ("p99", 1.5)):
            values = [(1e6 * getattr(a, name), 1e6 * getattr(b, name)) for a, b in waits]
            what, against = f"one {kind}, kick to interrupt, {name}", "an eventfd echo in C"
            # A change has to be on record before the host acts, and again before the driver hears of it.
            no_goal = kind.startswith("PLUG")
            yield plain_row(what, against, "us", values) if no_goal else ratio_row(what, against, "us", values, most)


class OneRequestRing:
    """A ring of `vmm` with a STATE, a PLUG and an UNPLUG in it, of one block, which are asked again and again."""

    _TYPES = (RequestType.STATE, RequestType.PLUG, RequestType.UNPLUG)

    def __init__(self, vmm: Vmm, floor: Floor) -> None:
        memory, layout = vmm.ram.memory, SplitLayout.place(64, GuestAddress(0))
        for number, type_ in enumerate(self._TYPES):
            request, response = GuestAddress(_REQUESTS + 64 * number), self._response(number)
            memory.write(request, Request(type_, ADDR, 1).encode())
            descriptors = (request, REQUEST_SIZE, NEXT, 2 * number + 1), (response, RESPONSE_SIZE, WRITE, 0)
            at = GuestAddress(layout.desc + 2 * number * DESCRIPTOR.size)
            memory.write(at, b"".join(DESCRIPTOR.pack(*each) for each in descriptors))
        self._vmm, self._floor, self._layout, self._vring = vmm, floor, layout, vmm.start(layout)
        self._asked = 0

    @staticmethod
    def _response(number: int) -> GuestAddress:
        return GuestAddress(_REQUESTS + 64 * number + 32)

    def state_waits(self, times: int) -> Waits:
        """How long as many STATE requests take, one after the other, of a block that is unplugged."""
        return _waits(self._trips(times, 0, 1))

    def plug_waits(self, times: int) -> Waits:
        """How long as many PLUG requests take, with an UNPLUG behind each."""
        return _waits(self._trips(2 * times, 1, 2)[::2])

    def _trips(self, times: int, first: int, count: int) -> list[float]:
        """Seconds of each of so many requests: the one with number `first` and those behind it, in turn."""
        ring = Ring(self._vmm.ram.fd, self._layout, self._asked % 2**16, 2 * first, count)
        seconds = self._floor.trips(self._vring.kick.fileno(), self._vring.call.fileno(), times, ring)
        self._asked += times
        for number in range(first, first + count):
            response = Response.decode(self._vmm.ram.memory.read(self._response(number), RESPONSE_SIZE))
            state = BlockState.UNPLUGGED if self._TYPES[number] is RequestType.STATE else BlockState.PLUGGED
            assert response == Response(ResponseType.ACK, state), (self._TYPES[number], response)
        return seconds


def _waits(seconds: list[float]) -> Waits:
    return Waits(quantile(seconds, 0.5), quantile(seconds, 0.99))
