"""What stands against a machine's memory, on this host and with this daemon, before a guest is there to suffer from it.

Memory is made as the options say, and let go again; nothing of it is populated. Whether it fits is asked of the host's
own limits, of all zones together: each of them may fit alone.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from vhost_user.errors import FieldError, HostError
from vhost_user.frontend import Frontend
from vhost_user.mapping import PAGE_SIZE
from vhost_user.message import F_LOG_ALL, F_PROTOCOL_FEATURES, VIRTIO_F_IOMMU_PLATFORM, ProtocolFeature
from vhost_user.units import U64_MAX, ByteCount, format_size
from virtio_mem.config import VmMemoryConfig
from virtio_mem.hostmem import facts, headroom
from virtio_mem.hostmem.backing import Hugetlb, SharedFile
from virtio_mem.hostmem.files import unallocated
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.managed_zone import ManagedZone
from virtio_mem.manager import MemoryManager
from virtio_mem.picture.sizes import human_size

_UNTIED = U64_MAX & ~(F_LOG_ALL | VIRTIO_F_IOMMU_PLATFORM)
"""Virtio features that are agreed to without more to do: a device may insist on one of its own."""


_NO_LIMIT = 1 << 62
"""Version 1 of cgroups has the largest number of whole pages where nothing limits."""


class Finding(NamedTuple):
    """`says` something about `what`; `bad` where it keeps the machine from working as asked for."""

    what: str
    says: str
    bad: bool = False


def host(root: Path = facts.ROOT) -> Iterator[Finding]:
    """What this host can give, and how it treats memory. `root` is where /proc and /sys hang."""
    yield from _limits(headroom.memory_limits(root=root))
    nodes = facts.memory_nodes(root)
    for node in nodes if len(nodes) > 1 else ():
        of_node = (each for each in headroom.memory_limits(node, root) if each.what == f"NUMA node {node}")
        yield from _limits(of_node)
    for size in facts.hugepage_sizes(root):
        for where in (None, *(nodes if len(nodes) > 1 else ())):
            pool = facts.huge_pool(size, where, root)
            name = f"huge pages of {format_size(size)}" + ("" if where is None else f", node {where}")
            said = f"{pool.free} of {pool.total} are free, and {pool.reserved} of those reserved"
            more = max(0, pool.overcommit - pool.surplus)
            yield Finding(name, said + (f"; {more} more by overcommit" if more else ""))
        yield from _limits(headroom.huge_limits(size, root))
    thp = f"private memory {facts.thp_mode(root)}, shared memory {facts.shmem_thp_mode(root)}"
    yield Finding("transparent huge pages", thp)
    yield Finding("NUMA nodes with memory", ", ".join(map(str, nodes)) or "none told of")


def machine(config: VmMemoryConfig, socket: str | None = None) -> Iterator[Finding]:
    """What the memory of these options would be, and with `socket` what the daemon there would have of it."""
    for warning in config.warnings:
        yield Finding("options", warning)
    with ExitStack() as stack:
        try:
            manager = stack.enter_context(MemoryManager(_not_populated(config)))
        except FieldError as error:
            yield Finding("memory", str(error), bad=True)
            return
        for zone in manager.zones.values():
            yield from _zone(zone)
        yield from _fits(list(manager.zones.values()))
        if socket is not None:
            yield from daemon(socket, manager)


def daemon(socket: str, manager: MemoryManager | None = None) -> Iterator[Finding]:
    """What the daemon at `socket` agrees to, and with `manager`, how it would be given that memory."""
    try:
        with Frontend.connect(socket, features=_UNTIED) as frontend:
            yield Finding("virtio features", f"{frontend.offered & ~F_PROTOCOL_FEATURES:#x}")
            agreed = [f"{bit.name}" for bit in ProtocolFeature if frontend.has(bit)]
            yield Finding("protocol features", ", ".join(agreed) or "none")
            if frontend.queue_count is not None:
                yield Finding("queues", str(frontend.queue_count))
            slots = frontend.has(ProtocolFeature.CONFIGURE_MEM_SLOTS)
            how = "one by one" if slots else "by whole tables: each change tells it of all of them anew"
            yield Finding("memory regions", f"{frontend.regions.slots} at most, {how}")
            if manager is not None:
                share = manager.share(frontend, name=socket)
                yield Finding("share of the memory", str(share.plan))
                share.close()
    except FieldError as error:
        yield Finding("daemon", str(error), bad=True)


def _limits(limits: Iterable[headroom.Limit]) -> Iterator[Finding]:
    for limit in limits:
        if limit.total < _NO_LIMIT:
            yield Finding(limit.what, f"{human_size(max(0, limit.available))} left of {human_size(limit.total)}")


def _not_populated(config: VmMemoryConfig) -> VmMemoryConfig:
    """The same without prefault, which would have the host allocate all of boot memory."""
    zones = tuple(replace(zone, prefault=False) for zone in config.zones)
    return replace(config, memory=replace(config.memory, prefault=False), zones=zones)


def _zone(zone: ManagedZone) -> Iterator[Finding]:
    """The zone's memory, and each option that comes to something else than it says."""
    boot = [f"boot memory at {part.addr:#x}+{part.size:#x}" for part in zone.boot]
    region = [f"a region at {zone.hotplug.addr:#x}+{zone.hotplug.size:#x}"] if zone.hotplug else []
    if zone.service is not None:
        region.append(f"blocks of {format_size(zone.service.device.geometry.block_size)}")
    pages = f"{zone.zone.kind} memory in pages of {format_size(zone.zone.page_size)}"
    yield Finding(f"zone {zone.id}", ", ".join((pages, *boot, *region)))
    if zone.hotplug and zone.service is None:
        why = "can be plugged by virtio-mem only: resizing by ACPI is not there; add hotplug_method=virtio-mem"
        yield Finding(f"zone {zone.id}", f"hotplug_size={format_size(zone.hotplug.size)}: {why}", bad=True)
    for name, requested, effective, reason in zone.zone.settings:
        if reason and name in zone.plan.spec.explicit:
            came = "" if effective == requested else f" comes to {_shown(effective)}"
            yield Finding(f"zone {zone.id}", f"{name}={_shown(requested)}{came}: {reason}")


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    return ("off", "on")[value] if isinstance(value, bool) else str(value)


