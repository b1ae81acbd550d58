"""`virtio-mem serve` under a real Linux guest: sizes agree everywhere, whatever dies, stops or comes back."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import counts
from tests.linux.served import MEMORY_BLOCK, linux, serving
from vhost_user.units import GIB, MIB

pytestmark = pytest.mark.needs_peers


def test_resizes_while_workers_are_killed(
    tmp_path: Path, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    with serving(tmp_path, "hotplugged_size=512M,prefault=on") as service, linux(tmp_path, service) as machine:
        service.wait_for(512 * MIB)
        total = machine.console.memory_total()
        for size in (640 * MIB, 0):
            service.resize(size)
            service.wait_for(size)
        machine.total_at_boot = machine.console.memory_total()
        assert total - machine.total_at_boot == 512 * MIB
        machine.check(0)
        for _ in range(counts.LINUX_KILLS):
            size = rng.randrange(9) * MEMORY_BLOCK
            service.resize(size)
            time.sleep(rng.uniform(0, 0.6))
            service.kill_worker()
            if rng.random() < 0.5:
                service.wait_for(size)
                machine.check(size)
        service.resize(3 * MEMORY_BLOCK)
        service.wait_for(3 * MEMORY_BLOCK)
        machine.check(3 * MEMORY_BLOCK)
    figure("workers killed under a Linux guest", counts.LINUX_KILLS)


def test_a_guest_and_its_vmm_come_and_go(tmp_path: Path) -> None:
    with serving(tmp_path, "hotplugged_size=256M,prefault=on") as service:
        with linux(tmp_path, service) as machine:
            service.wait_for(256 * MIB)
            machine.total_at_boot = machine.console.memory_total() - 256 * MIB

            # The VM stops, and a resize waits until it goes on.
            machine.vm.qmp("stop")
            service.resize(384 * MIB)
            time.sleep(0.5)
            assert service.zone()["plugged_size"] == 256 * MIB
            machine.vm.qmp("cont")
            service.wait_for(384 * MIB)
            machine.check(384 * MIB)

            # A second front end waits for its turn, and harms nobody.
            with socket.socket(socket.AF_UNIX) as second:
                second.connect(str(service.socket))
                second.send(b"\1" * 12)
                service.resize(128 * MIB)
                service.wait_for(128 * MIB)
                machine.check(128 * MIB)

            # The driver goes and comes: blocks stay as they are, and what is asked for is plugged.
            service.resize(0)
            service.wait_for(0)
            machine.console.run("rmmod virtio_mem")
            service.resize(512 * MIB)
            time.sleep(0.5)
            assert service.zone()["plugged_size"] == 0
            machine.console.run("insmod /modules/virtio_mem.ko")
            service.wait_for(512 * MIB)
            machine.check(512 * MIB)
            machine.vm.kill()
        # QEMU is dead; another one comes, whose guest's driver begins with UNPLUG ALL.
        zone = service.zone()
        assert zone["connected"] is False
        assert zone["plugged_size"] == 512 * MIB
        (tmp_path / "second").mkdir()
        with linux(tmp_path / "second", service) as machine:
            service.wait_for(512 * MIB)
            assert machine.held() == 512 * MIB
            assert service.zone()["answers"]["UNPLUG_ALL ACK"] == 1
            service.resize(int(GIB))
            service.wait_for(int(GIB))
            machine.total_at_boot = machine.console.memory_total() - GIB
            machine.check(int(GIB))
