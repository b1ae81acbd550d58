"""Zones that can't be: each error names the option, the value, the limit and the way out, and nothing stays open.

That nothing stays open or mapped of any file is looked at after every test of the suite; see tests/leaks.py.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.leaks import Holdings
from tests.zones.helpers import (
    ANONYMOUS,
    HUGE,
    KINDS,
    MEMFD,
    PRIVATE_FILE,
    SHARED_FILE,
    SHARED_TMPFS_FILE,
    Kind,
    Maker,
    each,
    effective_user,
    part,
)
from vhost_user import _native
from vhost_user.errors import FieldError, HostError, UsageError
from vhost_user.units import GIB, KIB, MIB, TIB, ByteCount, HostOffset
from virtio_mem.hostmem import facts, files, headroom
from virtio_mem.hostmem.headroom import Limit
from virtio_mem.zone import Zone, ZoneSpec


def address_space() -> int:
    """Bytes mapped by this process: anonymous memory has no name that a leak would show under."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * 4096


def refused(spec: ZoneSpec, error: type[FieldError], *words: str) -> FieldError:
    """The error that making a zone ends in; it has all of `words`, and the attempt left nothing behind."""
    before, mapped = Holdings(), address_space()
    with pytest.raises(error) as caught:
        Zone(spec)
    for word in words:
        assert word in str(caught.value)
    value = caught.value
    assert isinstance(value, FieldError)
    value.__traceback__ = value.__cause__ = value.__context__ = None
    assert before.leaks() == []
    assert address_space() - mapped < 64 * MIB
    return value


def spec(size: int = 4 * MIB, hotplug_size: int = 0, **options: Any) -> ZoneSpec:
    return ZoneSpec("m", ByteCount(size), ByteCount(hotplug_size), **options)


@pytest.mark.parametrize("field", ["size", "hotplug_size"])
@pytest.mark.parametrize(
    ("options", "size", "words"),
    [
        ({}, 4 * MIB + 1, ("not a multiple of the page size, 4K", "use 4M or 4100K")),
        ({"shared": True}, 4095, ("=4095:", "use 0 or 4K")),
        ({"hugepages": True, "hugepage_size": HUGE}, 5 * MIB, ("=5M:", "page size, 2M", "use 4M or 6M")),
        ({"hugepages": True, "hugepage_size": HUGE}, 4 * KIB, ("=4K:", "use 0 or 2M")),
        ({}, -8192, ("=-8K:", "not a multiple", "use 0 or 4K")),
    ],
)
def test_a_size_is_whole_pages(field: str, options: dict[str, Any], size: int, words: tuple[str, ...]) -> None:
    sizes = {"size": 4 * MIB, "hotplug_size": 4 * MIB, field: size}
    assert refused(spec(**sizes, **options), UsageError, *words).field == field


@pytest.mark.parametrize(("size", "hotplug_size"), [(0, 0), (2**63, 0), (2**62, 2**62), (2**64 - 4096, 2**64 - 4096)])
def test_a_zone_has_bytes_and_fits_a_file(size: int, hotplug_size: int) -> None:
    refused(spec(size, hotplug_size), UsageError, "size and hotplug_size together", str(2**63 - 1))


@each(ANONYMOUS, MEMFD)
@pytest.mark.parametrize("field", ["size", "hotplug_size"])
def test_more_than_the_address_space_is_refused(kind: Kind, field: str) -> None:
    sizes = {"size": 4 * MIB, "hotplug_size": 4 * MIB, field: 2**50}
    words = (f"{field}=1024T: ", "no room in the address space")
    assert refused(spec(**sizes, **kind.options), HostError, *words).field == field


# files


@each(SHARED_FILE, PRIVATE_FILE, SHARED_TMPFS_FILE)
@pytest.mark.parametrize("missing", [1, 4096, 4 * MIB])
def test_a_file_too_small_is_told_with_both_sizes(make: Maker, kind: Kind, missing: int) -> None:
    short = make.spec(kind, size=4 * MIB, hotplug_size=4 * MIB)
    assert short.file is not None
    os.truncate(short.file, 4 * MIB - missing)
    error = refused(short, UsageError, "the zone's boot memory needs 4M")
    assert error.remedy == f"truncate -s {4 * MIB} {short.file}"
    assert short.file.stat().st_size == 4 * MIB - missing


@each(SHARED_FILE, PRIVATE_FILE)
def test_a_file_larger_than_the_zone_is_left_as_it_is_behind_it(make: Maker, kind: Kind) -> None:
    larger = make.spec(kind, size=4 * MIB, hotplug_size=4 * MIB)
    assert larger.file is not None
    larger.file.write_bytes(b"\1" * 12 * MIB)
    zone = make.open(larger)
    assert part(zone.hotplug).discard_verified(HostOffset(0), ByteCount(4 * MIB)) == 0
    part(zone.boot).discard(HostOffset(0), ByteCount(4 * MIB))
    contents = larger.file.read_bytes()
    assert len(contents) == 12 * MIB
    assert contents[4 * MIB :] == b"\1" * 8 * MIB


