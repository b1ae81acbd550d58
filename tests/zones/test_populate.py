"""Populating: what is there afterwards, and that a host which can't give all of it is left as it was."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests import host
from tests.zones.helpers import (
    ANONYMOUS,
    HUGE,
    HUGETLB,
    KINDS,
    MEMFD,
    PRIVATE_FILE,
    SHARED_DIRECTORY,
    SHARED_FILE,
    SHARED_TMPFS_FILE,
    Kind,
    Maker,
    allocate,
    each,
    fill,
    free_pages,
    no_more_files,
    part,
    smaps,
    st_blocks_bytes,
    touch,
)
from vhost_user import _native
from vhost_user.errors import HostError
from vhost_user.units import GIB, KIB, MIB, TIB, ByteCount, HostOffset
from virtio_mem.hostmem import facts, headroom
from virtio_mem.hostmem.headroom import Limit
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.zone import ZoneSpec

BLOCK = ByteCount(4 * MIB)
ANOTHER = HostOffset(8 * MIB)


def content(memory: HostMemory, offset: int) -> bytes:
    with memory.view(HostOffset(offset), ByteCount(8)) as view:
        return bytes(view)


@each(*KINDS)
def test_populating_allocates_the_range_and_nothing_else(make: Maker, kind: Kind) -> None:
    memory = make.memory(kind, 16 * MIB, thp=False)
    memory.populate(ANOTHER, BLOCK)
    assert memory.held() == memory.held(ANOTHER, BLOCK) == BLOCK
    assert content(memory, ANOTHER) == bytes(8)


@each(*KINDS)
def test_populating_keeps_what_is_there(make: Maker, kind: Kind) -> None:
    memory = make.memory(kind, 16 * MIB)
    fill(memory, 2 * MIB, HUGE)
    memory.populate(HostOffset(0), memory.size)
    memory.populate(HostOffset(0), memory.size)
    assert content(memory, 2 * MIB) == b"virtio-m"
    assert memory.held() == memory.size


@pytest.mark.needs_hugetlb
def test_a_pool_that_runs_short_is_told_with_its_numbers_and_the_way_out(make: Maker) -> None:
    memory = make.memory(HUGETLB, 16 * MIB)
    make.hugepages(HUGE, 3)
    total = host.HugePagePool(HUGE).counter("nr_hugepages")
    with pytest.raises(HostError) as refused:
        memory.populate(HostOffset(0), ByteCount(10 * MIB))
    text = str(refused.value)
    assert f"needs 5 huge pages of 2M; of {total} in the pool 3 are free and 0 of those are reserved" in text
    assert f"write {total + 2} to /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages" in text
    assert memory.held() == 0
    (host.HugePagePool(HUGE).directory / "nr_hugepages").write_text(str(total + 2))
    memory.populate(HostOffset(0), ByteCount(10 * MIB))
    assert memory.held() == 10 * MIB


@pytest.mark.needs_hugetlb
def test_pages_that_others_reserved_are_not_taken_for_free(make: Maker) -> None:
    reserved = make.zone(HUGETLB, size=8 * MIB, reserve=True)
    memory = part(make.open(ZoneSpec("n", ByteCount(8 * MIB), hugepages=True, hugepage_size=HUGE)).boot)
    shortage = memory.shortage(HostOffset(0), ByteCount(2 * MIB))
    assert shortage is not None
    assert "needs 1 huge pages of 2M" in str(shortage)
    assert "4 are free and 4 of those are reserved" in str(shortage)
    with pytest.raises(HostError):
        memory.populate(HostOffset(0), HUGE)
    reserved.close()
    memory.populate(HostOffset(0), HUGE)
    assert memory.held() == HUGE


@pytest.mark.needs_hugetlb
def test_surplus_pages_that_the_host_allows_count_as_available(make: Maker) -> None:
    memory = make.memory(HUGETLB, 8 * MIB)
    pool = make.hugepages(HUGE, 0)
    assert memory.shortage(HostOffset(0), HUGE) is not None
    surplus = pool.counter("surplus_hugepages")
    with host.changed(pool.directory / "nr_overcommit_hugepages", surplus + 2):
        assert memory.shortage(HostOffset(0), ByteCount(4 * MIB)) is None
        assert memory.shortage(HostOffset(0), ByteCount(6 * MIB)) is not None
        memory.populate(HostOffset(0), ByteCount(4 * MIB))
        assert memory.held() == 4 * MIB
        memory.discard(HostOffset(0), ByteCount(4 * MIB))


@pytest.mark.needs_hugetlb
@pytest.mark.needs_mbind
def test_a_node_that_runs_short_is_told_though_the_host_has_pages(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    node = facts.memory_nodes()[0]
    memory = make.memory(HUGETLB, 8 * MIB, host_numa_node=node)
    real = facts.huge_pool

    def nothing_on_the_node(page_size: ByteCount, where: int | None = None, root: Path = facts.ROOT) -> facts.HugePool:
        pool = real(page_size, where, root)
        return pool if where is None else pool._replace(free=0, overcommit=0)

    monkeypatch.setattr(facts, "huge_pool", nothing_on_the_node)
    with pytest.raises(HostError, match=rf"needs 1 huge pages of 2M; .* 0 are free .*on node {node}"):
        memory.populate(HostOffset(0), HUGE)
    assert memory.held() == 0


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Populating doesn't see a shortage coming, as when others take the memory between the look and the taking."""

    def nothing_in_the_way(*_: object) -> None:
        pass

    monkeypatch.setattr(headroom, "require_huge_pages", nothing_in_the_way)
    monkeypatch.setattr(headroom, "require", nothing_in_the_way)


