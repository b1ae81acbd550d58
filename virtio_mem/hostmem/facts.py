"""What this host has, as /proc and /sys tell it: huge page pools, NUMA nodes, transparent huge pages, KSM, mounts.

Every function reads anew, because an operator may change all of this at run time. `root` is where /proc and /sys hang:
"/" except in tests. Sources: Documentation/admin-guide/mm/{hugetlbpage,transhuge,ksm,numaperf}.rst in the kernel tree,
proc(5) for mountinfo and fdinfo.
"""

from __future__ import annotations

import errno
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from vhost_user.errors import HostError
from vhost_user.units import KIB, ByteCount, format_size

ROOT = Path("/")
_PAGE = 1 << 16
_HUGEPAGES = "sys/kernel/mm/hugepages"
_THP = "sys/kernel/mm/transparent_hugepage"
_NODES = "sys/devices/system/node"

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENODEV)
"""No such file; ENODEV is what the file of a cgroup or device answers that is gone since it was opened."""

_REMEDIES = {
    errno.EACCES: "give read access",
    errno.EMFILE: "raise this process's limit of open files (RLIMIT_NOFILE)",
    errno.ENFILE: "raise /proc/sys/fs/file-max",
}


def read_or(path: Path, default: str) -> str:
    """The text of a file in /proc or /sys without the newline, or `default` where this kernel has no such file. Paths
    in it are as Python has them, and may have any letter: lines end at a newline, and nowhere else.

    Raises HostError where there is one that can't be read: a default in its place would be a fact made up.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = [os.read(fd, _PAGE)]
            while parts[-1]:
                parts.append(os.read(fd, _PAGE))
        finally:
            os.close(fd)
        return os.fsdecode(b"".join(parts)).removesuffix("\n")
    except OSError as error:
        if error.errno in _ABSENT:
            return default
        raise HostError.from_os_error("host", path, "read", error, _REMEDIES.get(error.errno or 0, "")) from error


def _counters(text: str) -> dict[str, ByteCount]:
    """The lines `name: number kB`, in bytes. A node's lines begin with the words "Node" and its number."""
    found = re.findall(r"^(?:Node \d+ )?(\S+):\s*(\d+) kB$", text, re.MULTILINE)
    return {name: ByteCount(int(size) * KIB) for name, size in found}


def counter(info: dict[str, ByteCount], name: str, source: str) -> ByteCount:
    """One of the counters that `source` has told; HostError where it has told no such thing."""
    if name not in info:
        raise HostError("host", name, f"{source} doesn't tell", "mount /proc and /sys")
    return info[name]


def meminfo(root: Path = ROOT) -> dict[str, ByteCount]:
    """The host's memory counters, in bytes: `MemAvailable`, `Hugepagesize` ..."""
    return _counters(read_or(root / "proc/meminfo", ""))


def node_meminfo(node: int, root: Path = ROOT) -> dict[str, ByteCount]:
    """A NUMA node's memory counters, in bytes: `MemFree`, `Inactive(file)` ..."""
    return _counters(read_or(root / _NODES / f"node{node}" / "meminfo", ""))


class HugePool(NamedTuple):
    """The huge pages of one size, on the whole host or on one node; counts are pages.

    `reserved` pages are free but promised to mappings that have yet to touch them. Up to `overcommit` pages beyond
    the pool may be taken from ordinary memory, `surplus` of which are taken already.
    """

    page_size: ByteCount
    total: int
    free: int
    reserved: int
    surplus: int
    overcommit: int
    sysctl: str
    """The file that sets the size of the pool."""

    @property
    def available(self) -> int:
        """Pages that a mapping without a reservation can still get."""
        return max(0, self.free - self.reserved) + max(0, self.overcommit - self.surplus)

    def shortage(self, pages: int) -> tuple[str, str]:
        """What to say when `pages` cannot be had: the limit, and the way out."""
        size = format_size(self.page_size)
        limit = (
            f"needs {pages} huge pages of {size}; of {self.total} in the pool {self.free} are free"
            f" and {self.reserved} of those are reserved"
        )
        short = max(0, pages - self.available)
        return limit, f"free {short} of them, or write {self.total - self.surplus + short} to {self.sysctl}"


def hugepage_sizes(root: Path = ROOT) -> list[ByteCount]:
    """The huge page sizes that the kernel has, smallest first; empty where it was built without hugetlb."""
    names = (entry.name for entry in (root / _HUGEPAGES).glob("hugepages-*kB"))
    return sorted(ByteCount(int(name[len("hugepages-") : -len("kB")]) * KIB) for name in names)


