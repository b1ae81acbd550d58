"""What slots are measured with: sides in C that do what they say, and notice when the other one doesn't."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.backend.devices import Echo
from tests.benchmarks import slots
from tests.benchmarks.peers import Peers
from tests.benchmarks.slots import SLOT_SIZE, front_end, memory, round_trips, slot
from vhost_user.backend import Server


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Peers:
    return Peers(tmp_path_factory.mktemp("peers"))


@contextmanager
def back_end_here(device: Echo) -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    with ours, Server() as server:
        server.serve(theirs, device)
        with server.in_thread():
            yield ours


def test_a_back_end_in_c_serves_our_front_end(peers: Peers) -> None:
    with memory(4 * SLOT_SIZE) as fd, front_end(peers.back_end()) as frontend:
        assert frontend.regions.slots == 509
        frontend.regions.share(slot(fd, number) for number in range(3))
        assert round_trips(frontend, fd, 5) > 0
        frontend.regions.remove(slot(fd, 1))
        assert list(frontend.regions) == [slot(fd, 0), slot(fd, 2)]


def test_a_front_end_in_c_leaves_the_other_slots_shared(peers: Peers) -> None:
    device = Echo()
    with memory(4 * SLOT_SIZE) as fd, back_end_here(device) as sock:
        assert len(peers.front_end(sock, fd, 3, SLOT_SIZE, 20)) == 20
        assert device.memory is not None
        found = [(region.guest_address, region.size) for region in device.memory.guest_memory.regions]
        assert found == [(each.guest_address, each.size) for each in (slot(fd, number) for number in range(3))]


def test_a_front_end_in_c_measures_no_refusal(peers: Peers) -> None:
    with memory(SLOT_SIZE) as fd, back_end_here(Echo()) as sock, pytest.raises(subprocess.CalledProcessError):
        peers.front_end(sock, fd, 0, 2 * SLOT_SIZE, 20)


def test_a_back_end_in_c_takes_no_more_slots_than_it_says(peers: Peers) -> None:
    with memory(SLOT_SIZE) as fd, peers.back_end() as sock, pytest.raises(subprocess.CalledProcessError):
        peers.front_end(sock, fd, 510, 4096, 1)


@pytest.mark.long
def test_there_is_a_row_for_each_side() -> None:
    rows = list(slots.rows(quick=True, rounds=2))
    assert [row.goal for row in rows] == ["at most 1.3 x"] * 2 + ["none"] * 4 + ["at most 1.3 x"]