@pytest.mark.parametrize("shared", [True, False])
def test_a_missing_file_is_told(tmp_path: Path, shared: bool) -> None:
    missing = tmp_path / "nothing"
    error = refused(spec(file=missing, shared=shared), UsageError, f"file={missing}: no such file", "create the file")
    assert error.field == "file"
    assert not missing.exists()


def test_a_path_through_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(spec(file=tmp_path / "file" / "below"), UsageError, "no such file or directory")


def test_a_link_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    refused(spec(file=tmp_path / "link"), UsageError, "no such file or directory")


def test_a_link_to_a_file_is_followed(make: Maker) -> None:
    target = make.spec(SHARED_FILE, size=4 * MIB).file
    assert target is not None
    link = target.with_name("link")
    link.symlink_to(target)
    assert make.open(spec(file=link, shared=True)).kind == "shared file"


def a_fifo(path: Path) -> Path:
    os.mkfifo(path / "fifo")
    return path / "fifo"


def a_device(_: Path) -> Path:
    return Path("/dev/zero")


def a_socket(path: Path) -> Path:
    os.mknod(path / "socket", stat.S_IFSOCK | 0o600)
    return path / "socket"


@pytest.mark.parametrize("special", [a_fifo, a_device, a_socket])
@pytest.mark.parametrize("shared", [True, False])
def test_what_is_no_file_is_refused_without_being_opened(
    tmp_path: Path, special: Callable[[Path], Path], shared: bool
) -> None:
    refused(spec(file=special(tmp_path), shared=shared), UsageError, "neither a regular file nor a directory")


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs_root: only root can become another user")


@as_root
@pytest.mark.parametrize(("shared", "mode"), [(True, 0o444), (True, 0o600), (False, 0o600)])
def test_a_file_without_permission_is_told(make: Maker, shared: bool, mode: int) -> None:
    make.tmpfs.chmod(0o755)
    file = make.spec(SHARED_TMPFS_FILE, size=4 * MIB).file
    assert file is not None
    file.chmod(mode)
    with effective_user(65534):
        error = refused(spec(file=file, shared=shared), HostError, "open failed: EACCES", "give read access")
    assert isinstance(error, HostError)
    assert error.errno == errno.EACCES


@as_root
def test_a_directory_without_permission_is_told(make: Maker) -> None:
    make.tmpfs.chmod(0o755)
    with effective_user(65534):
        refused(spec(file=make.tmpfs, shared=True), HostError, "open(O_TMPFILE) failed: EACCES", "write access")


@as_root
def test_a_file_below_a_directory_without_permission_is_told(make: Maker) -> None:
    make.tmpfs.chmod(0o700)
    file = make.spec(SHARED_TMPFS_FILE, size=4 * MIB).file
    with effective_user(65534):
        refused(spec(file=file, shared=True), HostError, "open failed: EACCES", "the directories above it")


def test_a_directory_whose_file_system_has_no_unnamed_files_is_told() -> None:
    refused(spec(file=Path("/proc/self"), shared=True), HostError, "open(O_TMPFILE) failed", "/proc/self")


def test_a_file_that_the_file_system_can_not_have_is_told(make: Maker) -> None:
    refused(spec(hotplug_size=2**62, file=make.disk, shared=True), HostError, "ftruncate to", "EFBIG", "another")


def test_a_file_system_without_holes_has_no_hotplug(make: Maker) -> None:
    directory = make.mount("ramfs")
    words = ("can't give back a part of a file", "shared=off")
    assert refused(spec(hotplug_size=4 * MIB, file=directory, shared=True), HostError, *words).field == "file"
    boot_only = make.open(spec(file=directory, shared=True))
    assert boot_only.hotplug is None
    file = directory / "file"
    file.touch()
    os.truncate(file, 4 * MIB)
    assert part(make.open(spec(hotplug_size=4 * MIB, file=file, shared=True)).hotplug).backing.kind == "memfd"


# huge pages


@pytest.mark.needs_hugetlb
@pytest.mark.parametrize("option", ["prefault", "reserve"])
def test_too_few_huge_pages_for_boot_memory_are_told(make: Maker, option: str) -> None:
    pool = make.hugepages(HUGE, 3)
    total = pool.counter("nr_hugepages")
    wanted = spec(16 * MIB, hugepages=True, hugepage_size=HUGE, **{option: True})
    words = (
        "needs 8 huge pages of 2M",
        f"of {total} in the pool 3 are free and 0 of those are reserved",
        f"free 5 of them, or write {total + 5} to /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
    )
    assert str(refused(wanted, HostError, *words)).startswith(f"{option}=on: ")
    assert pool.free == 3
    assert pool.counter("nr_hugepages") == total


