"""A guest in a process of its own: plugs at boot, follows the host's targets, dies, misbehaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests import counts
from tests.host import HugePagePool
from vhost_user.device_status import Status
from vhost_user.errors import UsageError
from vhost_user.units import GIB, MIB
from virtio_mem.config import VmMemoryConfig
from virtio_mem.device import VirtioMemDevice
from virtio_mem.guest.process import pattern
from virtio_mem.machine import Machine
from virtio_mem.manager import MemoryManager
from virtio_mem.mmio_registers import MAGIC
from virtio_mem.service import Section

LINE = "--memory size=64M,shared=on,hotplug_method=virtio-mem,hotplug_size=1G,hotplugged_size=256M"
TWO = (
    "--memory size=0,hotplug_method=virtio-mem --memory-zone id=a,size=64M,shared=on,hotplug_size=512M,"
    "hotplugged_size=128M id=b,size=0,shared=on,hotplug_size=512M"
)
PATIENCE = 30.0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the guest did not get there in time"
        time.sleep(0.005)


def device_of(manager: MemoryManager, zone_id: str = "mem0") -> VirtioMemDevice:
    service = manager.zones[zone_id].service
    assert service is not None
    return service.device


def held(manager: MemoryManager, zone_id: str = "mem0") -> int:
    hotplug = manager.zones[zone_id].zone.hotplug
    assert hotplug is not None
    return hotplug.held()


def at_target(manager: MemoryManager) -> bool:
    devices = [device_of(manager, zone_id) for zone_id in manager.zones]
    return all(device.plugged_size == device.requested_size for device in devices)


@contextmanager
def running(manager: MemoryManager) -> Iterator[tuple[Machine, Callable[..., subprocess.Popen[str]]]]:
    """A machine that serves, and a function that starts its guest."""
    machine = Machine(manager)
    guests: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        link = machine.take_guest_link()
        command = [sys.executable, "-m", "virtio_mem.guest", str(link.fileno()), *arguments]
        guests.append(subprocess.Popen(command, pass_fds=[link.fileno()], stdout=subprocess.PIPE, text=True))
        link.close()
        return guests[-1]

    machine.start()
    try:
        yield machine, start
    finally:
        machine.close()
        for guest in guests:
            with guest:
                pass


def events_up_to(last: dict[str, Any], guest: subprocess.Popen[str], machine: Machine) -> list[dict[str, Any]]:
    """What the guest tells until it tells `last`, or the machine is closed, which it is at the latest after a while."""
    assert guest.stdout is not None
    ending = threading.Timer(PATIENCE, machine.close)
    ending.start()
    try:
        seen: list[dict[str, Any]] = []
        while (not seen or seen[-1] != last) and (line := guest.stdout.readline()):
            seen.append(json.loads(line))
        return seen
    finally:
        ending.cancel()


def events(guest: subprocess.Popen[str]) -> list[dict[str, Any]]:
    assert guest.stdout is not None
    return [json.loads(line) for line in guest.stdout]


@pytest.mark.parametrize("ring", ["packed", "split"][: counts.RINGS_TRIED_AT_LENGTH])
def test_a_guest_plugs_at_boot_and_follows_the_host(ring: str) -> None:
    with MemoryManager(VmMemoryConfig.parse(LINE)) as manager:
        with running(manager) as (machine, start):
            guest = start(ring)
            for size in (320 * MIB, GIB + 64 * MIB, 66 * MIB, 64 * MIB, 192 * MIB):
                machine.resize(size)
                wait_until(lambda: at_target(manager))
                hotplugged = size - 64 * MIB
                wait_until(lambda hotplugged=hotplugged: held(manager) == hotplugged)  # type: ignore[misc]
            last = {"event": "outcome", "zone": "mem0", "outcome": "REACHED", "plugged_size": 128 * MIB}
            seen = events_up_to(last, guest, machine)
            machine.close()
            seen += events(guest)
            assert guest.wait() == 0
        assert not [event for event in seen if event["event"] == "damaged"]
        assert seen[-1] == last
        region = next(part for part in manager.shared_parts() if part.hotplug)
        assert os.pread(region.fd, 32, 0) == pattern(region.addr)


def test_two_zones_are_driven_side_by_side() -> None:
    with MemoryManager(VmMemoryConfig.parse(TWO)) as manager, running(manager) as (machine, start):
        start()
        machine.resize_zone("b", 384 * MIB)
        wait_until(lambda: at_target(manager))
        assert (device_of(manager, "a").plugged_size, device_of(manager, "b").plugged_size) == (128 * MIB, 384 * MIB)
        wait_until(lambda: (held(manager, "a"), held(manager, "b")) == (128 * MIB, 384 * MIB))


def test_a_guest_that_is_killed_leaves_the_machine_alive_and_the_next_one_starts_over() -> None:
    with MemoryManager(VmMemoryConfig.parse(LINE)) as manager:
        with running(manager) as (machine, start):
            guest = start()
            wait_until(lambda: device_of(manager).plugged_size > 0)
            guest.send_signal(signal.SIGKILL)
            guest.wait()
            machine.resize(128 * MIB)
            assert machine.system_reset()
            assert held(manager) == 0
            machine.resize(320 * MIB)
        with running(manager) as (_, start):
            second = start()
            wait_until(lambda: at_target(manager))
            second.kill()
        with running(manager) as (_, start):  # no system reset in between: blocks are plugged still
            start()
            answers = manager.zones["mem0"].service.answers  # type: ignore[union-attr]
            wait_until(lambda: answers["UNPLUG_ALL", "ACK"] == 1 and at_target(manager))


@pytest.mark.needs_hugetlb
def test_a_guest_that_was_told_busy_gets_there_soon_after_the_pages_come(
    hugepages: Callable[[int, int], HugePagePool],
) -> None:
    """The driver's own timer would wait for 50 seconds, longer than this test does."""
    pool = hugepages(2 * MIB, 40)
    line = (
        "--memory size=0,hotplug_method=virtio-mem --memory-zone id=a,size=16M,shared=on "
        "id=h,size=0,hugepages=on,hugepage_size=2M,hotplug_size=512M,hotplugged_size=256M"
    )
    with MemoryManager(VmMemoryConfig.parse(line)) as manager, running(manager) as (machine, start):
        start()
        service = manager.zones["h"].service
        assert service is not None
        wait_until(lambda: service.answers["PLUG", "BUSY"] > 0)
        assert held(manager, "h") == service.device.plugged_size
        with pool.with_free(128):
            wait_until(lambda: service.device.plugged_size == 256 * MIB)
            machine.close()
            manager.system_reset()


