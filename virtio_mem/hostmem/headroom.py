"""How much memory may be populated before somebody gets killed for it.

Populating asks the kernel for pages, and the kernel says no in two ways. A huge page pool, a full file system or a
NUMA node bound to runs out with an error. A memory cgroup over its limit and a host without memory run out with the
OOM killer, which ends the process, guest and all. So before it populates, a zone adds up what it may take: the least of

- MemAvailable of the host (proc(5)), or what is free or quickly freed on the NUMA node that the zone is bound to;
- limit less usage of this process's memory cgroup and of every cgroup above it. Page cache is part of the usage, and
  goes first under pressure; if it counted in full, a cgroup that reads many files would seem to have nothing left. So
  its inactive pages count as free, and half of the active ones: MemAvailable leaves no more than half to its users;
- for huge pages instead: the pool's free pages less those reserved, on the node too, and the hugetlb cgroup;
- for files: the room on the file system.

Swap is left out: a guest whose new memory goes to swap at once is not served. Whoever looks first and takes later can
be overtaken between the two; `margin` makes that unlikely, nothing makes it impossible.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from vhost_user.errors import HostError
from vhost_user.units import KIB, MIB, ByteCount, format_size
from virtio_mem.hostmem import facts
from virtio_mem.hostmem.facts import ROOT, Mount


class Limit(NamedTuple):
    """Something that bounds what can be populated: `available` bytes of `total` are left of `what`."""

    what: str
    available: int
    total: int
    remedy: str


def margin(size: int) -> ByteCount:
    """What must stay free when `size` bytes of small pages are populated.

    1/512 of the size for page tables (8 bytes for each page of 4 KiB), which are charged as the pages are, and 32 MiB
    for everything else: the kernel charges a cgroup 64 pages ahead on every CPU (256 KiB each, 8 MiB on 32 CPUs), and
    this process and its neighbours go on allocating in the meantime.
    """
    return ByteCount(32 * MIB + size // 512)


def require(size: int, limits: Iterator[Limit], field: str) -> None:
    """Raise HostError for the first of `limits` that has less than `size` bytes left."""
    for limit in limits:
        if size > limit.available:
            left = format_size(max(0, limit.available))
            text = f"needs {format_size(size)}, but {limit.what} has {left} left of {format_size(limit.total)}"
            raise HostError(field, format_size(size), text, limit.remedy)


def memory_limits(node: int | None = None, root: Path = ROOT) -> Iterator[Limit]:
    """What bounds ordinary memory: the host, the node that it is bound to, this process's memory cgroups.

    Raises HostError where the host doesn't tell.
    """
    info = facts.meminfo(root)
    free, total = (facts.counter(info, name, "/proc/meminfo") for name in ("MemAvailable", "MemTotal"))
    yield Limit("the host (MemAvailable)", free, total, "free memory on the host")
    if node is not None:
        local = facts.node_meminfo(node, root)
        names = ("MemFree", "Inactive(file)", "MemTotal")
        free, cache, total = (facts.counter(local, name, f"the meminfo of node {node}") for name in names)
        yield Limit(f"NUMA node {node}", free + cache, total, f"free memory on node {node}")
    yield from _cgroup_limits(
        "memory", "memory.max memory.current", "memory.limit_in_bytes memory.usage_in_bytes", root
    )


def huge_limits(page_size: ByteCount, root: Path = ROOT) -> Iterator[Limit]:
    """What bounds huge pages besides their pool: the hugetlb cgroup."""
    unit, name = (KIB, "KB") if page_size < MIB else (MIB, "MB") if page_size < 1024 * MIB else (1024 * MIB, "GB")
    prefix = f"hugetlb.{page_size // unit}{name}"
    v2, v1 = f"{prefix}.max {prefix}.current", f"{prefix}.limit_in_bytes {prefix}.usage_in_bytes"
    yield from _cgroup_limits("hugetlb", v2, v1, root)


def require_huge_pages(size: int, page_size: ByteCount, node: int | None, field: str, root: Path = ROOT) -> None:
    """Raise HostError where the pool (of `node`, if given) or a hugetlb cgroup can't give `size` bytes."""
    pages = size // page_size
    for where in (None,) if node is None else (None, node):
        pool = facts.huge_pool(page_size, where, root)
        if pages > pool.available:
            limit, remedy = pool.shortage(pages)
            raise HostError(field, format_size(size), limit if where is None else f"{limit}, on node {where}", remedy)
    require(size, huge_limits(page_size, root), field)


def file_limits(fd: int) -> Iterator[Limit]:
    """What bounds a file: the room on its file system. A tmpfs without a size has none."""
    room = os.fstatvfs(fd)
    if room.f_blocks:
        free, total = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
        yield Limit("the file system of the zone's file", free, total, "make room there, or use another file system")


def _cgroup_limits(controller: str, v2: str, v1: str, root: Path) -> Iterator[Limit]:
    """Each cgroup of this process that limits `controller`; `v2` and `v1` name the limit and the usage file of each."""
    for folder in cgroups(controller, root):
        *pairs, stat = _cgroup_files(folder, v2, v1)
        for limit_file, usage_file in pairs:
            limit, usage = _read_size(limit_file), _read_size(usage_file)
            if limit is not None and usage is not None:
                left = limit - usage + _spare_cache(*stat)
                yield Limit(str(limit_file), left, limit, f"raise {limit_file.name} there")


@lru_cache(maxsize=64)  # as the next one: to put paths together takes longer than to read what is there
def _cgroup_files(folder: Path, v2: str, v1: str) -> tuple[tuple[Path, ...], ...]:
    """The limit and the usage file of either version, and the file with the statistics."""
    pairs = (tuple(folder / name for name in names.split()) for names in (v2, v1))
    return (*pairs, (folder / "memory.stat",))


def cgroups(controller: str, root: Path = ROOT) -> tuple[Path, ...]:
    """This process's cgroup of `controller`, version 1 or 2, and those above it up to the top that is mounted."""
    return _cgroup_folders(facts.read_or(root / "proc/self/cgroup", ""), controller, root, facts.mounts(root))


@lru_cache(maxsize=4)
def _cgroup_folders(text: str, controller: str, root: Path, mounts: tuple[Mount, ...]) -> tuple[Path, ...]:
    folders: list[Path] = []
    for line in filter(None, text.split("\n")):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mount in mounts:
            named = mount.fstype == "cgroup" and controller in mount.options
            if named if controllers else mount.fstype == "cgroup2":
                top = root / mount.point.lstrip("/")
                inside = _below(path, mount.subtree)
                folders += (top / part for part in (inside, *inside.parents))
                break
    return tuple(folders)


def _below(path: str, subtree: str) -> Path:
    """A cgroup's path as the mount shows it; the mount's top where the cgroup lies outside of what it shows."""
    inside = Path(path)
    if ".." in inside.parts or not inside.is_relative_to(subtree):
        return Path()
    return inside.relative_to(subtree)


def _read_size(path: Path) -> int | None:
    """A cgroup file's number of bytes; None where there is no such file or no limit."""
    text = facts.read_or(path, "max")
    return None if text == "max" else int(text)


def _spare_cache(stat: Path) -> int:
    """Bytes of page cache that a memory cgroup and those below it can do without; version 1 says `total_` for that."""
    text = facts.read_or(stat, "")
    found: dict[str, str] = dict(re.findall(r"^(?:total_)?((?:in)?active_file) (\d+)$", text, re.MULTILINE))
    return int(found.get("inactive_file", "0")) + int(found.get("active_file", "0")) // 2