@pytest.fixture
def without_userfaultfd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(_native, "hugetlb_held", refuse)


@pytest.mark.needs_hugetlb
def test_a_short_pool_is_seen_first_where_the_kernel_does_not_tell_what_is_there(
    make: Maker, without_userfaultfd: None
) -> None:
    memory = make.memory(HUGETLB, 16 * MIB)
    pool = make.hugepages(HUGE, 2)
    with pytest.raises(HostError, match=r"populate=6M: needs 3 huge pages of 2M; .* 2 are free") as refused:
        memory.populate(HostOffset(0), ByteCount(6 * MIB))
    assert refused.value.errno == 0
    assert (pool.free, memory.held()) == (2, 0)


def populate_more_than_the_pool_has(make: Maker) -> None:
    """Two pages there, holes between them, two more in the pool where four are needed."""
    memory = make.memory(HUGETLB, 16 * MIB)
    whole = HostOffset(2 * MIB)
    fill(memory, 4 * MIB, HUGE)
    fill(memory, 8 * MIB, HUGE)
    pool = make.hugepages(HUGE, 2)
    with pytest.raises(HostError, match=r"MADV_POPULATE_WRITE failed: EFAULT.*huge pages of 2M.*are free") as refused:
        memory.populate(whole, ByteCount(12 * MIB))
    assert refused.value.errno == errno.EFAULT
    assert free_pages(pool, 2) == 2
    assert st_blocks_bytes(memory) == 4 * MIB
    assert content(memory, 4 * MIB) == content(memory, 8 * MIB) == b"virtio-m"


@pytest.mark.needs_hugetlb
@pytest.mark.needs_userfaultfd
def test_what_was_populated_before_the_pool_ran_dry_goes_back_and_the_rest_stays(make: Maker, blind: None) -> None:
    populate_more_than_the_pool_has(make)


@pytest.mark.needs_hugetlb
def test_the_same_where_the_kernel_does_not_tell_what_is_there(
    make: Maker, blind: None, without_userfaultfd: None
) -> None:
    populate_more_than_the_pool_has(make)


@pytest.mark.needs_hugetlb
def test_populating_works_without_userfaultfd(make: Maker, without_userfaultfd: None) -> None:
    memory = make.memory(HUGETLB, 16 * MIB)
    touch(memory, 0)
    memory.populate(HostOffset(0), BLOCK)
    assert memory.held() == BLOCK
    assert content(memory, 0)[0] == 0x5A


