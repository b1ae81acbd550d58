"""The Linux-like driver against the device, without transport: what it asks for, and how it takes each answer."""

from __future__ import annotations

import pytest

from tests.device.helpers import make_device
from vhost_user.units import GIB, MIB
from virtio_mem.device import Effect, VirtioMemDevice
from virtio_mem.geometry import UsableRegion
from virtio_mem.guest.memory_driver import MEMORY_BLOCK_SIZE, GuestRange, MemoryDriver, Outcome
from virtio_mem.protocol import ConfigSpace, Request, RequestType, Response, ResponseType

ACK, NACK, BUSY, ERROR = ResponseType
PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType


class Port:
    """The device at hand. `answers` replaces the next answers, before the device is asked."""

    def __init__(self, device: VirtioMemDevice) -> None:
        self.device = device
        self.requests: list[Request] = []
        self.answers: list[ResponseType] = []

    def config(self) -> ConfigSpace:
        return self.device.config

    def request(self, request: Request) -> Response:
        self.requests.append(request)
        if self.answers:
            return Response(self.answers.pop(0))
        outcome = self.device.request(request)
        return self.device.commit(outcome) if isinstance(outcome, Effect) else outcome

    def take(self, type_: RequestType) -> list[tuple[int, int]]:
        """Offset in MiB and number of blocks of each request, all of which were of one type."""
        requests, self.requests = self.requests, []
        assert {request.type for request in requests} <= {type_}
        return [((request.addr - self.device.geometry.addr) // MIB, request.nb_blocks) for request in requests]


def make(requested: int, **options: object) -> tuple[MemoryDriver, Port]:
    port = Port(make_device(requested=requested, **options))  # type: ignore[arg-type]
    return MemoryDriver(port), port


@pytest.mark.clause("MEM-DRV-OP-14")
def test_plugging_fills_memory_blocks_from_the_bottom() -> None:
    driver, port = make(300 * MIB)
    assert driver.run() is Outcome.REACHED
    assert port.take(PLUG) == [(0, 64), (128, 64), (256, 22)]
    assert driver.plugged_size == port.device.plugged_size == 300 * MIB


def test_unplugging_empties_memory_blocks_from_the_top() -> None:
    driver, port = make(300 * MIB)
    driver.run()
    port.take(PLUG)
    port.device.resize(100 * MIB)
    assert driver.run() is Outcome.REACHED
    assert port.take(UNPLUG) == [(256, 22), (128, 64), (100, 14)]


def test_growing_again_fills_the_gaps_first() -> None:
    driver, port = make(300 * MIB)
    driver.run()
    port.device.resize(292 * MIB)
    driver.run()
    port.requests.clear()
    port.device.resize(512 * MIB)
    assert driver.run() is Outcome.REACHED
    assert port.take(PLUG) == [(292, 46), (384, 64)]


def test_only_whole_memory_blocks_of_the_usable_region_are_used() -> None:
    addr = 4 * GIB + 64 * MIB
    driver, port = make(128 * MIB, addr=addr, usable=UsableRegion.REQUESTED_PLUS_SLACK)
    assert driver.run() is Outcome.REACHED
    assert port.take(PLUG) == [(64, 64)]
    port.device.resize(256 * MIB)
    assert driver.run() is Outcome.REACHED
    assert port.take(PLUG) == [(192, 64)]


def test_a_region_without_a_whole_memory_block_leaves_the_driver_stuck() -> None:
    driver, port = make(64 * MIB, region=64 * MIB)
    assert driver.run() is Outcome.STUCK
    assert port.requests == []


def test_blocks_larger_than_a_memory_block() -> None:
    driver, port = make(1 * GIB, region=2 * GIB, block=512 * MIB)
    assert driver.run() is Outcome.REACHED
    assert port.take(PLUG) == [(0, 1), (512, 1)]
    port.device.resize(512 * MIB)
    assert driver.run() is Outcome.REACHED
    assert port.take(UNPLUG) == [(512, 1)]


@pytest.mark.clause("MEM-DRV-INIT-2")
def test_memory_that_is_still_plugged_is_unplugged_first() -> None:
    first, port = make(256 * MIB)
    first.run()
    port.requests.clear()
    second = MemoryDriver(port)
    port.answers = [BUSY]
    assert second.run() is Outcome.BUSY
    assert second.run() is Outcome.REACHED
    assert [request.type for request in port.requests] == [UNPLUG_ALL, UNPLUG_ALL, PLUG, PLUG]


def test_busy_stops_and_the_next_run_goes_on() -> None:
    driver, port = make(256 * MIB)
    port.answers = [BUSY]
    assert driver.run() is Outcome.BUSY
    assert len(port.requests) == 1
    assert driver.run() is Outcome.REACHED


def test_nack_reads_the_target_again_and_starts_over() -> None:
    driver, port = make(256 * MIB)
    port.answers = [NACK, NACK]
    assert driver.run() is Outcome.REACHED
    assert len(port.requests) == 4


def test_a_device_that_always_says_nack_is_not_asked_for_ever() -> None:
    driver, port = make(256 * MIB)
    port.answers = [NACK] * 1000
    assert driver.run() is Outcome.BUSY
    assert len(port.requests) < 50


def test_a_device_without_a_block_size_is_broken() -> None:
    """A driver divided by it once (viomem: VW#1508)."""
    port = Port(make_device())
    port.config = lambda: ConfigSpace(*[0] * 7)  # type: ignore[method-assign, arg-type]
    driver = MemoryDriver(port)
    assert driver.run() is Outcome.BROKEN
    assert port.requests == []


def test_error_is_for_good() -> None:
    driver, port = make(256 * MIB)
    port.answers = [ERROR]
    assert driver.run() is Outcome.BROKEN
    assert driver.run() is Outcome.BROKEN
    assert len(port.requests) == 1


@pytest.mark.clause("MEM-DRV-OP-11", "MEM-DRV-OP-16")
def test_memory_that_is_in_use_is_not_given_up() -> None:
    device = make_device(requested=384 * MIB)
    port = Port(device)
    pinned = GuestRange(device.geometry.addr, MEMORY_BLOCK_SIZE)
    offered: list[GuestRange] = []

    def offline(unwanted: GuestRange) -> bool:
        offered.append(unwanted)
        return unwanted != pinned

    driver = MemoryDriver(port, offline=offline)
    driver.run()
    device.resize(0)
    port.requests.clear()
    assert driver.run() is Outcome.STUCK
    assert port.take(UNPLUG) == [(256, 64), (128, 64)]
    assert pinned in offered
    assert device.plugged_size == MEMORY_BLOCK_SIZE


def test_memory_that_could_not_be_unplugged_is_put_to_use_again() -> None:
    device = make_device(requested=128 * MIB)
    port = Port(device)
    online: list[GuestRange] = []
    driver = MemoryDriver(port, online=online.append)
    driver.run()
    device.resize(0)
    port.answers = [BUSY]
    assert driver.run() is Outcome.BUSY
    assert online == [GuestRange(device.geometry.addr, MEMORY_BLOCK_SIZE)] * 2
