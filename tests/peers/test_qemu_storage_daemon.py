"""Our front end and QEMU's storage daemon, a block device: libvhost-user, in C.

Every byte that comes back is compared: with the file that the daemon serves, or with what was written.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.peers.drivers.block import Disk
from tests.peers.drivers.machine import EVENT_IDX, RING_PACKED, VERSION_1, Machine, Queue, machine
from tests.peers.processes import Peer
from vhost_user.frontend import Frontend

pytestmark = pytest.mark.needs_peers

RING, HEADERS, BUFFER = 0x10000, 0x20000, 0x100000
FEATURES = VERSION_1 | EVENT_IDX
IO = 64 << 10


@contextmanager
def connected(peer: Peer, features: int = FEATURES, **options: float) -> Iterator[tuple[Machine, Frontend]]:
    with machine() as guest, Frontend.connect(str(peer.socket), features=features, **options) as frontend:  # type: ignore[arg-type]
        frontend.regions.share(guest.boot())
        yield guest, frontend


def disk_on(frontend: Frontend, guest: Machine, index: int = 0) -> Disk:
    return Disk(Queue(frontend, guest, index, RING + index * 0x8000), HEADERS + index * 0x8000)


@pytest.mark.parametrize("features", [VERSION_1, FEATURES, FEATURES | RING_PACKED], ids=["split", "event", "packed"])
def test_data_is_what_is_in_the_image(storage_daemon: Peer, image: Path, rng: random.Random, features: int) -> None:
    content = rng.randbytes(4 * IO)
    with image.open("r+b") as file:
        file.write(content)
    with connected(storage_daemon, features) as (guest, frontend):
        print(hex(frontend.offered), frontend.requests.acked, frontend.regions.slots)
        disk = disk_on(frontend, guest)
        first, second = guest.plug(0, 7)
        frontend.regions.share([first, second])
        for at, buffer in enumerate((BUFFER, first.guest_address, second.end - IO)):
            assert disk.read(at * IO // 512, buffer, IO) == content[at * IO : (at + 1) * IO]
            data = rng.randbytes(IO)
            disk.write((at + 8) * IO // 512, buffer, data)
            assert image.read_bytes()[(at + 8) * IO :][:IO] == data
