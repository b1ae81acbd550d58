"""What was asked of a zone's memory, and what came of it.

Most combinations of options and backings are legal and some do nothing: KSM merges private memory only, huge pages are
huge already. Each option becomes a Setting that tells both, and why they differ. Nobody is warned of a default.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterable
from typing import NamedTuple

from vhost_user.errors import HostError, UsageError
from virtio_mem.hostmem import facts
from virtio_mem.hostmem.backing import Backing

log = logging.getLogger("virtio_mem")


class Setting(NamedTuple):
    """An option as it was requested and as it is, with the reason if they differ (or if there is more to say)."""

    name: str
    requested: object
    effective: object
    reason: str = ""


def switch(name: str, requested: bool, obstacle: str) -> Setting:
    """An on/off option that has no effect if there is an obstacle."""
    return Setting(name, requested, requested and not obstacle, obstacle if requested else "")


def mergeable(requested: bool, backing: Backing) -> Setting:
    """Whether KSM merges equal pages of the memory."""
    obstacle = backing.no_merge
    if not obstacle:
        mode = facts.ksm_mode()
        if not mode:
            obstacle = "this kernel has no KSM"
        elif mode != "1":
            obstacle = f"/sys/kernel/mm/ksm/run is {mode}: the memory is marked and merges once 1 is written there"
    return switch("mergeable", requested, obstacle)


def transparent_huge_pages(requested: bool, backing: Backing) -> Setting:
    """Whether the kernel may use huge pages behind the scenes."""
    return switch("thp", requested, backing.no_thp)


def reserve(requested: bool, backing: Backing) -> Setting:
    """Whether boot memory is promised by the kernel when it is mapped."""
    return switch("reserve", requested, backing.no_reserve)


def host_numa_node(node: int | None, backing: Backing) -> Setting:
    """The NUMA node that all pages come from; None binds to none.

    Raises UsageError for a node that doesn't exist or memory that can't be bound, HostError for a node without memory.
    """
    if node is not None:
        online = facts.online_nodes()
        if node not in online:
            have = f"this host has nodes {', '.join(map(str, online))}" if online else "this kernel has no NUMA nodes"
            raise UsageError("host_numa_node", node, f"no such node: {have}", "name one of those, or none")
        if node not in facts.memory_nodes():
            raise HostError("host_numa_node", node, "this node has no memory", "name a node that has")
        if backing.no_bind:
            raise UsageError("host_numa_node", node, backing.no_bind, "use shared=off, a tmpfs, or leave it out")
    return Setting("host_numa_node", node, node)


def advice(settings: Iterable[Setting], backing: Backing) -> list[int]:
    """What to tell madvise(2). Memory is marked for KSM even while KSM is stopped: it may be started later."""
    wanted = {setting.name: setting for setting in settings}
    numbers: list[int] = []
    if wanted["mergeable"].requested and not backing.no_merge and facts.ksm_mode():
        numbers.append(mmap.MADV_MERGEABLE)
    if not backing.no_thp:
        numbers.append(mmap.MADV_HUGEPAGE if wanted["thp"].requested else mmap.MADV_NOHUGEPAGE)
    return numbers


def warn(zone: str, settings: Iterable[Setting], explicit: frozenset[str]) -> None:
    """Log each option that the user wrote and that has no effect, and huge pages that the host doesn't have yet."""
    for setting in settings:
        if setting.name == "hugepages" and setting.requested and setting.reason:
            log.warning("zone %s: hugepages=on: %s", zone, setting.reason)
        if setting.name in explicit and setting.requested != setting.effective:
            log.warning(
                "zone %s: %s=%s has no effect: %s", zone, setting.name, _shown(setting.requested), setting.reason
            )


def _shown(value: object) -> object:
    """A value as options have it."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value
