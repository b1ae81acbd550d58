"""The helpers that change the kernel's settings, on the real kernel."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from tests import host
from tests.host import HugePagePool, Ksm
from tests.skips import ROOT_CAN_ARRANGE
from vhost_user.units import MIB

# <linux/mman.h>
MAP_HUGETLB = 0x40000


def test_setting_reads_the_chosen_word(tmp_path: Path) -> None:
    (tmp_path / "choice").write_text("always [madvise] never\n")
    (tmp_path / "number").write_text("100\n")
    assert host.setting(tmp_path / "choice") == "madvise"
    assert host.setting(tmp_path / "number") == "100"


def test_changed_puts_back_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("100")
    with pytest.raises(AssertionError, match="seen: 200"), host.changed(tmp_path / "number", 200):
        raise AssertionError(f"seen: {host.setting(tmp_path / 'number')}")
    assert host.setting(tmp_path / "number") == "100"


def test_guard_puts_back_only_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another run on this machine may have the lock of the real settings.
    monkeypatch.setattr(host, "settings_lock", host.SettingsLock(tmp_path))
    monkeypatch.setattr(host, "WATCHED", (f"{tmp_path}/*",))
    for name in ("kept", "lost"):
        (tmp_path / name).write_text("1")
    guard = host.SettingsGuard()
    (tmp_path / "lost").write_text("2")
    assert guard.restore() == [f"{tmp_path}/lost was 1 before the run and 2 after it"]
    assert guard.restore() == []
    assert (tmp_path / "lost").read_text() == "1"


def test_every_watched_setting_of_this_kernel_can_be_read() -> None:
    assert host.SettingsGuard().restore() == []


def test_lock_keeps_others_out(tmp_path: Path) -> None:
    ours, theirs = host.SettingsLock(tmp_path), host.SettingsLock(tmp_path)
    with ours:
        with ours:
            assert not theirs.acquire(wait=False)
        assert not theirs.acquire(wait=False)
    assert theirs.acquire(wait=False)
    assert not ours.acquire(wait=False)
    theirs.release()


def test_guard_does_not_trust_settings_that_others_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "settings_lock", host.SettingsLock(tmp_path))
    assert host.SettingsGuard().watches
    with host.SettingsLock(tmp_path):
        assert not host.SettingsGuard().watches


@pytest.mark.needs_hugetlb
def test_exactly_as_many_huge_pages_are_free(hugepages: Callable[[int, int], HugePagePool]) -> None:
    pool = hugepages(2 * MIB, 3)
    assert pool.free == 3
    with pytest.raises(OSError, match="Cannot allocate memory"):
        mmap.mmap(-1, 8 * MIB, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_HUGETLB)
    with mmap.mmap(-1, 6 * MIB, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_HUGETLB) as pages:
        assert pool.free == 0
        pages[0] = 1
        assert pool.counter("free_hugepages") == 2


@pytest.mark.needs_hugetlb
def test_the_pool_is_put_back() -> None:
    pool = HugePagePool(2 * MIB)
    with host.settings_lock:
        before = pool.counter("nr_hugepages")
        with pool.with_free(2):
            assert pool.counter("nr_hugepages") >= 2
        assert pool.counter("nr_hugepages") == before


def test_a_pool_that_stays_short_is_an_error_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the kernel's directory: really asking for too much would starve the machine."""
    monkeypatch.setattr(host, "COMPACT_MEMORY", tmp_path / "compact_memory")
    for name, value in {"nr_hugepages": 4, "free_hugepages": 3, "resv_hugepages": 1}.items():
        (tmp_path / name).write_text(str(value))
    pool = HugePagePool(2 * MIB)
    pool.directory = tmp_path
    with pytest.raises(LookupError, match="could not gather 5 huge pages of 2M: it found 2"), pool.with_free(5):
        pytest.fail("the pool was taken to be large enough")
    assert (tmp_path / "compact_memory").read_text() == "1"
    assert pool.counter("nr_hugepages") == 4


@pytest.mark.needs_ksm
def test_ksm_merges_same_pages(ksm: Ksm) -> None:
    before = ksm.counter("pages_sharing")
    with mmap.mmap(-1, MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_MERGEABLE)
        memory[:] = os.urandom(mmap.PAGESIZE) * (MIB // mmap.PAGESIZE)
        ksm.wait_for_full_scans(3)
        # The kernel lets at most max_page_sharing (256) pages share one, which is just a MiB of them.
        assert ksm.counter("pages_sharing") - before >= 200


@pytest.mark.needs_thp
def test_shmem_thp_mode(shmem_thp: Callable[[str], None]) -> None:
    for mode in ("advise", "never"):
        shmem_thp(mode)
        assert host.setting(host.SHMEM_THP) == mode


def test_peers_of_another_script_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, tree = tmp_path / "script", tmp_path / "root"
    monkeypatch.setattr(host, "PEERS_SCRIPT", script)
    monkeypatch.setattr(host, "PEERS_TREE", tree)
    probe = host.PROBES["needs_peers"]
    script.write_text("one")
    assert probe() == "run scripts/peers"
    tree.mkdir()
    (tree / "made-by").write_text(f"{sha256(b'one').hexdigest()}\n")
    assert probe() is None
    script.write_text("another")
    assert probe() == "run scripts/peers: it has changed since"


@pytest.mark.parametrize("need", sorted(ROOT_CAN_ARRANGE))
def test_root_has_all_that_tests_need(need: str) -> None:
    """On a kernel that lacks one, this says which, before a hundred tests do."""
    if os.geteuid() == 0:
        assert host.missing(need) is None