@pytest.mark.needs_hugetlb
def test_huge_pages_that_are_neither_prefaulted_nor_reserved_are_not_needed_yet_but_told(
    make: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    total = make.hugepages(HUGE, 3).counter("nr_hugepages")
    zone = make.open(spec(16 * MIB, hotplug_size=TIB, hugepages=True, hugepage_size=HUGE))
    assert zone.info()["held"] == {"boot": 0, "hotplug": 0}
    reason = zone.info()["settings"]["hugepages"]["reason"]
    assert f"needs 8 huge pages of 2M; of {total} in the pool 3 are free" in reason
    assert f"write {total + 5} to /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages" in reason
    assert caplog.messages == [f"zone m: hugepages=on: {reason}"]


@pytest.mark.needs_hugetlb
def test_huge_pages_that_are_there_are_not_told(make: Maker, caplog: pytest.LogCaptureFixture) -> None:
    make.hugepages(HUGE, 8)
    zone = make.open(spec(16 * MIB, hotplug_size=TIB, hugepages=True, hugepage_size=HUGE))
    assert zone.info()["settings"]["hugepages"]["reason"] == ""
    assert caplog.messages == []


@each(ANONYMOUS, MEMFD, SHARED_TMPFS_FILE)
def test_boot_memory_that_the_host_can_not_prefault_names_the_option(
    make: Maker, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headroom, "memory_limits", lambda _node: iter([Limit("the host", MIB, GIB, "free some")]))
    ready = make.spec(kind, size=4 * MIB, prefault=True)
    assert str(refused(ready, HostError, "the host has 1M left of 1G; free some")).startswith("prefault=on: needs ")


def test_boot_memory_that_a_file_system_can_not_prefault_names_the_option(make: Maker) -> None:
    directory = make.mount("tmpfs", "size=4M")
    words = ("prefault=on: needs 8M", "has 4M left of 4M")
    refused(spec(8 * MIB, file=directory, shared=True, prefault=True), HostError, *words)


@pytest.mark.parametrize("size", [4 * KIB, 4 * MIB, 128 * MIB, 64 * GIB])
def test_a_page_size_that_the_kernel_does_not_have_is_told_with_those_that_it_has(size: int) -> None:
    assert size not in facts.hugepage_sizes()
    error = refused(spec(64 * GIB, hugepages=True, hugepage_size=ByteCount(size)), HostError, "the kernel's huge pages")
    assert error.field == "hugepage_size"
    assert "2M" in error.limit


def test_a_page_size_needs_huge_pages() -> None:
    refused(spec(hugepage_size=HUGE), UsageError, "hugepage_size=2M: needs huge pages; add hugepages=on")


def test_huge_pages_without_a_size_have_the_default_one() -> None:
    size = facts.default_hugepage_size()
    with Zone(spec(hotplug_size=2 * size, size=0, hugepages=True)) as zone:
        assert zone.page_size == size


def test_a_kernel_without_huge_pages_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "meminfo", lambda _root: {})
    refused(spec(hugepages=True), HostError, "this kernel has no huge pages", "use hugepages=off")


@pytest.mark.long
def test_huge_pages_of_a_gibibyte(make: Maker) -> None:
    make.hugepages(GIB, 1)
    options = {"hugepages": True, "hugepage_size": ByteCount(GIB), "prefault": True}
    zone = make.open(spec(GIB, **options))
    assert zone.page_size == GIB
    assert part(zone.boot).held() == GIB
    assert part(zone.boot).address % GIB == 0


# hugetlbfs


@pytest.fixture
def hugetlbfs(make: Maker) -> Path:
    directory = make.mount("hugetlbfs", "pagesize=2M")
    make.hugepages(HUGE, 4)
    return directory


@pytest.mark.needs_hugetlb
@pytest.mark.parametrize("options", [{"shared": True}, {"hugepages": True}, {"hugepages": True, "hugepage_size": HUGE}])
def test_a_directory_on_a_hugetlbfs_gives_huge_pages(make: Maker, hugetlbfs: Path, options: dict[str, Any]) -> None:
    zone = make.open(spec(4 * MIB, hotplug_size=4 * MIB, file=hugetlbfs, prefault=True, **options))
    assert (zone.kind, zone.page_size, zone.shared) == ("hugetlb", HUGE, True)
    assert zone.info()["held"] == {"boot": 4 * MIB, "hotplug": 0}
    assert list(hugetlbfs.iterdir()) == []


