"""Each way to back a zone: what is mapped, what can be shared, what the host holds and how it gets it back."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import socket
from pathlib import Path

import pytest

from tests import host
from tests.counts import MEBIBYTES_THERE_AND_BACK
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
    SHARED_TMPFS_DIRECTORY,
    SHARED_TMPFS_FILE,
    Kind,
    Maker,
    each,
    fill,
    free_pages,
    in_child,
    part,
    smaps,
    st_blocks_bytes,
    touch,
    vm_flags,
)
from vhost_user import _native
from vhost_user.errors import HostError, UsageError
from vhost_user.units import KIB, MIB, TIB, ByteCount, HostOffset
from virtio_mem.hostmem.memory import HostMemory

SHARED_KINDS = [kind for kind in KINDS if kind.shared]
PRIVATE_KINDS = [kind for kind in KINDS if not kind.shared]
USER_FILES = [SHARED_FILE, PRIVATE_FILE, SHARED_TMPFS_FILE, PRIVATE_TMPFS_FILE]

PLUGGED = ByteCount(MEBIBYTES_THERE_AND_BACK * MIB)
"""What is plugged, written and taken back, on each backing."""


@each(*KINDS)
def test_a_zone_is_of_its_kind_and_takes_nothing_until_it_is_touched(make: Maker, kind: Kind) -> None:
    zone = make.zone(kind, size=4 * MIB, hotplug_size=8 * MIB)
    boot, hotplug = part(zone.boot), part(zone.hotplug)
    assert (zone.kind, zone.shared, zone.page_size) == (kind.kind, kind.shared, kind.page_size)
    assert (boot.size, hotplug.size) == (4 * MIB, 8 * MIB)
    assert boot.held() == hotplug.held() == 0
    assert (boot.backing.kind, hotplug.backing.kind) == (kind.kind, kind.hotplug_kind)
    for memory in (boot, hotplug):
        assert memory.has_shared_zero_page == (memory.backing.kind == "anonymous")
    assert smaps(boot.address)["KernelPageSize"] == kind.page_size


@each(*KINDS)
def test_the_mapping_is_shared_or_private_and_reserves_nothing(make: Maker, kind: Kind) -> None:
    zone = make.zone(kind, size=4 * MIB, hotplug_size=8 * MIB)
    for memory in (part(zone.boot), part(zone.hotplug)):
        flags = vm_flags(memory.address)
        assert ("sh" in flags) == kind.shared
        assert ("ht" in flags) == (kind is HUGETLB)
        assert "nr" in flags
        assert "ac" not in flags


@each(*KINDS)
def test_the_two_parts_are_apart(make: Maker, kind: Kind) -> None:
    zone = make.zone(kind, size=4 * MIB, hotplug_size=8 * MIB)
    boot, hotplug = part(zone.boot), part(zone.hotplug)
    fill(boot, 0, boot.size, b"boot")
    fill(hotplug, 0, hotplug.size, b"plug")
    assert bytes(boot.view()[:4]) == bytes(boot.view()[-4:]) == b"boot"
    assert bytes(hotplug.view()[:4]) == bytes(hotplug.view()[-4:]) == b"plug"
    hotplug.discard(HostOffset(0), hotplug.size)
    assert boot.held() == boot.size
    assert bytes(boot.view()[-4:]) == b"boot"


@each(*KINDS)
@pytest.mark.parametrize(("size", "hotplug_size"), [(4 * MIB, 0), (0, 4 * MIB)])
def test_a_zone_may_have_one_part_only(make: Maker, kind: Kind, size: int, hotplug_size: int) -> None:
    zone = make.zone(kind, size=size, hotplug_size=hotplug_size)
    assert [memory is not None for memory in (zone.boot, zone.hotplug)] == [bool(size), bool(hotplug_size)]
    assert zone.info()["held"] == {"boot": 0, "hotplug": 0}


@each(*SHARED_KINDS)
def test_another_process_reads_and_writes_through_the_passed_fd(make: Maker, kind: Kind) -> None:
    zone = make.zone(kind, size=8 * MIB, hotplug_size=4 * MIB)
    for memory in (part(zone.boot), part(zone.hotplug)):
        read_and_write_elsewhere(memory)


def read_and_write_elsewhere(memory: HostMemory) -> None:
    fill(memory, 0, memory.size, b"from the zone 16")
    offset = memory.file_offset
    ours, theirs = socket.socketpair()

    def other_process() -> None:
        _, (fd,), _, _ = socket.recv_fds(theirs, 1, 1)
        with mmap.mmap(fd, memory.size, offset=offset) as there:
            assert there[-16:] == b"from the zone 16"
            there[:5] = b"other"

    with ours, theirs:
        assert memory.shareable_fd is not None
        socket.send_fds(ours, [b"x"], [memory.shareable_fd])
        assert in_child(other_process) == 0
    assert bytes(memory.view()[:5]) == b"other"


@each(*PRIVATE_KINDS)
def test_private_memory_has_no_fd_to_share(make: Maker, kind: Kind) -> None:
    assert make.memory(kind, 4 * MIB).shareable_fd is None


@each(MEMFD, HUGETLB)
def test_a_memfd_can_neither_shrink_nor_grow_nor_be_unsealed(make: Maker, kind: Kind) -> None:
    zone = make.zone(kind, size=4 * MIB, hotplug_size=8 * MIB)
    for memory in (part(zone.boot), part(zone.hotplug)):
        fd = memory.backing.fd
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == seals
        for size in (memory.size - kind.page_size, memory.size + kind.page_size):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert os.fstat(fd).st_size == memory.size


@each(MEMFD, HUGETLB)
def test_a_memfd_bears_the_names_of_zone_and_part(make: Maker, kind: Kind) -> None:
    zone = make.zone(kind, size=4 * MIB, hotplug_size=8 * MIB)
    for name, memory in (("boot", part(zone.boot)), ("hotplug", part(zone.hotplug))):
        assert str(Path(f"/proc/self/fd/{memory.backing.fd}").readlink()) == f"/memfd:virtio-mem:m:{name} (deleted)"


@each(SHARED_DIRECTORY, PRIVATE_DIRECTORY, SHARED_TMPFS_DIRECTORY)
def test_a_directory_gets_files_without_names(make: Maker, kind: Kind) -> None:
    zone = make.zone(kind, size=4 * MIB, hotplug_size=8 * MIB)
    directory = zone.spec.file
    assert directory is not None
    assert list(directory.iterdir()) == []
    for memory in (part(zone.boot), part(zone.hotplug)):
        found = os.fstat(memory.backing.fd)
        assert (found.st_nlink, found.st_size, found.st_mode & 0o777) == (0, memory.size, 0o600)
        with pytest.raises(FileNotFoundError):
            # A directory's fd that isn't needed, because the path is absolute, makes Python follow the link.
            os.link(f"/proc/self/fd/{memory.backing.fd}", directory / "named", src_dir_fd=0)


@each(SHARED_FILE, SHARED_TMPFS_FILE)
def test_a_shared_file_has_boot_memory_and_nothing_else(make: Maker, kind: Kind) -> None:
    zone = make.zone(kind, size=4 * MIB, hotplug_size=8 * MIB)
    fill(part(zone.boot), 0, 4 * MIB, b"boot")
    fill(part(zone.hotplug), 0, 8 * MIB, b"plug")
    assert zone.spec.file is not None
    assert zone.spec.file.read_bytes() == b"boot" * MIB


@each(*USER_FILES)
def test_what_a_file_has_behind_boot_memory_is_neither_seen_nor_changed(make: Maker, kind: Kind) -> None:
    spec = make.spec(kind, size=4 * MIB, hotplug_size=8 * MIB)
    assert spec.file is not None
    image = os.urandom(4 * MIB) * 3
    spec.file.write_bytes(image)
    hotplug = part(make.open(spec).hotplug)
    assert bytes(hotplug.view()) == bytes(8 * MIB)
    hotplug.populate(HostOffset(0), hotplug.size)
    fill(hotplug, 0, hotplug.size)
    assert hotplug.discard_verified(HostOffset(0), hotplug.size) == 0
    assert spec.file.read_bytes() == image


@each(*USER_FILES)
def test_a_zone_without_boot_memory_has_no_use_for_a_file(make: Maker, kind: Kind) -> None:
    zone = make.zone(kind, hotplug_size=8 * MIB)
    assert (zone.kind, zone.shared) == (kind.hotplug_kind, kind.shared)
    assert zone.spec.file is not None
    assert zone.spec.file.stat().st_size == 0


@each(SHARED_FILE, SHARED_TMPFS_FILE)
@pytest.mark.parametrize("behind", [0, 1, 4096])
def test_opening_a_shared_file_changes_no_byte_of_it(make: Maker, kind: Kind, behind: int) -> None:
    spec = make.spec(kind, size=4 * MIB, hotplug_size=8 * MIB)
    assert spec.file is not None
    image = os.urandom(12 * MIB + behind)
    spec.file.write_bytes(image)
    make.open(spec).close()
    assert spec.file.read_bytes() == image


@each(PRIVATE_FILE, PRIVATE_TMPFS_FILE)
def test_a_private_file_can_be_read_only_and_shows_its_contents(make: Maker, kind: Kind) -> None:
    spec = make.spec(kind, size=4 * MIB, hotplug_size=8 * MIB)
    assert spec.file is not None
    spec.file.write_bytes(b"image---" * (12 * MIB // 8))
    spec.file.chmod(0o444)
    zone = make.open(spec)
    boot = part(zone.boot)
    assert bytes(boot.view()[:8]) == b"image---"
    assert fcntl.fcntl(boot.backing.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


@each(PRIVATE_FILE, PRIVATE_TMPFS_FILE)
def test_a_private_file_is_never_changed(make: Maker, kind: Kind) -> None:
    spec = make.spec(kind, size=4 * MIB, hotplug_size=8 * MIB)
    assert spec.file is not None
    spec.file.write_bytes(os.urandom(12 * MIB))
    before = (hashlib.sha256(spec.file.read_bytes()).digest(), spec.file.stat())
    zone = make.open(spec)
    for memory in (part(zone.boot), part(zone.hotplug)):
        memory.populate(HostOffset(0), memory.size)
        fill(memory, 0, memory.size)
        assert memory.held() == memory.size
        assert memory.discard_verified(HostOffset(0), memory.size) == 0
    zone.close()
    after = (hashlib.sha256(spec.file.read_bytes()).digest(), spec.file.stat())
    assert after[0] == before[0]
    assert (after[1].st_blocks, after[1].st_mtime_ns) == (before[1].st_blocks, before[1].st_mtime_ns)


@each(PRIVATE_FILE, PRIVATE_TMPFS_FILE)
def test_discarding_a_private_file_brings_its_contents_back(make: Maker, kind: Kind) -> None:
    spec = make.spec(kind, size=8 * MIB)
    assert spec.file is not None
    spec.file.write_bytes(b"image---" * MIB)
    memory = part(make.open(spec).boot)
    fill(memory, 0, memory.size)
    memory.discard(HostOffset(0), ByteCount(4 * MIB))
    assert bytes(memory.view()[:8]) == b"image---"
    assert bytes(memory.view()[4 * MIB :][:8]) == b"virtio-m"


class Counter:
    """What the kernel says that a memory takes, from a counter that the zone's own `held` doesn't look at."""

    def __init__(self, make: Maker, kind: Kind, memory: HostMemory) -> None:
        self._pool = make.hugepages(HUGE, PLUGGED // HUGE) if kind is HUGETLB else None
        self._kind = kind
        self._memory = memory

    def __call__(self) -> int:
        if self._pool is not None:
            return PLUGGED - self._pool.free * HUGE
        if self._kind.shared:
            return st_blocks_bytes(self._memory)
        counters = smaps(self._memory.address)
        return counters["Anonymous"] + counters["Swap"]


@each(*(kind for kind in KINDS if not kind.place.startswith("tmpfs")))
def test_a_gibibyte_plugged_written_and_unplugged_goes_back_to_the_host(make: Maker, kind: Kind) -> None:
    memory = make.memory(kind, PLUGGED)
    taken = Counter(make, kind, memory)
    before = taken()
    memory.populate(HostOffset(0), PLUGGED)
    # A file system may take a little more for its own bookkeeping.
    slack = MIB if kind.place.startswith("disk") else 0
    assert PLUGGED <= taken() - before <= PLUGGED + slack
    fill(memory, 0, PLUGGED)
    assert memory.held() == PLUGGED
    assert memory.discard_verified(HostOffset(0), PLUGGED) == 0
    if kind is HUGETLB:
        free_pages(host.HugePagePool(HUGE), PLUGGED // HUGE)
    assert taken() == before
    fresh = memory.view(HostOffset(PLUGGED - 16), ByteCount(16))
    assert bytes(fresh) == bytes(16)
    fresh.release()


@each(*KINDS)
def test_a_part_of_the_range_goes_back_alone(make: Maker, kind: Kind) -> None:
    memory = make.memory(kind, 16 * MIB, thp=False)
    fill(memory, 0, memory.size)
    assert memory.discard_verified(HostOffset(4 * MIB), ByteCount(2 * MIB)) == 0
    assert memory.held() == 14 * MIB
    assert memory.held(HostOffset(2 * MIB), ByteCount(4 * MIB)) == 2 * MIB
    with memory.view() as view:
        assert view[4 * MIB - 1] == view[6 * MIB] - ord("v") + ord("k") == ord("k")


@each(*SHARED_KINDS)
def test_what_another_process_touched_is_seen_and_goes_back(make: Maker, kind: Kind) -> None:
    memory = make.memory(kind, 8 * MIB)
    assert in_child(lambda: touch(memory, 4 * MIB)) == 0
    assert memory.held() == kind.page_size
    assert memory.held(HostOffset(4 * MIB), ByteCount(kind.page_size)) == kind.page_size
    assert memory.held(HostOffset(0), ByteCount(4 * MIB)) == 0
    assert memory.discard_verified(HostOffset(4 * MIB), ByteCount(kind.page_size)) == 0


def test_reading_private_anonymous_memory_takes_nothing(make: Maker) -> None:
    memory = make.memory(ANONYMOUS, 8 * MIB)
    with memory.view() as view:
        assert not any(view[::4096])
    assert memory.held() == smaps(memory.address)["Anonymous"] == 0


@each(MEMFD, HUGETLB, SHARED_TMPFS_DIRECTORY)
def test_reading_shared_memory_takes_memory(make: Maker, kind: Kind) -> None:
    memory = make.memory(kind, 8 * MIB)
    with memory.view() as view:
        assert not any(view[:: kind.page_size])
    # Pages that were only read are clean, so the kernel may have dropped some of them already.
    assert 0 < memory.held() <= 8 * MIB


def test_private_memory_in_a_directory_on_a_tmpfs_is_there_once(make: Maker) -> None:
    zone = make.zone(PRIVATE_TMPFS_DIRECTORY, size=8 * MIB)
    before = resident("RssShmem"), resident("RssAnon")
    memory = part(zone.boot)
    memory.populate(HostOffset(0), memory.size)
    assert memory.backing.fd == -1
    assert resident("RssShmem") == before[0]
    assert resident("RssAnon") >= before[1] + 8 * MIB - MIB  # the allocator may have given a little back


def resident(kind: str) -> int:
    """Bytes of this process's memory of a kind, as /proc/self/status counts them."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{kind}:")]
    return int(line.split()[1]) << 10


