"""Daemons that we did not write, at a manager's memory: what each has mapped after each plug and unplug."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.peers.daemons import qemu_storage_daemon, virtiofsd
from tests.peers.dpdk import dpdk_vhost
from tests.peers.processes import LATE, Peer
from tests.sharing.helpers import ACK, BLOCK, manage, plug, service_of, unplug, unplug_all
from vhost_user.frontend import Frontend
from vhost_user.units import MIB
from virtio_mem.manager import MemoryManager

pytestmark = pytest.mark.needs_peers

VERSION_1 = 1 << 32


@pytest.fixture
def directory() -> Iterator[Path]:
    """With a path that is short enough for sockets."""
    made = Path(tempfile.mkdtemp(prefix="sharing-"))
    yield made
    shutil.rmtree(made)


@contextmanager
def connected(name: str, directory: Path) -> Iterator[tuple[MemoryManager, Peer, Frontend]]:
    with ExitStack() as stack:
        peer = stack.enter_context(daemon(name, directory))
        manager = stack.enter_context(manage())
        frontend = stack.enter_context(Frontend.connect(str(peer.socket), features=VERSION_1, timeout=LATE))
        yield manager, peer, frontend


@contextmanager
def daemon(name: str, directory: Path) -> Iterator[Peer]:
    if name == "qemu-storage-daemon":
        image = directory / "image"
        image.write_bytes(bytes(MIB))
        with qemu_storage_daemon(directory, image) as peer:
            yield peer
    elif name == "virtiofsd":
        share = directory / "share"
        share.mkdir()
        with virtiofsd(directory, share) as peer:
            yield peer
    else:
        with dpdk_vhost(directory) as peer:
            yield peer


def mapped(peer: Peer) -> int:
    """Bytes that the process has mapped of the hotplug region."""
    lines = [line for line in peer.mappings() if "virtio-mem:mem0:hotplug" in line]
    ranges = [re.match(r"([0-9a-f]+)-([0-9a-f]+)", line) for line in lines]
    return sum(int(found[2], 16) - int(found[1], 16) for found in ranges if found)


@pytest.mark.parametrize("name", ["qemu-storage-daemon", "virtiofsd"])
def test_slot_by_slot(name: str, directory: Path) -> None:
    with connected(name, directory) as (manager, peer, frontend):
        share = manager.share(frontend, name=name)
        assert share.plan.slot_size("mem0") == BLOCK
        for count, block in enumerate((0, 1, 7, 40), 1):
            assert plug(manager, block) is ACK
            assert mapped(peer) == count * BLOCK
        assert unplug(manager, 1) is ACK
        assert mapped(peer) == 3 * BLOCK
        assert unplug_all(manager) is ACK
        assert mapped(peer) == 0
        assert plug(manager, 0, 64) is ACK
        assert mapped(peer) == 128 * MIB
        assert manager.system_reset()
        assert mapped(peer) == 0
        assert frontend.connected
        assert service_of(manager).failed_undos == 0
        share.close()
        assert not [line for line in peer.mappings() if "virtio-mem:" in line]


def test_by_whole_tables(directory: Path) -> None:
    """DPDK's takes eight regions, and no single ones."""
    with connected("dpdk", directory) as (manager, peer, frontend):
        share = manager.share(frontend)
        assert share.plan.slot_size("mem0") == 32 * MIB
        for block in (3, 20):
            assert plug(manager, block) is ACK
        assert manager.info()["daemons"][0]["shared_unplugged"] == 64 * MIB - 2 * BLOCK
        before = mapped(peer)
        assert before >= 64 * MIB
        assert unplug(manager, 20) is ACK
        assert mapped(peer) < before
        assert unplug(manager, 3) is ACK
        assert mapped(peer) == 0
        assert frontend.connected
