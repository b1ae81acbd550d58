"""Zones of every backing, and the kernel's own counters for the memory of this process."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import host
from vhost_user.units import KIB, MIB, ByteCount, HostOffset
from virtio_mem.hostmem import files
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.zone import Zone, ZoneSpec

HUGE = ByteCount(2 * MIB)


@dataclass(frozen=True)
class Kind:
    """A way to back a zone. `place` says what its file is, if it has one: a file or a directory, on disk or a tmpfs.

    `kind` is that of its boot memory.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    place: str = ""
    kind: str = ""
    page_size: int = 4 * KIB
    marks: tuple[pytest.MarkDecorator, ...] = ()

    @property
    def shared(self) -> bool:
        return "shared" in self.options or "hugepages" in self.options

    @property
    def user_file(self) -> bool:
        """Whether the zone's file is a regular one."""
        return self.place.endswith("file")

    @property
    def hotplug_kind(self) -> str:
        """That of its hotplug region, which is never in a regular file."""
        if not self.user_file:
            return self.kind
        return "memfd" if self.shared else "anonymous"


SHARED = {"shared": True}
ANONYMOUS = Kind("anonymous", kind="anonymous")
MEMFD = Kind("memfd", SHARED, kind="memfd")
HUGETLB = Kind(
    "hugetlb",
    {"hugepages": True, "hugepage_size": HUGE},
    kind="hugetlb",
    page_size=HUGE,
    marks=(pytest.mark.needs_hugetlb, pytest.mark.needs_userfaultfd),
)
SHARED_FILE = Kind("shared-file", SHARED, "disk file", "shared file")
PRIVATE_FILE = Kind("private-file", {}, "disk file", "private file")
SHARED_DIRECTORY = Kind("shared-directory", SHARED, "disk directory", "shared file")
PRIVATE_DIRECTORY = Kind("private-directory", {}, "disk directory", "private file")
SHARED_TMPFS_FILE = Kind("shared-tmpfs-file", SHARED, "tmpfs file", "shared file")
PRIVATE_TMPFS_FILE = Kind("private-tmpfs-file", {}, "tmpfs file", "private file")
SHARED_TMPFS_DIRECTORY = Kind("shared-tmpfs-directory", SHARED, "tmpfs directory", "shared file")
PRIVATE_TMPFS_DIRECTORY = Kind("private-tmpfs-directory", {}, "tmpfs directory", "anonymous")

KINDS = [
    ANONYMOUS,
    MEMFD,
    HUGETLB,
    SHARED_FILE,
    PRIVATE_FILE,
    SHARED_DIRECTORY,
    PRIVATE_DIRECTORY,
    SHARED_TMPFS_FILE,
    PRIVATE_TMPFS_FILE,
    SHARED_TMPFS_DIRECTORY,
    PRIVATE_TMPFS_DIRECTORY,
]


def each(*kinds: Kind) -> pytest.MarkDecorator:
    """Run a test once for each of `kinds`, as its argument `kind`."""
    return pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.name, marks=kind.marks) for kind in kinds])


