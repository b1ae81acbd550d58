"""`virtio-mem doctor`: what stands against memory is said before there is a guest, and nothing is populated for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest

from tests.cli.rig import run
from tests.host import HugePagePool
from tests.zones.test_headroom import Tree
from vhost_user.backend import Device, Server
from vhost_user.units import GIB, MIB
from virtio_mem import VmMemoryConfig, doctor
from virtio_mem.doctor import Finding
from virtio_mem.hostmem import facts

HOTPLUG = "--memory size=64M,shared=on,hotplug_method=virtio-mem,hotplug_size=1G"


class Quiet(Device):
    name = "quiet"
    queue_count = 3


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[str]:
    """Where a daemon listens."""
    path = str(tmp_path / "daemon.sock")
    with Server() as server:
        server.listen(path, Quiet())
        with server.in_thread():
            yield path


def said(findings: Iterator[Finding]) -> dict[str, str]:
    return {what: says for what, says, _ in findings}


def bad(findings: Iterator[Finding]) -> list[str]:
    return [f"{what}: {says}" for what, says, is_bad in findings if is_bad]


def two_nodes(root: Path) -> Tree:
    tree = Tree(root, "4:memory:/vm\n0::/\n")
    tree.v1("vm", 3 * MIB, MIB)
    tree.v1("", 2**63 - 4096, MIB)
    pool = {"nr": 8, "free": 5, "resv": 2, "surplus": 1, "nr_overcommit": 4}
    for name, pages in pool.items():
        tree.write(f"sys/kernel/mm/hugepages/hugepages-2048kB/{name}_hugepages", pages)
    for node, free in ((0, 1), (1, 4)):
        folder = f"sys/devices/system/node/node{node}"
        text = f"Node {node} MemTotal: 4096 kB\nNode {node} MemFree: 1024 kB\nNode {node} Inactive(file): 512 kB\n"
        tree.write(f"{folder}/meminfo", text)
        for name, pages in {"nr": 4, "free": free, "surplus": 0}.items():
            tree.write(f"{folder}/hugepages/hugepages-2048kB/{name}_hugepages", pages)
    tree.write("sys/devices/system/node/has_memory", "0-1")
    return tree


def test_what_a_host_has_is_told_by_page_size_and_node(tmp_path: Path) -> None:
    found = said(doctor.host(two_nodes(tmp_path).root))
    limits = {what.rpartition("/")[2] if what.endswith("bytes") else what: says for what, says in found.items()}
    assert limits == {
        "the host (MemAvailable)": "4 MiB left of 8 MiB",
        "memory.limit_in_bytes": "2 MiB left of 3 MiB",
        "NUMA node 0": "1.5 MiB left of 4 MiB",
        "NUMA node 1": "1.5 MiB left of 4 MiB",
        "huge pages of 2M": "5 of 8 are free, and 2 of those reserved; 3 more by overcommit",
        "huge pages of 2M, node 0": "1 of 4 are free, and 0 of those reserved; 4 more by overcommit",
        "huge pages of 2M, node 1": "4 of 4 are free, and 0 of those reserved; 4 more by overcommit",
        "transparent huge pages": "private memory never, shared memory never",
        "NUMA nodes with memory": "0, 1",
    }


def test_memory_that_fits() -> None:
    found = list(doctor.machine(VmMemoryConfig.parse(f"{HOTPLUG},hotplugged_size=128M,prefault=on")))
    assert not bad(iter(found))
    region = "a region at 0x100000000+0x40000000, blocks of "
    assert found[0].says.startswith(f"memfd memory in pages of 4K, boot memory at 0x0+0x4000000, {region}")
    assert Finding("192 MiB at start", "there is as much now") in found


def test_memory_that_does_not_fit_is_not_populated_to_find_out() -> None:
    line = "--memory size=0,hotplug_method=virtio-mem --memory-zone "
    line += "id=a,size=2T,shared=on,prefault=on id=b,size=1T,shared=on,hotplug_size=4T"
    found = list(doctor.machine(VmMemoryConfig.parse(line)))
    (at_start,) = bad(iter(found))
    assert at_start.startswith("3 TiB at start: needs ")
    later = {what: says for what, says, is_bad in found if not is_bad}["7 TiB with all plugged"]
    assert "free memory on the host" in later


def test_huge_pages_are_counted_over_all_zones() -> None:
    line = "--memory size=0,hotplug_method=virtio-mem --memory-zone "
    zone = "size=512G,hugepages=on,hugepage_size=2M"
    found = bad(doctor.machine(VmMemoryConfig.parse(f"{line} id=a,{zone} id=b,{zone}")))
    assert [each.partition(";")[0] for each in found] == ["1 TiB at start: needs 524288 huge pages of 2M"]


def test_zones_are_counted_together_whatever_node_they_are_bound_to() -> None:
    has = facts.counter(facts.meminfo(), "MemAvailable", "") // MIB
    line = "--memory size=0 --memory-zone "
    line += f"id=a,size={has * 3 // 5}M,shared=on,host_numa_node=0 id=b,size={has * 3 // 5}M,shared=on"
    (found,) = bad(doctor.machine(VmMemoryConfig.parse(line)))
    assert "at start: needs " in found
    assert "the host (MemAvailable)" in found


def test_files_have_to_find_room_where_they_are(tmp_path: Path) -> None:
    room = os.statvfs(tmp_path)
    half = (room.f_bavail * room.f_frsize // MIB * 3 // 5) * MIB
    line = f"--memory size=0 --memory-zone id=a,size={half},shared=on,file={tmp_path}"
    assert not [each for each in bad(doctor.machine(VmMemoryConfig.parse(line))) if "in files of a: " in each]
    both = bad(doctor.machine(VmMemoryConfig.parse(f"{line} id=b,size={half},shared=on,file={tmp_path}")))
    (found,) = (each for each in both if "in files of" in each)
    assert "at start, in files of a, b: needs " in found
    assert "the file system of the zone's file has " in found
    assert not list(tmp_path.iterdir())


def test_what_a_file_in_memory_has_is_not_needed_once_more() -> None:
    with NamedTemporaryFile(dir="/dev/shm") as file:
        os.posix_fallocate(file.fileno(), 0, 8 * MIB)
        line = f"--memory size=0 --memory-zone id=a,size=16M,shared=on,file={file.name}"
        os.truncate(file.name, 16 * MIB)
        found = said(doctor.machine(VmMemoryConfig.parse(line)))
    assert found["8 MiB at start"] == found["8 MiB at start, in files of a"] == "there is as much now"


def test_what_is_reserved_for_this_memory_is_there(hugepages: Callable[[int, int], HugePagePool]) -> None:
    hugepages(2 * MIB, 8)
    line = "--memory size=16M,hugepages=on,hugepage_size=2M,reserve=on"
    assert not bad(doctor.machine(VmMemoryConfig.parse(line)))


@pytest.mark.parametrize(
    ("line", "trouble"),
    [
        ("--memory size=0 --memory-zone id=a,size=64M,host_numa_node=999", "host_numa_node=999: no such node"),
        ("--memory size=0 --memory-zone id=a,size=64M,file=/nowhere/at/all", "no such file or directory"),
        ("--memory size=64M,hotplug_size=1G", "hotplug_size=1G: can be plugged by virtio-mem only"),
        ("--memory size=4097", "not a multiple of the page size"),
    ],
)
def test_options_that_this_host_can_not_meet(line: str, trouble: str) -> None:
    (found,) = bad(doctor.machine(VmMemoryConfig.parse(line)))
    assert trouble in found


def test_what_an_option_comes_to() -> None:
    line = "--memory size=0,hotplug_method=virtio-mem --memory-zone id=a,size=64M,reserve=on,shared=on,hotplug_size=8G"
    found = list(doctor.machine(VmMemoryConfig.parse(line)))
    (reserve,) = (says for _, says, _ in found if says.startswith("reserve=on"))
    assert reserve.startswith("reserve=on comes to off: shared memory is counted when it is touched")
    assert next(says for what, says, _ in found if what == "options").startswith("hotplug_size=8G: a Linux guest")


def test_a_daemon_and_its_share(socket: str) -> None:
    done = run("doctor", *HOTPLUG.split(), "--socket", socket)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "  queues: 3" in lines
    assert "  memory regions: 509 at most, one by one" in lines
    assert lines[-1].startswith("  share of the memory: ")
    assert "of 509 regions; mem0: slots of " in lines[-1]


def test_a_daemon_alone(socket: str) -> None:
    found = said(doctor.daemon(socket))
    assert "CONFIGURE_MEM_SLOTS" in found["protocol features"]
    assert "share of the memory" not in found


def test_memory_that_a_daemon_can_not_map(socket: str) -> None:
    done = run("doctor", "--memory", "size=64M", "--socket", socket)
    assert done.returncode == 1
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("!"))
    assert line.startswith("! daemon: zone mem0 shared=off: is private memory, which no other process can map")


def test_no_daemon(tmp_path: Path) -> None:
    done = run("doctor", "--socket", str(tmp_path / "none"))
    assert (done.returncode, done.stderr) == (1, "")
    assert "! daemon: socket=" in done.stdout


def test_the_examples_in_the_help_work() -> None:
    lines = [line for line in run("doctor", "--help").stdout.splitlines() if line.startswith("  virtio-mem doctor")]
    for line in lines:
        done = run(*line.split()[1:])
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert len(lines) == 2


def test_a_mistake_in_the_options_is_one_line() -> None:
    done = run("doctor", "--memory", f"size={GIB},colour=red")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no such key" in done.stderr