def default_hugepage_size(root: Path = ROOT) -> ByteCount:
    """The size that MFD_HUGETLB means when none is named. Raises HostError where there are no huge pages."""
    size = meminfo(root).get("Hugepagesize")
    if size is None:
        raise HostError("hugepages", "on", "this kernel has no huge pages", "use hugepages=off")
    return size


def huge_pool(page_size: ByteCount, node: int | None = None, root: Path = ROOT) -> HugePool:
    """The pool of `page_size` pages. With `node`, its share of the pool: reservations are known for the host only."""
    folder = f"hugepages-{page_size // KIB}kB"
    host = f"{_HUGEPAGES}/{folder}"
    counted = host if node is None else f"{_NODES}/node{node}/hugepages/{folder}"

    def pages(directory: str, name: str) -> int:
        return int(read_or(root / directory / name, "0"))

    return HugePool(
        page_size,
        total=pages(counted, "nr_hugepages"),
        free=pages(counted, "free_hugepages"),
        reserved=pages(host, "resv_hugepages") if node is None else 0,
        surplus=pages(counted, "surplus_hugepages"),
        overcommit=pages(host, "nr_overcommit_hugepages"),
        sysctl=f"/{counted}/nr_hugepages",
    )


def parse_id_list(text: str) -> list[int]:
    """The kernel's list format: "0-2,5" is 0, 1, 2 and 5."""
    ids: list[int] = []
    for item in filter(None, text.split(",")):
        first, _, last = item.partition("-")
        ids.extend(range(int(first), int(last or first) + 1))
    return ids


def online_nodes(root: Path = ROOT) -> list[int]:
    """The NUMA nodes that are online; empty where the kernel was built without NUMA."""
    return parse_id_list(read_or(root / _NODES / "online", ""))


def memory_nodes(root: Path = ROOT) -> list[int]:
    """The NUMA nodes that have memory."""
    return parse_id_list(read_or(root / _NODES / "has_memory", ""))


def _selected(path: Path) -> str:
    """The word in brackets of a file such as "always [madvise] never"; "never" where there is no such file."""
    found = re.search(r"\[(\S+)\]", read_or(path, ""))
    return found[1] if found else "never"


def _thp_mode(name: str, root: Path) -> str:
    """The kernel's choice for huge pages of the PMD size, which may have one of its own or inherit the general one."""
    size = int(read_or(root / _THP / "hpage_pmd_size", "0"))
    general = _selected(root / _THP / name)
    own = root / _THP / f"hugepages-{size // KIB}kB" / name
    if general in ("deny", "force") or not own.exists():
        return general
    mode = _selected(own)
    return general if mode == "inherit" else mode


def thp_mode(root: Path = ROOT) -> str:
    """Whether anonymous memory gets transparent huge pages: always, madvise or never."""
    return _thp_mode("enabled", root)


def shmem_thp_mode(root: Path = ROOT) -> str:
    """Whether memfds get transparent huge pages: always, within_size, advise, never, deny or force."""
    return _thp_mode("shmem_enabled", root)


def ksm_mode(root: Path = ROOT) -> str:
    """What /sys/kernel/mm/ksm/run says: "1" merging, "0" stopped, "2" unmerging; "" without KSM in the kernel."""
    return read_or(root / "sys/kernel/mm/ksm/run", "")


class Mount(NamedTuple):
    """One line of mountinfo: `subtree` of the file system is what shows at `point`."""

    id: int
    subtree: str
    point: str
    fstype: str
    options: tuple[str, ...]


def _unescape(field: str) -> str:
    r"""Blanks, tabs, newlines and backslashes are \ooo in mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)


def mounts(root: Path = ROOT) -> tuple[Mount, ...]:
    """This process's mounts; `options` are those of the file system, not of the mount."""
    return _parsed_mounts(read_or(root / "proc/self/mountinfo", ""))


@lru_cache(maxsize=2)  # there can be hundreds, they seldom change, and each PLUG that populates asks
def _parsed_mounts(text: str) -> tuple[Mount, ...]:
    found = []
    for line in filter(None, text.split("\n")):
        before, _, after = line.partition(" - ")
        fields, (fstype, _, words) = before.split(" "), after.split(" ", 2)
        options = tuple(words.split(","))
        found.append(Mount(int(fields[0]), _unescape(fields[3]), _unescape(fields[4]), fstype, options))
    return tuple(found)


def mount_of(fd: int) -> Mount | None:
    """The mount that a file was opened on, or None for a file on none of ours (a memfd, another mount namespace)."""
    found = re.search(r"^mnt_id:\s*(\d+)$", read_or(Path(f"/proc/self/fdinfo/{fd}"), ""), re.MULTILINE)
    return next((mount for mount in mounts() if found and mount.id == int(found[1])), None)
