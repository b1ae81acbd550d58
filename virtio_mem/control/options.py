"""A manager's options as `vm.info` gives them: with Cloud Hypervisor's names, and its values."""

from __future__ import annotations

from typing import Any

from virtio_mem.config import HotplugMethod, VmMemoryConfig, ZonePlan

_METHODS = {HotplugMethod.ACPI: "Acpi", HotplugMethod.VIRTIO_MEM: "VirtioMem"}


def zone_options(plan: ZonePlan) -> dict[str, Any]:
    """The options of one zone, without its sizes; those without a value are left out."""
    spec = plan.spec
    options = {
        "file": None if spec.file is None else str(spec.file),
        "mergeable": spec.mergeable,
        "shared": spec.shared,
        "hugepages": spec.hugepages,
        "hugepage_size": spec.hugepage_size,
        "host_numa_node": spec.host_numa_node,
        "prefault": spec.prefault,
        "reserve": spec.reserve,
    }
    return {name: value for name, value in options.items() if value is not None}


def memory_options(config: VmMemoryConfig) -> dict[str, Any]:
    """What --memory says for the machine as a whole, without its sizes."""
    memory = config.memory
    return {"mergeable": memory.mergeable, "thp": memory.thp, "hotplug_method": _METHODS[memory.hotplug_method]}
