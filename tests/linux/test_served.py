"""`virtio-mem serve` under a real Linux guest: sizes agree everywhere, whatever dies, stops or comes back.

A boot takes seconds, so one guest goes through all of it.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import counts
from tests.linux.served import MEMORY_BLOCK, Machine, Service, linux, serving
from tests.peers.processes import wait_until
from vhost_user.units import MIB

pytestmark = pytest.mark.needs_peers


def reach(machine: Machine, size: int) -> None:
    machine.service.resize(size)
    machine.check(size)


def resize_to_and_fro(machine: Machine) -> None:
    """What the guest had when it booted is in its MemTotal, and goes out of it again."""
    machine.service.wait_for(256 * MIB)
    wait_until(lambda: machine.console.has_online(256 * MIB), "what was hotplugged at boot is online")
    total = machine.console.memory_total()
    machine.service.resize(0)
    machine.service.wait_for(0)
    wait_until(lambda: machine.console.has_online(0), "nothing is hotplugged")
    machine.total_at_boot = machine.console.memory_total()
    assert total - machine.total_at_boot == 256 * MIB
    machine.check(0)
    reach(machine, 384 * MIB)
    reach(machine, 128 * MIB)


def kill_workers(machine: Machine, rng: random.Random) -> None:
    for _ in range(counts.LINUX_KILLS):
        size = rng.randrange(9) * MEMORY_BLOCK
        machine.service.resize(size)
        time.sleep(rng.uniform(0, 0.6))
        machine.service.kill_worker()
        if rng.random() < 0.5:
            machine.check(size)
    reach(machine, 256 * MIB)


def stop_and_continue(machine: Machine) -> None:
    """The VM stops, and a resize waits until it goes on."""
    machine.vm.qmp("stop")
    machine.service.resize(384 * MIB)
    time.sleep(0.3)
    assert machine.service.zone()["plugged_size"] == 256 * MIB
    machine.vm.qmp("cont")
    machine.check(384 * MIB)


def connect_a_second_front_end(machine: Machine) -> None:
    """It waits for its turn, and harms nobody."""
    with socket.socket(socket.AF_UNIX) as second:
        second.connect(str(machine.service.socket))
        second.send(b"\1" * 12)
        reach(machine, 128 * MIB)


def reload_the_driver(machine: Machine) -> None:
    reach(machine, 0)
    machine.console.run("rmmod virtio_mem")
    machine.service.resize(256 * MIB)
    time.sleep(0.3)
    assert machine.service.zone()["plugged_size"] == 0
    machine.console.run("insmod /modules/virtio_mem.ko")
    machine.check(256 * MIB)


def boot_another(directory: Path, service: Service) -> None:
    """QEMU died. Nobody is connected, blocks are as they were; the next guest's driver begins with UNPLUG ALL."""
    wait_until(lambda: service.zone()["connected"] is False, "the end of the connection is seen")
    zone = service.zone()
    assert zone["plugged_size"] == 256 * MIB
    before = zone["answers"].get("UNPLUG_ALL ACK", 0)
    with linux(directory, service) as machine:
        wait_until(lambda: service.zone()["answers"].get("UNPLUG_ALL ACK", 0) > before, "the driver's UNPLUG ALL")
        service.wait_for(256 * MIB)
        wait_until(lambda: machine.console.has_online(256 * MIB), "the target is online")
        assert machine.held() == 256 * MIB
        assert service.zone()["answers"]["UNPLUG_ALL ACK"] == before + 1
        machine.total_at_boot = machine.console.memory_total() - 256 * MIB
        machine.check(256 * MIB)
        machine.vm.kill()


def test_a_linux_guest_is_resized(tmp_path: Path, rng: random.Random, figure: Callable[[str, object], None]) -> None:
    with serving(tmp_path, "hotplugged_size=256M,prefault=on") as service:
        with linux(tmp_path, service) as machine:
            resize_to_and_fro(machine)
            kill_workers(machine, rng)
            stop_and_continue(machine)
            connect_a_second_front_end(machine)
            reload_the_driver(machine)
            machine.vm.kill()
        for number in range(counts.VMMS_AFTER_THE_FIRST):
            directory = tmp_path / str(number)
            directory.mkdir()
            boot_another(directory, service)
    figure("workers killed under a Linux guest", counts.LINUX_KILLS)