def test_a_hotplug_region_of_a_private_file_on_a_tmpfs_never_grows_the_file(make: Maker) -> None:
    zone = make.zone(PRIVATE_TMPFS_FILE, size=4 * MIB, hotplug_size=8 * MIB)
    file = zone.spec.file
    assert file is not None
    memory = part(zone.hotplug)
    memory.populate(HostOffset(0), memory.size)
    assert file.stat().st_blocks == 0
    assert memory.discard_verified(HostOffset(0), memory.size) == 0
    assert file.stat().st_blocks == 0


@each(MEMFD, ANONYMOUS)
def test_sixteen_tebibytes_to_plug_into_cost_nothing(make: Maker, kind: Kind) -> None:
    memory = make.memory(kind, 16 * TIB)
    assert memory.held() == 0
    block = ByteCount(2 * MIB)
    last = HostOffset(16 * TIB - block)
    memory.populate(last, block)
    assert memory.held(last, block) == memory.held(HostOffset(8 * TIB), ByteCount(8 * TIB)) == block
    assert memory.discard_verified(last, block) == 0


@each(HUGETLB, MEMFD, SHARED_FILE)
def test_the_whole_of_a_file_is_what_st_blocks_says(make: Maker, kind: Kind) -> None:
    memory = make.memory(kind, 8 * MIB)
    for offset in (0, 2 * MIB, 6 * MIB):
        touch(memory, offset)
    assert memory.held() == st_blocks_bytes(memory) == 3 * kind.page_size


