"""The daemons that we did not write, ready to be connected to; dead and reaped when the test ends.

Fixtures
    directory       an empty directory with a path short enough for sockets
    image           a raw disk image of IMAGE_SIZE zeros
    share           an empty directory for virtiofsd to serve
    storage_daemon  qemu-storage-daemon serves `image`, with two queues
    virtiofs        virtiofsd serves `share`; it ends when its first client leaves
    passt_daemon    passt
    dpdk_daemon     DPDK's net_vhost, which echoes frames

A test that wants one with other options, or a front end, uses the context managers of daemons.py, dpdk.py and qemu.py
in `directory`. Modules that use any of it set `pytestmark = pytest.mark.needs_peers`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import host
from tests.peers.daemons import passt, qemu_storage_daemon, virtiofsd
from tests.peers.dpdk import dpdk_vhost
from tests.peers.processes import Peer
from vhost_user.units import MIB

IMAGE_SIZE = 64 * MIB


@pytest.fixture
def directory() -> Iterator[Path]:
    if reason := host.missing("needs_peers"):
        pytest.skip(f"needs_peers: {reason}")
    made = Path(tempfile.mkdtemp(prefix="peers-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def image(directory: Path) -> Path:
    path = directory / "image"
    with path.open("wb") as file:
        file.truncate(IMAGE_SIZE)
    return path


@pytest.fixture
def share(directory: Path) -> Path:
    path = directory / "share"
    path.mkdir()
    return path


@pytest.fixture
def storage_daemon(directory: Path, image: Path) -> Iterator[Peer]:
    with qemu_storage_daemon(directory, image, num_queues=2) as peer:
        yield peer


@pytest.fixture
def virtiofs(directory: Path, share: Path) -> Iterator[Peer]:
    with virtiofsd(directory, share) as peer:
        yield peer


@pytest.fixture
def passt_daemon(directory: Path) -> Iterator[Peer]:
    with passt(directory) as peer:
        yield peer


@pytest.fixture
def dpdk_daemon(directory: Path) -> Iterator[Peer]:
    with dpdk_vhost(directory) as peer:
        yield peer