class _Needs:
    """Bytes of one page size: by the node of the host that they are bound to, and of all, those that `promised` says
    are reserved for the memory that was just made."""

    def __init__(self) -> None:
        self.by_node: Counter[int | None] = Counter()
        self.promised = 0

    def together(self) -> Iterator[tuple[int | None, int]]:
        """What each node has to have, and before that the host, unless that is the same."""
        if len(self.by_node) > 1:
            yield None, self.by_node.total()
        for node, need in self.by_node.items():
            if node is not None or len(self.by_node) == 1:
                yield node, need


class _Files:
    """Bytes by which the files on one file system may grow, those of `zones`; `fd` is one of them."""

    def __init__(self) -> None:
        self.growth = 0
        self.fd = -1
        self.zones: dict[str, None] = {}


def _fits(zones: list[ManagedZone]) -> Iterator[Finding]:
    """Whether the host has what the guest begins with, and what it may ever have."""
    for when, bad, name in (("at start", True, "hotplugged_size"), ("with all plugged", False, "hotplug_size")):
        needs: defaultdict[ByteCount, _Needs] = defaultdict(_Needs)
        disks: defaultdict[int, _Files] = defaultdict(_Files)
        for zone in zones:
            hotplug = zone.plan.hotplugged_size if name == "hotplugged_size" else zone.plan.spec.hotplug_size
            for part, asked in ((zone.zone.boot, zone.plan.spec.size), (zone.zone.hotplug, hotplug)):
                size = int(asked)
                if part is not None and isinstance(part.backing, SharedFile):
                    size = min(size, unallocated(part.backing.fd))
                    disk = disks[os.fstat(part.backing.fd).st_dev]
                    disk.growth, disk.fd, disk.zones[zone.id] = disk.growth + size, part.backing.fd, None
                if part is not None and not _on_disk(part):
                    needs[part.page_size].by_node[zone.plan.spec.host_numa_node] += size
                    if isinstance(part.backing, Hugetlb) and part.backing.reserved:
                        needs[part.page_size].promised += size
        for page_size, all_of_them in needs.items():
            for node, need in all_of_them.together():
                where = f"{human_size(need)} {when}" + ("" if node is None else f", of node {node}")
                yield _judged(where, partial(_require, need, all_of_them.promised, page_size, node), bad)
        for disk in disks.values():
            where = f"{human_size(disk.growth)} {when}, in files of {', '.join(disk.zones)}"
            yield _judged(where, partial(headroom.require, disk.growth, headroom.file_limits(disk.fd), "size"), bad)


def _judged(where: str, require: Callable[[], None], bad: bool) -> Finding:
    try:
        require()
    except HostError as error:
        return Finding(where, f"{error.limit}; {error.remedy}", bad)
    return Finding(where, "there is as much now")


def _require(need: int, promised: int, page_size: ByteCount, node: int | None) -> None:
    """HostError where the host, or a node of it, has no `need` bytes, of which `promised` are reserved for us."""
    if page_size > PAGE_SIZE:
        headroom.require_huge_pages(max(0, need - promised), page_size, node, "size")
        headroom.require(need, headroom.huge_limits(page_size), "size")
    else:
        headroom.require(need + headroom.margin(need), headroom.memory_limits(node), "size")


def _on_disk(part: HostMemory) -> bool:
    return isinstance(part.backing, SharedFile) and not part.backing.in_memory
