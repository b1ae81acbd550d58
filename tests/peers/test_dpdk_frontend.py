"""DPDK's virtio_user as the front end: frames without a pause, through rings that it polls and never sleeps at.

It trusts what it reads from the used ring: an index that is wrong for one load makes it crash. So a million frames that
it lives through say that the ring's stores are whole and in order, each of them seen by another processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import counts
from tests.peers.dpdk import dpdk_virtio_user
from tests.peers.net_device import NetDevice
from tests.peers.processes import Peer, wait_until
from vhost_user.backend import Server
from vhost_user.message import ProtocolFeature

pytestmark = pytest.mark.needs_peers

RING_PACKED = 1 << 34


@contextmanager
def front_end(
    directory: Path, device: NetDevice, mode: str, *, listens: bool = False, burst: bool = True, options: str = ""
) -> Iterator[tuple[Peer, Server]]:
    """DPDK in forwarding mode `mode`, which connects to our device, or `listens` for it."""
    socket = directory / "net.sock"
    arguments = (f"--forward-mode={mode}",)
    with Server() as server:
        if listens:
            with dpdk_virtio_user(directory, socket, *arguments, server=True, burst=burst, options=options) as peer:
                server.connect(socket, device)
                with server.in_thread():
                    yield peer, server
        else:
            server.listen(socket, device)
            with server.in_thread(), dpdk_virtio_user(directory, socket, *arguments, options=options) as peer:
                yield peer, server


def take_frames(peer: Peer, device: NetDevice, number: int) -> None:
    """Until so many more have come; the peer lives."""
    aim = device.frames + number
    wait_until(lambda: device.frames >= aim or peer.process.poll() is not None, f"{number} frames", 600)
    assert peer.process.poll() is None


def end(peer: Peer) -> str:
    peer.send("")
    assert peer.wait() == 0
    return peer.wait_for_output("Accumulated forward statistics")


@pytest.mark.parametrize("listens", [False, True], ids=["it connects", "it listens"])
@pytest.mark.parametrize("options", ["", "packed_vq=1"], ids=["split", "packed"])
def test_frames_without_a_pause(
    directory: Path, listens: bool, options: str, figure: Callable[[str, object], None]
) -> None:
    device = NetDevice()
    with front_end(directory, device, "txonly", listens=listens, options=options) as (peer, server):
        (endpoint,) = server.endpoints
        take_frames(peer, device, counts.DPDK_FRAMES)
        assert bool(device.acked & RING_PACKED) == bool(options)
        assert endpoint.link is not None
        acked = endpoint.link.session.negotiated.protocol_features
        end(peer)
        wait_until(lambda: not endpoint.connected, "the back end sees DPDK gone")
    assert acked == ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.STATUS
    figure(f"DPDK frames, {options or 'split'}, {'server' if listens else 'client'}", device.frames)
    figure("DPDK virtio_user acked", f"{device.acked:#x} {acked!r}")


def test_frames_go_round(directory: Path, figure: Callable[[str, object], None]) -> None:
    """Both rings at once: it sends again what it is sent, and counts."""
    device = NetDevice(echo=True)
    with front_end(directory, device, "io") as (peer, _):
        take_frames(peer, device, counts.DPDK_FRAMES // 10)
        printed = end(peer)
    assert device.echoed == device.frames
    received = int(printed.rpartition("RX-packets: ")[2].split()[0])
    assert 0 < received <= device.echoed
    figure("DPDK frames that went round", device.echoed)


@pytest.mark.parametrize("options", ["", "packed_vq=1"], ids=["split", "packed"])
def test_a_front_end_that_listens_is_gone_to_again(directory: Path, options: str) -> None:
    """In the middle of its work. It goes on with the split rings that it has, and tells that they begin at 0."""
    device = NetDevice()
    with front_end(directory, device, "txonly", listens=True, burst=False, options=options) as (peer, server):
        (endpoint,) = server.endpoints
        take_frames(peer, device, counts.DPDK_FRAMES // 10)
        assert endpoint.link is not None
        server.loop.call_soon(endpoint.link.close)
        wait_until(lambda: device.sessions == 2, "the back end connects again")
        take_frames(peer, device, counts.DPDK_FRAMES // 10)
        end(peer)
