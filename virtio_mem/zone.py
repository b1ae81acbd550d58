"""A zone: guest memory of one kind, with the boot memory that is always there and a region to plug more into.

The two parts have files of their own. A regular file of the user's is boot memory and nothing else: every driver begins
with UNPLUG ALL, which gives the hotplug region back to the host, and with it would go whatever the file had there. The
region is what it would be without the file, of the file's huge pages where it is on a hugetlbfs. A directory is where
both parts have their unnamed files. A file that nobody can see and that would be memory itself, as in a directory on a
tmpfs with shared=off, would only take the memory twice: such a zone is anonymous memory.

Boot memory is reserved and prefaulted as a whole if asked for. The hotplug region never is: it may be hundreds of times
what the host has, and costs nothing until blocks of it are plugged and populated. Who asked for it is warned of that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vhost_user.errors import HostError, UsageError
from vhost_user.mapping import PAGE_SIZE
from vhost_user.units import ByteCount, HostOffset, align_up, format_size
from virtio_mem.hostmem import facts, files, headroom, settings
from virtio_mem.hostmem.backing import Anonymous, Backing, Hugetlb, Memfd, PrivateFile, SharedFile
from virtio_mem.hostmem.files import Place
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.hostmem.settings import Setting

HUGETLBFS = "hugetlbfs"

_LARGEST_FILE = 2**63 - 1
"""File offsets are signed 64-bit numbers."""


@dataclass(frozen=True)
class ZoneSpec:
    """What a zone is to be; sizes in bytes. `explicit` has the names of the options that the user really wrote.

    `size` is boot memory, `hotplug_size` the region to plug into; either may be 0 but not both. `file` is a regular
    file of at least `size` bytes, for boot memory, or a directory for unnamed files. `hugepages` are always shared;
    without `hugepage_size` they have the kernel's default size.
    """

    id: str
    size: ByteCount
    hotplug_size: ByteCount = ByteCount(0)
    file: Path | None = None
    shared: bool = False
    hugepages: bool = False
    hugepage_size: ByteCount | None = None
    host_numa_node: int | None = None
    prefault: bool = False
    reserve: bool = False
    mergeable: bool = False
    thp: bool = True
    explicit: frozenset[str] = frozenset()


class Zone:
    """The host memory of a zone. Everything is open and mapped, or an error was raised and nothing is.

    `boot` and `hotplug` are the two parts, None where a part has no bytes. Raises UsageError for a spec that can't be
    (sizes, file, node), HostError for one that this host can't serve (huge pages, permissions, address space). Use as a
    context manager, or call `close()`.
    """

    def __init__(self, spec: ZoneSpec) -> None:
        self.spec = spec
        self._place = files.examine(spec.file) if spec.file is not None else None
        self.page_size = _page_size(spec, self._place)
        _check_sizes(spec, self.page_size)
        with ExitStack() as undo:
            boot = self._open(undo, "boot", spec.size)
            with _told_as("hotplug_size", format_size(spec.hotplug_size), "size"):
                hotplug = self._open(undo, "hotplug", spec.hotplug_size)
            parts = {settings.BOOT: boot, settings.HOTPLUG: hotplug}
            backings = {part: backing for part, backing in parts.items() if backing is not None}
            sample = next(iter(backings.values()))
            self.kind = sample.kind
            self.shared = sample.shared
            self.settings = _settings(spec, self._place, backings)
            self.boot = self._map(undo, boot, spec.size, reserve=spec.reserve)
            with _told_as("hotplug_size", format_size(spec.hotplug_size), "size"):
                self.hotplug = self._map(undo, hotplug, spec.hotplug_size, reserve=False)
            if spec.prefault and self.boot is not None:
                with _told_as("prefault", "on", "populate"):
                    self.boot.populate(HostOffset(0), spec.size)
            undo.pop_all()
        settings.warn(spec.id, self.settings, spec.explicit)

    def _open(self, undo: ExitStack, part: str, size: ByteCount) -> Backing | None:
        """What backs a part, whose closing is left to `undo`."""
        if not size:
            return None
        backing = self._backing(part, size)
        undo.callback(backing.close)
        if part == "hotplug" and isinstance(backing, SharedFile) and not files.can_punch_holes(backing.fd):
            limit = "its file system can't give back a part of a file, so memory could never be unplugged"
            raise HostError("file", self.spec.file, limit, "use another file system, shared=off, or no hotplug_size")
        return backing

    def _backing(self, part: str, size: ByteCount) -> Backing:
        spec, place, start = self.spec, self._place, HostOffset(0)
        reserved = spec.reserve and part == "boot"
        if place is None or (part == "hotplug" and not place.directory):
            name = f"virtio-mem:{spec.id}:{part}"
            if self.page_size > PAGE_SIZE:
                return Hugetlb(files.memfd(name, size, self.page_size), start, self.page_size, reserved=reserved)
            return Memfd(files.memfd(name, size)) if spec.shared else Anonymous()
        if _needs_no_file(spec, place):
            return Anonymous()
        if place.directory:
            fd = files.unnamed_file(place.path, size)
        else:
            fd = files.user_file(place.path, size, shared=spec.shared or spec.hugepages)
        if place.fstype == HUGETLBFS:
            return Hugetlb(fd, start, self.page_size, reserved=reserved)
        return SharedFile(fd, start, place) if spec.shared else PrivateFile(fd, start, place)

    def _map(self, undo: ExitStack, backing: Backing | None, size: ByteCount, *, reserve: bool) -> HostMemory | None:
        """A part, whose closing is left to `undo`."""
        if backing is None:
            return None
        node = self.spec.host_numa_node
        if reserve and isinstance(backing, Hugetlb):
            with _told_as("reserve", "on", "populate"):
                headroom.require_huge_pages(size, self.page_size, node, "populate")
        advice = settings.advice(self.settings, backing)
        memory = HostMemory(backing, size, node=node, advice=advice, reserve=reserve and not backing.no_reserve)
        undo.callback(memory.close)
        return memory

    def info(self) -> dict[str, Any]:
        """What the zone is, what was asked of it and what came of that, and the bytes that the host holds: plain data.

        `held` of a part is None where the kernel will not tell.
        """
        return {
            "id": self.spec.id,
            "kind": self.kind,
            "file": None if self.spec.file is None else str(self.spec.file),
            "size": int(self.spec.size),
            "hotplug_size": int(self.spec.hotplug_size),
            "page_size": int(self.page_size),
            "settings": {name: {"requested": a, "effective": b, "reason": c} for name, a, b, c in self.settings},
            "held": {"boot": _held(self.boot), "hotplug": _held(self.hotplug)},
        }

    def close(self) -> None:
        """Unmap and close. BufferError while a view of a part lives: it stays, alone, and closing can be repeated."""
        with ExitStack() as parts:
            for part in (self.boot, self.hotplug):
                if part is not None:
                    parts.callback(part.close)

    def __enter__(self) -> Zone:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _told_as(option: str, value: object, field: str) -> Iterator[None]:
    """A refusal that names `field`, as the part of a zone calls it, names the option that asked for it instead."""
    try:
        yield
    except HostError as error:
        if error.field != field:
            raise
        raise HostError(option, value, error.limit, error.remedy, errno=error.errno) from error


def _page_size(spec: ZoneSpec, place: Place | None) -> ByteCount:
    """The size of the pages that the zone's memory comes in."""
    if place is not None and place.fstype == HUGETLBFS:
        if not (spec.shared or spec.hugepages):
            limit = f"file={place.path} is on a hugetlbfs, and huge pages are always shared"
            raise UsageError("shared", "off", limit, "use shared=on")
        if spec.hugepage_size not in (None, place.block_size):
            limit = f"the pages of the hugetlbfs at file={place.path} have {format_size(place.block_size)}"
            raise UsageError("hugepage_size", format_size(spec.hugepage_size), limit, "leave it out")
        return place.block_size
    if not spec.hugepages:
        if spec.hugepage_size is not None:
            raise UsageError("hugepage_size", format_size(spec.hugepage_size), "needs huge pages", "add hugepages=on")
        return ByteCount(PAGE_SIZE)
    if place is not None:
        limit = f"file={place.path} is on {place.fstype}, which has no huge pages"
        raise UsageError("hugepages", "on", limit, "leave file out, or name a file or directory on a hugetlbfs")
    size, have = spec.hugepage_size or facts.default_hugepage_size(), facts.hugepage_sizes()
    if size not in have:
        limit = f"the kernel's huge pages have {', '.join(map(format_size, have)) or 'no sizes at all'}"
        raise HostError("hugepage_size", format_size(size), limit, "name one of those")
    return size


