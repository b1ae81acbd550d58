"""What is shared besides memory, and what goes through pipes: device state, inflight areas, postcopy."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.backend.devices import Echo, Faulting, Forgetful
from tests.backend.rig import EVERYTHING, FIRST_PACKED, RING_PACKED, SPLIT, Ram, pair, start_ring
from tests.leaks import mapped_files
from vhost_user import _native
from vhost_user.backend import PROTOCOL_FEATURES, Server, state_transfer
from vhost_user.chain import Chain
from vhost_user.connection import Connection, connect
from vhost_user.errors import Disconnected, PeerError, Refused
from vhost_user.frontend import Frontend
from vhost_user.memory import GuestMemory
from vhost_user.message import (
    U64,
    DeviceState,
    DeviceStateReply,
    Empty,
    FrontendRequest,
    Inflight,
    MemoryTable,
    ProtocolFeature,
)
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import ByteCount, GuestAddress, HostOffset

ALL = PROTOCOL_FEATURES & ~ProtocolFeature.GPA_ADDRESSES & ~ProtocolFeature.PAGEFAULT
FORMATS = pytest.mark.parametrize("features", [SPLIT, EVERYTHING], ids=["split", "packed"])


# Device state.


def test_state_moves_from_one_device_to_another() -> None:
    device, other = Echo(), Echo()
    with pair(device) as source, pair(other) as destination:
        start_ring(source.frontend, source.ram).echo(b"one")
        source.frontend.set_config(8, b"12345678")
        source.frontend.vring(0).stop()
        state = source.frontend.save_state()
        destination.frontend.load_state(state)
        assert state == struct.pack("<Q", 1) + b"READONLY12345678"
        assert other.served == 1
        assert destination.frontend.get_config(8, 8) == b"12345678"


def test_a_large_state_goes_in_pieces() -> None:
    class Large(Echo):
        loaded = b""

        def save_state(self) -> bytes:
            return bytes(range(256)) * 3000

        def load_state(self, data: bytes) -> None:
            self.loaded = data

    device = Large()
    with pair(device) as both:
        state = both.frontend.save_state()
        assert state == bytes(range(256)) * 3000
        both.frontend.load_state(state)
        assert device.loaded == state


@pytest.mark.parametrize("state", [b"", b"short", bytes(2 << 20)], ids=["none", "short", "beyond the limit"])
def test_a_state_that_can_not_be_is_refused_and_nothing_has_changed(state: bytes) -> None:
    device = Echo()
    with pair(device) as both:
        with pytest.raises(PeerError):
            both.frontend.load_state(state)
        assert device.config == b"READONLYwritable"
        if both.frontend.connected:
            both.frontend.load_state(struct.pack("<Q", 9) + b"READONLYwritable")
            assert device.served == 9


def test_a_state_moves_only_while_rings_are_stopped() -> None:
    with pair() as both:
        start_ring(both.frontend, both.ram)
        reader, writer = os.pipe()
        with OwnedFd(reader), OwnedFd(writer):
            answer = both.frontend.requests.ask(
                FrontendRequest.SET_DEVICE_STATE_FD, DeviceStateReply, DeviceState(0), [writer]
            )
        assert answer.error


@pytest.mark.parametrize("state", [DeviceState(2), DeviceState(0, 1)])
def test_an_unknown_direction_or_phase_is_the_answers_error(state: DeviceState) -> None:
    reader, writer = os.pipe()
    with pair() as both, OwnedFd(reader), OwnedFd(writer):
        answer = both.frontend.requests.ask(FrontendRequest.SET_DEVICE_STATE_FD, DeviceStateReply, state, [writer])
        assert answer == DeviceStateReply(error=1, no_fd=True)
        check = both.frontend.requests.ask(FrontendRequest.CHECK_DEVICE_STATE, U64)
        assert check.value == 1


def test_a_file_is_no_pipe(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    with pair() as both, file.open("r+b") as opened:
        answer = both.frontend.requests.ask(
            FrontendRequest.SET_DEVICE_STATE_FD, DeviceStateReply, DeviceState(0), [opened.fileno()]
        )
        assert answer.error


def test_a_reader_that_goes_is_a_failed_save() -> None:
    class Large(Echo):
        def save_state(self) -> bytes:
            return bytes(1 << 20)

    reader, writer = os.pipe()
    with pair(Large()) as both:
        with OwnedFd(writer):
            both.frontend.requests.ask(FrontendRequest.SET_DEVICE_STATE_FD, DeviceStateReply, DeviceState(0), [writer])
        os.close(reader)
        assert both.frontend.requests.ask(FrontendRequest.CHECK_DEVICE_STATE, U64).value == 1


def test_a_transfer_without_end_fails_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_transfer, "TIME_LIMIT", 0.05)
    reader, writer = os.pipe()
    with pair() as both, OwnedFd(writer):
        with OwnedFd(reader):
            both.frontend.requests.ask(FrontendRequest.SET_DEVICE_STATE_FD, DeviceStateReply, DeviceState(1), [reader])
        assert both.frontend.requests.ask(FrontendRequest.CHECK_DEVICE_STATE, U64).value == 1
        both.frontend.requests.confirm()


def test_who_leaves_during_a_transfer_leaves_nothing() -> None:
    reader, writer = os.pipe()
    with OwnedFd(reader), OwnedFd(writer), pair() as both:
        both.frontend.requests.ask(FrontendRequest.SET_DEVICE_STATE_FD, DeviceStateReply, DeviceState(1), [reader])
        # A second one takes the place of the first.
        both.frontend.requests.ask(FrontendRequest.SET_DEVICE_STATE_FD, DeviceStateReply, DeviceState(1), [reader])


# Inflight.


@FORMATS
def test_a_new_daemon_finishes_what_the_last_one_had(features: int, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    ram = Ram(user=None)
    first = Forgetful()
    with Server() as server:
        server.listen(path, first)
        with server.in_thread():
            frontend = Frontend.connect(path, features=features, protocol_features=ALL)
            frontend.track_inflight(2, 16)
            frontend.regions.share([ram.region])
            ring = start_ring(frontend, ram)
            for each in range(5):
                ring.send(b"request %d" % each)
            ring.vring.kick.signal()
            while len(first.kept) < 5:
                frontend.requests.confirm()
            # Two are done, out of order; then the daemon goes, and forgets the others.
            chains = list(first.kept)
            for at in (3, 1):
                server.loop.call_soon(partial(finish, server, chains[at]))
            ring.collect(2)
    second = Echo()
    with Server() as server:
        server.listen(path, second)
        with server.in_thread():
            frontend.reconnect(connect(path, timeout=5))
            ring.collect(3)
            assert second.served == 3
            ring.echo(b"and goes on")
            frontend.close()
    ram.close()


def finish(server: Server, chain: Chain) -> None:
    """The device is done with a chain that it kept."""
    (endpoint,) = server.endpoints
    assert endpoint.link is not None
    vring = endpoint.link.session.rings.vrings[0]
    device = endpoint.device
    assert isinstance(device, Forgetful)
    device.kept.remove(chain)
    vring.push(chain, device.echo(chain))
    vring.notify()


@pytest.mark.parametrize(("queues", "size"), [(0, 16), (3, 16), (1, 0), (1, 512)])
def test_areas_of_queues_that_are_not_there_are_refused(queues: int, size: int) -> None:
    with pair() as both:
        with pytest.raises(PeerError):
            both.frontend.track_inflight(queues, size)
        assert not both.frontend.connected


def test_areas_come_before_the_rings_that_they_are_of() -> None:
    with pair() as both:
        both.frontend.track_inflight(1, 16)
        start_ring(both.frontend, both.ram)
        area = Inflight(ByteCount(1 << 16), HostOffset(0), 1, 16)
        with pytest.raises(Refused):
            both.frontend.requests.tell(FrontendRequest.SET_INFLIGHT_FD, area, [both.ram.fd])


def inflight_mappings() -> set[str]:
    return {name for name in mapped_files() if "inflight" in name}


def test_an_area_takes_the_place_of_the_last_one() -> None:
    with pair() as both:
        both.frontend.track_inflight(1, 16)
        areas = inflight_mappings()
        both.frontend.track_inflight(2, 32)
        assert len(inflight_mappings()) == len(areas) == 1
        assert inflight_mappings() != areas
        start_ring(both.frontend, both.ram, 1, 32).echo(b"with the new one")


# Postcopy.


@pytest.fixture
def faulting() -> Iterator[tuple[Server, Frontend]]:
    with Server() as server:
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        server.serve(theirs, Faulting())
        with server.in_thread():
            wanted = ALL | ProtocolFeature.PAGEFAULT
            with Frontend(Connection(ours), features=SPLIT, protocol_features=wanted) as frontend:
                yield server, frontend


def test_pagefault_goes_without_slots(faulting: tuple[Server, Frontend]) -> None:
    _, frontend = faulting
    assert frontend.has(ProtocolFeature.PAGEFAULT)
    assert not frontend.has(ProtocolFeature.CONFIGURE_MEM_SLOTS)


def send_and_confirm(frontend: Frontend, request: FrontendRequest) -> None:
    if request is FrontendRequest.POSTCOPY_LISTEN:
        frontend.requests.tell(request)
        frontend.requests.confirm()
    else:
        frontend.requests.ask(request, U64)


@pytest.mark.parametrize("request_", [FrontendRequest.POSTCOPY_LISTEN, FrontendRequest.POSTCOPY_END])
def test_postcopy_begins_with_advice(faulting: tuple[Server, Frontend], request_: FrontendRequest) -> None:
    _, frontend = faulting
    frontend.requests.acked &= ~ProtocolFeature.REPLY_ACK
    with pytest.raises(PeerError):
        send_and_confirm(frontend, request_)


class Source:
    """Where pages come from: answers the faults of the back end, in a thread of its own, for the length of a `with`."""

    def __init__(self, memory: GuestMemory, uffd: OwnedFd, base: int) -> None:
        self.served: list[int] = []
        self._memory, self._uffd, self._base = memory, uffd, base
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        while not self._done.is_set():
            address = _native.fault_take(self._uffd.fileno())
            if address is not None:
                page = GuestAddress((address - self._base) & ~0xFFF)
                self.served.append(page)
                _native.fault_fill(self._uffd.fileno(), self._base + page, self._memory.read(page, 4096))

    def __enter__(self) -> Source:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def listen(frontend: Frontend, ram: Ram) -> tuple[OwnedFd, int]:
    """Have the back end watch `ram`, shared anew; the userfaultfd, and where the back end has it."""
    requests = frontend.requests
    _, (uffd,) = requests.ask_for_fds(FrontendRequest.POSTCOPY_ADVISE, Empty)
    requests.tell(FrontendRequest.POSTCOPY_LISTEN)
    requests.postcopy = True
    table = MemoryTable((ram.region.wire,))
    told = requests.ask(FrontendRequest.SET_MEM_TABLE, MemoryTable, table, [ram.fd])
    connection = requests._connection
    assert connection is not None
    connection.send(FrontendRequest.SET_MEM_TABLE, MemoryTable(()).encode(), timeout=5)
    return uffd, told.regions[0].user_address


@pytest.mark.needs_userfaultfd
def test_pages_come_when_they_are_touched(faulting: tuple[Server, Frontend]) -> None:
    _, frontend = faulting
    source, arriving = Ram(), Ram()
    frontend.regions.share([arriving.region])
    source.memory.write(GuestAddress(0x100000), b"came late")
    uffd, base = listen(frontend, arriving)
    with uffd, Source(source.memory, uffd, base) as pages:
        # The ring is our own driver's, in a mapping that is not watched: its pages are in the file already.
        ring = start_ring(frontend, arriving)
        token = ring.driver.add([(0x100000, 9)], [(0x180000, 9)])
        ring.vring.kick.signal()
        while (used := ring.driver.get_used()) is None:
            ring.vring.wait(0.1)
        assert used == (token, 9)
        assert arriving.memory.read(GuestAddress(0x180000), 9) == b"came late"
        assert {0x100000, 0x180000} <= set(pages.served)
        assert frontend.requests.ask(FrontendRequest.POSTCOPY_END, U64).value == 0
        frontend.requests.postcopy = False
    ring.echo(b"without anybody's help")
    source.close()
    arriving.close()


# The channel.


def test_answers_that_nobody_asked_for_close_the_channel_only() -> None:
    with pair() as both:
        assert both.frontend.channel is not None
        both.frontend.channel._connection.send(2, U64(0).encode(), reply=True, timeout=5)
        start_ring(both.frontend, both.ram).echo(b"goes on")
        both.endpoint.config_changed()
        both.frontend.requests.confirm()


def test_areas_of_the_other_format_are_refused_when_a_ring_is_started() -> None:
    with pair(features=SPLIT) as both:
        both.frontend.track_inflight(1, 16)
        both.frontend.requests.tell(FrontendRequest.SET_FEATURES, U64(both.frontend.features | RING_PACKED))
        both.frontend.features |= RING_PACKED
        with pytest.raises(Refused):
            start_ring(both.frontend, both.ram)
        both.frontend.track_inflight(1, 16)
        start_ring(both.frontend, both.ram).echo(b"with areas of its own")


@FORMATS
def test_after_a_reset_a_ring_begins_where_rings_begin(features: int) -> None:
    with pair(features=features) as both:
        start_ring(both.frontend, both.ram).echo(b"before")
        both.frontend.reset_device()
        assert both.frontend.vring(0).stop() == (FIRST_PACKED if features & RING_PACKED else 0)


def test_a_ring_is_not_started_before_its_memory_may_be_touched(faulting: tuple[Server, Frontend]) -> None:
    _, frontend = faulting
    ram = Ram()
    frontend.regions.share([ram.region])
    requests = frontend.requests
    _, (uffd,) = requests.ask_for_fds(FrontendRequest.POSTCOPY_ADVISE, Empty)
    requests.tell(FrontendRequest.POSTCOPY_LISTEN)
    requests.postcopy = True
    with uffd:
        requests.ask(FrontendRequest.SET_MEM_TABLE, MemoryTable, MemoryTable((ram.region.wire,)), [ram.fd])
        with pytest.raises(Refused):
            start_ring(frontend, ram)
    ram.close()


def test_a_table_is_not_replaced_under_rings_while_memory_is_to_come(faulting: tuple[Server, Frontend]) -> None:
    _, frontend = faulting
    ram = Ram()
    frontend.regions.share([ram.region])
    start_ring(frontend, ram)
    requests = frontend.requests
    _, (uffd,) = requests.ask_for_fds(FrontendRequest.POSTCOPY_ADVISE, Empty)
    requests.tell(FrontendRequest.POSTCOPY_LISTEN)
    requests.postcopy = True
    with uffd, pytest.raises(Disconnected):
        requests.ask(FrontendRequest.SET_MEM_TABLE, MemoryTable, MemoryTable((ram.region.wire,)), [ram.fd])
    ram.close()


def test_a_state_beyond_the_limit_is_not_even_read_to_its_end() -> None:
    class Small(Echo):
        state_size_limit = 100
        loaded = False

        def load_state(self, data: bytes) -> None:
            self.loaded = True

    device = Small()
    with pair(device) as both:
        both.frontend.load_state(bytes(100))
        assert device.loaded
        device.loaded = False
        with pytest.raises(PeerError):
            both.frontend.load_state(bytes(101))
        assert not device.loaded
