"""What may be populated: read from trees made up for the purpose, and from real cgroups that would really kill."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.zones.helpers import (
    ANONYMOUS,
    HUGE,
    MEMFD,
    PRIVATE_FILE,
    PRIVATE_TMPFS_DIRECTORY,
    PRIVATE_TMPFS_FILE,
    Kind,
    Maker,
    each,
    in_child,
    part,
    st_blocks_bytes,
)
from vhost_user.errors import HostError
from vhost_user.units import GIB, KIB, MIB, ByteCount, HostOffset
from virtio_mem.hostmem import headroom
from virtio_mem.hostmem.headroom import Limit
from virtio_mem.zone import ZoneSpec

UNLIMITED_V1 = 2**63 - 4096
"""What version 1 says where there is no limit: the largest number of whole pages."""

MOUNTS = """\
22 1 0:20 / /sys rw - sysfs sysfs rw
30 22 0:26 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct
31 22 0:27 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
32 22 0:28 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
"""


class Tree:
    """A machine's /proc and /sys, made up."""

    def __init__(self, root: Path, groups: str, mounts: str = MOUNTS) -> None:
        self.root = root
        self.write("proc/self/cgroup", groups)
        self.write("proc/self/mountinfo", mounts)
        self.write("proc/meminfo", "MemTotal: 8192 kB\nMemFree: 1 kB\nMemAvailable: 4096 kB\nHugepagesize: 2048 kB\n")

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.fsencode(f"{text}\n" if not str(text).endswith("\n") else str(text)))

    def v1(self, group: str, limit: int, usage: int, inactive: int = 0, active: int = 0) -> None:
        top = f"sys/fs/cgroup/memory/{group}"
        self.write(f"{top}/memory.limit_in_bytes", limit)
        self.write(f"{top}/memory.usage_in_bytes", usage)
        below = f"total_inactive_anon 3\ntotal_inactive_file {inactive}\ntotal_active_file {active}\n"
        self.write(f"{top}/memory.stat", f"inactive_file 1000\nactive_file 1000\n{below}")

    def v2(self, group: str, limit: object, usage: int, inactive: int = 0, active: int = 0) -> None:
        top = f"sys/fs/cgroup/unified/{group}"
        self.write(f"{top}/memory.max", limit)
        self.write(f"{top}/memory.current", usage)
        self.write(f"{top}/memory.stat", f"anon 9\ninactive_file {inactive}\nactive_file {active}\n")

    def limits(self, node: int | None = None) -> dict[str, int]:
        """What is left, by what limits it."""
        found = headroom.memory_limits(node, self.root)
        return {limit.what.replace(str(self.root), ""): limit.available for limit in found}


HOST = {"the host (MemAvailable)": 4 * MIB}


def test_version_1_counts_every_group_up_to_the_top(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "5:cpu,cpuacct:/\n4:memory:/vm/one\n0::/\n")
    tree.v1("vm/one", 1000, 400, inactive=50)
    tree.v1("vm", 700, 650, active=4)
    tree.v1("", UNLIMITED_V1, 9)
    assert tree.limits() == {
        **HOST,
        "/sys/fs/cgroup/memory/vm/one/memory.limit_in_bytes": 650,
        "/sys/fs/cgroup/memory/vm/memory.limit_in_bytes": 52,
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1 - 9,
    }


def test_version_2_counts_every_group_that_has_a_limit(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "0::/machine.slice/vm.scope\n")
    tree.v2("machine.slice/vm.scope", "max", 10)
    tree.v2("machine.slice", 5000, 4000, inactive=100, active=21)
    assert tree.limits() == {**HOST, "/sys/fs/cgroup/unified/machine.slice/memory.max": 1110}


@pytest.mark.parametrize("name", ["odd\udce9\x0c\x85.scope", "a blank ", "no break\xa0"])
def test_a_group_may_have_any_name(name: str, tmp_path: Path) -> None:
    tree = Tree(tmp_path, f"0::/{name}\n")
    tree.v2(name, 5000, 4000)
    assert tree.limits() == {**HOST, f"/sys/fs/cgroup/unified/{name}/memory.max": 1000}


