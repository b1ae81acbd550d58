"""A Linux guest on our memory: what it sees, what the host holds, and what becomes of both."""

from __future__ import annotations

import os
import signal
from itertools import groupby
from pathlib import Path

import pytest

from tests import counts
from tests.boot.rig import Machine, end, machine
from tests.peers.processes import wait_until
from vhost_user.units import MIB
from virtio_mem.conformance.replay import parse_script, replay
from virtio_mem.conformance.targets.ours import OurTarget

pytestmark = pytest.mark.needs_peers

TWO_NODES = (
    "--cpus boot=3 --memory size=0,hotplug_method=virtio-mem --memory-zone "
    "id=a,size=320M,shared=on,hotplug_size=512M "
    "id=b,size=128M,shared=on,hotplug_size=640M,hotplugged_size=256M,prefault=on "
    "--numa guest_numa_id=0,cpus=[0,2],memory_zones=a,distances=[1@17] guest_numa_id=1,cpus=[1],memory_zones=b"
)
ONE = "--memory size=320M,shared=on,hotplug_method=virtio-mem,hotplug_size=512M,hotplugged_size=256M,prefault=on"


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("b")


def wait_for_size(vm: Machine, zone: str, size: int) -> None:
    vm.wait_for(lambda: vm.zone(zone)["plugged_size"] == size, f"{size} bytes of {zone} plugged")


def iomem(vm: Machine) -> dict[int, int]:
    """What is plugged by /proc/iomem: start and size. Linux joins neighbours after a moment; here they are at once."""
    lines = vm.guest("grep virtio_mem /proc/iomem || true").splitlines()
    ranges = [line.split(" : ")[0].split("-") for line in lines if "System RAM (virtio_mem)" in line]
    found: dict[int, int] = {}
    for start, size in sorted((int(first, 16), int(last, 16) + 1 - int(first, 16)) for first, last in ranges):
        before = next((known for known, its_size in found.items() if known + its_size == start), start)
        found[before] = start + size - before
    return found


def check_nodes(vm: Machine) -> None:
    """Nodes, processors and distances are the configuration's, and memory is on the right node."""
    nodes = "/sys/devices/system/node"
    assert vm.guest(f"cat {nodes}/online").strip() == "0-1"
    assert vm.guest(f"cat {nodes}/node0/cpulist {nodes}/node1/cpulist").split() == ["0,2", "1"]
    assert vm.guest(f"cat {nodes}/node0/distance {nodes}/node1/distance").split() == ["10", "17", "17", "10"]
    before = vm.guest_kib(f"{nodes}/node0/meminfo"), vm.guest_kib(f"{nodes}/node1/meminfo")
    vm.resize_zone("a", (320 + 128) * MIB)
    vm.resize_zone("b", (128 + 384) * MIB)
    after = vm.guest_kib(f"{nodes}/node0/meminfo"), vm.guest_kib(f"{nodes}/node1/meminfo")
    assert [now - then for now, then in zip(after, before, strict=True)] == [128 << 10, 128 << 10]


def check_return(vm: Machine) -> None:
    """What is unplugged is back with the host, and what stays keeps its content."""
    # On zone b's node, where plugged memory is what the kernel takes first.
    vm.guest("mount -t tmpfs -o size=100%,mpol=bind:1 tmp /tmp")
    vm.guest("dd if=/dev/urandom of=/tmp/data bs=1M count=60 2>/dev/null")
    (known, *_) = vm.guest("md5sum /tmp/data").split()
    vm.resize_zone("b", (128 + 128) * MIB)
    zone = vm.zone("b")
    assert zone["unplugged_bytes"] == 256 * MIB
    assert zone["unreturned_bytes"] == 0
    assert vm.held_by_host("b") == zone["held"] == zone["plugged_size"] == 128 * MIB  # of a zone with prefault
    assert known in vm.guest("md5sum /tmp/data; rm /tmp/data")
    vm.resize_zone("a", 320 * MIB)
    assert vm.held_by_host("a") == 0


def check_sizes(vm: Machine) -> None:
    """Guest, device and host agree."""
    zone = vm.zone("b")
    assert iomem(vm) == {zone["addr"]: zone["plugged_size"]}
    assert "requested size: 0x10000000" in vm.guest("dmesg | grep virtio_mem")


