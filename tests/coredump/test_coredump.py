"""A core dump has what the guest has, on each kind of memory, and nothing else; where it fails, there is none."""

from __future__ import annotations

import errno
import os
import platform
import random
import re
import resource
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.coredump.elf import Core
from tests.host import HugePagePool
from tests.snapshot.helpers import BLOCK, BOOT, HOTPLUG, OPTIONS, TARGET, ask, config, content, fill, parts, service_of
from tests.snapshot.helpers import write as write_memory
from vhost_user.errors import HostError, UsageError
from vhost_user.units import GIB, KIB, MIB
from virtio_mem import coredump
from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.config import VmMemoryConfig
from virtio_mem.coredump import core_dump
from virtio_mem.hostmem.files import write_at
from virtio_mem.manager import MemoryManager
from virtio_mem.protocol import BlockState, RequestType, ResponseType

KINDS = [pytest.param(name, marks=pytest.mark.needs_hugetlb) if name == "hugetlb" else name for name in OPTIONS]
REGION = 4 * GIB
"""Where the hotplug region is."""


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[MemoryManager]:
    """A paused machine on memfds, with something in it."""
    with MemoryManager(config("memfd", tmp_path)) as manager:
        fill(manager, random.Random(7))
        manager.pause()
        yield manager


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_what_the_guest_has(
    kind: str, tmp_path: Path, rng: random.Random, hugepages: Callable[[int, int], HugePagePool]
) -> None:
    if kind == "hugetlb":
        hugepages(2 * MIB, (BOOT + HOTPLUG) // (2 * MIB))
    with MemoryManager(config(kind, tmp_path)) as manager:
        fill(manager, rng)
        manager.pause()
        held = manager.zones["mem0"].zone.info()["held"]
        core_dump(manager, tmp_path / "core")
        assert manager.zones["mem0"].zone.info()["held"] == held, "the dump had the host allocate memory"
        expected, runs = content(manager), list(service_of(manager).device.blocks.plugged_runs())
    core = Core(tmp_path / "core")
    assert (core.type, core.machine) == (4, {"x86_64": 62, "aarch64": 183}[platform.machine()])
    assert core.ranges == [(0, BOOT), *((REGION + run.first * BLOCK, run.nb_blocks * BLOCK) for run in runs)]
    assert core.read(0, BOOT) == expected.pop("boot")
    assert len(expected) == 10
    for name, data in expected.items():
        assert core.read(REGION + int(name.removeprefix("block ")) * BLOCK, BLOCK) == data, name
    assert not core.extended
    assert list(core.notes()) == []


def test_boot_memory_around_the_hole_and_zones_without_a_device(tmp_path: Path) -> None:
    line = (
        "--memory size=0,hotplug_method=virtio-mem --memory-zone id=a,size=3584M,shared=on "
        "id=b,size=64M,hotplug_size=64M id=c,size=0,shared=on,hotplug_size=64M "
        "--numa guest_numa_id=0,memory_zones=[a,b,c]"
    )
    with MemoryManager(VmMemoryConfig.parse(line)) as manager:
        boot = manager.zones["a"].zone.boot
        assert boot is not None
        for offset in (0, 3 * GIB - 4, 3 * GIB, 3584 * MIB - 4):
            write_memory(boot, offset, struct.pack("<I", offset >> 2))
        manager.pause()
        core_dump(manager, tmp_path / "core")
        placed = [(place.addr, place.size) for place in manager.layout.boot]
    core = Core(tmp_path / "core")
    assert core.ranges == sorted(placed) == [(0, 3 * GIB), (4 * GIB, 512 * MIB), (4 * GIB + 512 * MIB, 64 * MIB)]
    for address, offset in ((0, 0), (3 * GIB - 4, 3 * GIB - 4), (4 * GIB, 3 * GIB), (4608 * MIB - 4, 3584 * MIB - 4)):
        assert core.read(address, 4) == struct.pack("<I", offset >> 2)
    assert (tmp_path / "core").stat().st_blocks * 512 <= 64 * KIB


@pytest.mark.parametrize("kind", ["memfd", "anonymous"])
def test_what_a_guest_wrote_where_nothing_is_plugged_is_not_in_it(kind: str, tmp_path: Path) -> None:
    with MemoryManager(config(kind, tmp_path)) as manager:
        manager.resize_zone("mem0", BOOT + TARGET)
        assert ask(manager, RequestType.PLUG, 3) is ResponseType.ACK
        _, hotplug = parts(manager.zones["mem0"])
        for block, data in ((2, b"secret"), (3, b"plugged"), (4, b"secret"), (15, b"secret")):
            write_memory(hotplug, block * BLOCK, data)
        manager.pause()
        core_dump(manager, str(tmp_path / "core"))
    core = Core(tmp_path / "core")
    assert core.ranges[1:] == [(REGION + 3 * BLOCK, BLOCK)]
    assert core.read(REGION + 3 * BLOCK, 8) == b"plugged\0"
    assert b"secret" not in (tmp_path / "core").read_bytes()
    for block in (2, 4, 15):
        with pytest.raises(LookupError):
            core.read(REGION + block * BLOCK, 1)


@pytest.mark.parametrize("kind", ["anonymous", "memfd", "shared directory"])
def test_pages_of_zeros_are_holes(kind: str, tmp_path: Path) -> None:
    with MemoryManager(config(kind, tmp_path)) as manager:
        manager.resize_zone("mem0", BOOT + TARGET)
        assert ask(manager, RequestType.PLUG, 0, 12) is ResponseType.ACK
        _, hotplug = parts(manager.zones["mem0"])
        write_memory(hotplug, 7 * BLOCK + 5 * 4096, b"x")
        write_memory(hotplug, 9 * BLOCK, bytes(BLOCK))  # held, and zero
        write_memory(hotplug, 11 * BLOCK - 4096, b"y")
        manager.pause()
        core_dump(manager, tmp_path / "core")
    about = (tmp_path / "core").stat()
    assert about.st_size == 4096 + BOOT + TARGET
    assert about.st_blocks * 512 <= 16 * KIB
    core = Core(tmp_path / "core")
    assert core.read(REGION + 7 * BLOCK + 5 * 4096, 1) == b"x"
    assert core.read(REGION + 11 * BLOCK - 4096, 1) == b"y"
    assert core.read(REGION, TARGET).count(0) == TARGET - 2


def test_more_runs_than_an_elf_header_counts(tmp_path: Path) -> None:
    """The most that it counts, boot memory and notes among them, one more, and 65,536 runs."""
    size, block, written = 128 * GIB, MIB, (0, 1, 777, 65531, 65532, 65535)
    line = f"--memory size=2M,shared=on,hotplug_method=virtio-mem,hotplug_size={size}"
    with MemoryManager(VmMemoryConfig.parse(line), block_size=block) as manager:
        blocks, (boot, hotplug) = service_of(manager).device.blocks, parts(manager.zones["mem0"])
        write_memory(boot, 0, b"boot")
        manager.pause()
        for number in range(65536):
            blocks.put(Run(BlockIndex(2 * number), 1), BlockState.PLUGGED)
            if number in written:
                write_memory(hotplug, 2 * number * block, b"run %d\n" % number)
            if number + 1 in (65532, 65533, 65536):
                core_dump(manager, tmp_path / f"{number + 1}")
    for nb_runs in (65532, 65533, 65536):
        path = tmp_path / f"{nb_runs}"
        core = Core(path)
        assert core.extended == (nb_runs > 65532)
        assert core.ranges == [(0, 2 * MIB), *((REGION + 2 * number * block, block) for number in range(nb_runs))]
        for number in (0, 1, 777, nb_runs - 1):
            data = core.read(REGION + 2 * number * block, 20)
            assert data.rstrip(b"\0") == (b"run %d\n" % number if number in written else b"")
        assert path.stat().st_blocks * 512 < 5 * MIB


def test_notes_are_the_callers(manager: MemoryManager, tmp_path: Path) -> None:
    status = random.Random(1).randbytes(336)
    core_dump(manager, tmp_path / "core", struct.pack("<III8s", 5, 336, 1, b"CORE") + status)
    core = Core(tmp_path / "core")
    assert list(core.notes()) == [(b"CORE", 1, status)]
    assert core.read(12345, 11) == b"boot memory"
    for notes in ("text", None, bytearray(4)):
        with pytest.raises(UsageError, match=r"notes=.*have to be bytes"):
            core_dump(manager, tmp_path / "other", notes)  # type: ignore[arg-type]
    assert not (tmp_path / "other").exists()


def test_others_read_it(manager: MemoryManager, tmp_path: Path) -> None:
    """binutils' readelf, which comes with gcc."""
    core_dump(manager, tmp_path / "core", struct.pack("<III8s", 5, 336, 1, b"CORE") + bytes(336))
    done = subprocess.run(["readelf", "-Whln", tmp_path / "core"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "NT_PRSTATUS" in done.stdout
    found = re.findall(r" LOAD +0x\w+ 0x0+ (0x\w+) (0x\w+) ", done.stdout)
    assert [(int(addr, 16), int(size, 16)) for addr, size in found] == Core(tmp_path / "core").ranges


def test_a_machine_that_runs_is_not_dumped(manager: MemoryManager, tmp_path: Path) -> None:
    manager.resume()
    with pytest.raises(UsageError, match="zone mem0=running"):
        core_dump(manager, tmp_path / "core")
    assert not (tmp_path / "core").exists()


def test_blocks_that_come_or_go_meanwhile_leave_no_dump(
    manager: MemoryManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_content = coredump._write_content

    def resumed(fd: int, part: Any, content_at: int) -> None:
        manager.resume()
        assert ask(manager, RequestType.UNPLUG_ALL, 0, 0) is ResponseType.ACK
        manager.pause()
        write_content(fd, part, content_at)

    monkeypatch.setattr(coredump, "_write_content", resumed)
    with pytest.raises(UsageError, match="stays paused"):
        core_dump(manager, tmp_path / "core")
    assert not (tmp_path / "core").exists()


def test_it_is_for_its_owner_and_replaces_nothing(manager: MemoryManager, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        core_dump(manager, tmp_path / "core")
    finally:
        os.umask(before)
    assert (tmp_path / "core").stat().st_mode & 0o7777 == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for path in ("core", "link", "pipe", ".", ".."):
        about = (tmp_path / path).lstat()
        with pytest.raises(UsageError, match="is there already"):
            core_dump(manager, tmp_path / path)
        assert (tmp_path / path).lstat().st_ino == about.st_ino
    assert not (tmp_path / "nowhere").exists()


def test_it_outlives_the_host(manager: MemoryManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, and then its name, are on disk when it counts as written."""
    synced, sync = [], os.fsync

    def note(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink())
        sync(fd)

    monkeypatch.setattr(os, "fsync", note)
    core_dump(manager, tmp_path / "core")
    assert synced == [tmp_path / "core", tmp_path]


@pytest.mark.parametrize("path", ["a\0b", "\ud800", Path("a\0b"), Path("\ud800"), b"a", 5, None])
def test_what_is_no_path(manager: MemoryManager, path: Any) -> None:
    with pytest.raises(UsageError, match=r"file=.* has to be a path"):
        core_dump(manager, path)


def test_where_no_file_can_be(manager: MemoryManager, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for parent in ("no", "file"):
        with pytest.raises(UsageError, match="has to be in a directory that there is"):
            core_dump(manager, tmp_path / parent / "core")
    with pytest.raises(HostError, match="open failed: ENAMETOOLONG"):
        core_dump(manager, tmp_path / ("x" * 256))


def in_child(manager: MemoryManager, path: Path, before: Callable[[], object]) -> int:
    """The number of the error that a process gets for a dump."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            before()
            core_dump(manager, path)
        except HostError as error:
            os._exit(error.errno if "write failed" in str(error) and "make room there" in str(error) else 254)
        os._exit(255)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_file_that_may_not_be_so_long_leaves_nothing(manager: MemoryManager, tmp_path: Path) -> None:
    limit = (MIB, MIB)
    assert in_child(manager, tmp_path / "core", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)) == errno.EFBIG
    assert not (tmp_path / "core").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs_root: only root can mount a tmpfs")
def test_a_full_disk_leaves_nothing(manager: MemoryManager, tmp_path: Path) -> None:
    boot, _ = parts(manager.zones["mem0"])
    write_memory(boot, 0, random.Random(2).randbytes(MIB))
    (tmp_path / "full").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512K", "tmpfs", tmp_path / "full"], check=True)
    try:
        assert in_child(manager, tmp_path / "full/core", lambda: None) == errno.ENOSPC
        assert list((tmp_path / "full").iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path / "full"], check=True)


@pytest.mark.parametrize("kind", ["shared directory", "private file"])
def test_memory_whose_file_is_truncated_leaves_nothing(kind: str, tmp_path: Path) -> None:
    with MemoryManager(config(kind, tmp_path)) as manager:
        boot, _ = parts(manager.zones["mem0"])
        write_memory(boot, 0, b"x" * MIB)
        manager.pause()
        os.truncate(f"/proc/self/fd/{boot.backing.fd}", MIB // 2)
        with pytest.raises(HostError, match="was truncated"):
            core_dump(manager, tmp_path / "core")
    assert not (tmp_path / "core").exists()


def test_one_that_is_killed_leaves_no_elf_file(
    manager: MemoryManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any of its writes."""
    survived = 0
    for deadly in range(100):
        path, child = tmp_path / f"core-{deadly}", os.fork()
        if child == 0:
            done = 0

            def write(fd: int, data: bytes, offset: int, deadly: int = deadly) -> None:
                nonlocal done
                if done == deadly:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1
                write_at(fd, data, offset)

            monkeypatch.setattr("virtio_mem.coredump.write_at", write)
            core_dump(manager, path)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            survived = deadly
            break
        assert path.read_bytes()[:64] == bytes(64)[: path.stat().st_size]
    assert survived > 4
    assert Core(path).loads
