"""Requests through a ring: how they may be cut up, and that no chain stops the queue."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.device.helpers import ADDR, BLOCK, make_device
from tests.device.test_service import Script, ScriptedMemory
from tests.machine.helpers import RAM_SIZE, RING, guest_ram
from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress
from vhost_user.vring import PackedDriver, PackedLayout, PackedQueue, SplitDriver, SplitLayout, SplitQueue
from vhost_user.vring.driver import DriverQueue
from virtio_mem.protocol import BlockState, Request, RequestType, Response, ResponseType
from virtio_mem.request_queue import GuestRequestQueue, Progress
from virtio_mem.service import DeviceService

BUFFERS = GuestAddress(2 << 20)
SIZE = 16
PLUG = Request(RequestType.PLUG, GuestAddress(ADDR), 1)
UNPLUG = Request(RequestType.UNPLUG, GuestAddress(ADDR), 1)
Ranges = list[tuple[int, int]]


class Bench:
    """A driver's queue and the device's, and buffers that are handed out one behind the other."""

    def __init__(self, memory: GuestMemory, *, packed: bool = False) -> None:
        self.memory = memory
        self.service = DeviceService(make_device(), ScriptedMemory(Script()))
        self.driver: DriverQueue
        if packed:
            layout = PackedLayout.place(SIZE, RING)
            self.driver = PackedDriver(memory, layout)
            self.queue = GuestRequestQueue(self.service, PackedQueue(memory, **vars(layout), indirect=True))
        else:
            split = SplitLayout.place(SIZE, RING)
            self.driver = SplitDriver(memory, split)
            self.queue = GuestRequestQueue(self.service, SplitQueue(memory, **vars(split), indirect=True))
        self.next = int(BUFFERS)

    def buffer(self, data: bytes) -> tuple[int, int]:
        at = self.next
        self.memory.write(GuestAddress(at), data)
        self.next += len(data) + 7  # so that neighbours don't touch
        return at, len(data)

    def send(self, readable: list[bytes], writable: list[int]) -> tuple[int, bytes]:
        """Send one chain; returns the used length and what the writable part holds afterwards."""
        room: Ranges = [self.buffer(b"\xee" * size) for size in writable]
        self.driver.add([self.buffer(data) for data in readable], room)
        self.queue.process()
        used = self.driver.get_used()
        assert used is not None
        return used[1], b"".join(self.memory.read(GuestAddress(at), size) for at, size in room)

    def ask(self, request: Request) -> Response:
        length, data = self.send([request.encode()], [10])
        assert length == 10
        return Response.decode(data)


@pytest.fixture(params=["split", "packed"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with guest_ram() as memory:
        yield Bench(memory, packed=request.param == "packed")


@pytest.mark.clause("MEM-WIRE-1", "MEM-WIRE-3")
def test_a_request_and_its_response(bench: Bench) -> None:
    length, data = bench.send([PLUG.encode()], [10])
    assert (length, data) == (10, bytes(10))
    state = Request(RequestType.STATE, GuestAddress(ADDR), 2)
    assert bench.send([state.encode()], [10]) == (10, bytes(8) + b"\x02\x00")


def cuts(size: int) -> st.SearchStrategy[list[int]]:
    """Ways to cut `size` bytes into pieces, none of them empty."""
    return st.sets(st.integers(1, size - 1), max_size=6).map(sorted)


@pytest.mark.clause("MEM-PLUG-1", "MEM-UNPLUG-1", "MEM-STATE-1")
@given(st.data(), st.binary(max_size=60), st.integers(0, 60), st.booleans())
def test_any_cut_and_any_surplus_gives_the_same_answer(
    data: st.DataObject, surplus: bytes, room: int, packed: bool
) -> None:
    with guest_ram() as memory:
        bench = Bench(memory, packed=packed)
        request = PLUG.encode() + surplus
        at = [0, *data.draw(cuts(len(request))), len(request)]
        pieces = [request[start:end] for start, end in pairwise(at)]
        at = [0, *data.draw(cuts(10 + room)), 10 + room]
        sizes = [end - start for start, end in pairwise(at)]
        length, response = bench.send(pieces, sizes)
        assert length == 10
        assert response == bytes(10) + b"\xee" * room, "nothing is written behind the response"
        assert bench.ask(Request(RequestType.STATE, GuestAddress(ADDR), 1)).state is BlockState.PLUGGED


@pytest.mark.parametrize(
    ("readable", "writable", "reason"),
    [
        ([], [10], "request_too_short"),
        ([b"\0"], [10], "request_too_short"),
        ([PLUG.encode()[:23]], [10], "request_too_short"),
        ([PLUG.encode()[:12], PLUG.encode()[12:23]], [5, 5], "request_too_short"),
        ([PLUG.encode()], [], "no_room_for_response"),
        ([PLUG.encode()], [9], "no_room_for_response"),
        ([PLUG.encode()], [4, 5], "no_room_for_response"),
    ],
)
def test_a_chain_without_a_request_goes_back_empty_and_counted(
    bench: Bench, readable: list[bytes], writable: list[int], reason: str
) -> None:
    """Chains like these killed the device thread of a peer (Cloud Hypervisor: 6a1fe123c)."""
    length, data = bench.send(readable, writable)
    assert length == 0
    assert set(data) <= {0xEE}
    assert bench.queue.queue.malformed == {reason: 1}
    assert bench.service.device.plugged_size == 0
    assert bench.ask(PLUG).type is ResponseType.ACK


def test_an_unknown_request_is_answered_and_the_next_is_served(bench: Bench) -> None:
    """A type like this killed the device thread of a peer (Cloud Hypervisor: 97e16f249)."""
    assert bench.ask(Request(0xFFFF)).type is ResponseType.ERROR
    assert bench.ask(PLUG).type is ResponseType.ACK


@pytest.mark.parametrize("at", [RAM_SIZE - 23, RAM_SIZE, 2**64 - 24, 2**63])
def test_a_request_outside_memory_goes_back_empty(bench: Bench, at: int) -> None:
    """Accepted by a peer once (Cloud Hypervisor: 795e60618)."""
    bench.driver.add([(at, 24)], [bench.buffer(bytes(10))])
    bench.queue.process()
    used = bench.driver.get_used()
    assert used is not None
    assert used[1] == 0
    assert bench.queue.queue.malformed == {"outside_memory": 1}
    assert bench.ask(PLUG).type is ResponseType.ACK


def test_a_batch_is_answered_in_order(bench: Bench) -> None:
    requests = [PLUG, PLUG, UNPLUG, PLUG, Request(9)]
    rooms = []
    for request in requests:
        rooms.append(bench.buffer(bytes(10)))
        bench.driver.add([bench.buffer(request.encode())], [rooms[-1]])
    assert bench.queue.process() == Progress(notify=True, more=False)
    assert bench.queue.process() == Progress(notify=False, more=False)
    answers = [Response.decode(bench.memory.read(GuestAddress(at), 10)).type.name for at, _ in rooms]
    assert answers == ["ACK", "ERROR", "ACK", "ACK", "ERROR"]


def test_one_call_serves_a_ringful_at_most(bench: Bench) -> None:
    """A driver that refills the ring as fast as it is emptied can't hold the caller."""
    served = 0
    device = bench.service.device
    real = bench.service.request

    def request_and_refill(request: Request) -> Response:
        nonlocal served
        served += 1
        bench.driver.get_used()
        bench.driver.add([bench.buffer(PLUG.encode())], [bench.buffer(bytes(10))])
        return real(request)

    bench.service.request = request_and_refill  # type: ignore[method-assign]
    bench.driver.add([bench.buffer(PLUG.encode())], [bench.buffer(bytes(10))])
    assert bench.queue.process().more
    assert served <= SIZE
    assert device.plugged_size == BLOCK


def test_memory_that_goes_while_a_request_is_served_costs_that_request_only(bench: Bench) -> None:
    real = bench.service.request
    regions = bench.memory.regions

    def request_and_unmap(request: Request) -> Response:
        (region,) = regions
        low = type(region)(region.guest_address, 2 << 20, region.mapping)  # type: ignore[arg-type]
        bench.memory.replace([low])
        return real(request)

    bench.service.request = request_and_unmap  # type: ignore[method-assign]
    bench.driver.add([bench.buffer(PLUG.encode())], [bench.buffer(bytes(10))])
    bench.queue.process()
    assert bench.driver.get_used() is not None
    assert bench.queue.queue.malformed == {"memory_gone": 1}
    bench.memory.replace(regions)
    bench.service.request = real  # type: ignore[method-assign]
    assert bench.ask(UNPLUG).type is ResponseType.ACK
