"""Every option on every backing: what the kernel really does, and whether the zone says so."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import host
from tests.zones.helpers import (
    ANONYMOUS,
    HUGE,
    HUGETLB,
    KINDS,
    MEMFD,
    PRIVATE_DIRECTORY,
    PRIVATE_FILE,
    PRIVATE_TMPFS_DIRECTORY,
    PRIVATE_TMPFS_FILE,
    SHARED_DIRECTORY,
    SHARED_FILE,
    Kind,
    Maker,
    each,
    fill,
    free_pages,
    numa_policy,
    part,
    smaps,
    vm_flags,
)
from vhost_user import _native
from vhost_user.errors import HostError, UsageError
from vhost_user.units import GIB, KIB, MIB, ByteCount, HostOffset
from virtio_mem.hostmem import facts
from virtio_mem.hostmem.settings import Setting
from virtio_mem.zone import Zone, ZoneSpec

MERGEABLE = (ANONYMOUS, PRIVATE_FILE, PRIVATE_DIRECTORY, PRIVATE_TMPFS_FILE, PRIVATE_TMPFS_DIRECTORY)
SHARED_ON_DISK = (SHARED_FILE, SHARED_DIRECTORY)
BINDABLE = tuple(kind for kind in KINDS if kind not in SHARED_ON_DISK)
RESERVABLE = (*MERGEABLE, HUGETLB)
SIZE = 4 * MIB
BOOT_ONLY = "memory that is not plugged yet is not paid for; only boot memory is reserved"
KSM_PASSES = 3
"""The pass that is under way when pages are written may have been over some of them; two whole ones merge all."""


def setting(zone: Zone, name: str) -> Setting:
    return next(setting for setting in zone.settings if setting.name == name)


def other_than(kinds: tuple[Kind, ...]) -> list[Kind]:
    return [kind for kind in KINDS if kind not in kinds]


# prefault


@each(*KINDS)
def test_prefault_fills_boot_memory_and_leaves_the_hotplug_region_empty(make: Maker, kind: Kind) -> None:
    zone = make.zone(kind, size=SIZE, hotplug_size=SIZE, prefault=True)
    boot, hotplug = part(zone.boot), part(zone.hotplug)
    counters = smaps(boot.address)
    assert counters["Rss"] + counters["Shared_Hugetlb"] + counters["Private_Hugetlb"] == SIZE
    assert boot.held() == SIZE
    assert hotplug.held() == 0


@each(*KINDS)
def test_without_prefault_nothing_is_filled(make: Maker, kind: Kind) -> None:
    zone = make.zone(kind, size=SIZE)
    boot = part(zone.boot)
    assert smaps(boot.address)["Rss"] == boot.held() == 0


# reserve


@each(*MERGEABLE)
def test_reserved_private_memory_is_accounted_for_in_the_boot_part_only(make: Maker, kind: Kind) -> None:
    zone = make.zone(kind, size=SIZE, hotplug_size=SIZE, reserve=True)
    boot, hotplug = (vm_flags(part(memory).address) for memory in (zone.boot, zone.hotplug))
    assert "ac" in boot
    assert "nr" not in boot
    assert "ac" not in hotplug
    assert "nr" in hotplug
    assert setting(zone, "reserve") == ("reserve", True, True, f"not for the hotplug region: {BOOT_ONLY}")
    boot_alone = make.zone(kind, size=SIZE, reserve=True)
    assert setting(boot_alone, "reserve") == ("reserve", True, True, "")


@each(*RESERVABLE)
def test_a_hotplug_region_that_is_not_reserved_is_warned_of(
    make: Maker, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    spec = make.spec(kind, size=SIZE, hotplug_size=SIZE, reserve=True, explicit=frozenset({"reserve"}))
    make.open(spec)
    assert warnings(caplog) == [f"zone m: reserve=on: not for the hotplug region: {BOOT_ONLY}"]


@each(*RESERVABLE)
def test_reserve_without_boot_memory_has_no_effect_and_says_so(
    make: Maker, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    zone = make.zone(kind, hotplug_size=SIZE, reserve=True, explicit=frozenset({"reserve"}))
    assert "nr" in vm_flags(part(zone.hotplug).address)
    assert setting(zone, "reserve") == ("reserve", True, False, BOOT_ONLY)
    assert zone.info()["settings"]["reserve"] == {"requested": True, "effective": False, "reason": BOOT_ONLY}
    assert warnings(caplog) == [f"zone m: reserve=on has no effect: {BOOT_ONLY}"]


@pytest.mark.needs_hugetlb
def test_reserved_huge_pages_are_promised_to_the_boot_part_only(make: Maker) -> None:
    spec = make.spec(HUGETLB, size=SIZE, hotplug_size=SIZE, reserve=True)
    pool = host.HugePagePool(HUGE)
    before = pool.counter("resv_hugepages")
    zone = make.open(spec)
    assert pool.counter("resv_hugepages") - before == SIZE // HUGE
    assert setting(zone, "reserve").effective is True
    part(zone.boot).populate(HostOffset(0), ByteCount(SIZE))
    assert pool.counter("resv_hugepages") == before
    zone.close()
    assert free_pages(pool, 2 * SIZE // HUGE) == 2 * SIZE // HUGE


@pytest.mark.needs_hugetlb
def test_unreserved_huge_pages_are_promised_to_nobody(make: Maker) -> None:
    spec = make.spec(HUGETLB, size=SIZE, hotplug_size=SIZE)
    before = host.HugePagePool(HUGE).counter("resv_hugepages")
    make.open(spec)
    assert host.HugePagePool(HUGE).counter("resv_hugepages") == before


@pytest.mark.needs_hugetlb
def test_a_reserved_boot_part_is_populated_from_its_own_reservation(make: Maker) -> None:
    zone = make.zone(HUGETLB, size=SIZE, reserve=True)
    assert host.HugePagePool(HUGE).free == 0
    assert part(zone.boot).shortage(HostOffset(0), ByteCount(SIZE)) is None
    part(zone.boot).populate(HostOffset(0), ByteCount(SIZE))
    assert part(zone.boot).held() == SIZE


@each(*other_than(RESERVABLE))
def test_reserve_on_shared_memory_has_no_effect_and_says_so(
    make: Maker, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    zone = make.zone(kind, size=SIZE, reserve=True, explicit=frozenset({"reserve"}))
    assert "nr" in vm_flags(part(zone.boot).address)
    assert setting(zone, "reserve").effective is False
    assert warnings(caplog) == ["zone m: reserve=on has no effect: " + setting(zone, "reserve").reason]


# mergeable


@pytest.mark.needs_ksm
@each(*MERGEABLE)
def test_equal_pages_of_mergeable_memory_become_one(make: Maker, kind: Kind, ksm: host.Ksm) -> None:
    zone = make.zone(kind, size=SIZE, mergeable=True, thp=False)
    boot = part(zone.boot)
    assert "mg" in vm_flags(boot.address)
    assert setting(zone, "mergeable") == ("mergeable", True, True, "")
    fill(boot, 0, SIZE, os.urandom(64) * 64)
    ksm.wait_for_full_scans(KSM_PASSES)
    pages = SIZE // (4 * KIB)
    # One page stays as what the others share; for every max_page_sharing others there is one more.
    assert pages - 1 - pages // ksm.counter("max_page_sharing") <= merged_pages() <= pages
    assert smaps(boot.address)["KSM"] >= SIZE - 16 * 4 * KIB


def merged_pages() -> int:
    return int(Path("/proc/self/ksm_merging_pages").read_text())


@pytest.mark.needs_ksm
@each(*MERGEABLE)
def test_pages_of_memory_that_is_not_mergeable_stay_apart(make: Maker, kind: Kind, ksm: host.Ksm) -> None:
    boot = part(make.zone(kind, size=SIZE, thp=False).boot)
    # KSM ends no pass while there is nothing mergeable at all.
    beside = part(make.zone(ANONYMOUS, size=SIZE, thp=False, mergeable=True).boot)
    same = os.urandom(64) * 64
    fill(boot, 0, SIZE, same)
    fill(beside, 0, SIZE, same)
    ksm.wait_for_full_scans(KSM_PASSES)
    assert "mg" not in vm_flags(boot.address)
    assert smaps(boot.address)["KSM"] == 0
    assert smaps(beside.address)["KSM"] > 0


@pytest.mark.needs_ksm
@each(*other_than(MERGEABLE))
def test_mergeable_shared_memory_is_warned_of(
    make: Maker, kind: Kind, ksm: host.Ksm, caplog: pytest.LogCaptureFixture
) -> None:
    zone = make.zone(kind, size=SIZE, mergeable=True, explicit=frozenset({"mergeable"}))
    assert "mg" not in vm_flags(part(zone.boot).address)
    assert setting(zone, "mergeable") == ("mergeable", True, False, "KSM merges private memory only")
    assert warnings(caplog) == ["zone m: mergeable=on has no effect: KSM merges private memory only"]


@pytest.mark.needs_ksm
def test_mergeable_memory_is_marked_while_ksm_is_stopped(make: Maker, caplog: pytest.LogCaptureFixture) -> None:
    with host.changed(host.KSM / "run", 0):
        zone = make.zone(ANONYMOUS, size=SIZE, mergeable=True, explicit=frozenset({"mergeable"}))
        assert "mg" in vm_flags(part(zone.boot).address)
        assert setting(zone, "mergeable").effective is False
        reason = "/sys/kernel/mm/ksm/run is 0: the memory is marked and merges once 1 is written there"
        assert warnings(caplog) == [f"zone m: mergeable=on has no effect: {reason}"]


def test_mergeable_memory_on_a_kernel_without_ksm(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "ksm_mode", str)
    zone = make.zone(ANONYMOUS, size=SIZE, mergeable=True)
    assert setting(zone, "mergeable") == ("mergeable", True, False, "this kernel has no KSM")
    assert "mg" not in vm_flags(part(zone.boot).address)


@pytest.mark.needs_ksm
def test_merged_memory_can_be_discarded(make: Maker, ksm: host.Ksm) -> None:
    memory = make.memory(ANONYMOUS, SIZE, mergeable=True, thp=False)
    fill(memory, 0, SIZE, os.urandom(64) * 64)
    ksm.wait_for_full_scans(KSM_PASSES)
    assert memory.discard_verified(HostOffset(0), ByteCount(SIZE)) == 0
    assert not any(memory.view())


# thp


@pytest.mark.needs_thp
@pytest.mark.parametrize(("thp", "huge"), [(True, SIZE), (False, 0)])
def test_private_anonymous_memory_has_transparent_huge_pages_or_none(make: Maker, thp: bool, huge: int) -> None:
    with host.changed(host.THP / "enabled", "madvise"):
        boot = part(make.zone(ANONYMOUS, size=SIZE, thp=thp, prefault=True).boot)
    assert smaps(boot.address)["AnonHugePages"] == huge
    assert ("hg" in vm_flags(boot.address), "nh" in vm_flags(boot.address)) == (thp, not thp)


@pytest.mark.needs_thp
def test_thp_off_holds_where_the_host_gives_huge_pages_to_all(make: Maker) -> None:
    with host.changed(host.THP / "enabled", "always"):
        boot = part(make.zone(ANONYMOUS, size=SIZE, thp=False, prefault=True).boot)
        other = part(make.zone(ANONYMOUS, size=SIZE, thp=True, prefault=True).boot)
    assert smaps(boot.address)["AnonHugePages"] == 0
    assert smaps(other.address)["AnonHugePages"] == SIZE


@pytest.mark.needs_thp
def test_thp_that_the_host_never_gives_is_reported(make: Maker, caplog: pytest.LogCaptureFixture) -> None:
    with host.changed(host.THP / "enabled", "never"):
        zone = make.zone(ANONYMOUS, size=SIZE, prefault=True, explicit=frozenset({"thp"}))
        assert setting(zone, "thp").effective is False
        assert smaps(part(zone.boot).address)["AnonHugePages"] == 0
    assert warnings(caplog) == ["zone m: thp=on has no effect: /sys/kernel/mm/transparent_hugepage/enabled is never"]


@pytest.mark.needs_thp
@pytest.mark.parametrize("mode", ["advise", "within_size", "always"])
@pytest.mark.parametrize(("thp", "huge"), [(True, SIZE), (False, 0)])
def test_a_memfd_has_transparent_huge_pages_where_the_host_has_them(
    make: Maker, shmem_thp: Callable[[str], None], mode: str, thp: bool, huge: int
) -> None:
    shmem_thp(mode)
    zone = make.zone(MEMFD, size=SIZE, thp=thp, prefault=True)
    assert setting(zone, "thp") == ("thp", thp, thp, "")
    assert smaps(part(zone.boot).address)["ShmemPmdMapped"] == huge
    assert part(zone.boot).discard_verified(HostOffset(0), ByteCount(SIZE)) == 0


@pytest.mark.needs_thp
@pytest.mark.parametrize("mode", ["never", "deny"])
def test_a_memfd_without_transparent_huge_pages_is_reported_and_a_default_is_not_warned_of(
    make: Maker, shmem_thp: Callable[[str], None], mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    shmem_thp(mode)
    zone = make.zone(MEMFD, size=SIZE, prefault=True)
    reason = f"/sys/kernel/mm/transparent_hugepage/shmem_enabled is {mode}"
    assert setting(zone, "thp") == ("thp", True, False, reason)
    assert smaps(part(zone.boot).address)["ShmemPmdMapped"] == 0
    assert warnings(caplog) == []


@pytest.mark.needs_thp
@each(HUGETLB, *(kind for kind in KINDS if kind.place and kind.kind != "anonymous"))
def test_thp_has_no_effect_on_files_and_huge_pages(make: Maker, kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    zone = make.zone(kind, size=SIZE, prefault=True, explicit=frozenset({"thp"}))
    counters = smaps(part(zone.boot).address)
    assert counters["AnonHugePages"] == counters["ShmemPmdMapped"] == counters["FilePmdMapped"] == 0
    assert setting(zone, "thp").effective is False
    assert warnings(caplog) == ["zone m: thp=on has no effect: " + setting(zone, "thp").reason]


@pytest.mark.needs_thp
@pytest.mark.parametrize(("option", "huge"), [("advise", SIZE), ("always", SIZE), ("never", 0)])
def test_a_file_on_a_tmpfs_goes_by_the_mount_option(make: Maker, option: str, huge: int) -> None:
    directory = make.mount("tmpfs", f"size=64M,huge={option}")
    zone = make.open(ZoneSpec("m", ByteCount(SIZE), file=directory, shared=True, prefault=True))
    assert setting(zone, "thp").effective is bool(huge)
    assert smaps(part(zone.boot).address)["ShmemPmdMapped"] == huge


# host_numa_node


@pytest.mark.needs_mbind
@each(*BINDABLE)
def test_memory_lies_on_the_node_that_it_is_bound_to(make: Maker, kind: Kind) -> None:
    node = facts.memory_nodes()[-1]
    zone = make.zone(kind, size=SIZE, hotplug_size=SIZE, host_numa_node=node)
    for memory in (part(zone.boot), part(zone.hotplug)):
        policy, before = numa_policy(memory.address)
        assert policy == f"bind:{node}"
        memory.populate(HostOffset(0), memory.size)
        assert numa_policy(memory.address) == (policy, {node: before.get(node, 0) + SIZE // kind.page_size})
    assert setting(zone, "host_numa_node") == ("host_numa_node", node, node, "")


@pytest.mark.needs_mbind
@pytest.mark.parametrize("node", [0, 63, 64, 127])
def test_the_kernel_reads_every_bit_of_a_mask_of_nodes(make: Maker, node: int) -> None:
    mpol_default = 0
    memory = make.memory(ANONYMOUS, SIZE)
    _native.mbind(memory.address, SIZE, mpol_default, [])
    # The default policy takes no nodes, so a mask that the kernel has read in full is refused.
    with pytest.raises(OSError, match="Invalid argument"):
        _native.mbind(memory.address, SIZE, mpol_default, [node])


@each(*KINDS)
def test_memory_that_is_bound_to_no_node_has_no_policy(make: Maker, kind: Kind) -> None:
    zone = make.zone(kind, size=SIZE)
    assert numa_policy(part(zone.boot).address)[0] == "default"
    assert setting(zone, "host_numa_node").effective is None


@each(*SHARED_ON_DISK)
def test_a_shared_file_on_disk_can_not_be_bound(make: Maker, kind: Kind) -> None:
    with pytest.raises(UsageError, match=r"host_numa_node=0: the page cache of a file on \w+ ignores the policy"):
        make.zone(kind, size=SIZE, host_numa_node=0)


@each(ANONYMOUS, MEMFD, HUGETLB)
@pytest.mark.parametrize("offset", [1, 1000, 2**31])
def test_a_node_that_does_not_exist_is_refused_and_those_that_do_are_named(
    make: Maker, kind: Kind, offset: int
) -> None:
    nodes = facts.online_nodes()
    with pytest.raises(UsageError) as refused:
        make.zone(kind, size=SIZE, host_numa_node=nodes[-1] + offset)
    assert f"no such node: this host has nodes {', '.join(map(str, nodes))}" in str(refused.value)


def test_a_node_without_memory_is_refused(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "memory_nodes", list)
    with pytest.raises(HostError, match="host_numa_node=0: this node has no memory"):
        make.zone(MEMFD, size=SIZE, host_numa_node=0)


def test_a_kernel_without_numa_is_told_from_a_wrong_node(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "online_nodes", list)
    with pytest.raises(UsageError, match="this kernel has no NUMA nodes"):
        make.zone(MEMFD, size=SIZE, host_numa_node=0)


# what is said about all of them


@pytest.mark.needs_hugetlb
def test_shared_off_is_overruled_by_huge_pages_and_warned_of(make: Maker, caplog: pytest.LogCaptureFixture) -> None:
    zone = make.zone(HUGETLB, size=SIZE, shared=False, explicit=frozenset({"shared", "hugepages"}))
    assert setting(zone, "shared") == ("shared", False, True, "huge pages are always shared")
    assert warnings(caplog) == ["zone m: shared=off has no effect: huge pages are always shared"]


def test_a_directory_that_private_memory_has_no_use_for_is_warned_of(
    make: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    zone = make.zone(PRIVATE_TMPFS_DIRECTORY, size=SIZE, explicit=frozenset({"file"}))
    told = setting(zone, "file")
    assert (told.requested, told.effective) == (str(make.tmpfs), None)
    assert warnings(caplog) == [f"zone m: file={make.tmpfs} has no effect: {told.reason}"]


@each(SHARED_FILE, PRIVATE_FILE)
def test_a_file_is_said_to_be_for_boot_memory_only(make: Maker, kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    file = frozenset({"file"})
    both = setting(make.zone(kind, size=SIZE, hotplug_size=SIZE, explicit=file), "file")
    assert both.effective == both.requested
    assert both.reason == f"boot memory only; the hotplug region is {kind.hotplug_kind} memory"
    assert setting(make.zone(kind, size=SIZE, explicit=file), "file").reason == ""
    assert warnings(caplog) == []
    none = setting(make.zone(kind, hotplug_size=SIZE, explicit=file), "file")
    assert none.effective is None
    assert warnings(caplog) == [f"zone m: file={none.requested} has no effect: {none.reason}"]


@pytest.mark.needs_thp
@pytest.mark.parametrize("thp", [True, False])
@each(SHARED_FILE, PRIVATE_FILE)
def test_thp_is_for_the_hotplug_region_beside_a_file(
    make: Maker, kind: Kind, thp: bool, shmem_thp: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    shmem_thp("advise")
    with host.changed(host.THP / "enabled", "madvise"):
        zone = make.zone(kind, size=SIZE, hotplug_size=SIZE, thp=thp, explicit=frozenset({"thp"}))
        part(zone.hotplug).populate(HostOffset(0), ByteCount(SIZE))
    counters = smaps(part(zone.hotplug).address)
    assert counters["AnonHugePages"] + counters["ShmemPmdMapped"] == SIZE * thp
    reason = f"not for boot memory: {part(zone.boot).backing.no_thp}" if thp else ""
    assert setting(zone, "thp") == ("thp", thp, thp, reason)
    assert warnings(caplog) == [f"zone m: thp=on: {reason}"] * thp


def test_an_option_with_its_effect_is_not_warned_of(make: Maker, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"prefault": True, "reserve": True, "mergeable": False, "thp": False}
    make.zone(ANONYMOUS, size=SIZE, explicit=frozenset(options), **options)
    assert warnings(caplog) == []


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        message for name, level, message in caplog.record_tuples if (name, level) == ("virtio_mem", logging.WARNING)
    ]


def test_info_is_plain_data_with_what_was_asked_and_what_came_of_it(make: Maker) -> None:
    node = facts.memory_nodes()[0]
    zone = make.zone(MEMFD, size=SIZE, hotplug_size=GIB, reserve=True, host_numa_node=node)
    part(zone.hotplug).populate(HostOffset(0), ByteCount(2 * MIB))
    info = json.loads(json.dumps(zone.info()))
    settings = info.pop("settings")
    assert info == {
        "id": "m",
        "kind": "memfd",
        "file": None,
        "size": SIZE,
        "hotplug_size": GIB,
        "page_size": 4096,
        "held": {"boot": 0, "hotplug": 2 * MIB},
    }
    assert settings["shared"] == {"requested": True, "effective": True, "reason": ""}
    assert settings["host_numa_node"] == {"requested": node, "effective": node, "reason": ""}
    assert settings["reserve"]["requested"] is True
    assert settings["reserve"]["effective"] is False
    assert set(settings) == {
        *("file", "shared", "hugepages", "hugepage_size", "host_numa_node", "prefault", "reserve", "mergeable", "thp")
    }


@pytest.mark.needs_hugetlb
def test_info_names_the_file_and_the_size_of_huge_pages(make: Maker) -> None:
    info = make.zone(HUGETLB, size=SIZE).info()
    assert info["settings"]["hugepage_size"] == {"requested": HUGE, "effective": HUGE, "reason": ""}
    on_disk = make.zone(SHARED_FILE, size=SIZE)
    assert on_disk.info()["file"] == str(on_disk.spec.file)
