"""What the host has: read from trees made up for the purpose, then from this one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.zones.helpers import effective_user, no_more_files
from vhost_user.errors import HostError
from vhost_user.units import GIB, KIB, MIB, ByteCount
from virtio_mem.hostmem import facts
from virtio_mem.hostmem.facts import HugePool, Mount

HUGE = ByteCount(2 * MIB)


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(os.fsencode(text + "\n"))


@pytest.mark.parametrize(
    ("text", "ids"), [("0", [0]), ("0-2", [0, 1, 2]), ("0-1,5,7-8", [0, 1, 5, 7, 8]), ("", []), ("3,0", [3, 0])]
)
def test_lists_of_ids(text: str, ids: list[int]) -> None:
    assert facts.parse_id_list(text) == ids


def test_nodes_that_are_online_and_nodes_that_have_memory(tmp_path: Path) -> None:
    assert facts.online_nodes(tmp_path) == facts.memory_nodes(tmp_path) == []
    write(tmp_path, "sys/devices/system/node/online", "0-1,4")
    write(tmp_path, "sys/devices/system/node/has_memory", "0,4")
    assert facts.online_nodes(tmp_path) == [0, 1, 4]
    assert facts.memory_nodes(tmp_path) == [0, 4]


def test_what_is_not_there_has_the_default_and_what_can_not_be_read_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "file", "text")
    assert facts.read_or(tmp_path / "file", "default") == "text"
    assert facts.read_or(tmp_path / "nothing", "default") == "default"
    assert facts.read_or(tmp_path / "file" / "below", "default") == "default"
    with pytest.raises(HostError, match=f"host={tmp_path}: read failed: EISDIR"):
        facts.read_or(tmp_path, "default")
    with no_more_files(), pytest.raises(HostError, match=r"read failed: EMFILE .*RLIMIT_NOFILE"):
        facts.read_or(tmp_path / "file", "default")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs_root: only root can become another user")
def test_a_file_that_others_may_not_read_is_an_error(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    write(tmp_path, "secret", "text")
    (tmp_path / "secret").chmod(0)
    try:
        with effective_user(65534), pytest.raises(HostError, match=r"read failed: EACCES .*; give read access"):
            facts.read_or(Path(f"/proc/self/fd/{fd}/secret"), "default")
    finally:
        os.close(fd)


def test_page_sizes_in_order_of_size(tmp_path: Path) -> None:
    assert facts.hugepage_sizes(tmp_path) == []
    for name in ("hugepages-1048576kB", "hugepages-2048kB", "hugepages-64kB"):
        (tmp_path / "sys/kernel/mm/hugepages" / name).mkdir(parents=True)
    assert facts.hugepage_sizes(tmp_path) == [64 * KIB, 2 * MIB, GIB]


def test_the_default_page_size(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no huge pages"):
        facts.default_hugepage_size(tmp_path)
    write(tmp_path, "proc/meminfo", "MemTotal:  1 kB\nHugePages_Free:   3\nHugepagesize:       2048 kB")
    assert facts.default_hugepage_size(tmp_path) == HUGE


@pytest.mark.parametrize(
    ("free", "reserved", "surplus", "overcommit", "available"),
    [(5, 0, 0, 0, 5), (5, 2, 0, 0, 3), (2, 2, 0, 4, 4), (0, 0, 3, 4, 1), (0, 0, 5, 4, 0), (1, 2, 0, 0, 0)],
)
def test_pages_that_can_be_had(free: int, reserved: int, surplus: int, overcommit: int, available: int) -> None:
    assert HugePool(HUGE, 10, free, reserved, surplus, overcommit, "").available == available


@pytest.mark.parametrize("pages", [4, 8, 100])
def test_the_advice_on_a_shortage_is_enough(pages: int) -> None:
    pool = HugePool(HUGE, total=10, free=5, reserved=2, surplus=1, overcommit=0, sysctl="/sys/x")
    _, remedy = pool.shortage(pages)
    grown = int(remedy.split("write ")[1].split(" to ")[0]) - (pool.total - pool.surplus)
    assert pool._replace(total=pool.total + grown, free=pool.free + grown).available == pages


@pytest.mark.parametrize(
    ("general", "own", "mode"),
    [
        ("always [madvise] never", None, "madvise"),
        ("always [madvise] never", "always [inherit] madvise never", "madvise"),
        ("always madvise [never]", "[always] inherit madvise never", "always"),
        ("[always] madvise never", "always inherit madvise [never]", "never"),
        (None, None, "never"),
    ],
)
def test_anonymous_memory_goes_by_the_setting_of_the_page_size(
    tmp_path: Path, general: str | None, own: str | None, mode: str
) -> None:
    thp = "sys/kernel/mm/transparent_hugepage"
    write(tmp_path, f"{thp}/hpage_pmd_size", "2097152")
    if general:
        write(tmp_path, f"{thp}/enabled", general)
    if own:
        write(tmp_path, f"{thp}/hugepages-2048kB/enabled", own)
    assert facts.thp_mode(tmp_path) == mode


@pytest.mark.parametrize("general", ["deny", "force"])
def test_shared_memory_can_be_overruled_for_all_page_sizes(tmp_path: Path, general: str) -> None:
    thp = "sys/kernel/mm/transparent_hugepage"
    write(tmp_path, f"{thp}/hpage_pmd_size", "2097152")
    write(tmp_path, f"{thp}/shmem_enabled", f"always within_size advise never [{general}]")
    write(tmp_path, f"{thp}/hugepages-2048kB/shmem_enabled", "[always] inherit within_size advise never")
    assert facts.shmem_thp_mode(tmp_path) == general


def test_a_kernel_without_ksm_says_nothing(tmp_path: Path) -> None:
    assert facts.ksm_mode(tmp_path) == ""
    write(tmp_path, "sys/kernel/mm/ksm/run", "1")
    assert facts.ksm_mode(tmp_path) == "1"


def test_mounts_with_all_that_a_line_may_have(tmp_path: Path) -> None:
    lines = (
        r"36 35 98:0 /a\040b /mnt\134x rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue",
        r"40 1 0:5 / / rw - tmpfs  rw,size=4k",
        "41 1 0:6 / /media/caf\udce9\x0c\r\x85 rw - vfat /dev/sdb1 rw",  # no UTF-8, and what may end lines elsewhere
    )
    write(tmp_path, "proc/self/mountinfo", "\n".join(lines))
    assert list(facts.mounts(tmp_path)) == [
        Mount(36, "/a b", "/mnt\\x", "ext3", ("rw", "errors=continue")),
        Mount(40, "/", "/", "tmpfs", ("rw", "size=4k")),
        Mount(41, "/", "/media/caf\udce9\x0c\r\x85", "vfat", ("rw",)),
    ]


def test_the_mount_of_a_file_and_of_none() -> None:
    with open("/proc/self/status") as status:
        mount = facts.mount_of(status.fileno())
    assert mount is not None
    assert (mount.fstype, mount.point) == ("proc", "/proc")
    fd = os.memfd_create("nowhere")
    try:
        assert facts.mount_of(fd) is None
    finally:
        os.close(fd)


def test_this_host_has_what_it_says() -> None:
    info = facts.meminfo()
    assert 0 < info["MemAvailable"] <= info["MemTotal"]
    for node in facts.memory_nodes():
        assert node in facts.online_nodes()
        assert 0 < facts.node_meminfo(node)["MemFree"] <= facts.node_meminfo(node)["MemTotal"]
    for size in facts.hugepage_sizes():
        pool = facts.huge_pool(size)
        assert Path(pool.sysctl).exists()
        assert pool.free <= pool.total
        assert sum(facts.huge_pool(size, node).total for node in facts.memory_nodes()) == pool.total