def test_two_zones_on_two_nodes(directory: Path) -> None:
    with machine(directory, TWO_NODES, append="-- inits") as vm:  # what is added comes before that
        wait_for_size(vm, "b", 256 * MIB)
        assert vm.held_by_host("a") == 0  # neither QEMU nor the guest touched what was not plugged
        assert vm.held_by_host("b") == 256 * MIB
        check_sizes(vm)
        check_nodes(vm)
        check_return(vm)
        config = vm.api.info()["config"]
        assert [zone["size"] for zone in config["memory"]["zones"]] == [320 * MIB, 128 * MIB]
        vm.send("poweroff -f")
        assert vm.wait(20) == 0
    assert list(directory.glob("virtio-mem-*")) == []


def check_reboot(vm: Machine, reset: str) -> None:
    """The machine is reset: blocks go, memory returns, and the next guest plugs up to the target."""
    returned = vm.zone("mem0")["unplugged_bytes"]
    vm.boots += 1
    if reset:
        vm.send(reset)
    else:
        put(vm, "system-reset")
    vm.wait_for(lambda: vm.zone("mem0")["unplugged_bytes"] == returned + 256 * MIB, "the blocks are gone")
    vm.wait_for_boot()
    wait_for_size(vm, "mem0", 256 * MIB)
    assert vm.zone("mem0")["unreturned_bytes"] == 0
    assert vm.held_by_host("mem0") == 256 * MIB
    # The driver of the new guest found no blocks that it would have to give back.
    assert not [name for name in vm.zone("mem0")["answers"] if name.startswith("UNPLUG_ALL")]  # type: ignore[attr-defined]


def put(vm: Machine, action: str) -> None:
    with vm.api._exchange("PUT", action, None, 20.0):
        pass


def check_pause(vm: Machine) -> None:
    put(vm, "vm.pause")
    assert vm.api.info()["state"] == "Paused"
    vm.api.resize(320 * MIB)
    before = vm.output()
    vm.send("echo it runs")
    with pytest.raises(TimeoutError):
        wait_until(lambda: vm.output() != before, "the guest stands still", 1.0)
    assert vm.zone("mem0")["plugged_size"] == 256 * MIB
    put(vm, "vm.resume")
    vm.wait_for(lambda: "it runs" in vm.output(), "the guest goes on")
    wait_for_size(vm, "mem0", 0)
    assert vm.held_by_host("mem0") == 0
    assert vm.api.operation(vm.api.resize((320 + 256) * MIB), wait=30.0)["state"] == "reached"


def check_trace(path: Path) -> None:
    """The guests' requests are in it, with what befell the machine, and another device answers them in the same way."""
    scripts = parse_script(path.read_text())
    with OurTarget() as target:
        replays = [replay(target, script) for script in scripts]
    assert [(run.failure, run.differences) for run in replays] == [("", [])] * len(scripts)
    calls = [step.call for script in scripts for step in script.steps]
    moves = [call for call in calls if call in ("begin", "pause on", "pause off", "system_reset")]
    # Firmware may reset the machine once more.
    assert [move for move, _ in groupby(moves)] == [
        *("begin", "pause on", "pause off", "system_reset", "begin", "system_reset", "begin")
    ]
    assert sum(int(call.split()[2]) for call in calls if call.startswith("plug")) == 4 * 128


@pytest.mark.parametrize("kernel", ["6.1"] if counts.TIER == "quick" else ["6.1", "7.3"])
def test_a_machine_that_is_paused_and_reset(directory: Path, kernel: str) -> None:
    trace = directory / "mem0.trace"
    with machine(directory, f"{ONE} --trace {trace}", kernel) as vm:
        wait_for_size(vm, "mem0", 256 * MIB)
        assert kernel in vm.guest("uname -r")
        assert vm.guest("cat /sys/devices/system/node/online").strip() == "0"
        assert sum(iomem(vm).values()) == 256 * MIB
        check_pause(vm)
        check_reboot(vm, "reboot -f")
        (worker,) = vm.children("virtio_mem.boot.worker")
        os.kill(worker, signal.SIGKILL)
        check_reboot(vm, "")
        assert end(vm.process) < 10
        assert vm.process.returncode == 0
    assert list(directory.glob("virtio-mem-*")) == []
    check_trace(trace)