@pytest.mark.needs_hugetlb
def test_without_userfaultfd_the_whole_is_told_and_a_part_is_not(make: Maker, without_userfaultfd: None) -> None:
    zone = make.zone(HUGETLB, size=BLOCK, hotplug_size=16 * MIB)
    memory = part(zone.hotplug)
    touch(memory, 0)
    assert memory.held() == HUGE
    with pytest.raises(HostError, match=r"held=0x0\+0x200000: userfaultfd failed: EPERM.*allow userfaultfd"):
        memory.held(HostOffset(0), HUGE)
    assert zone.info()["held"] == {"boot": 0, "hotplug": HUGE}


@pytest.mark.needs_hugetlb
def test_a_part_of_a_file_that_can_not_be_told_is_none_in_info(make: Maker, without_userfaultfd: None) -> None:
    directory = make.mount("hugetlbfs", "pagesize=2M")
    make.hugepages(HUGE, 4)
    file = directory / "longer"
    file.touch()
    os.truncate(file, 8 * MIB)
    zone = make.open(ZoneSpec("m", ByteCount(4 * MIB), ByteCount(4 * MIB), file=file, shared=True))
    assert zone.info()["held"] == {"boot": None, "hotplug": 0}


def test_a_full_tmpfs_is_seen_before_anything_is_taken(make: Maker) -> None:
    memory = on_small_tmpfs(make)
    with pytest.raises(
        HostError, match=r"populate=8M: needs 8M, but the file system of the zone's file has 4M left of 4M"
    ):
        memory.populate(HostOffset(0), ByteCount(8 * MIB))
    assert memory.held() == 0


def test_a_file_that_has_its_blocks_needs_no_more_room(make: Maker) -> None:
    file = make.mount("tmpfs", "size=8M") / "file"
    file.touch()
    os.truncate(file, 8 * MIB)
    allocate(file)
    memory = part(make.open(ZoneSpec("m", ByteCount(8 * MIB), file=file, shared=True)).boot)
    assert os.statvfs(file).f_bfree == memory.held() == 0
    assert memory.shortage(HostOffset(0), memory.size) is None
    memory.populate(HostOffset(0), memory.size)
    assert memory.held() == memory.size


def test_a_file_that_has_some_of_its_blocks_needs_room_for_the_others(make: Maker) -> None:
    file = make.mount("tmpfs", "size=6M") / "file"
    file.touch()
    os.truncate(file, 4 * MIB)
    allocate(file)
    os.truncate(file, 8 * MIB)
    memory = part(make.open(ZoneSpec("m", ByteCount(8 * MIB), file=file, shared=True)).boot)
    with pytest.raises(HostError, match="needs 4M, but the file system of the zone's file has 2M left of 6M"):
        memory.populate(HostOffset(0), memory.size)
    assert memory.held() == 0


def test_a_tmpfs_that_fills_up_meanwhile_leaves_what_was_there(make: Maker, blind: None) -> None:
    memory = on_small_tmpfs(make)
    fill(memory, 6 * MIB, MIB)
    with pytest.raises(HostError, match=r"MADV_POPULATE_WRITE failed: EFAULT.*; make room there"):
        memory.populate(HostOffset(0), memory.size)
    assert memory.held() == memory.held(HostOffset(6 * MIB), ByteCount(MIB)) == MIB
    assert content(memory, 6 * MIB) == b"virtio-m"


@each(SHARED_FILE, PRIVATE_FILE, SHARED_TMPFS_FILE)
def test_a_file_that_was_truncated_is_told(make: Maker, kind: Kind) -> None:
    memory = make.memory(kind, 8 * MIB)
    with open(f"/proc/self/fd/{memory.backing.fd}", "r+b") as file:
        file.truncate(4 * MIB)
    with pytest.raises(HostError, match=r"MADV_POPULATE_WRITE failed: EFAULT.*; its file is shorter"):
        memory.populate(HostOffset(0), memory.size)


def on_small_tmpfs(make: Maker) -> HostMemory:
    directory = make.mount("tmpfs", "size=4M")
    return part(make.open(ZoneSpec("m", ByteCount(0), ByteCount(8 * MIB), file=directory, shared=True)).hotplug)


@each(ANONYMOUS, MEMFD, SHARED_DIRECTORY)
def test_more_than_the_host_has_is_refused_with_the_numbers(make: Maker, kind: Kind) -> None:
    memory = make.memory(kind, 4 * TIB)
    with pytest.raises(HostError, match=r"needs \S+, but .* has \d+\w? left of \d+\w?"):
        memory.populate(HostOffset(0), memory.size)
    assert memory.held() == 0
    assert memory.shortage(HostOffset(0), memory.size) is not None
    assert memory.shortage(HostOffset(0), BLOCK) is None


