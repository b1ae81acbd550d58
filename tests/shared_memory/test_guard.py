"""Memory whose file is truncated: zeros in its place, and a mapping that is known to be dead; other faults end us."""

from __future__ import annotations

import errno
import mmap
import os
import platform
import signal
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests import counts
from tests.shared_memory.helpers import HUGE, SMALL, Pages, guarded, mappings, run
from vhost_user import _native
from vhost_user.errors import HostError, PeerError, UsageError
from vhost_user.mapping import MAP_NORESERVE, PAGE_SIZE, Mapping, page_size_of
from vhost_user.memory import GuestMemory, Region
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import ByteCount, GuestAddress, HostOffset

PAGES = 4


@contextmanager
def truncated(pages: Pages, keep: int = 0) -> Iterator[Mapping]:
    """A guarded mapping full of `x`, whose file then loses all pages but the first `keep`."""
    with pages.file(PAGES) as fd, guarded(fd, PAGES * pages.size) as mapping:
        mapping.view()[:] = b"x" * mapping.size
        assert not mapping.dead
        os.ftruncate(fd.fileno(), keep * pages.size)
        yield mapping


def test_a_view_reads_zeros(pages: Pages) -> None:
    before = _native.guard_faults()
    with truncated(pages) as mapping:
        view = mapping.view()
        assert view[-1] == 0
        assert mapping.dead
        assert not any(bytes(view))
        assert _native.guard_faults() == before + 1, "one mapping died, once"
        del view


def test_a_view_writes_zeros_away_into_memory_of_our_own(pages: Pages) -> None:
    with truncated(pages) as mapping:
        mapping.view(HostOffset(100), ByteCount(5))[:] = b"hello"
        assert mapping.dead
        assert bytes(mapping.view(HostOffset(98), ByteCount(9))) == b"\0\0hello\0\0"


def test_what_the_file_still_has_is_no_fault_and_is_gone_after_one(pages: Pages) -> None:
    with truncated(pages, keep=1) as mapping:
        assert mapping.view()[pages.size - 1] == ord("x")
        assert not mapping.dead
        assert mapping.view()[pages.size] == 0
        assert mapping.dead
        assert mapping.view()[0] == 0, "the mapping is ours as a whole: its memory is one thing or the other"


def test_a_file_that_grows_again_does_not_come_back(pages: Pages) -> None:
    with pages.file(1) as fd, guarded(fd, pages.size) as mapping:
        os.ftruncate(fd.fileno(), 0)
        assert mapping.view()[0] == 0
        os.ftruncate(fd.fileno(), pages.size)
        mapping.view()[0] = 1
        with guarded(fd, pages.size) as anew:
            assert (anew.view()[0], anew.dead) == (0, False)


def test_a_call_of_the_core_fails_and_marks(pages: Pages) -> None:
    with truncated(pages) as mapping:
        memory = GuestMemory([Region(GuestAddress(0), mapping.size, mapping)])
        with pytest.raises(PeerError):
            memory.read(GuestAddress(0), 8)
        assert mapping.dead
        with pytest.raises(PeerError):
            memory.write(GuestAddress(0), b"x")
        memory.replace(())


def test_a_system_call_fails_and_marks_nothing() -> None:
    """Reported by an error, as a bad address is, and not by a signal."""
    with truncated(SMALL) as mapping, open("/dev/zero", "rb", buffering=0) as zeros:
        view = mapping.view()
        with pytest.raises(OSError, match="Bad address"):
            zeros.readinto(view)
        del view
        assert not mapping.dead