@each(*KINDS)
@pytest.mark.parametrize(
    ("offset", "size"),
    [(-4 * KIB, 4 * MIB), (0, 0), (0, 4 * MIB + 4 * KIB), (4 * MIB, 4 * KIB), (1, 4 * KIB), (0, 4 * KIB - 1), (0, -1)],
)
def test_a_range_that_cannot_be_is_refused_and_nothing_happens(make: Maker, kind: Kind, offset: int, size: int) -> None:
    memory = make.memory(kind, 4 * MIB)
    touch(memory, 0)
    held = memory.held()
    for action in (memory.discard, memory.discard_verified, memory.populate, memory.held):
        with pytest.raises(UsageError, match=r"range=.*whole pages"):
            action(HostOffset(offset), ByteCount(size))
    assert memory.held() == held
    assert memory.view()[0] == 0x5A


@each(MEMFD, ANONYMOUS)
def test_a_kernel_that_does_not_tell_what_it_holds_is_an_error(
    make: Maker, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = make.memory(kind, 4 * MIB)

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "lseek", refuse)
    monkeypatch.setattr(_native, "private_held", refuse)
    with pytest.raises(HostError, match=r"held=0x0\+0x400000: \w+ failed: EPERM"):
        memory.held()


@each(*KINDS)
def test_closing_unmaps_and_closes_everything(make: Maker, kind: Kind) -> None:
    zone = make.zone(kind, size=4 * MIB, hotplug_size=8 * MIB)
    fds = [memory.backing.fd for memory in (part(zone.boot), part(zone.hotplug))]
    addresses = [memory.address for memory in (part(zone.boot), part(zone.hotplug))]
    zone.close()
    zone.close()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    for address in addresses:
        with pytest.raises(LookupError):
            smaps(address)