@pytest.mark.needs_hugetlb
@pytest.mark.needs_userfaultfd
@pytest.mark.parametrize("options", [{"shared": True}, {"hugepages": True}])
def test_a_hotplug_region_beside_a_file_on_a_hugetlbfs_has_pages_of_that_size(
    make: Maker, hugetlbfs: Path, options: dict[str, Any]
) -> None:
    file = hugetlbfs / "boot"
    file.touch()
    os.truncate(file, 4 * MIB)
    zone = make.open(spec(4 * MIB, hotplug_size=4 * MIB, file=file, **options))
    boot, hotplug = part(zone.boot), part(zone.hotplug)
    assert {memory.backing.kind for memory in (boot, hotplug)} == {"hugetlb"}
    assert (boot.page_size, hotplug.page_size) == (HUGE, HUGE)
    boot.populate(HostOffset(0), HUGE)
    hotplug.populate(HostOffset(2 * MIB), HUGE)
    assert zone.info()["held"] == {"boot": HUGE, "hotplug": HUGE}
    assert file.stat().st_blocks * 512 == HUGE
    assert hotplug.discard_verified(HostOffset(2 * MIB), HUGE) == 0
    assert file.stat().st_blocks * 512 == HUGE


@pytest.mark.needs_hugetlb
def test_a_hugetlbfs_is_shared_and_has_pages_of_its_own_size(hugetlbfs: Path) -> None:
    refused(spec(file=hugetlbfs), UsageError, "shared=off", "huge pages are always shared", "use shared=on")
    other = {"hugepages": True, "hugepage_size": ByteCount(GIB)}
    refused(spec(GIB, file=hugetlbfs, **other), UsageError, "hugepage_size=1G", "have 2M", "leave it out")
    refused(spec(5 * MIB, file=hugetlbfs, shared=True), UsageError, "size=5M", "use 4M or 6M")


def test_huge_pages_on_a_file_system_that_has_none(make: Maker) -> None:
    words = ("hugepages=on", f"file={make.disk} is on", "which has no huge pages")
    refused(spec(file=make.disk, hugepages=True), UsageError, *words)


# failures half way


CALLS = ["Mapped", "mbind", "madvise"]


@each(*KINDS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("nth", [1, 2])
def test_a_system_call_that_fails_half_way_leaves_nothing_behind(
    make: Maker, kind: Kind, call: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk = kind.shared and kind.place.startswith("disk")
    ready = make.spec(kind, size=4 * MIB, hotplug_size=4 * MIB, host_numa_node=None if on_disk else 0, prefault=True)
    real, left = getattr(_native, call), [nth]

    def failing(*arguments: Any) -> object:
        left[0] -= 1
        if not left[0]:
            raise _native.MapError(-errno.ENOMEM, _native.MAP)
        return real(*arguments)

    monkeypatch.setattr(_native, call, failing)
    if failures_expected(kind, call, on_disk) >= nth:
        refused(ready, HostError, "ENOMEM")
    else:
        make.open(ready)


def failures_expected(kind: Kind, call: str, on_disk: bool) -> int:
    """How often making a zone of two parts, the first of them prefaulted, makes a call."""
    if call == "mbind":
        return 0 if on_disk else 2
    if call == "Mapped":
        return 2
    # Advice for each part where the kind can have transparent huge pages, and the populating of the first.
    with_thp = ["anonymous", *(["memfd"] if facts.shmem_thp_mode() not in ("never", "deny") else [])]
    return 1 + (kind.kind in with_thp) + (kind.hotplug_kind in with_thp)


@each(*(kind for kind in KINDS if kind.place.endswith("directory") and kind.kind != "anonymous"))
def test_a_second_file_that_can_not_be_made_closes_the_first(
    make: Maker, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.unnamed_file
    made: list[int] = []

    def once(directory: Path, size: ByteCount) -> int:
        if made:
            raise HostError("file", directory, "disk full")
        made.append(real(directory, size))
        return made[0]

    monkeypatch.setattr(files, "unnamed_file", once)
    refused(make.spec(kind, size=4 * MIB, hotplug_size=4 * MIB), HostError, "disk full")


def test_a_failed_seal_closes_the_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    refused(spec(shared=True), HostError, "fcntl(F_ADD_SEALS) failed: EPERM")


def test_a_reservation_of_more_than_the_host_has_is_told() -> None:
    error = refused(spec(64 * TIB, reserve=True), HostError, "mmap failed: ENOMEM", "use reserve=off")
    assert isinstance(error, HostError)
    assert error.errno == errno.ENOMEM


@pytest.mark.parametrize("call", ["fstat", "fstatvfs"])
def test_a_file_whose_server_has_forgotten_it(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS says of one that was removed elsewhere."""

    def forgotten(_: int) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, forgotten)
        with pytest.raises(HostError) as refusal:
            files.examine(tmp_path)
    assert f"{refusal.value}".startswith(f"file={tmp_path}: stat failed: ESTALE")