def test_private_memory_cannot_be_given_to_another_process() -> None:
    line = "--memory size=64M,hotplug_method=virtio-mem,hotplug_size=1G"
    with MemoryManager(VmMemoryConfig.parse(line)) as manager:
        machine = Machine(manager)
        with pytest.raises(UsageError, match="shared=on"):
            machine.take_guest_link()
        machine.close()


@pytest.mark.parametrize("message", [b"x", bytes(24), b"\x02" + bytes(23), b"\x00\x03" + bytes(22), bytes(100)])
def test_a_guest_that_talks_nonsense_is_cut_off_and_the_machine_lives(message: bytes) -> None:
    with MemoryManager(VmMemoryConfig.parse(LINE)) as manager, running(manager) as (machine, _):
        with machine.take_guest_link() as link:
            socket.recv_fds(link, 65536, 0)
            link.send(message)
        machine.resize(128 * MIB)
        assert machine.system_reset()


def test_a_guest_that_reads_no_answers_does_not_hold_the_machine() -> None:
    with MemoryManager(VmMemoryConfig.parse(LINE)) as manager, running(manager) as (machine, _):
        with machine.take_guest_link() as link:
            link.setblocking(False)
            read = b"\x00\x04" + bytes(6) + (0xD000_0000).to_bytes(8, "little") + bytes(8)
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                try:
                    link.send(read)
                except BlockingIOError:
                    time.sleep(0.01)
        machine.close()
        assert not machine._thread.is_alive()


def test_a_guest_that_makes_its_pipes_blocking_does_not_hold_the_machine() -> None:
    with MemoryManager(VmMemoryConfig.parse(TWO)) as manager, running(manager) as (machine, _):
        with machine.take_guest_link() as link:
            message, fds, _, _ = socket.recv_fds(link, 65536, 16)
            devices = json.loads(message)["devices"]
            kick, irq = (fds[devices[0][name]] for name in ("kick", "irq"))
            for fd in (kick, irq):
                os.set_blocking(fd, True)
            os.set_blocking(kick, False)
            for _ in range(100_000):
                try:
                    os.write(kick, b"x" * 4096)
                except BlockingIOError:
                    continue
            for fd in fds:
                os.close(fd)
        machine.resize_zone("b", 128 * MIB)
        machine.close()
        assert not machine._thread.is_alive()