def test_any_number_of_pages_costs_one_mapping() -> None:
    many = 2000
    with SMALL.file(many) as fd, guarded(fd, many * PAGE_SIZE) as mapping:
        os.ftruncate(fd.fileno(), 0)
        view = mapping.view()
        before = mappings()
        assert sum(view[0 :: 2 * PAGE_SIZE]) == 0
        view[PAGE_SIZE :: 2 * PAGE_SIZE] = bytes(many // 2)
        assert mappings() <= before + 2
        del view


@pytest.mark.parametrize("let_go", ["close", "forget"])
def test_a_view_outlives_its_mapping_guarded(let_go: str) -> None:
    with SMALL.file(1) as fd:
        mapping = guarded(fd, PAGE_SIZE)
        os.ftruncate(fd.fileno(), 0)
    view = mapping.view()
    if let_go == "close":
        with pytest.raises(BufferError):
            mapping.close()
        assert (view[0], mapping.dead) == (0, True)
    else:
        del mapping
        assert view[0] == 0


def taken_slots() -> int:
    """How many slots of the registry are taken, by taking the others."""
    mine: list[int] = []
    try:
        while True:
            mine.append(_native.guard_add(2**63 + PAGE_SIZE * len(mine), PAGE_SIZE, PAGE_SIZE))
    except OSError as full:
        if full.errno != errno.ENOSPC:
            raise
        return _native.GUARD_SLOTS - len(mine)
    finally:
        for slot in mine:
            _native.guard_remove(slot)


@pytest.mark.parametrize("let_go", ["close", "close twice", "forget", "forget before the last view"])
def test_a_slot_is_free_again(let_go: str) -> None:
    before = taken_slots()
    with SMALL.file(1) as fd:
        mapping = guarded(fd, PAGE_SIZE)
    view = mapping.view()
    assert taken_slots() == before + 1
    if let_go == "forget before the last view":
        del mapping
        assert taken_slots() == before + 1
        del view
    else:
        del view
        for _ in range({"close": 1, "close twice": 2}.get(let_go, 0)):
            mapping.close()
        if let_go == "forget":
            del mapping
    assert taken_slots() == before


def test_a_slot_that_was_dead_is_alive_for_the_next() -> None:
    for _ in range(3):
        with truncated(SMALL) as mapping:
            assert (mapping.view()[0], mapping.dead) == (0, True)
        assert not mapping.dead


def test_no_slot_is_free() -> None:
    with SMALL.file(1) as fd:
        slots = [_native.guard_add(2**63, PAGE_SIZE, PAGE_SIZE) for _ in range(_native.GUARD_SLOTS - taken_slots())]
        before = mappings()
        with pytest.raises(HostError, match=f"{_native.GUARD_SLOTS} guarded mappings at a time; close others") as full:
            guarded(fd, PAGE_SIZE)
        assert full.value.errno == errno.ENOSPC
        assert mappings() == before
        _native.guard_remove(slots.pop())
        guarded(fd, PAGE_SIZE).close()
        for slot in slots:
            _native.guard_remove(slot)


def test_a_page_of_zeros_where_the_whole_range_is_refused() -> None:
    """As where the kernel counts what may be written. Here the range is larger than any address space."""
    with SMALL.file(2) as fd, Mapping(ByteCount(2 * PAGE_SIZE), mmap.MAP_SHARED, fd.fileno()) as mapping:
        slot = _native.guard_add(mapping.address, 2**62, PAGE_SIZE)
        mapping.view()[0] = 1
        os.ftruncate(fd.fileno(), PAGE_SIZE)
        assert mapping.view()[PAGE_SIZE] == 0
        assert mapping.view()[0] == 1
        assert _native.guard_dead(slot)
        _native.guard_remove(slot)


def test_the_newer_of_two_ranges_counts() -> None:
    """The older one was unmapped by a thread that has not yet come to remove it."""
    for order in (1, -1):  # in the lower slot the older one, then the newer one
        spare = _native.guard_add(2**63, PAGE_SIZE, PAGE_SIZE)
        with SMALL.file(1) as fd, Mapping(ByteCount(PAGE_SIZE), mmap.MAP_SHARED, fd.fileno()) as mapping:
            slots = [_native.guard_add(mapping.address, PAGE_SIZE, PAGE_SIZE)]
            if order < 0:
                _native.guard_remove(spare)
            slots.append(_native.guard_add(mapping.address, PAGE_SIZE, PAGE_SIZE))
            assert sorted(slots) == slots[::order]
            os.ftruncate(fd.fileno(), 0)
            assert mapping.view()[0] == 0
            assert [_native.guard_dead(slot) for slot in slots] == [False, True]
            for slot in {*slots, spare}:
                _native.guard_remove(slot)


def test_threads_fault_at_once_while_others_come_and_go(pages: Pages) -> None:
    """crc32 lets go of the interpreter's lock, so the faults really are at the same time."""
    workers = 4
    size = max(pages.size, 16 * PAGE_SIZE)
    done = threading.Event()

    def come_and_go() -> None:
        with SMALL.file(1) as fd:
            while not done.is_set():
                guarded(fd, PAGE_SIZE).close()

    coming = threading.Thread(target=come_and_go)
    coming.start()
    try:
        with ThreadPoolExecutor(workers) as pool, pages.file(size // pages.size) as fd:
            for _ in range(counts.GUARD_ROUNDS):
                with guarded(fd, size) as shared, guarded(fd, size) as other:
                    os.ftruncate(fd.fileno(), 0)
                    views = [shared.view(), shared.view(), other.view(), shared.view()]
                    assert set(pool.map(zlib.crc32, views)) == {zlib.crc32(bytes(size))}
                    assert shared.dead
                    assert other.dead
                    del views
                os.ftruncate(fd.fileno(), size)
    finally:
        done.set()
        coming.join()


PROGRAM = """
import faulthandler, mmap, os, signal
from vhost_user import _native
from vhost_user.mapping import Mapping
{before}
fd = os.memfd_create("test")
os.ftruncate(fd, 4096)
mapping, other = [Mapping(4096, mmap.MAP_SHARED, fd, guarded=guarded) for guarded in (True, False)]
os.ftruncate(fd, 0)
{after}
print("alive", mapping.dead)
"""

READ_GUARDED = "assert mapping.view()[0] == 0"
READ_OTHER = "other.view()[0]"
INSTALL = "_native.install_guard()"
ENABLE = "faulthandler.enable()"


@pytest.mark.parametrize("before", ["", ENABLE, f"{INSTALL}; {ENABLE}"])
@pytest.mark.parametrize("after", [READ_OTHER, f"{READ_GUARDED}; {READ_OTHER}"])
def test_a_fault_elsewhere_is_not_ours_to_hide(before: str, after: str) -> None:
    done = run(PROGRAM.format(before=before, after=after))
    assert done.returncode == -signal.SIGBUS
    assert done.stderr.count("Fatal Python error: Bus error") == (ENABLE in before)


@pytest.mark.parametrize("before", ["", ENABLE, f"{INSTALL}; {ENABLE}"])
def test_a_fault_of_ours_is_survived_below_another_handler(before: str) -> None:
    done = run(PROGRAM.format(before=before, after=f"{READ_GUARDED}; {READ_GUARDED}"))
    assert (done.returncode, done.stdout) == (0, "alive True\n")


@pytest.mark.parametrize(
    ("send", "times"),
    [
        ("os.kill(os.getpid(), signal.SIGBUS)", 1),
        ("signal.raise_signal(signal.SIGBUS)", 2),  # the first might be a fault that another handler passed on
    ],
)
def test_a_signal_that_somebody_sends_is_no_fault(send: str, times: int) -> None:
    done = run(PROGRAM.format(before="", after="; ".join([send] * times)))
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="rt_sigqueueinfo has another number on this architecture")
@pytest.mark.parametrize("before", ["", INSTALL])
def test_a_page_that_goes_bad_before_it_is_met_takes_nothing_from_the_guard(before: str) -> None:
    """The kernel tells of it early where it is asked to, PR_MCE_KILL(2const): BUS_MCEERR_AO."""
    tell = "import ctypes; info = bytes([7, 0, 0, 0] * 2 + [5] + [0] * 119)"
    send = "ctypes.CDLL(None).syscall(129, os.getpid(), signal.SIGBUS, info)"
    done = run(PROGRAM.format(before=before, after=f"{tell}; {send}; {READ_GUARDED}"))
    assert (done.returncode, done.stdout) == (0, "alive True\n")


def test_a_range_that_gets_no_zeros_is_passed_on() -> None:
    add = "_native.guard_add(other.address, 2**62, 2**62)"
    done = run(PROGRAM.format(before="", after=f"{add}; {READ_OTHER}"))
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "")


