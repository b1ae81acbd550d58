"""Memory that a front end shares: allocated without being mapped here, and with nothing lost that is in it."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.zones.helpers import (
    HUGE,
    HUGETLB,
    MEMFD,
    SHARED_FILE,
    SHARED_TMPFS_FILE,
    Kind,
    Maker,
    each,
    fill,
    part,
    smaps,
)
from vhost_user.errors import HostError
from vhost_user.mapping import PAGE_SIZE, Mapping, map_part
from vhost_user.memory import Region, RegionFile
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import KIB, MIB, ByteCount, GuestAddress, HostOffset
from virtio_mem.hostmem import headroom
from virtio_mem.hostmem.backing import Anonymous, Memfd
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.serve.memory import FrontendMemory
from virtio_mem.zone import ZoneSpec

F_SEAL_FUTURE_WRITE = 0x10
"""fcntl(2); the `fcntl` module of Python 3.11 does not name it."""

SIZE = ByteCount(16 * MIB)
START = GuestAddress(1 << 32)
THERE = 6 * MIB
"""Where the front end has written 2 MiB."""


@contextmanager
def shared(theirs: HostMemory) -> Iterator[FrontendMemory]:
    """`theirs`, which a front end has, as the service sees it."""
    assert theirs.shareable_fd is not None
    ours = FrontendMemory(START, SIZE, HUGE, prefault=True)
    mapping, offset = map_part(theirs.shareable_fd, theirs.file_offset, SIZE)
    with mapping, OwnedFd.duplicate_of(theirs.shareable_fd) as fd:
        assert ours.attach([Region(START, SIZE, mapping, offset, file=RegionFile(fd, theirs.file_offset))])
        try:
            yield ours
        finally:
            ours.detach()


def resident(memory: FrontendMemory) -> int:
    """Bytes of it that count as this process's."""
    (region,) = memory.require(HostOffset(0), SIZE).regions
    return smaps(region.mapping.address)["Rss"]


def mappings(theirs: HostMemory) -> int:
    """How often its file is mapped in this process."""
    inode = str(os.fstat(theirs.backing.fd).st_ino)
    return sum(line.split()[4] == inode for line in Path("/proc/self/maps").read_text().splitlines())


def private(mapping: Mapping) -> int:
    """Bytes of private memory in a mapping. Its neighbours may have become one with it, in smaps."""
    memory = Anonymous()
    memory.address = mapping.address
    return memory.held(HostOffset(0), mapping.size)


def nothing(fd: int) -> None:
    """A file as it comes."""


def sealed(fd: int) -> None:
    """Mappings that there are may be written, and nothing else."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)


def appended_to(fd: int) -> None:
    """Of the description that the front end shares with us."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)


@each(MEMFD, SHARED_TMPFS_FILE, SHARED_FILE, HUGETLB)
def test_what_is_populated_is_held_and_not_mapped_here(make: Maker, kind: Kind) -> None:
    theirs = make.memory(kind, SIZE)
    fill(theirs, THERE, HUGE)
    with shared(theirs) as memory:
        memory.populate(HostOffset(4 * MIB), ByteCount(8 * MIB))
        assert theirs.held(HostOffset(4 * MIB), ByteCount(8 * MIB)) == theirs.held() == 8 * MIB
        assert resident(memory) == 0
        check_content(theirs)


@pytest.mark.parametrize("within_a_page", [0, 2 * KIB])
@each(MEMFD, SHARED_FILE, HUGETLB)
def test_what_is_shared_anew_in_two_regions_is_populated_there(make: Maker, kind: Kind, within_a_page: int) -> None:
    theirs = make.memory(kind, SIZE)
    fill(theirs, THERE, HUGE)
    fd = theirs.shareable_fd
    assert fd is not None
    half = SIZE // 2 + within_a_page
    with shared(theirs) as memory, ExitStack() as stack:
        (before,) = memory.require(HostOffset(0), SIZE).regions
        regions = []
        for begin, end in ((0, half), (half, SIZE)):
            start, size = HostOffset(theirs.file_offset + begin), ByteCount(end - begin)
            mapping, offset = map_part(fd, start, size)
            stack.enter_context(mapping)
            file = RegionFile(stack.enter_context(OwnedFd.duplicate_of(fd)), start)
            regions.append(Region(GuestAddress(START + begin), size, mapping, offset, file=file))
        assert not memory.attach(regions), "it is the same memory"
        before.mapping.close()
        memory.populate(HostOffset(4 * MIB), ByteCount(8 * MIB))
        assert theirs.held(HostOffset(4 * MIB), ByteCount(8 * MIB)) == theirs.held() == 8 * MIB
        assert [smaps(region.mapping.address)["Rss"] for region in regions] == [0, 0]
        check_content(theirs)