def test_a_machine_that_is_closed_rings_no_more() -> None:
    with MemoryManager(VmMemoryConfig.parse(LINE)) as manager:
        machine = Machine(manager)
        slot = machine.slots[0]
        machine.close()
        machine.close()
        slot.irq.ring()
        slot.kick.ring()
        assert (slot.irq.writer, slot.kick.writer) == (-1, -1), "whoever gets these numbers next is left alone"


def test_a_resize_is_told_at_once_and_not_by_the_next_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtio_mem.machine.POLL_INTERVAL", 1000.0)
    with MemoryManager(VmMemoryConfig.parse(LINE)) as manager, running(manager) as (machine, start):
        start()
        wait_until(lambda: device_of(manager).plugged_size == 256 * MIB)
        machine.resize(320 * MIB + 128 * MIB)
        wait_until(lambda: at_target(manager))


def test_requests_that_are_left_are_served_without_another_kick(monkeypatch: pytest.MonkeyPatch) -> None:
    with MemoryManager(VmMemoryConfig.parse(LINE)) as manager:
        machine = Machine(manager)
        calls = []

        def process() -> bool:
            calls.append(1)
            return len(calls) < 5

        monkeypatch.setattr(machine.slots[0].transport, "process", process)
        machine.start()
        machine.slots[0].kick.ring()
        wait_until(lambda: len(calls) == 5)
        machine.close()


def test_a_machine_has_one_guest() -> None:
    with MemoryManager(VmMemoryConfig.parse(LINE)) as manager, Machine(manager) as machine:
        machine.take_guest_link()
        with pytest.raises(UsageError, match="one guest"):
            machine.take_guest_link()


def test_a_device_that_fails_does_not_take_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with MemoryManager(VmMemoryConfig.parse(TWO)) as manager, running(manager) as (machine, start):

        def fail() -> bool:
            raise RuntimeError("the device's own fault")

        monkeypatch.setattr(machine.slots[0].transport, "process", fail)
        start()
        wait_until(lambda: bool(machine.slots[0].transport.status & Status.NEEDS_RESET))
        machine.resize_zone("b", 128 * MIB)
        assert machine.bus.read(machine.slots[1].base, 4) == MAGIC


def test_a_target_that_moves_while_the_guest_is_at_work_is_not_missed() -> None:
    """A notice that came during a request was taken for its answer's, and forgotten."""
    with MemoryManager(VmMemoryConfig.parse(LINE)) as manager, running(manager) as (machine, start):
        service = manager.zones["mem0"].service
        assert service is not None
        targets = iter([GIB, 512 * MIB, 768 * MIB, 128 * MIB])

        class Mover:
            def plugged(self, section: Section) -> None:
                threading.Thread(target=self.move).start()

            def unplugging(self, section: Section) -> None:
                threading.Thread(target=self.move).start()

            def move(self) -> None:
                for target in targets:
                    machine.resize(64 * MIB + target)
                    break

        service.listeners.append(Mover())
        start()
        wait_until(lambda: at_target(manager) and device_of(manager).requested_size == 128 * MIB)


def test_a_guest_without_a_machine_ends() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        ours.close()
        command = [sys.executable, "-m", "virtio_mem.guest", str(theirs.fileno())]
        assert subprocess.run(command, pass_fds=[theirs.fileno()], check=False, timeout=PATIENCE).returncode == 0


def test_a_machine_is_started_once_and_not_when_it_is_closed() -> None:
    with MemoryManager(VmMemoryConfig.parse(LINE)) as manager:
        with Machine(manager) as machine:
            machine.start()
            with pytest.raises(UsageError, match="machine=started: has to be new"):
                machine.start()
        with pytest.raises(UsageError, match="machine=closed: has to be new"):
            machine.start()
        unused = Machine(manager)
        unused.close()
        before = threading.enumerate()
        with pytest.raises(UsageError, match="machine=closed: has to be new"):
            unused.start()
        assert threading.enumerate() == before
        unused.close()