def test_closing_waits_for_the_last_view(make: Maker) -> None:
    zone = make.zone(MEMFD, size=4 * MIB, hotplug_size=8 * MIB)
    with part(zone.boot).view() as view:
        with pytest.raises(BufferError):
            zone.close()
        view[0] = 1
    zone.close()
    assert part(zone.boot).mapping.closed


@each(*KINDS)
@pytest.mark.parametrize("busy", ["boot", "hotplug"])
def test_a_view_of_one_part_keeps_that_part_only(make: Maker, kind: Kind, busy: str) -> None:
    zone = make.zone(kind, size=4 * MIB, hotplug_size=8 * MIB)
    parts = {"boot": part(zone.boot), "hotplug": part(zone.hotplug)}
    kept = parts.pop(busy)
    (other,) = parts.values()
    with kept.view() as view:
        with pytest.raises(BufferError):
            zone.close()
        assert other.mapping.closed
        assert other.backing.fd == -1
        view[0] = 1
    zone.close()
    assert kept.mapping.closed
    assert kept.backing.fd == -1


@pytest.mark.needs_hugetlb
def test_a_hugetlb_zone_gives_its_pages_back_when_it_closes(make: Maker) -> None:
    zone = make.zone(HUGETLB, size=4 * MIB, hotplug_size=8 * MIB, prefault=True)
    pool = make.hugepages(HUGE, 4)
    assert part(zone.boot).held() == 4 * MIB
    zone.close()
    assert free_pages(pool, 6) == 6