@each(SHARED_TMPFS_FILE, SHARED_FILE)
def test_a_file_that_is_truncated_meanwhile_costs_no_process(make: Maker, kind: Kind) -> None:
    """Nor is anything allocated where the mapping was."""
    theirs = make.memory(kind, SIZE)
    fd = theirs.shareable_fd
    assert fd is not None
    with shared(theirs) as memory:
        found = memory.require(HostOffset(0), SIZE)
        os.ftruncate(fd, 0)
        with pytest.raises(HostError, match=r"allocating memory failed: EFAULT.*truncate"):
            found.populate(HostOffset(0), SIZE)
        with pytest.raises(HostError, match="within the file's 0x0 bytes"):
            found.write(HostOffset(THERE), b"virtio-mem")
        (region,) = found.regions
        assert not region.mapping.dead
        with region.mapping.view() as view:
            assert view[0] == 0
        assert region.mapping.dead
        with pytest.raises(HostError, match=r"allocating memory failed: EFAULT.*truncate"):
            found.populate(HostOffset(0), SIZE)
        assert private(region.mapping) <= PAGE_SIZE


@each(MEMFD, SHARED_FILE, HUGETLB)
def test_what_is_written_is_there_and_not_mapped_here(make: Maker, kind: Kind) -> None:
    theirs = make.memory(kind, SIZE)
    with shared(theirs) as memory:
        found = memory.require(HostOffset(0), SIZE)
        found.populate(HostOffset(THERE), HUGE)
        with theirs.view() as view:
            before = mappings(theirs)
            found.write(HostOffset(THERE + PAGE_SIZE), b"virtio-mem")
            assert mappings(theirs) == before
            assert bytes(view[THERE + PAGE_SIZE : THERE + PAGE_SIZE + 10]) == b"virtio-mem"
        assert resident(memory) == 0


def check_content(theirs: HostMemory) -> None:
    """What was written is there, and zeros elsewhere."""
    with theirs.view() as view:
        assert bytes(view[THERE : THERE + 8]) == b"virtio-m"
        rest = bytes(view[:THERE]) + bytes(view[THERE + HUGE :])
    assert rest == bytes(SIZE - HUGE)


@pytest.mark.parametrize("make_odd", [nothing, sealed, appended_to])
def test_a_file_that_can_not_be_written_as_others_is_populated(make_odd: Callable[[int], None]) -> None:
    theirs = odd_memory()
    fill(theirs, THERE, HUGE)
    try:
        with shared(theirs) as memory:
            make_odd(theirs.backing.fd)
            memory.populate(HostOffset(0), SIZE)
            assert theirs.held() == SIZE == os.fstat(theirs.backing.fd).st_size
            assert resident(memory) == 0
            check_content(theirs)
    finally:
        theirs.close()


