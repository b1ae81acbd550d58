"""What was asked of a zone's memory, and what came of it.

Most combinations of options and backings are legal and some do nothing: KSM merges private memory only, huge pages are
huge already. Each option becomes a Setting that tells both, and why they differ. Nobody is warned of a default.

A zone's two parts can differ in what an option does for them: `parts` has the backing of each that there is, by its
name. An option that does something for one of them has an effect, and its reason tells of the other.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vhost_user.errors import HostError, UsageError
from virtio_mem.hostmem import facts
from virtio_mem.hostmem.backing import Backing

log = logging.getLogger("virtio_mem")

BOOT, HOTPLUG = "boot memory", "the hotplug region"
"""A zone's parts, by the names that they have in reasons."""

BOOT_ONLY = "memory that is not plugged yet is not paid for; only boot memory is reserved"
"""Why reserve=on does nothing for a hotplug region."""


class Setting(NamedTuple):
    """An option as it was requested and as it is, with the reason if they differ (or if there is more to say)."""

    name: str
    requested: object
    effective: object
    reason: str = ""


def switch(name: str, requested: bool, obstacles: Mapping[str, str]) -> Setting:
    """An on/off option; `obstacles` has for each part what keeps it from having an effect there, empty for nothing."""
    if not requested:
        return Setting(name, False, False)
    reasons = set(obstacles.values())
    each = (f"not for {part}: {why}" for part, why in obstacles.items() if why)
    return Setting(name, True, not all(obstacles.values()), reasons.pop() if len(reasons) == 1 else "; ".join(each))


def mergeable(requested: bool, parts: Mapping[str, Backing]) -> Setting:
    """Whether KSM merges equal pages of the memory."""
    mode = facts.ksm_mode()
    stopped = ""
    if not mode:
        stopped = "this kernel has no KSM"
    elif mode != "1":
        stopped = f"/sys/kernel/mm/ksm/run is {mode}: the memory is marked and merges once 1 is written there"
    return switch("mergeable", requested, {part: backing.no_merge or stopped for part, backing in parts.items()})


def transparent_huge_pages(requested: bool, parts: Mapping[str, Backing]) -> Setting:
    """Whether the kernel may use huge pages behind the scenes."""
    return switch("thp", requested, {part: backing.no_thp for part, backing in parts.items()})


def reserve(requested: bool, parts: Mapping[str, Backing]) -> Setting:
    """Whether boot memory is promised by the kernel when it is mapped."""
    not_boot = {BOOT: "", HOTPLUG: BOOT_ONLY}
    return switch("reserve", requested, {part: backing.no_reserve or not_boot[part] for part, backing in parts.items()})


def host_numa_node(node: int | None, parts: Mapping[str, Backing]) -> Setting:
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
        for no_bind in filter(None, (backing.no_bind for backing in parts.values())):
            raise UsageError("host_numa_node", node, no_bind, "use shared=off, a tmpfs, or leave it out")
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
    """Log each option that the user wrote and that has no effect, or none for a part of the zone; and huge pages that
    the host doesn't have yet."""
    for setting in settings:
        if setting.name in explicit and setting.requested != setting.effective:
            log.warning(
                "zone %s: %s=%s has no effect: %s", zone, setting.name, _shown(setting.requested), setting.reason
            )
        elif setting.requested is True and setting.reason and setting.name in {*explicit, "hugepages"}:
            log.warning("zone %s: %s=on: %s", zone, setting.name, setting.reason)


def _shown(value: object) -> object:
    """A value as options have it."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value
