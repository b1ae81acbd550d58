"""A core dump of a Linux guest on QEMU: what debuggers look for is in it, and what is unplugged is not."""

from __future__ import annotations

import os
import re
import signal
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any

import pytest

from tests.api.rig import Client
from tests.api.test_served import worker_of
from tests.boot.rig import Machine, machine
from tests.boot.test_guest import put, wait_for_size
from tests.coredump.elf import Core
from tests.peers.processes import wait_until
from vhost_user.errors import HostError
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import GIB, MIB, ByteCount
from virtio_mem.boot.dump import MOST_NOTES, guest_notes
from virtio_mem.boot.layout import lay_out_machine
from virtio_mem.boot.machine import _places
from virtio_mem.boot.qemu import BackingFile
from virtio_mem.boot.qmp import QemuRefused
from virtio_mem.layout import ZoneSize

BOOT, PLUGGED = 320 * MIB, 128 * MIB
OPTIONS = (
    "--cpus boot=2 --memory size=0,hotplug_method=virtio-mem --memory-zone id=a,size=320M,shared=on,"
    "hotplug_size=8G,hotplugged_size=256M,prefault=on --numa guest_numa_id=0,cpus=[0,1],memory_zones=a"
)
KERNEL_MAP = 0xFFFFFFFF80000000
"""Where x86-64's Linux has its image: at this, less phys_base, in guest addresses."""


def dump(client: Client, path: Path) -> Core:
    answer = client.ask("PUT", "/api/v1/vm.coredump", {"destination_url": f"file://{path}"})
    assert (answer.status, answer.body) == (204, b""), answer
    return Core(path)


def check_content(vm: Machine, core: Core) -> None:
    """Of a machine that is paused: byte by byte what is in the files that its memory is."""
    assert core.ranges == [(0, BOOT), (4 * GIB, PLUGGED)]
    for part, addr, size in (("boot", 0, BOOT), ("hotplug", 4 * GIB, PLUGGED)):
        link, *_ = (
            link
            for link in Path(f"/proc/{vm.process.pid}/fd").iterdir()
            if str(link.readlink()).startswith(f"/memfd:virtio-mem:a:{part}")
        )
        with link.open("rb") as memory:
            for offset in range(0, size, 16 * MIB):
                assert core.read(addr + offset, 16 * MIB) == memory.read(16 * MIB), f"{part} {offset:#x}"


def check_notes(vm: Machine, core: Core) -> None:
    """The registers of both processors, and where Linux has its own name."""
    notes = list(core.notes())
    registers = [data for name, type_, data in notes if (name, type_) == (b"CORE", 1)]
    assert [struct.unpack_from("<i", data, 32)[0] for data in registers] == [1, 2]
    assert [name for name, _, _ in notes].count(b"QEMU") == 2
    (info,) = (data.decode() for name, _, data in notes if name == b"VMCOREINFO")
    kernel = vm.guest("uname -r").strip()
    assert f"OSRELEASE={kernel}\n" in info
    known = dict(re.findall(r"^(?:SYMBOL|NUMBER|OFFSET)\((\S+)\)=(\S+)$", info, re.MULTILINE))
    name = int(known["init_uts_ns"], 16) + int(known["uts_namespace.name"])
    assert core.read(name - KERNEL_MAP + int(known["phys_base"]), 130 + 65)[130:].rstrip(b"\0").decode() == kernel
    for data in registers:
        (rip,) = struct.unpack_from("<Q", data, 112 + 16 * 8)
        assert rip >= int(known["_stext"], 16), "the guest was idle, in its kernel"


def check_dumps(vm: Machine, client: Client, directory: Path) -> None:
    wait_for_size(vm, "a", 256 * MIB)
    vm.resize_zone("a", BOOT + PLUGGED)
    put(vm, "vm.pause")
    held = vm.held_by_host("a"), vm.held_by_host("a", "boot")
    core = dump(client, directory / "core")
    assert (vm.held_by_host("a"), vm.held_by_host("a", "boot")) == held
    assert vm.api.info()["state"] == "Paused"
    check_content(vm, core)
    put(vm, "vm.resume")
    check_notes(vm, core)
    data = core.path.read_bytes()
    assert re.search(rb"Linux version \d+\.\d+.* SMP ", data)
    assert core.path.stat().st_blocks * 512 < len(data) < BOOT + PLUGGED + MIB
    worker = worker_of(client)
    os.kill(worker, signal.SIGKILL)
    assert worker_of(client) != worker
    assert dump(client, directory / "again").ranges == core.ranges
    check_interrupted_dumps(vm, client, directory)


def is_another(client: Client, worker: int) -> bool:
    return worker_of(client) != worker


def check_interrupted_dumps(vm: Machine, client: Client, directory: Path) -> None:
    """The process that follows has the machine go on, and none had to be killed for that."""
    for number in (signal.SIGKILL, signal.SIGHUP):
        worker, path = worker_of(client), directory / number.name
        with ThreadPoolExecutor() as pool:
            dumping = pool.submit(dump, client, path)
            wait_until(path.exists, "the dump begins")
            os.kill(worker if number is signal.SIGKILL else vm.process.pid, number)
            assert isinstance(dumping.exception(), (OSError, HTTPException, NoneType)), "it may be over by then"
        wait_until(partial(is_another, client, worker), "another process serves")
        assert vm.guest("echo it goes on").strip() == "it goes on"
        wait_until(lambda: vm.api.info()["state"] == "Running", "the machine runs, as is told")
    assert "killed, since it did not end" not in vm.output()


