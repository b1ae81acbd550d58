"""A machine that is saved and restored is the same: each block's state and content, on each kind of memory."""

from __future__ import annotations

import errno
import os
import random
import resource
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.host import HugePagePool
from tests.snapshot.helpers import (
    BLOCK,
    BOOT,
    HOTPLUG,
    OPTIONS,
    TARGET,
    ask,
    config,
    content,
    fill,
    parts,
    service_of,
    write,
)
from tests.zones.helpers import effective_user
from vhost_user.errors import HostError, UsageError
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import MIB, GuestAddress
from virtio_mem.config import VmMemoryConfig
from virtio_mem.geometry import UsableRegion
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.manager import MemoryManager
from virtio_mem.protocol import BlockState, Request, RequestType, ResponseType
from virtio_mem.snapshot import restore, save
from virtio_mem.snapshot.content import CHUNK, Range, _data_chunks, write_content
from virtio_mem.snapshot.manifest import FILE_NAME
from virtio_mem.snapshot.own_file import named, require_file

KINDS = [pytest.param(name, marks=pytest.mark.needs_hugetlb) if name == "hugetlb" else name for name in OPTIONS]


@pytest.mark.parametrize("kind", KINDS)
def test_each_blocks_state_and_content_is_what_it_was(
    kind: str, tmp_path: Path, rng: random.Random, hugepages: Callable[[int, int], HugePagePool]
) -> None:
    if kind == "hugetlb":
        hugepages(2 * MIB, 2 * (BOOT + HOTPLUG) // (2 * MIB))
    snapshot = tmp_path / "snapshot"
    with MemoryManager(config(kind, tmp_path)) as manager:
        fill(manager, rng)
        before, device = content(manager), service_of(manager).device
        manager.pause()
        held = manager.zones["mem0"].zone.info()["held"]
        save(manager, snapshot)
        assert manager.zones["mem0"].zone.info()["held"] == held, "saving had the host allocate memory"
        space, blocks = device.config, list(device.blocks.plugged_runs())
    with restore(snapshot) as manager:
        device = service_of(manager).device
        assert device.paused
        assert device.config == space
        assert list(device.blocks.plugged_runs()) == blocks
        assert content(manager) == before
        manager.resume()
        for block in range(HOTPLUG // BLOCK):
            addr = GuestAddress(device.geometry.addr + block * BLOCK)
            answer = service_of(manager).request(Request(RequestType.STATE, addr, 1))
            assert answer.state is (BlockState.PLUGGED if f"block {block}" in before else BlockState.UNPLUGGED)
        # The restored device goes on: what is plugged can be unplugged, and what is not be plugged.
        free = next(block for block in range(HOTPLUG // BLOCK) if f"block {block}" not in before)
        taken = next(block for block in range(HOTPLUG // BLOCK) if f"block {block}" in before)
        assert ask(manager, RequestType.PLUG, free) is ResponseType.ACK
        assert ask(manager, RequestType.UNPLUG, taken) is ResponseType.ACK


def test_what_is_saved_outlives_the_host(tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files, and then its names, are on disk when it counts as saved."""
    synced, sync = [], os.fsync

    def note(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink())
        sync(fd)

    monkeypatch.setattr(os, "fsync", note)
    snapshot = tmp_path / "snapshot"
    with MemoryManager(config("memfd", tmp_path)) as manager:
        fill(manager, rng)
        manager.pause()
        save(manager, snapshot)
    *files, names, name = synced
    assert sorted(files) == sorted(snapshot.iterdir())
    assert (names, name) == (snapshot, tmp_path)


def test_a_file_system_that_syncs_no_directory_takes_a_snapshot(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of shared folders in VirtualBox, or 9P2000.u: fsync(2) of a directory is EINVAL there."""
    sync = os.fsync

    def refuse(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(fd)

    monkeypatch.setattr(os, "fsync", refuse)
    with MemoryManager(config("memfd", tmp_path)) as manager:
        fill(manager, rng)
        manager.pause()
        save(manager, tmp_path / "snapshot")
    assert (tmp_path / "snapshot" / FILE_NAME).is_file()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs_root: only root can become another user")
def test_a_directory_that_may_be_written_and_not_read_takes_a_snapshot(tmp_path: Path, rng: random.Random) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o333)
    with MemoryManager(config("memfd", tmp_path)) as manager, OwnedFd(os.open(folder, os.O_PATH)) as fd:
        fill(manager, rng)
        manager.pause()
        with effective_user(65534):
            save(manager, f"/proc/self/fd/{fd.fileno()}/snapshot")
    assert (folder / "snapshot" / FILE_NAME).stat().st_uid == 65534


def test_a_machine_that_goes_on_meanwhile_is_not_saved(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MemoryManager(config("memfd", tmp_path)) as manager:
        fill(manager, rng)
        manager.pause()

        def resumed(memory: HostMemory, ranges: Iterable[Range], fd: int) -> str:
            if memory.size == HOTPLUG:  # the device is saved by now
                manager.resume()
                assert ask(manager, RequestType.UNPLUG_ALL, 0, 0) is ResponseType.ACK
                manager.pause()
            return write_content(memory, ranges, fd)

        monkeypatch.setattr(import_module("virtio_mem.snapshot.save"), "write_content", resumed)
        with pytest.raises(UsageError, match="stays paused"):
            save(manager, tmp_path / "snapshot")
        assert not (tmp_path / "snapshot").exists()


@pytest.mark.parametrize("kind", ["anonymous", "memfd", "shared directory"])
def test_what_is_zero_takes_no_room_neither_saved_nor_restored(kind: str, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    with MemoryManager(config(kind, tmp_path)) as manager:
        manager.resize_zone("mem0", BOOT + TARGET)
        assert ask(manager, RequestType.PLUG, 0, 12) is ResponseType.ACK
        _, hotplug = parts(manager.zones["mem0"])
        write(hotplug, 7 * BLOCK, b"x")
        manager.pause()
        save(manager, snapshot)
    assert (snapshot / "mem0.hotplug").stat().st_size == HOTPLUG
    assert (snapshot / "mem0.hotplug").stat().st_blocks * 512 <= MIB
    with restore(snapshot) as manager:
        _, hotplug = parts(manager.zones["mem0"])
        assert hotplug.held() <= 2 * MIB  # a chunk, or the huge page that it lies in


def test_unplugged_blocks_are_not_in_a_snapshot(tmp_path: Path) -> None:
    """A guest that wrote where nothing is plugged, or an earlier owner of the block, does not get it saved."""
    snapshot = tmp_path / "snapshot"
    with MemoryManager(config("memfd", tmp_path)) as manager:
        manager.resize_zone("mem0", BOOT + TARGET)
        assert ask(manager, RequestType.PLUG, 3) is ResponseType.ACK
        _, hotplug = parts(manager.zones["mem0"])
        write(hotplug, 3 * BLOCK, b"plugged")
        write(hotplug, 9 * BLOCK, b"secret")
        manager.pause()
        save(manager, snapshot)
    saved = (snapshot / "mem0.hotplug").read_bytes()
    assert b"plugged" in saved
    assert b"secret" not in saved


def test_boot_memory_in_a_shared_file_is_named_and_not_copied(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    with MemoryManager(config("shared file", tmp_path)) as manager:
        fill(manager, random.Random(1))
        manager.pause()
        save(manager, snapshot)
    assert sorted(path.name for path in snapshot.iterdir()) == ["mem0.blocks", "mem0.hotplug", "snapshot.json"]
    (tmp_path / "zone").rename(tmp_path / "elsewhere")
    (tmp_path / "zone").write_bytes(bytes(BOOT + HOTPLUG))
    with pytest.raises(UsageError, match=r"zone mem0 file=.* is inode"):
        restore(snapshot)
    (tmp_path / "elsewhere").rename(tmp_path / "zone")
    with restore(snapshot) as manager:
        assert content(manager)


def test_options_besides_the_configuration_are_kept(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    line = VmMemoryConfig.parse("--memory size=64M,shared=on,hotplug_method=virtio-mem,hotplug_size=64M")
    with MemoryManager(line, block_size=4 * MIB, usable_region=UsableRegion.WHOLE_REGION) as manager:
        manager.pause()
        save(manager, str(snapshot))
        options = str(manager.config)
    with restore(str(snapshot)) as manager:
        (zone,) = manager.zones.values()
        assert zone.service is not None
        assert zone.service.device.geometry.block_size == 4 * MIB
        assert zone.service.device.usable_region_size == 64 * MIB
        assert str(manager.config) == options


def test_a_machine_that_runs_is_not_saved(tmp_path: Path) -> None:
    with MemoryManager(config("memfd", tmp_path)) as manager:
        with pytest.raises(UsageError, match="zone mem0=running"):
            save(manager, tmp_path / "snapshot")
        manager.pause()
        (tmp_path / "there").mkdir()
        with pytest.raises(UsageError, match="is there already"):
            save(manager, tmp_path / "there")
        (tmp_path / "file").touch()
        for parent in ("no", "file"):
            with pytest.raises(UsageError, match="has to be in a directory that there is"):
                save(manager, tmp_path / parent / "where")
        with pytest.raises(HostError, match="mkdir"):
            save(manager, tmp_path / ("x" * 256))
    assert not (tmp_path / "snapshot").exists()


def test_where_there_is_no_room_nothing_is_left(tmp_path: Path) -> None:
    """A full disk, as far as a process can have one: no file may be longer than 1 MiB."""
    with MemoryManager(config("memfd", tmp_path)) as manager:
        manager.pause()
        child = os.fork()
        if child == 0:
            import signal  # noqa: PLC0415

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
            try:
                save(manager, tmp_path / "snapshot")
            except HostError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not (tmp_path / "snapshot").exists()


def test_a_write_that_ends_early_is_not_taken_for_whole(tmp_path: Path) -> None:
    """A disk that is full in the middle of a chunk: half of it is written, and no error is told."""
    with MemoryManager(config("memfd", tmp_path)) as manager, (tmp_path / "part").open("wb") as file:
        boot, _ = parts(manager.zones["mem0"])
        write(boot, 0, random.Random(3).randbytes(MIB))
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (MIB // 2, MIB))
            try:
                write_content(boot, [Range(0, MIB)], file.fileno())
            except OSError as error:
                os._exit(error.errno or 1)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EFBIG
    assert (tmp_path / "part").stat().st_size == MIB // 2


@pytest.mark.parametrize("kind", ["shared directory", "shared file", "private file"])
@pytest.mark.parametrize("length", [0, MIB // 2, MIB, BOOT - 1])
def test_memory_whose_file_is_truncated_is_refused_and_no_bus_error(length: int, kind: str, tmp_path: Path) -> None:
    """As a front end can do it, whose files they are. The first MiB has data, the rest has none, or is not copied."""
    with MemoryManager(config(kind, tmp_path)) as manager:
        boot, _ = parts(manager.zones["mem0"])
        write(boot, 0, random.Random(3).randbytes(MIB))
        manager.pause()
        child = os.fork()
        if child == 0:
            try:
                os.truncate(f"/proc/self/fd/{boot.backing.fd}", boot.backing.offset + length)
                save(manager, tmp_path / "snapshot")
            except HostError as error:
                os._exit(7 if "was truncated" in str(error) else 8)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not (tmp_path / "snapshot").exists()


@pytest.mark.needs_hugetlb
def test_restoring_with_too_few_huge_pages_is_refused_and_leaves_nothing(
    tmp_path: Path, hugepages: Callable[[int, int], HugePagePool]
) -> None:
    """QEMU d71920d425: a destination short of huge pages died of SIGBUS."""
    hugepages(2 * MIB, (BOOT + HOTPLUG) // (2 * MIB))
    snapshot = tmp_path / "snapshot"
    with MemoryManager(config("hugetlb", tmp_path)) as manager:
        manager.resize_zone("mem0", BOOT + HOTPLUG)
        assert ask(manager, RequestType.PLUG, 0, HOTPLUG // BLOCK) is ResponseType.ACK
        manager.pause()
        save(manager, snapshot)
        with pytest.raises(HostError, match="huge pages"):
            restore(snapshot)
    with restore(snapshot) as manager:
        assert service_of(manager).device.plugged_size == HOTPLUG


def test_the_chunks_that_have_data_are_found_among_millions(rng: random.Random) -> None:
    """Of the chunks of any ranges, wherever they begin in the file, and the last one shorter."""
    start, chunks = 3 * 4096, 8 << 20
    fd = os.memfd_create("sparse", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, start + chunks * CHUNK)
        written = {*(rng.randrange(chunks) for _ in range(50)), *range(1000, 1010), 0, chunks - 1}
        for chunk in written:
            os.pwrite(fd, b"x", start + chunk * CHUNK + rng.randrange(CHUNK))
        for ranges in (
            [(0, chunks)],
            [(0, 1), (5, 998), (1004, 2), (1007, chunks - 1007)],
            [(2000, 1), (chunks - 1, 1)],
        ):
            wanted = [
                (chunk * CHUNK, CHUNK)
                for first, count in ranges
                for chunk in sorted(written)
                if first <= chunk < first + count
            ]
            assert (
                list(_data_chunks(fd, start, [Range(first * CHUNK, count * CHUNK) for first, count in ranges]))
                == wanted
            )
        os.pwrite(fd, b"x", start + 5000 * CHUNK)
        assert list(_data_chunks(fd, start, [Range(5000 * CHUNK, 4096)])) == [(5000 * CHUNK, 4096)]
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("field", "renamed"),
    [("inode", True), ("file_size", True), ("generation", True), ("file_offset", True), ("path", False)],
)
def test_a_file_is_known_again_by_each_of_these(field: str, renamed: bool, tmp_path: Path) -> None:
    with MemoryManager(config("shared file", tmp_path)) as manager:
        boot, _ = parts(manager.zones["mem0"])
        state = named(tmp_path / "zone", boot)
        require_file(state, tmp_path / "zone", boot, renamed=renamed)
        before: Any = "/elsewhere" if field == "path" else (getattr(state, field) or 0) + 1
        with pytest.raises(UsageError, match=r"file=inode .*: is inode .* now; put the file back"):
            require_file(replace(state, **{field: before}), tmp_path / "zone", boot, renamed=renamed)


def test_a_file_at_another_path_is_of_the_same_device(tmp_path: Path) -> None:
    """Or it is at the same path, as after a boot that gave the device another number."""
    with MemoryManager(config("shared file", tmp_path)) as manager:
        boot, _ = parts(manager.zones["mem0"])
        state = named(tmp_path / "zone", boot)
        assert state.device is not None
        other_device = replace(state, device=state.device + 1)
        require_file(state, tmp_path / "renamed", boot, renamed=True)
        require_file(other_device, tmp_path / "zone", boot, renamed=True)
        with pytest.raises(UsageError, match="file"):
            require_file(other_device, tmp_path / "renamed", boot, renamed=True)
