"""Unplugged memory against a daemon of ours, in a process of its own, that tries to touch it.

What the host holds for a block is read from its file, so an access that made the host allocate it again would be seen
whoever made it.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.counts import UNPLUGS_UNDER_TOUCH
from tests.host import HugePagePool
from tests.sharing.helpers import ACK, BLOCK, BUSY, ONE_ZONE, manage, plug, service_of, unplug, unplug_all
from vhost_user.connection import connect
from vhost_user.frontend import Frontend
from vhost_user.units import MIB, GuestAddress
from virtio_mem.manager import MemoryManager
from virtio_mem.sharing import HotplugSharing

TOUCHER = Path(__file__).with_name("toucher.py")
BLOCKS = 64
LATE = 60.0


class Toucher:
    """The daemon's process, and the end of it that commands are written to."""

    def __init__(self, socket: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(TOUCHER.parents[2])}
        self.socket = str(socket)
        self.process = subprocess.Popen(
            [sys.executable, str(TOUCHER), self.socket],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, command: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._read()

    def mapped(self, part: str) -> list[tuple[int, int]]:
        """What the process has mapped of a zone's memfd: offset and size in blocks."""
        found = []
        for line in Path(f"/proc/{self.process.pid}/maps").read_text().splitlines():
            if f"virtio-mem:mem0:{part}" in line:
                start, end, offset = (int(number, 16) for number in re.findall(r"[0-9a-f]{8,}", line)[:3])
                found.append((offset // BLOCK, (end - start) // BLOCK))
        return sorted(found)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def machine_and_toucher(
    directory: Path, hotplug: HotplugSharing = HotplugSharing.PLUGGED, line: str = ONE_ZONE
) -> Iterator[tuple[MemoryManager, Toucher, Frontend]]:
    with ExitStack() as stack:
        manager = stack.enter_context(manage(line))
        toucher = Toucher(directory / "toucher.sock")
        stack.callback(toucher.end)
        frontend = stack.enter_context(Frontend.connect(toucher.socket, features=0, timeout=LATE))
        manager.share(frontend, hotplug=hotplug)
        yield manager, toucher, frontend


def address_of(manager: MemoryManager, block: int) -> int:
    return service_of(manager).device.geometry.addr + block * BLOCK


def held(manager: MemoryManager) -> int:
    memory = manager.zones["mem0"].zone.hotplug
    assert memory is not None
    return memory.held()


def test_an_unplugged_block_cannot_be_touched(tmp_path: Path) -> None:
    with machine_and_toucher(tmp_path) as (manager, toucher, _):
        assert plug(manager, 3, 2) is ACK
        assert toucher.mapped("hotplug") == [(3, 1), (4, 1)]
        assert toucher.ask(f"touch {address_of(manager, 3)}") == "done"
        assert toucher.ask(f"touch {address_of(manager, 4)}") == "done"
        assert manager.guest_memory.read(GuestAddress(address_of(manager, 3)), 1) == b"t"
        assert held(manager) > 0
        assert unplug(manager, 3) is ACK
        assert toucher.mapped("hotplug") == [(4, 1)]
        assert toucher.ask(f"touch {address_of(manager, 3)}") == "no memory"
        assert unplug(manager, 4) is ACK
        assert toucher.mapped("hotplug") == []
        for block in range(BLOCKS):
            assert toucher.ask(f"touch {address_of(manager, block)}") == "no memory"
        assert held(manager) == 0
        assert toucher.ask("touch 0") == "done", "boot memory stays"
        assert manager.info()["daemons"][0]["shared_unplugged"] == 0


@pytest.mark.needs_hugetlb
def test_nor_can_an_unplugged_huge_page(tmp_path: Path, hugepages: Callable[[int, int], HugePagePool]) -> None:
    hugepages(2 * MIB, 4)
    line = ONE_ZONE.replace("size=16M,shared=on", "size=2M,hugepages=on,hugepage_size=2M")
    with machine_and_toucher(tmp_path, line=line) as (manager, toucher, _):
        assert plug(manager, 3, 2) is ACK
        for block in (3, 4):
            assert toucher.ask(f"touch {address_of(manager, block)}") == "done"
        assert unplug(manager, 3) is ACK
        assert held(manager) == BLOCK
        assert toucher.ask(f"touch {address_of(manager, 3)}") == "no memory"
        assert toucher.ask(f"touch {address_of(manager, 4)}") == "done"
        assert unplug_all(manager) is ACK
        assert toucher.mapped("hotplug") == []
        assert held(manager) == 0


def test_of_a_whole_region_it_can(tmp_path: Path) -> None:
    """What the other tests are there to see."""
    with machine_and_toucher(tmp_path, HotplugSharing.WHOLE) as (manager, toucher, _):
        assert toucher.ask(f"touch {address_of(manager, 3)}") == "done"
        assert held(manager) > 0
        assert manager.info()["daemons"][0]["shared_unplugged"] == 128 * MIB


def test_no_block_comes_back_under_a_daemon_that_touches_all_the_time(
    tmp_path: Path, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    with machine_and_toucher(tmp_path) as (manager, toucher, _):
        toucher.ask(f"hammer {address_of(manager, 0)} {BLOCK} {BLOCKS}")
        service, unplugs, done = service_of(manager), 0, 0
        while unplugs < UNPLUGS_UNDER_TOUCH:
            first = rng.randrange(BLOCKS - 4)
            count = rng.randint(1, 4)
            assert plug(manager, first, count) is ACK
            toucher.ask("hits")
            written, _ = map(int, toucher.ask("hits").split())
            done += written
            assert (unplug_all(manager) if rng.random() < 0.3 else unplug(manager, first, count)) is ACK
            unplugs += 1
            assert held(manager) == 0
        toucher.ask("hits")
        toucher.ask("hits")
        assert held(manager) == 0
        assert service.tally.unreturned_bytes == 0
        assert done, "it did touch what was plugged"
        figure("unplugs while a daemon touches memory", unplugs)


def test_a_killed_daemon_is_in_nobodys_way_and_the_next_gets_what_is_plugged(tmp_path: Path) -> None:
    with machine_and_toucher(tmp_path) as (manager, toucher, frontend):
        plug(manager, 0, 3)
        toucher.end()
        assert unplug(manager, 1) is ACK
        assert plug(manager, 9) is ACK
        again = Toucher(tmp_path / "toucher.sock")
        try:
            frontend.reconnect(connect(again.socket, timeout=LATE))
            assert again.mapped("hotplug") == [(0, 1), (2, 1), (9, 1)]
            assert again.ask(f"touch {address_of(manager, 1)}") == "no memory"
            assert again.ask(f"touch {address_of(manager, 9)}") == "done"
        finally:
            again.end()


def test_a_stopped_daemon_keeps_its_blocks_plugged_until_it_is_dead(tmp_path: Path) -> None:
    with machine_and_toucher(tmp_path) as (manager, toucher, frontend):
        plug(manager, 0, 2)
        toucher.process.send_signal(signal.SIGSTOP)
        frontend.requests.timeout = 0.3
        assert unplug(manager) is BUSY
        assert unplug(manager) is BUSY
        assert toucher.mapped("hotplug") == [(0, 1), (1, 1)]
        toucher.process.send_signal(signal.SIGCONT)
        deadline = time.monotonic() + LATE
        while toucher.mapped("hotplug"):
            assert time.monotonic() < deadline, "it sees that the connection has ended, and unmaps"
        while manager.shares[0].lingering:
            assert time.monotonic() < deadline
        assert unplug(manager) is ACK


def test_everything_at_once(tmp_path: Path) -> None:
    with machine_and_toucher(tmp_path) as (manager, toucher, _):
        for first in range(0, BLOCKS, 2):
            assert plug(manager, first) is ACK
        assert len(toucher.mapped("hotplug")) == BLOCKS // 2
        assert manager.system_reset()
        assert toucher.mapped("hotplug") == []
