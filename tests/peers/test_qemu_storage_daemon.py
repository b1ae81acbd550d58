"""Our front end and QEMU's storage daemon, a block device: libvhost-user, in C.

Every byte that comes back is compared: with the file that the daemon serves, or with what was written.
"""

from __future__ import annotations

import os
import random
import signal
import struct
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import counts
from tests.peers.conftest import IMAGE_SIZE
from tests.peers.daemons import qemu_storage_daemon
from tests.peers.drivers.block import IN, OUT, SECTOR, Disk
from tests.peers.drivers.machine import EVENT_IDX, VERSION_1, Machine, Queue, machine
from tests.peers.processes import LATE, Peer
from tests.peers.qemu import Qmp
from vhost_user.connection import connect
from vhost_user.errors import Disconnected, Refused
from vhost_user.frontend import PROTOCOL_FEATURES, Frontend, SharedRegion
from vhost_user.message import LOG_PAGE, ProtocolFeature
from vhost_user.units import ByteCount, GuestAddress

pytestmark = pytest.mark.needs_peers

RING, HEADERS, BUFFER = 0x10000, 0x20000, 0x100000
FEATURES = VERSION_1 | EVENT_IDX
IO = 64 << 10


@contextmanager
def connected(peer: Peer, features: int = FEATURES) -> Iterator[tuple[Machine, Frontend]]:
    with machine() as guest, Frontend.connect(str(peer.socket), features=features, timeout=LATE) as frontend:
        frontend.regions.share(guest.boot())
        yield guest, frontend


def disk_on(frontend: Frontend, guest: Machine, index: int = 0, *, start: bool = True) -> Disk:
    return Disk(Queue(frontend, guest, index, RING + index * 0x8000, start=start), HEADERS + index * 0x8000)


def fill(image: Path, rng: random.Random, size: int) -> bytes:
    """Random bytes at the beginning of the image."""
    content = rng.randbytes(size)
    with image.open("r+b") as file:
        file.write(content)
    return content


def on_disk(image: Path, at: int, size: int) -> bytes:
    with image.open("rb") as file:
        file.seek(at)
        return file.read(size)


