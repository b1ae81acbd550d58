"""QEMU's storage daemon reads and writes memory that is not there yet; its faults are served by our front end."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.peers.drivers.block import IN, OUT, SECTOR, Disk
from tests.peers.drivers.machine import VERSION_1, Queue, machine
from tests.peers.processes import LATE, Peer
from vhost_user.errors import Refused
from vhost_user.frontend import Frontend
from vhost_user.frontend.postcopy import Postcopy
from vhost_user.frontend.regions import SharedRegion
from vhost_user.units import ByteCount, GuestAddress, HostOffset

pytestmark = [pytest.mark.needs_peers, pytest.mark.needs_userfaultfd]

RING, HEADERS, BUFFER = 0x10000, 0x20000, 0x100000
PAGE = 4096

CONTENT = 40 << 20
"""Where the disk has something to read."""


def test_a_disk_is_written_from_memory_that_is_still_elsewhere(
    storage_daemon: Peer, image: Path, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    content = rng.randbytes(8 * PAGE)
    with image.open("r+b") as file:
        file.seek(CONTENT)
        file.write(content)
    source: dict[int, bytes] = {}  # what the machine had where it came from

    def page(region: SharedRegion, offset: HostOffset, size: ByteCount) -> bytes:
        return source.setdefault(region.guest_address + offset, rng.randbytes(size))

    with (
        machine() as guest,
        Frontend.connect(str(storage_daemon.socket), features=VERSION_1, timeout=LATE) as frontend,
        Postcopy(frontend, page, pid=storage_daemon.pid) as postcopy,
    ):
        postcopy.listen()
        (block,) = guest.plug(9)
        regions = [*guest.boot(), block]
        postcopy.share(regions)
        # The rings and the requests have come already: our own driver has written them.
        disk = Disk(Queue(frontend, guest, 0, RING), HEADERS)
        before = os.fstat(block.fd).st_blocks
        for base in (BUFFER, block.guest_address):
            disk.request(OUT, base % (32 << 20) // SECTOR, base, 8 * PAGE)
            assert sorted(source)[-8:] == list(range(base, base + 8 * PAGE, PAGE))
            written = b"".join(source[base + at] for at in range(0, 8 * PAGE, PAGE))
            with image.open("rb") as disk_file:
                disk_file.seek(base % (32 << 20))
                assert disk_file.read(8 * PAGE) == written
        assert os.fstat(block.fd).st_blocks - before == 8 * PAGE // 512
        assert postcopy.faults == 16
        # Read into pages that are missing: the rest of a page is what it was elsewhere.
        at = block.guest_address + 64 * PAGE
        disk.request(IN, CONTENT // SECTOR, at + SECTOR, 2 * PAGE)
        assert postcopy.faults == 19
        expected = bytearray(b"".join(source[at + page * PAGE] for page in range(3)))
        expected[SECTOR : SECTOR + 2 * PAGE] = content[: 2 * PAGE]
        assert guest.memory.read(GuestAddress(at), 3 * PAGE) == expected
        postcopy.end()
        disk.read(CONTENT // SECTOR, block.guest_address + 128 * PAGE, PAGE)
        assert postcopy.faults == 19
    figure("page faults of qemu-storage-daemon served", postcopy.faults)


def test_without_knowing_the_process_its_addresses_are_not_known(storage_daemon: Peer) -> None:
    with (
        machine() as guest,
        Frontend.connect(str(storage_daemon.socket), features=VERSION_1, timeout=LATE) as frontend,
        Postcopy(frontend, lambda *_: b"") as postcopy,
    ):
        postcopy.listen()
        with pytest.raises(Refused, match="give its pid"):
            postcopy.share(guest.boot())
