"""A front end with guest memory in a memfd, to set against a back end: both in this process, by a socket."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from tests.backend.devices import Echo
from vhost_user.backend import Device, Endpoint, Server
from vhost_user.connection import Connection
from vhost_user.frontend import PROTOCOL_FEATURES, Frontend, FrontendVring, SharedRegion
from vhost_user.mapping import Mapping
from vhost_user.memory import GuestMemory, Region
from vhost_user.message import PackedBase, ProtocolFeature
from vhost_user.units import MIB, ByteCount, GuestAddress, UserAddress
from vhost_user.vring import DriverQueue, PackedDriver, PackedLayout, SplitDriver, SplitLayout

RING_PACKED, EVENT_IDX, INDIRECT_DESC, VERSION_1 = 1 << 34, 1 << 29, 1 << 28, 1 << 32
EVERYTHING = RING_PACKED | EVENT_IDX | INDIRECT_DESC | VERSION_1
SPLIT = EVERYTHING & ~RING_PACKED

SIZE = 2 * MIB
USER = UserAddress(0x7F00_0000_0000)
"""Where the front end says that it has its memory: not where it is in the guest, so that mixing them up is seen."""

DATA = GuestAddress(MIB)
"""Where buffers are; rings lie below."""


class Ram:
    """Guest memory of `size` bytes at `guest`, in a memfd, for a driver in this process and a daemon in another."""

    def __init__(self, size: int = SIZE, guest: int = 0, user: int | None = USER) -> None:
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.mapping = Mapping(ByteCount(size), mmap.MAP_SHARED, self.fd)
        self.region = SharedRegion(
            GuestAddress(guest), ByteCount(size), self.fd, user_address=None if user is None else UserAddress(user)
        )
        self.memory = GuestMemory([Region(GuestAddress(guest), ByteCount(size), self.mapping)])

    def close(self) -> None:
        self.memory.replace(())
        self.mapping.close()
        os.close(self.fd)


@dataclass
class Running:
    """A ring that both sides serve."""

    vring: FrontendVring
    driver: DriverQueue
    layout: SplitLayout | PackedLayout
    memory: GuestMemory
    next_data: int = 0
    sent: dict[int, tuple[GuestAddress, bytes]] = field(default_factory=dict)

    def send(self, data: bytes) -> int:
        """Make `data` available with room for the answer, without a kick; the chain's token."""
        at = DATA + self.vring.index * 0x40000 + self.next_data % 64 * 0x1000
        self.next_data += 1
        self.memory.write(GuestAddress(at), data)
        answer = GuestAddress(at + 0x800)
        token = self.driver.add([(at, len(data))], [(answer, len(data))])
        self.sent[token] = (answer, data)
        return token

    def collect(self, count: int, timeout: float = 5.0) -> None:
        """Wait for `count` chains to come back, each with what was sent."""
        while count:
            used = self.driver.get_used()
            if used is None:
                if not self.driver.enable_interrupts():
                    assert self.vring.wait(timeout), "no call came"
                continue
            token, written = used
            answer, data = self.sent.pop(token)
            assert written == len(data)
            assert self.memory.read(answer, written) == data
            count -= 1

    def echo(self, data: bytes) -> None:
        self.send(data)
        self.kick()
        self.collect(1)

    def kick(self) -> None:
        if self.driver.needs_kick():
            self.vring.kick.signal()


FIRST_PACKED = PackedBase(0, True, 0, True).to_num()


def start_ring(frontend: Frontend, ram: Ram, index: int = 0, size: int = 16, *, enabled: bool = True) -> Running:
    """Make a ring in `ram` and have the back end serve it."""
    at = GuestAddress(ram.region.guest_address + index * 0x10000)
    event_idx = bool(frontend.features & EVENT_IDX)
    driver: DriverQueue
    layout: SplitLayout | PackedLayout
    if frontend.features & RING_PACKED:
        layout = PackedLayout.place(size, at)
        driver = PackedDriver(ram.memory, layout, event_idx=event_idx)
    else:
        layout = SplitLayout.place(size, at)
        driver = SplitDriver(ram.memory, layout, event_idx=event_idx)
    vring = frontend.vring(index)
    vring.start(layout, FIRST_PACKED if frontend.features & RING_PACKED else 0, enabled=enabled)
    return Running(vring, driver, layout, ram.memory)


@dataclass
class Pair:
    """A front end, the server at the other end of its socket, and guest memory that is shared already."""

    server: Server
    endpoint: Endpoint
    frontend: Frontend
    ram: Ram


@contextmanager
def pair(
    device: Device | None = None,
    *,
    features: int = SPLIT,
    protocol_features: ProtocolFeature = PROTOCOL_FEATURES,
    share: bool = True,
) -> Iterator[Pair]:
    """Both ends of a socket, the back end in a thread of its own."""
    with ExitStack() as stack:
        server = stack.enter_context(Server())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        endpoint = server.serve(theirs, device or Echo())
        stack.enter_context(server.in_thread())
        ram = Ram()
        stack.callback(ram.close)
        frontend = Frontend(Connection(ours), features=features, protocol_features=protocol_features)
        stack.enter_context(frontend)
        if share:
            frontend.regions.share([ram.region])
        yield Pair(server, endpoint, frontend, ram)


def confirm_often(frontend: Frontend) -> None:
    """A thousand round trips: what the back end would send by itself is there by then."""
    for _ in range(1000):
        frontend.requests.confirm()