def odd_memory() -> HostMemory:
    """Not sealed."""
    fd = os.memfd_create("odd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    return HostMemory(Memfd(fd, HostOffset(0)), SIZE)


@pytest.fixture(params=["memfd", SHARED_TMPFS_FILE.name])
def in_memory(make: Maker, request: pytest.FixtureRequest) -> Iterator[HostMemory]:
    """A file that is written to be populated, and that its front end can truncate."""
    if request.param != "memfd":
        yield make.memory(SHARED_TMPFS_FILE, SIZE)
        return
    theirs = odd_memory()
    yield theirs
    theirs.close()


def at_the_write(monkeypatch: pytest.MonkeyPatch, offset: int, act: Callable[[], None]) -> None:
    """Just before zeros are written to `offset`, the front end does something, once."""
    write = os.pwrite

    def act_and_write(fd: int, data: bytes, at: int) -> int:
        if at == offset:
            monkeypatch.undo()
            act()
        return write(fd, data, at)

    monkeypatch.setattr(os, "pwrite", act_and_write)


@pytest.mark.parametrize("at", [0, 4 * MIB, SIZE - HUGE])
def test_a_file_that_is_truncated_while_it_is_written_is_refused(
    in_memory: HostMemory, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets longer by the piece in hand at most, and nothing stays in it."""
    fd = in_memory.backing.fd
    with shared(in_memory) as memory:
        at_the_write(monkeypatch, at, lambda: os.ftruncate(fd, 0))
        with pytest.raises(HostError, match=r"allocating memory failed: EFAULT.*truncate its file"):
            memory.populate(HostOffset(0), SIZE)
        assert os.fstat(fd).st_size == at + HUGE
        assert in_memory.held() == 0


def test_what_comes_while_a_file_is_written_stays(in_memory: HostMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another piece, and behind other data in the piece in hand."""
    fill(in_memory, 3 * MIB, PAGE_SIZE)
    with shared(in_memory) as memory:

        def write() -> None:
            fill(in_memory, 4 * MIB - PAGE_SIZE, PAGE_SIZE)
            fill(in_memory, THERE, HUGE)

        at_the_write(monkeypatch, 2 * MIB, write)
        memory.populate(HostOffset(0), SIZE)
        assert in_memory.held() == SIZE
        with in_memory.view() as view:
            for offset in (3 * MIB, 4 * MIB - PAGE_SIZE, THERE, THERE + HUGE - PAGE_SIZE):
                assert bytes(view[offset : offset + 8]) == b"virtio-m"


def test_what_is_not_mapped_here_is_not_taken_for_populated(make: Maker) -> None:
    theirs = make.memory(SHARED_FILE, SIZE)
    with shared(theirs) as memory:
        found = memory.require(HostOffset(0), SIZE)
        (region,) = found.regions
        for regions in ((), (replace(region, size=ByteCount(SIZE - PAGE_SIZE)),)):
            found.regions = regions
            with pytest.raises(HostError, match=r"allocating memory failed: EFAULT.*; share all of it"):
                found.populate(HostOffset(0), SIZE)
            assert theirs.held() == 0


def descriptors(theirs: HostMemory) -> int:
    """How often its file is open in this process."""
    inode = os.fstat(theirs.backing.fd).st_ino
    return sum(path.stat().st_ino == inode for path in Path("/proc/self/fd").iterdir() if path.exists())


def test_a_file_is_opened_once_more_when_something_is_populated(in_memory: HostMemory) -> None:
    alone = descriptors(in_memory)
    with shared(in_memory) as memory:
        before = descriptors(in_memory)
        memory.discard(HostOffset(0), HUGE)
        assert descriptors(in_memory) == before
        for offset in (0, HUGE):
            memory.populate(HostOffset(offset), HUGE)
            assert descriptors(in_memory) == before + 1
    assert descriptors(in_memory) == alone


def test_nobody_waits_for_whoever_has_a_lease_on_the_file(make: Maker) -> None:
    """The kernel would have an open(2) wait for /proc/sys/fs/lease-break-time, and then take the lease away."""
    theirs = make.memory(SHARED_TMPFS_FILE, SIZE)
    inode = f":{os.fstat(theirs.backing.fd).st_ino} "

    def leases() -> list[str]:
        return [line.split()[2] for line in Path("/proc/locks").read_text().splitlines() if inode in line]

    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        fcntl.fcntl(theirs.backing.fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        with shared(theirs) as memory:
            assert leases() == ["ACTIVE"]
            memory.populate(HostOffset(0), SIZE)
            assert leases() == ["BREAKING"]
            assert theirs.held() == SIZE
    finally:
        fcntl.fcntl(theirs.backing.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        signal.signal(signal.SIGIO, before)


def test_a_limit_on_the_size_of_files_limits_no_memory(make: Maker) -> None:
    theirs = make.memory(MEMFD, SIZE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with shared(theirs) as memory:
        resource.setrlimit(resource.RLIMIT_FSIZE, (THERE, hard))
        try:
            memory.populate(HostOffset(0), SIZE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert theirs.held() == SIZE


def test_a_full_tmpfs_leaves_what_was_there(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headroom, "require", lambda *_: None)  # it fills up behind the look at it
    file = make.mount("tmpfs", "size=4M") / "file"
    file.touch()
    os.truncate(file, SIZE)
    theirs = part(make.open(ZoneSpec("m", SIZE, file=file, shared=True)).boot)
    fill(theirs, THERE, MIB)
    with shared(theirs) as memory:
        with pytest.raises(HostError, match=r"allocating memory failed: ENOSPC.*; make room there"):
            memory.populate(HostOffset(0), SIZE)
        assert theirs.held() == theirs.held(HostOffset(THERE), ByteCount(MIB)) == MIB