def test_a_group_over_its_limit_has_less_than_nothing_left(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "0::/vm\n")
    tree.v2("vm", 100, 300)
    with pytest.raises(HostError, match=r"memory.max has 0 left of 100; raise memory.max there"):
        headroom.require(1, headroom.memory_limits(None, tmp_path), "memory")


def test_both_versions_count_where_both_are_mounted(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "4:memory:/a\n0::/b\n")
    tree.v1("a", 100, 1)
    tree.v2("b", 200, 2)
    assert sorted(tree.limits().values()) == [99, 198, 4 * MIB]


def test_a_group_that_is_mounted_in_part_is_found_from_the_top_of_that_part(tmp_path: Path) -> None:
    mounts = "31 22 0:27 /docker/abc /sys/fs/cgroup/memory ro,relatime - cgroup cgroup rw,memory\n"
    tree = Tree(tmp_path, "4:memory:/docker/abc/inner\n", mounts)
    tree.v1("inner", 100, 1)
    tree.v1("", 200, 2)
    assert sorted(tree.limits().values()) == [99, 198, 4 * MIB]


@pytest.mark.parametrize("path", ["/docker/other", "/../..", "/"])
def test_a_group_outside_of_the_mount_leaves_the_top_of_the_mount(tmp_path: Path, path: str) -> None:
    mounts = "31 22 0:27 /docker/abc /sys/fs/cgroup/memory ro,relatime - cgroup cgroup rw,memory\n"
    tree = Tree(tmp_path, f"4:memory:{path}\n", mounts)
    tree.v1("", 200, 2)
    assert tree.limits() == {**HOST, "/sys/fs/cgroup/memory/memory.limit_in_bytes": 198}


def test_a_group_with_a_colon_and_a_mount_with_a_blank_are_found(tmp_path: Path) -> None:
    mounts = "32 22 0:28 / /sys/fs/cgroup/uni\\040fied rw - cgroup2  rw\n"
    tree = Tree(tmp_path, "0::/vm:1\n", mounts)
    tree.write("sys/fs/cgroup/uni fied/vm:1/memory.max", 30)
    tree.write("sys/fs/cgroup/uni fied/vm:1/memory.current", 10)
    assert tree.limits() == {**HOST, "/sys/fs/cgroup/uni fied/vm:1/memory.max": 20}


def test_without_cgroups_the_host_is_the_limit(tmp_path: Path) -> None:
    assert Tree(tmp_path, "").limits() == HOST


def test_a_node_has_what_is_free_and_what_is_cache(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "")
    text = "Node 1 MemTotal: 900 kB\nNode 1 MemFree: 100 kB\nNode 1 Active(file): 50 kB\nNode 1 Inactive(file): 20 kB\n"
    tree.write("sys/devices/system/node/node1/meminfo", text)
    assert tree.limits(node=1) == {**HOST, "NUMA node 1": 120 * KIB}


@pytest.mark.parametrize("node", [None, 1])
def test_a_host_that_does_not_tell_is_an_error(tmp_path: Path, node: int | None) -> None:
    tree = Tree(tmp_path, "")
    if node is None:
        tree.write("proc/meminfo", "MemTotal: 8192 kB\n")
    with pytest.raises(HostError, match=r"doesn't tell; mount /proc and /sys"):
        tree.limits(node)


@pytest.mark.parametrize(
    ("page_size", "name"),
    [(64 * KIB, "64KB"), (HUGE, "2MB"), (32 * MIB, "32MB"), (GIB, "1GB"), (16 * GIB, "16GB")],
)
def test_the_hugetlb_cgroup_limits_each_page_size_by_itself(tmp_path: Path, page_size: int, name: str) -> None:
    tree = Tree(tmp_path, "0::/vm\n")
    tree.write(f"sys/fs/cgroup/unified/vm/hugetlb.{name}.max", 10 * page_size)
    tree.write(f"sys/fs/cgroup/unified/vm/hugetlb.{name}.current", 4 * page_size)
    (limit,) = headroom.huge_limits(ByteCount(page_size), tmp_path)
    assert (limit.available, limit.total) == (6 * page_size, 10 * page_size)