@pytest.mark.parametrize("features", [VERSION_1, FEATURES], ids=["flags", "event index"])
def test_data_goes_both_ways_through_boot_ram_and_hotplugged_blocks(
    storage_daemon: Peer, image: Path, rng: random.Random, features: int
) -> None:
    content = fill(image, rng, 4 * IO)
    with connected(storage_daemon, features) as (guest, frontend):
        assert frontend.features & features == features
        disk = disk_on(frontend, guest)
        first, second = guest.plug(0, 7)
        frontend.regions.share([first, second])
        for at, buffer in enumerate((BUFFER, first.guest_address, second.end - IO)):
            assert disk.read(at * IO // SECTOR, buffer, IO) == content[at * IO :][:IO]
            data = rng.randbytes(IO)
            disk.write((at + 8) * IO // SECTOR, buffer, data)
            disk.flush()
            assert on_disk(image, (at + 8) * IO, IO) == data
        assert disk.serial(second.guest_address).rstrip(b"\0") == b"vhost_user_blk"


def test_every_queue_of_several(storage_daemon: Peer, image: Path, rng: random.Random) -> None:
    content = fill(image, rng, 2 * IO)
    with connected(storage_daemon) as (guest, frontend):
        assert frontend.queue_count == 2
        for index, disk in enumerate([disk_on(frontend, guest, 0), disk_on(frontend, guest, 1)]):
            assert disk.read(index * IO // SECTOR, BUFFER, IO) == content[index * IO :][:IO]


def test_the_configuration_and_notice_of_its_change(directory: Path, image: Path) -> None:
    monitor = directory / "monitor.sock"
    arguments = ["--chardev", f"socket,id=m,path={monitor},server=on,wait=off", "--monitor", "chardev=m"]
    with qemu_storage_daemon(directory, image, *arguments) as peer, connected(peer) as (_, frontend):
        assert struct.unpack("<Q", frontend.get_config(0, 8)) == (IMAGE_SIZE // SECTOR,)
        with pytest.raises(Refused, match="GET_CONFIG"):
            frontend.get_config(100, 100)
        assert frontend.connected
        assert frontend.channel is not None
        qmp = Qmp(monitor)
        try:
            qmp("block_resize", {"node-name": "image", "size": IMAGE_SIZE // 2})
        finally:
            qmp.close()
        assert frontend.requests.wait_ready(frontend.channel.fileno(), LATE)
        frontend.serve_channel()
        assert frontend.channel.config_changes == 1
        assert struct.unpack("<Q", frontend.get_config(0, 8)) == (IMAGE_SIZE // 2 // SECTOR,)


def shared_mappings(peer: Peer) -> list[str]:
    """What it has of our memory."""
    return [line for line in peer.mappings() if "memfd:" in line]


class Traffic:
    """Reads and writes that never pause: eight sectors each, through buffers in boot RAM of their own."""

    SIZE = 8 * SECTOR

    def __init__(self, disk: Disk, content: bytes, depth: int = 16) -> None:
        self.disk = disk
        self.content = content
        self.done = 0
        self._flying: dict[int, tuple[int, int]] = {}
        self._buffers = deque(BUFFER + 0x10000 + at * self.SIZE for at in range(depth))
        self._next = 0

    def top_up(self) -> None:
        """As many requests in flight as there are buffers."""
        while self._buffers:
            buffer, at = self._buffers.popleft(), self._next % (len(self.content) // self.SIZE)
            self._next += 1
            self.disk.queue.memory.write(GuestAddress(buffer), bytes(self.SIZE))
            self._flying[self.disk.submit(IN, at * self.SIZE // SECTOR, buffer, self.SIZE)] = buffer, at

    def take(self, foreign: int | None = None) -> bool:
        """Take back one request, and compare what it read; whether it was the `foreign` one, which is not compared."""
        token = self.disk.complete()
        if token == foreign:
            return True
        buffer, at = self._flying.pop(token)
        got = self.disk.queue.memory.read(GuestAddress(buffer), self.SIZE)
        assert got == self.content[at * self.SIZE :][: self.SIZE]
        self._buffers.append(buffer)
        self.done += 1
        return False

    def drain(self) -> None:
        while self._flying:
            self.take()


def test_blocks_come_and_go_under_load(storage_daemon: Peer, image: Path, rng: random.Random) -> None:
    content = fill(image, rng, 64 * Traffic.SIZE)
    with connected(storage_daemon) as (guest, frontend):
        blocks = guest.plug(0, 1, 2, 3)
        traffic = Traffic(disk_on(frontend, guest), content)
        files, mapped = storage_daemon.open_files(), shared_mappings(storage_daemon)
        for turn in range(counts.REGIONS_UNDER_LOAD):
            block = blocks[turn % len(blocks)]
            traffic.top_up()
            frontend.regions.add(block)
            at = turn % 64
            buffer = block.guest_address + rng.randrange(0, block.size - Traffic.SIZE, SECTOR)
            token = traffic.disk.submit(IN, at * Traffic.SIZE // SECTOR, buffer, Traffic.SIZE)
            while not traffic.take(token):
                traffic.top_up()
            got = guest.memory.read(GuestAddress(buffer), Traffic.SIZE)
            assert got == content[at * Traffic.SIZE :][: Traffic.SIZE]
            frontend.regions.remove(block)
        traffic.drain()
        assert traffic.done >= counts.REGIONS_UNDER_LOAD
        assert storage_daemon.open_files() == files
        assert shared_mappings(storage_daemon) == mapped


def test_as_many_regions_as_there_are_slots(storage_daemon: Peer, image: Path, rng: random.Random) -> None:
    content = fill(image, rng, IO)
    with connected(storage_daemon) as (guest, frontend):
        (block,) = guest.plug(0)
        page = 4096
        pieces = [
            SharedRegion(
                GuestAddress(block.guest_address + at), ByteCount(page), block.fd, type(block.offset)(block.offset + at)
            )
            for at in range(0, (frontend.regions.slots - 1) * page, page)
        ]
        frontend.regions.share(pieces)
        assert len(frontend.regions) == frontend.regions.slots == 509
        disk = disk_on(frontend, guest)
        # Across sixteen of them.
        assert disk.read(0, pieces[100].guest_address, IO) == content


def test_a_ring_is_stopped_and_started_while_another_is_busy(
    storage_daemon: Peer, image: Path, rng: random.Random
) -> None:
    """What is made available while the ring is stopped waits, and is served at the start without a kick."""
    content = fill(image, rng, 64 * Traffic.SIZE)
    with connected(storage_daemon) as (guest, frontend):
        busy, disk = Traffic(disk_on(frontend, guest, 1), content), disk_on(frontend, guest)
        queue = disk.queue
        for turn in range(counts.RING_RESTARTS):
            busy.top_up()
            assert queue.vring.stop() == turn
            token = disk.submit(IN, turn % 64 * 8, BUFFER, Traffic.SIZE)
            busy.take()
            assert queue.driver.get_used() is None
            queue.vring.start(queue.layout, turn)
            assert disk.complete() == token
            got = guest.memory.read(GuestAddress(BUFFER), Traffic.SIZE)
            assert got == content[turn % 64 * Traffic.SIZE :][: Traffic.SIZE]
        busy.drain()


def test_nothing_is_lost_when_a_ring_is_stopped_with_a_request_in_flight(
    storage_daemon: Peer, image: Path, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    """This daemon stops without waiting for it, against the document, and closes where it completes before the ring is
    started again: then a front end has to reconnect. With several, which complete in any order, it would have to know
    which, and this daemon doesn't track what is in flight."""
    content = fill(image, rng, 64 * Traffic.SIZE)
    closed = 0
    with connected(storage_daemon) as (guest, frontend):
        traffic = Traffic(disk_on(frontend, guest), content, depth=1)
        vring, layout = traffic.disk.queue.vring, traffic.disk.queue.layout
        for _ in range(counts.RING_RESTARTS):
            traffic.top_up()
            try:
                vring.start(layout, vring.stop())
                frontend.requests.confirm()
            except Disconnected:
                closed += 1
                frontend.reconnect(connect(str(storage_daemon.socket), timeout=LATE))
                if not vring.started:
                    vring.start(layout, vring.position())
            traffic.take()
        traffic.drain()
    figure(f"qsd {storage_daemon.version} closed, in {counts.RING_RESTARTS} stops with a request in flight", closed)


def changed(before: bytes, after: bytes) -> set[int]:
    return {
        at // LOG_PAGE
        for at in range(0, len(before), LOG_PAGE)
        if before[at : at + LOG_PAGE] != after[at : at + LOG_PAGE]
    }


def test_the_dirty_log_names_the_pages_that_changed(storage_daemon: Peer, image: Path, rng: random.Random) -> None:
    content = fill(image, rng, 32 * IO)
    with connected(storage_daemon) as (guest, frontend):
        disk = disk_on(frontend, guest)
        vring = disk.queue.vring
        ram = guest.boot()[0]
        assert disk.read(0, BUFFER, IO) == content[:IO]
        frontend.start_logging(GuestAddress(ram.end - 1))
        vring.set_log(vring.layout.areas["used"].address)  # type: ignore[union-attr]
        logged, shadow, own = set(), {}, set()
        (block,) = guest.plug(3)
        frontend.regions.add(block)  # beyond the end of the log, which grows
        for region in (ram, block):
            shadow[region.guest_address] = guest.memory.read(region.guest_address, region.size)
        for at in range(32):
            base, size = (BUFFER, 0x100000) if at % 2 else (block.guest_address, block.size)
            buffer = base + rng.randrange(0, size - IO, SECTOR)
            assert disk.read(at * IO // SECTOR, buffer, IO) == content[at * IO :][:IO]
            if at % 5 == 0:
                logged |= frontend.take_dirty_pages()
        logged |= frontend.stop_logging()
        own |= {HEADERS // LOG_PAGE, RING // LOG_PAGE}
        dirty = set()
        for region in (ram, block):
            after = guest.memory.read(region.guest_address, region.size)
            first = region.guest_address // LOG_PAGE
            dirty |= {first + page for page in changed(shadow[region.guest_address], after)}
        assert logged - own == dirty - own
        # The status byte of a request, and the used ring; the driver's own writes are in the same pages.
        assert own <= dirty
        assert own <= logged
        disk.read(0, BUFFER, IO)


def test_a_daemon_that_was_killed_is_replaced(directory: Path, image: Path, rng: random.Random) -> None:
    content = fill(image, rng, 64 * Traffic.SIZE)
    with qemu_storage_daemon(directory, image) as first, connected(first) as (guest, frontend):
        (block,) = guest.plug(5)
        frontend.regions.add(block)
        traffic = Traffic(disk_on(frontend, guest), content)
        for _ in range(100):
            traffic.top_up()
            traffic.take()
        traffic.drain()
        # What it took is lost with it unless it was used in order: so it takes none of these.
        os.kill(first.pid, signal.SIGSTOP)
        traffic.top_up()
        first.kill()
        with pytest.raises(Disconnected):
            frontend.requests.confirm()
        with qemu_storage_daemon(directory, image, socket=first.socket) as second:
            frontend.reconnect(connect(str(second.socket), timeout=LATE))
            traffic.drain()
            data = rng.randbytes(IO)
            traffic.disk.write(1024, block.guest_address, data)
            assert on_disk(image, 1024 * SECTOR, IO) == data


def test_without_slots_whole_tables_are_sent(storage_daemon: Peer, image: Path, rng: random.Random) -> None:
    content = fill(image, rng, IO)
    without = ~ProtocolFeature.CONFIGURE_MEM_SLOTS
    with (
        machine() as guest,
        Frontend.connect(
            str(storage_daemon.socket), features=FEATURES, timeout=LATE, protocol_features=PROTOCOL_FEATURES & without
        ) as frontend,
    ):
        assert not frontend.regions.by_region
        frontend.regions.share(guest.boot())
        blocks = guest.plug(*range(7))
        disk = disk_on(frontend, guest)
        for block in blocks:
            frontend.regions.add(block)
            assert disk.read(0, block.guest_address, IO) == content
        for block in blocks[:-1]:
            frontend.regions.remove(block)
        assert disk.read(0, blocks[-1].guest_address, IO) == content


def until_it_closes(frontend: Frontend) -> None:
    while True:
        frontend.requests.confirm()


def test_a_buffer_in_memory_that_was_taken_back_ends_the_connection(storage_daemon: Peer) -> None:
    with connected(storage_daemon) as (guest, frontend):
        (block,) = guest.plug(0)
        disk = disk_on(frontend, guest)
        frontend.regions.add(block)
        disk.read(0, block.guest_address, IO)
        frontend.regions.remove(block)
        disk.submit(OUT, 0, block.guest_address, IO)
        with pytest.raises(Disconnected):
            until_it_closes(frontend)
        assert storage_daemon.process.poll() is None