def test_a_mapping_that_is_not_guarded_is_never_dead() -> None:
    with SMALL.file(1) as fd, Mapping(ByteCount(PAGE_SIZE), mmap.MAP_SHARED, fd.fileno()) as mapping:
        os.ftruncate(fd.fileno(), 0)
        memory = GuestMemory([Region(GuestAddress(0), mapping.size, mapping)])
        with pytest.raises(PeerError):
            memory.read(GuestAddress(0), 1)
        assert not mapping.dead
        memory.replace(())


def test_the_page_size_is_the_files(pages: Pages) -> None:
    assert page_size_of(-1) == PAGE_SIZE
    with pages.file(1) as fd:
        assert page_size_of(fd.fileno()) == pages.size
        closed = fd.fileno()
    with pytest.raises(HostError, match="fstatfs failed: EBADF"):
        page_size_of(closed)


@pytest.mark.needs_hugetlb
@pytest.mark.parametrize(("size", "offset", "field"), [(PAGE_SIZE, 0, "size"), (HUGE, PAGE_SIZE, "offset")])
def test_a_part_of_a_huge_page_is_refused(size: int, offset: int, field: str) -> None:
    """The kernel would map the whole one, over what lies behind."""
    with Pages(HUGE).file(2) as fd:
        before = mappings()
        with pytest.raises(UsageError, match=f"multiple of the page size, {HUGE}") as refusal:
            guarded(fd, size, offset)
        assert refusal.value.field == field
        assert mappings() == before


@pytest.mark.needs_hugetlb
def test_huge_pages_are_aligned_without_being_told() -> None:
    with Pages(HUGE).file(1) as fd, OwnedFd(os.dup(fd.fileno())) as same:
        flags = mmap.MAP_SHARED | MAP_NORESERVE
        with Mapping(ByteCount(HUGE), flags, same.fileno(), alignment=PAGE_SIZE) as mapping:
            assert mapping.address % HUGE == 0