def _needs_no_file(spec: ZoneSpec, place: Place) -> bool:
    """Whether an unnamed file would do nothing but take each page a second time."""
    return place.directory and place.in_memory and not spec.shared


def _check_sizes(spec: ZoneSpec, page_size: ByteCount) -> None:
    """Both parts are whole pages, there is at least one, and the two together fit a file."""
    for field, size in (("size", spec.size), ("hotplug_size", spec.hotplug_size)):
        if size < 0 or size % page_size:
            down, up = max(0, size // page_size * page_size), align_up(max(1, size), page_size)
            limit = f"not a multiple of the page size, {format_size(page_size)}"
            raise UsageError(field, format_size(size), limit, f"use {format_size(down)} or {format_size(up)}")
    total = spec.size + spec.hotplug_size
    if not 0 < total <= _LARGEST_FILE:
        limit = f"size and hotplug_size together are more than 0 and at most {_LARGEST_FILE} bytes"
        raise UsageError("size", format_size(total), limit)


def _settings(spec: ZoneSpec, place: Place | None, parts: Mapping[str, Backing]) -> tuple[Setting, ...]:
    """Every option that can come to nothing or to something else, for a zone of these parts."""
    backing = next(iter(parts.values()))
    huge = isinstance(backing, Hugetlb)
    why_shared = "" if backing.shared == spec.shared else "huge pages are always shared"
    why_huge = "" if huge == spec.hugepages else "the file is on a hugetlbfs"
    return (
        _file(spec, place, parts),
        Setting("shared", spec.shared, backing.shared, why_shared),
        Setting("hugepages", spec.hugepages, huge, why_huge or _short_pool(spec, backing)),
        Setting("hugepage_size", spec.hugepage_size, backing.page_size if huge else None),
        settings.host_numa_node(spec.host_numa_node, parts),
        Setting("prefault", spec.prefault, spec.prefault),
        settings.reserve(spec.reserve, parts),
        settings.mergeable(spec.mergeable, parts),
        settings.transparent_huge_pages(spec.thp, parts),
    )


def _short_pool(spec: ZoneSpec, backing: Backing) -> str:
    """What to say where boot memory is of huge pages that the host doesn't have, and nothing asks for them now."""
    if not isinstance(backing, Hugetlb) or not spec.size or spec.prefault or spec.reserve:
        return ""
    try:
        backing.require_headroom(spec.size, spec.host_numa_node)
    except HostError as error:
        return f"boot memory, once it is touched, {error.limit}; {error.remedy}"
    return ""


def _file(spec: ZoneSpec, place: Place | None, parts: Mapping[str, Backing]) -> Setting:
    if place is None:
        return Setting("file", None, None)
    name, hotplug = str(spec.file), parts.get(settings.HOTPLUG)
    if _needs_no_file(spec, place):
        why = "private memory needs no file where files are memory: it is anonymous; shared=on makes files there"
        return Setting("file", name, None, why)
    if place.directory or hotplug is None:
        return Setting("file", name, name)
    if not spec.size:
        return Setting("file", name, None, "a regular file is for boot memory only, of which the zone has none")
    return Setting("file", name, name, f"boot memory only; the hotplug region is {hotplug.kind} memory")


def _held(part: HostMemory | None) -> int | None:
    """What the host holds for a part: 0 for one that isn't there, None where the kernel will not tell."""
    if part is None:
        return 0
    try:
        return int(part.held())
    except HostError:
        return None
