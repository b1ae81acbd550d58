"""Our front end and virtiofsd, a file system: rust-vmm's crates."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.peers.daemons import virtiofsd
from tests.peers.drivers.fuse import FileSystem
from tests.peers.drivers.machine import VERSION_1, Machine, Queue, machine
from tests.peers.processes import LATE, Peer, running
from tests.peers.tree import version
from vhost_user.errors import PeerError, Refused, UsageError
from vhost_user.frontend import Frontend
from vhost_user.message import ProtocolFeature

pytestmark = pytest.mark.needs_peers

RING, SCRATCH, BUFFER = 0x10000, 0x20000, 0x100000
REQUESTS = 1
"""The first request queue; 0 is the one for urgent ones."""

SIZE = 128 << 10


@contextmanager
def connected(peer: Peer, guest: Machine) -> Iterator[tuple[Frontend, FileSystem]]:
    with Frontend.connect(str(peer.socket), features=VERSION_1, timeout=LATE) as frontend:
        frontend.regions.share(guest.boot())
        queues = [Queue(frontend, guest, index, RING + index * 0x4000, start=False) for index in range(2)]
        yield frontend, FileSystem(queues[REQUESTS], SCRATCH)


def test_the_command_of_the_readme(directory: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    shown = re.search(r"^    (L=.*\\\n.*)$", (root / "README.md").read_text(), re.MULTILINE)
    assert shown is not None
    socket = directory / "readme.sock"
    line = f"cd {root}; {shown[1]}".replace("/tmp/virtiofsd.sock", str(socket)).replace("; $L", "; exec $L")
    with (
        running("virtiofsd", version("virtiofsd"), ["bash", "-c", line], directory, socket) as peer,
        Frontend.connect(str(peer.socket), features=VERSION_1, timeout=LATE) as frontend,
    ):
        assert frontend.features & VERSION_1


def start(files: FileSystem) -> None:
    files.queue.vring.start(files.queue.layout)


@pytest.fixture
def content(share: Path, rng: random.Random) -> bytes:
    data = rng.randbytes(SIZE)
    (share / "file").write_bytes(data)
    return data


def test_a_file_is_read_into_a_hotplugged_block(virtiofs: Peer, content: bytes) -> None:
    with machine() as guest, connected(virtiofs, guest) as (frontend, files):
        start(files)
        assert files.init()[0] == 7
        with pytest.raises(FileNotFoundError):
            files.lookup("nothing")
        node = files.lookup("file")
        handle = files.open(node)
        (block,) = guest.plug(11)
        frontend.regions.add(block)
        for offset in range(0, SIZE, SIZE // 4):
            got = files.read(node, handle, offset, SIZE // 4, block.guest_address + offset)
            assert got == content[offset:][: SIZE // 4]
        assert guest.memory.read(block.guest_address, SIZE) == content
        frontend.regions.remove(block)
        assert files.read(node, handle, 1000, 1000, BUFFER) == content[1000:2000]


def test_the_tag_is_in_the_configuration(directory: Path, share: Path) -> None:
    with virtiofsd(directory, share, tag="files") as peer, machine() as guest:
        with connected(peer, guest) as (frontend, _):
            assert frontend.get_config(0, 36).rstrip(b"\0") == b"files"
        assert peer.wait() == 0


def test_a_second_daemon_serves_the_file_that_the_first_one_opened(
    directory: Path, share: Path, content: bytes, virtiofs: Peer, figure: Callable[[str, object], None]
) -> None:
    with machine() as guest, connected(virtiofs, guest) as (source, files):
        start(files)
        files.init()
        node = files.lookup("file")
        handle = files.open(node)
        with pytest.raises(UsageError, match="stop them first"):
            source.save_state()
        assert files.queue.vring.stop() == 3
        state = source.save_state()
        figure("virtiofsd's state with one open file, bytes", len(state))
        assert 0 < len(state) < 4096
        # The first daemon took its socket away, and the lock beside it not.
        second = directory / "second.sock"
        with virtiofsd(directory, share, socket=second) as peer, connected(peer, guest) as (target, moved):
            target.load_state(state)
            start(moved)  # a ring of its own, and in it no INIT, LOOKUP or OPEN
            assert moved.read(node, handle, 0, SIZE, BUFFER) == content


@pytest.mark.parametrize("state", [b"", b"garbage", b"\xff" * (1 << 20)], ids=["nothing", "garbage", "a mebibyte"])
def test_what_is_no_state_is_refused(virtiofs: Peer, state: bytes) -> None:
    with machine() as guest, connected(virtiofs, guest) as (frontend, _):
        assert frontend.has(ProtocolFeature.DEVICE_STATE)
        with pytest.raises(Refused, match="CHECK_DEVICE_STATE"):
            frontend.load_state(state)
        assert frontend.connected


def test_more_state_than_is_wanted(virtiofs: Peer) -> None:
    with machine() as guest, connected(virtiofs, guest) as (frontend, files):
        start(files)
        files.init()
        files.queue.vring.stop()
        with pytest.raises(PeerError, match="more than 3 bytes"):
            frontend.save_state(limit=3)
