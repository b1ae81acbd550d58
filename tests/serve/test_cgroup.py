"""A service in a memory cgroup near its limit: PLUG is BUSY, nobody is killed, and with room again it goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.peers.processes import wait_until
from tests.serve.rig import BLOCK_SIZE, Guest, guest, zone
from tests.serve.supervised import supervised
from vhost_user.frontend import Frontend
from vhost_user.units import MIB
from virtio_mem.hostmem.headroom import cgroups
from virtio_mem.protocol import RequestType, ResponseType
from virtio_mem.serve.plan import ServePlan

BLOCKS = 64
LIMIT = 96 * MIB
"""Less than the zone, and more than the service and the margin of 32 MiB."""


class Cgroup:
    """A memory cgroup, version 1 or 2, below the one that this process is in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.version = 1 if (folder / "memory.limit_in_bytes").exists() else 2

    def limit(self, size: int) -> None:
        name = "memory.limit_in_bytes" if self.version == 1 else "memory.max"
        (self.folder / name).write_text(str(size))

    def take(self, pid: int) -> None:
        (self.folder / "cgroup.procs").write_text(str(pid))

    def kills(self) -> int:
        """By the OOM killer, in this cgroup."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        (line,) = [line for line in (self.folder / name).read_text().splitlines() if line.startswith("oom_kill ")]
        return int(line.split()[1])


@contextmanager
def cgroup() -> Iterator[Cgroup]:
    """One that is new, and gone afterwards. Skips where there can be none."""
    parent = next(iter(cgroups("memory")), None)
    if parent is None or not os.access(parent, os.W_OK):
        pytest.skip("no memory cgroup that can be written to")
    folder = parent / f"virtio-mem-test-{os.getpid()}"
    folder.mkdir()
    try:
        made = Cgroup(folder)
        if not (folder / "memory.oom_control").exists() and not (folder / "memory.max").exists():
            pytest.skip("the memory controller is not handed down to new cgroups")
        yield made
    finally:
        folder.rmdir()


def plug_until_busy(machine: Guest, frontend: Frontend) -> int:
    """Block by block; which one was BUSY."""
    for block in range(BLOCKS):
        if block in machine.plugged:
            continue
        answer = machine.ask(frontend, RequestType.PLUG, block)
        if answer is not ResponseType.ACK:
            assert answer is ResponseType.BUSY
            return block
    raise AssertionError("the limit was never met")


def test_a_cgroup_near_its_limit_is_busy_and_nobody_is_killed(tmp_path: Path) -> None:
    with cgroup() as group, guest(nb_blocks=BLOCKS) as machine:
        plan = ServePlan(zones=(zone(BLOCKS),))
        with supervised(plan, tmp_path) as service:
            group.limit(LIMIT)
            group.take(service.pid)
            service.replace_worker()  # the new one is of the supervisor's cgroup
            worker = service.worker()
            with Frontend.connect(str(service.sockets["mem0"]), features=machine.features, timeout=20) as frontend:
                machine.start(frontend)
                changes = _told(frontend)
                refused = plug_until_busy(machine, frontend)
                assert 0 < refused * BLOCK_SIZE < LIMIT
                assert group.kills() == 0
                assert service.worker() == worker, "it was killed"
                machine.check(frontend)
                assert machine.ask(frontend, RequestType.PLUG, refused) is ResponseType.BUSY
                group.limit(4 * LIMIT)
                wait_until(
                    lambda: _told(frontend) > changes, "the driver is asked to try again once there is room", seconds=10
                )
                assert machine.ask(frontend, RequestType.PLUG, refused) is ResponseType.ACK
                assert machine.ask(frontend, RequestType.UNPLUG_ALL) is ResponseType.ACK
                machine.check(frontend)
                assert group.kills() == 0


def _told(frontend: Frontend) -> int:
    """How many change notices came; a message is what has them looked at."""
    frontend.get_config(0, 4)
    assert frontend.channel is not None
    return frontend.channel.config_changes