def test_a_range_that_is_there_needs_no_headroom(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make.memory(MEMFD, 8 * MIB)
    memory.populate(HostOffset(0), BLOCK)
    monkeypatch.setattr(headroom, "memory_limits", lambda _node: iter([Limit("the host", 0, GIB, "free some")]))
    memory.populate(HostOffset(0), BLOCK)
    with pytest.raises(HostError, match=r"the host has 0 left of 1G; free some"):
        memory.populate(HostOffset(0), memory.size)


def read_all_then_find_no_headroom(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make.memory(ANONYMOUS, 8 * MIB, thp=False)
    with memory.view() as view:
        assert not any(view[:: 4 * KIB])
    monkeypatch.setattr(headroom, "memory_limits", lambda _node: iter([Limit("the host", 8 * MIB, GIB, "free some")]))
    assert memory.shortage(HostOffset(0), memory.size) is not None
    with pytest.raises(HostError, match=r"the host has 8M left of 1G; free some"):
        memory.populate(HostOffset(0), memory.size)
    assert smaps(memory.address)["Anonymous"] == 0


def test_pages_that_were_only_read_need_headroom(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    read_all_then_find_no_headroom(make, monkeypatch)


@pytest.mark.usefixtures("before_pagemap_scan")
def test_so_they_do_where_the_kernel_can_not_tell_them(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    read_all_then_find_no_headroom(make, monkeypatch)


@pytest.mark.usefixtures("before_pagemap_scan")
@each(*(kind for kind in KINDS if not kind.shared))
def test_populating_works_without_a_scan(make: Maker, kind: Kind) -> None:
    test_populating_allocates_the_range_and_nothing_else(make, kind)
    test_populating_keeps_what_is_there(make, kind)


def test_only_what_is_missing_needs_headroom(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make.memory(MEMFD, 8 * MIB)
    touch(memory, 5 * MIB + 4 * KIB)
    missing = 8 * MIB - 4 * KIB
    exactly = missing + headroom.margin(missing)
    monkeypatch.setattr(headroom, "memory_limits", lambda _node: iter([Limit("the host", exactly - 1, GIB, "")]))
    with pytest.raises(HostError):
        memory.populate(HostOffset(0), memory.size)
    monkeypatch.setattr(headroom, "memory_limits", lambda _node: iter([Limit("the host", exactly, GIB, "")]))
    memory.populate(HostOffset(0), memory.size)
    assert memory.held() == memory.size


@each(*(kind for kind in KINDS if kind not in (SHARED_FILE, SHARED_DIRECTORY)))
def test_a_process_that_can_open_no_file_populates_nothing(make: Maker, kind: Kind) -> None:
    memory = make.memory(kind, 16 * MIB)
    touch(memory, 0)
    with no_more_files(), pytest.raises(HostError, match=r"failed: EMFILE"):
        memory.populate(HostOffset(0), ByteCount(8 * MIB))
    assert memory.held() == memory.held(HostOffset(0), HUGE) > 0


def test_a_kernel_that_can_not_populate_is_told(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make.memory(MEMFD, 8 * MIB)

    def old_kernel(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(_native, "madvise", old_kernel)
    with pytest.raises(HostError, match=r"EINVAL.*needs Linux 5\.14"):
        memory.populate(HostOffset(0), BLOCK)


@each(ANONYMOUS, MEMFD)
def test_a_discard_that_the_host_refuses_is_an_error_and_changes_nothing(
    make: Maker, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = make.memory(kind, 8 * MIB)
    fill(memory, 0, BLOCK)

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(_native, "madvise", refuse)
    monkeypatch.setattr(_native, "fallocate", refuse)
    with pytest.raises(HostError, match=r"discard=0x0\+0x400000: giving back memory failed: EPERM"):
        memory.discard(HostOffset(0), BLOCK)
    monkeypatch.undo()
    assert memory.held(HostOffset(0), BLOCK) == BLOCK
    assert content(memory, 0) == b"virtio-m"