def test_the_hugetlb_cgroup_of_version_1(tmp_path: Path) -> None:
    mounts = "33 22 0:29 / /sys/fs/cgroup/hugetlb rw - cgroup cgroup rw,hugetlb\n"
    tree = Tree(tmp_path, "3:hugetlb:/vm\n", mounts)
    tree.write("sys/fs/cgroup/hugetlb/vm/hugetlb.2MB.limit_in_bytes", 8 * MIB)
    tree.write("sys/fs/cgroup/hugetlb/vm/hugetlb.2MB.usage_in_bytes", 6 * MIB)
    pool(tree, free=9)
    headroom.require_huge_pages(2 * MIB, HUGE, None, "hugepages", tmp_path)
    with pytest.raises(HostError, match=r"hugepages=4M: needs 4M, but .*hugetlb.2MB.limit_in_bytes has 2M left of 8M"):
        headroom.require_huge_pages(4 * MIB, HUGE, None, "hugepages", tmp_path)


def pool(tree: Tree, *, free: int, reserved: int = 0, node: int | None = None, total: int = 20) -> None:
    top = "sys/kernel/mm/hugepages" if node is None else f"sys/devices/system/node/node{node}/hugepages"
    counters = {"nr_hugepages": total, "free_hugepages": free, "surplus_hugepages": 0}
    if node is None:
        counters |= {"resv_hugepages": reserved, "nr_overcommit_hugepages": 0}
    for name, value in counters.items():
        tree.write(f"{top}/hugepages-2048kB/{name}", value)


def test_pages_on_a_node_are_needed_on_the_host_and_on_that_node(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "")
    pool(tree, free=10, reserved=4)
    pool(tree, free=5, node=0)
    pool(tree, free=1, node=1, total=3)
    headroom.require_huge_pages(5 * HUGE, HUGE, 0, "hugepages", tmp_path)
    with pytest.raises(HostError) as refused:
        headroom.require_huge_pages(2 * HUGE, HUGE, 1, "hugepages", tmp_path)
    assert "needs 2 huge pages of 2M; of 3 in the pool 1 are free" in str(refused.value)
    assert "on node 1" in str(refused.value)
    assert "write 4 to /sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages" in str(refused.value)
    with pytest.raises(HostError, match=r"needs 7 .* 10 are free and 4 of those are reserved"):
        headroom.require_huge_pages(7 * HUGE, HUGE, None, "hugepages", tmp_path)


def test_the_first_limit_that_is_short_is_named_with_all_numbers() -> None:
    limits = [Limit("enough", 10 * GIB, 10 * GIB, "no"), Limit("short", 3 * MIB, GIB, "make it longer")]
    with pytest.raises(HostError) as refused:
        headroom.require(4 * MIB, iter(limits), "memory")
    assert str(refused.value) == "memory=4M: needs 4M, but short has 3M left of 1G; make it longer"
    headroom.require(3 * MIB, iter(limits), "memory")


def test_the_margin_covers_page_tables() -> None:
    assert headroom.margin(0) == 32 * MIB
    assert headroom.margin(GIB) - headroom.margin(0) == GIB // 4096 * 8


# Real cgroups

LIMIT = 160 * MIB
FITS = ByteCount(32 * MIB)
TOO_MUCH = ByteCount(192 * MIB)