@dataclass
class Maker:
    """Makes zones whose files and huge pages are there for the length of a test, then closes them."""

    disk: Path
    tmpfs: Path
    hugepages: Callable[[int, int], host.HugePagePool]
    stack: contextlib.ExitStack

    def spec(self, kind: Kind, *, size: int = 0, hotplug_size: int = 0, **options: Any) -> ZoneSpec:
        """A spec for which all is prepared: a file of the right size, enough huge pages."""
        if kind.kind == "hugetlb":
            self.hugepages(kind.page_size, (size + hotplug_size) // kind.page_size)
        where = self.disk if kind.place.startswith("disk") else self.tmpfs
        if kind.user_file:
            where /= f"{kind.name}-{size}-{hotplug_size}"
            where.touch()
            os.truncate(where, size)
        file = where if kind.place else None
        chosen = {"file": file, **kind.options, **options}
        return ZoneSpec("m", ByteCount(size), ByteCount(hotplug_size), **chosen)

    def open(self, spec: ZoneSpec) -> Zone:
        return self.stack.enter_context(Zone(spec))

    def zone(self, kind: Kind, **sizes_and_options: Any) -> Zone:
        return self.open(self.spec(kind, **sizes_and_options))

    def mount(self, fstype: str, options: str = "defaults") -> Path:
        """A directory with a file system of its own."""
        if os.geteuid():
            pytest.skip("needs_mount: only root mounts file systems")
        directory = Path(tempfile.mkdtemp(dir=self.disk))
        self.stack.callback(directory.rmdir)
        done = subprocess.run(
            ["mount", "-t", fstype, "-o", options, "none", directory], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"needs_mount: {done.stderr.strip()}")
        self.stack.callback(lambda: subprocess.run(["umount", directory], check=True))
        return directory

    def memory(self, kind: Kind, size: int, **options: Any) -> HostMemory:
        """A hotplug region and nothing else; boot memory of a kind with a regular file, which has only that."""
        if kind.user_file:
            return part(self.zone(kind, size=size, **options).boot)
        return part(self.zone(kind, hotplug_size=size, **options).hotplug)


def part(memory: HostMemory | None) -> HostMemory:
    """A part that must be there."""
    assert memory is not None
    return memory


def on_tmpfs(path: Path) -> bool:
    return files.examine(path).fstype == "tmpfs"


def smaps(address: int) -> dict[str, int]:
    """The counters, in bytes, of the mapping that `address` lies in."""
    return {name: int(size) * KIB for name, size in re.findall(r"^(\w+): +(\d+) kB$", _entry(address), re.MULTILINE)}


def vm_flags(address: int) -> set[str]:
    """The two-letter flags of the mapping that `address` lies in; see proc(5)."""
    found = re.search(r"^VmFlags: (.*)$", _entry(address), re.MULTILINE)
    assert found
    return set(found[1].split())


def _entry(address: int) -> str:
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, end = (int(border, 16) for border in entry.split(maxsplit=1)[0].split("-"))
        if start <= address < end:
            return entry
    raise LookupError(f"{address:#x} is not mapped")


def numa_policy(address: int) -> tuple[str, dict[int, int]]:
    """The policy of the mapping that has `address`, and its pages on each node; see numa(7).

    Of private memory the kernel makes one mapping with a neighbour that has the same policy.
    """
    lines = [line.split() for line in Path("/proc/self/numa_maps").read_text().splitlines()]
    _, policy, *items = max((line for line in lines if int(line[0], 16) <= address), key=lambda line: int(line[0], 16))
    return policy, {int(node): int(pages) for node, pages in re.findall(r"N(\d+)=(\d+)", " ".join(items))}


def allocate(file: Path) -> None:
    """Have the file system get all of a file's blocks, without anything being written."""
    with file.open("r+b") as opened:
        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


def st_blocks_bytes(memory: HostMemory) -> int:
    """What the file behind a memory takes, by fstat(2)."""
    return os.fstat(memory.backing.fd).st_blocks * 512


def fill(memory: HostMemory, offset: int, size: int, pattern: bytes = b"virtio-mem block") -> None:
    """Write a pattern all over a range."""
    chunk = min(size, 16 * MIB)
    data = pattern * (chunk // len(pattern))
    with memory.view(HostOffset(offset), ByteCount(size)) as view:
        for start in range(0, size, chunk):
            view[start : start + chunk] = data[: size - start]


def touch(memory: HostMemory, offset: int) -> None:
    """Write one byte."""
    with memory.view(HostOffset(offset), ByteCount(1)) as view:
        view[0] = 0x5A


def free_pages(pool: host.HugePagePool, expected: int, seconds: float = 2) -> int:
    """The free pages of a pool, once they are as expected or long after: compaction may hold one for a moment."""
    deadline = time.monotonic() + seconds
    while pool.free != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return pool.free


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked process; its exit status, or the negated number of the signal that ended it."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    """This process may open nothing more; what is open stays so."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def effective_user(uid: int) -> Iterator[None]:
    """Do something with another user's rights."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
