"""Our front end and DPDK's net_vhost, which sends each frame back as it came. It takes whole tables of memory only."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests import counts
from tests.peers.drivers.machine import RING_PACKED, VERSION_1, Machine, Queue, machine
from tests.peers.drivers.net import RX, TX, Nic
from tests.peers.processes import LATE, Peer, wait_until
from vhost_user.errors import HostError
from vhost_user.frontend import Frontend
from vhost_user.message import ProtocolFeature

pytestmark = pytest.mark.needs_peers

RINGS, BUFFERS = (0x10000, 0x20000), (0x100000, 0x200000)
DRIVER_OK = 1 | 2 | 4 | 8
"""ACKNOWLEDGE, DRIVER, DRIVER_OK and FEATURES_OK of the device status."""


@contextmanager
def connected(peer: Peer, features: int = VERSION_1) -> Iterator[tuple[Machine, Frontend]]:
    with machine() as guest, Frontend.connect(str(peer.socket), features=features, timeout=LATE) as frontend:
        frontend.regions.share(guest.boot())
        yield guest, frontend


def nic_on(frontend: Frontend, guest: Machine, buffers: tuple[int, int] = BUFFERS) -> Nic:
    rings = [Queue(frontend, guest, index, RINGS[index]) for index in (RX, TX)]
    frontend.status = DRIVER_OK
    nic = Nic(rings[RX], rings[TX], buffers)
    wait_for_echo(nic)
    return nic


def wait_for_echo(nic: Nic) -> None:
    """testpmd looks for its port's link, and throws away what came by then, before it forwards."""

    def echoed() -> bool:
        nic.send(bytes(60))
        return nic.receiver.vring.wait(0.05)

    wait_until(echoed, "a frame comes back")
    nic.send(b"the last of them".ljust(60))
    while nic.receive() != b"the last of them".ljust(60):
        pass


def echo(nic: Nic, rng: random.Random, frames: int, at_once: int = 16) -> None:
    """Frames of every size there and back, in order, several in flight."""
    flying: list[bytes] = []
    for _ in range(frames):
        frame = rng.randbytes(rng.randrange(60, 1515))
        nic.send(frame)
        flying.append(frame)
        if len(flying) == at_once:
            assert nic.receive() == flying.pop(0)
    for frame in flying:
        assert nic.receive() == frame


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | RING_PACKED], ids=["split", "packed"])
def test_frames_come_back_byte_for_byte(dpdk_daemon: Peer, rng: random.Random, features: int) -> None:
    with connected(dpdk_daemon, features) as (guest, frontend):
        assert frontend.features & features == features
        assert frontend.has(ProtocolFeature.STATUS)
        assert not frontend.regions.by_region
        nic = nic_on(frontend, guest)
        assert frontend.status == DRIVER_OK
        echo(nic, rng, counts.ECHOED_FRAMES)


def test_memory_is_added_and_removed_by_tables(dpdk_daemon: Peer, rng: random.Random) -> None:
    with connected(dpdk_daemon) as (guest, frontend):
        blocks = guest.plug(*range(8))
        frontend.regions.share(blocks[:7])
        with pytest.raises(HostError, match="has to be at most 8"):
            frontend.regions.add(blocks[7])
        low, high = blocks[0].guest_address, blocks[6].guest_address
        nic = nic_on(frontend, guest, (low, high))
        echo(nic, rng, 50)
        # Not those with the rings' buffers in them.
        frontend.regions.unshare(blocks[1:6])
        echo(nic, rng, 50)
        frontend.regions.add(blocks[7])
        echo(nic, rng, 50)