def tops() -> Iterator[Path]:
    """Where cgroups that limit memory can be made, of either version, as high up as is mounted."""
    seen = list(headroom.cgroups("memory"))
    for group in seen:
        control = group / "cgroup.subtree_control"
        version_2 = control.exists() and "memory" in control.read_text().split()
        if group.parent not in seen and (version_2 or (group / "memory.limit_in_bytes").exists()):
            yield group


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A memory cgroup without a limit, below one of LIMIT bytes; empty, to be joined by children."""
    top = next(tops(), None)
    if top is None:
        pytest.skip("needs_cgroup: no memory cgroups are mounted, or none may be made")
    outer = top / f"virtio-mem-test-{os.getpid()}"
    inner = outer / "inner"
    with ExitStack() as undo:
        try:
            for group in (outer, inner):
                group.mkdir()
                undo.callback(group.rmdir)
        except OSError as error:
            pytest.skip(f"needs_cgroup: {error}")
        the_one_of(outer, "memory.max", "memory.limit_in_bytes").write_text(str(LIMIT))
        yield inner


def the_one_of(group: Path, *names: str) -> Path:
    """The file that this version of cgroups has."""
    return next(group / name for name in names if (group / name).exists())


def join(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


@each(ANONYMOUS, MEMFD)
def test_a_limit_of_a_cgroup_above_is_seen_before_it_kills(make: Maker, kind: Kind, limited_group: Path) -> None:
    memory = make.memory(kind, 256 * MIB)

    def in_the_group() -> None:
        join(limited_group)
        memory.populate(HostOffset(0), FITS)
        with pytest.raises(HostError) as refused:
            memory.populate(HostOffset(0), TOO_MUCH)
        assert str(limited_group.parent) in str(refused.value)
        assert "left of 160M" in str(refused.value)
        assert memory.held() == FITS

    assert in_child(in_the_group) == 0


@each(PRIVATE_FILE, PRIVATE_TMPFS_DIRECTORY, PRIVATE_TMPFS_FILE)
def test_private_memory_of_a_file_is_seen_before_it_kills(make: Maker, kind: Kind, limited_group: Path) -> None:
    memory = part(make.zone(kind, size=256 * MIB).boot)

    def in_the_group() -> None:
        join(limited_group)
        memory.populate(HostOffset(0), FITS)
        # As much again as fits a group that has nothing else to pay, and twice that where the file's holes fill too.
        more = ByteCount(80 * MIB)
        if kind is PRIVATE_TMPFS_FILE:
            assert st_blocks_bytes(memory) == FITS
            with pytest.raises(HostError, match=r"left of 160M"):
                memory.populate(HostOffset(0), more)
        else:
            memory.populate(HostOffset(0), more)
        held = memory.held()
        with pytest.raises(HostError, match=r"left of 160M"):
            memory.populate(HostOffset(0), TOO_MUCH)
        assert memory.held() == held

    assert in_child(in_the_group) == 0


def test_a_sparse_private_file_needs_room_on_its_tmpfs(make: Maker) -> None:
    file = make.mount("tmpfs", "size=4M") / "file"
    file.touch()
    os.truncate(file, 8 * MIB)
    memory = part(make.open(ZoneSpec("m", ByteCount(8 * MIB), file=file)).boot)
    with pytest.raises(HostError, match="needs 8M, but the file system of the zone's file has 4M left of 4M"):
        memory.populate(HostOffset(0), memory.size)
    assert memory.held() == file.stat().st_blocks == 0


def test_without_the_look_at_the_headroom_the_kernel_kills(
    make: Maker, limited_group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = make.memory(MEMFD, 256 * MIB)
    monkeypatch.setattr(headroom, "require", lambda *_: None)

    def in_the_group() -> None:
        join(limited_group)
        memory.populate(HostOffset(0), TOO_MUCH)

    assert in_child(in_the_group) == -signal.SIGKILL


def test_page_cache_that_can_go_does_not_count_against_a_cgroup(make: Maker, limited_group: Path) -> None:
    memory = make.memory(MEMFD, 256 * MIB)
    file = make.disk / "cache"
    with file.open("wb") as cache:
        cache.write(bytes(96 * MIB))
        cache.flush()
        os.fsync(cache.fileno())
        os.posix_fadvise(cache.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def in_the_group() -> None:
        join(limited_group)
        before = left_in(limited_group.parent)
        with file.open("rb") as cache:
            # Read ahead, so that no page is used twice and becomes active.
            for offset in range(0, 96 * MIB, 64 * KIB):
                os.posix_fadvise(cache.fileno(), offset, 64 * KIB, os.POSIX_FADV_WILLNEED)
        usage = the_one_of(limited_group.parent, "memory.current", "memory.usage_in_bytes")
        assert int(usage.read_text()) > 80 * MIB
        assert left_in(limited_group.parent) > before - 16 * MIB
        memory.populate(HostOffset(0), ByteCount(80 * MIB))

    assert in_child(in_the_group) == 0


def left_in(group: Path) -> int:
    return next(limit.available for limit in headroom.memory_limits() if limit.what.startswith(f"{group}/memory."))