def dump_too_early(client: Client, path: Path) -> None:
    """Of processors that stand at the firmware's first instruction, until this is answered."""
    wait_until(Path(client.path).exists, "the API is there")
    answer = client.ask("PUT", "/api/v1/vm.coredump", {"destination_url": f"file://{path}"})
    assert answer.status == 500
    assert "the guest is not in 64-bit mode" in answer.json["limit"]
    assert not path.exists()
    assert client.ask("PUT", "/api/v1/vm.resume").status == 204, "it stood still before, and still does"


@pytest.mark.needs_peers
def test_a_linux_guest_is_dumped(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("b")
    client = Client(str(directory / "api"))
    (directory / "empty").mkdir()
    with ThreadPoolExecutor() as pool:
        early = pool.submit(dump_too_early, client, directory / "early")
        chroot = f"-run-with chroot={directory / 'empty'}" if os.geteuid() == 0 else ""  # no path of ours is there
        with machine(directory, OPTIONS, more=f"-- -S {chroot}") as vm:
            early.result()
            check_dumps(vm, client, directory)
    assert list(directory.glob("virtio-mem-*")) == []


def test_places_of_a_machine_with_memory_at_both_sides_of_the_hole() -> None:
    page = ByteCount(4096)
    zones = [
        ZoneSize("a", ByteCount(GIB), ByteCount(GIB), page, ByteCount(2 * MIB)),
        ZoneSize("b", ByteCount(2 * GIB), ByteCount(0), page, ByteCount(2 * MIB)),
    ]
    files = {
        ("a", False): BackingFile(5, 0, False),
        ("a", True): BackingFile(6, 0, False),
        ("b", False): BackingFile(7, 4096, False),
    }
    assert _places(lay_out_machine(zones, (), 1), files) == {
        "boot": [
            {"file": 0, "offset": 0, "addr": 0, "size": GIB},
            {"file": 2, "offset": 4096, "addr": GIB, "size": GIB},
            {"file": 2, "offset": 4096 + GIB, "addr": 4 * GIB, "size": GIB},
        ],
        "hotplug": {"a": {"file": 1, "offset": 0, "addr": 5 * GIB, "size": GIB}},
    }


# What QEMU may say.

NOTES = b"notes!!!"


def elf(*, ident: bytes = b"\x7fELF\2\1\1", machine: int = 62, phoff: int = 64, phnum: int = 2, **note: int) -> bytes:
    """A core file as QEMU writes it: notes, and a page of memory."""
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, 4, machine, 1, 0, phoff, 0, 0, 64, 56, phnum, 0, 0, 0)
    about = {"type": 4, "offset": 176, "size": len(NOTES)} | note
    notes = struct.pack("<IIQQQQQQ", about["type"], 0, about["offset"], 0, 0, about["size"], about["size"], 0)
    return header + notes + struct.pack("<IIQQQQQQ", 1, 0, 184, 0, 0, 8, 8, 0) + NOTES + b"memory.."


def monitor(answer: Callable[[], bytes]) -> Any:
    """QEMU's, which writes what `answer` gives."""

    passed: dict[str, OwnedFd] = {}

    def execute(command: str, arguments: dict[str, Any], fds: Sequence[int] = ()) -> None:
        if command == "getfd":
            (fd,) = fds
            passed[f"fd:{arguments['fdname']}"] = OwnedFd.duplicate_of(fd)
            return
        assert (command, arguments["begin"], arguments["length"]) == ("dump-guest-memory", 0, 4096)
        with passed.pop(arguments["protocol"]) as file:
            os.write(file.fileno(), answer())

    return SimpleNamespace(execute=execute)


def test_qemus_notes_are_taken_from_its_dump() -> None:
    assert guest_notes(monitor(elf)) == NOTES


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (b"", "is not in it"),
        (elf()[:-9], "is not in it"),
        (elf()[:100], "is not in it"),
        (elf(ident=b"\x7fELF\1\1\1"), "the guest is not in 64-bit mode"),
        (elf(machine=3), "the guest is not in 64-bit mode"),
        (elf(type=1), "must have the CPUs' registers"),
        (elf(phnum=0), "must have the CPUs' registers"),
        (elf(phoff=(1 << 64) - 1), "is not in it"),
        (elf(offset=1 << 63), "is not in it"),
        (elf(size=1 << 63), "is not in it"),
        (elf(size=MOST_NOTES + 1) + bytes(MOST_NOTES), "is not in it"),
    ],
)
def test_what_is_no_dump_of_qemus_is_told(written: bytes, says: str) -> None:
    with pytest.raises(HostError, match=rf"qemu=dump-guest-memory: .*{says}"):
        guest_notes(monitor(lambda: written))


def test_a_qemu_that_is_late_writes_to_no_other_file() -> None:
    """Once nobody waits for it, the number that the notes' file had is another file's."""
    asked: list[dict[str, Any]] = []

    def execute(command: str, arguments: dict[str, Any], fds: Sequence[int] = ()) -> None:
        asked.append(arguments)
        if command == "dump-guest-memory":
            raise HostError("qemu", command, "no answer within 10 s")

    with pytest.raises(HostError, match="no answer"):
        guest_notes(SimpleNamespace(execute=execute))  # type: ignore[arg-type]
    assert "/" not in asked[-1]["protocol"], "QEMU opens what is at that path by then"


def test_what_qemu_refuses_is_told() -> None:
    def refuse() -> bytes:
        raise QemuRefused("qemu", "dump-guest-memory", "QEMU refused: there is a dump in process")

    with pytest.raises(HostError, match="there is a dump in process"):
        guest_notes(monitor(refuse))
