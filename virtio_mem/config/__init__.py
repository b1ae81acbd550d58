"""The memory of a machine as its owner describes it, with Cloud Hypervisor's options.

They are `--memory`, `--memory-zone`, `--numa` and `--sgx-epc`. Each is a frozen object, made from keyword arguments, or
from the option's text by `parse`, and printed as such text by `str`. `VmMemoryConfig` is all of them together.
spec-notes/cloud-hypervisor.md has the rules that are not Cloud Hypervisor's.

Each name is imported when it is first used: a program with options of its own does not pay for these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhost_user.late import importer

if TYPE_CHECKING:
    from virtio_mem.config.errors import ConfigError
    from virtio_mem.config.memory import HotplugMethod, MemoryConfig, MemoryZoneConfig, SgxEpcConfig
    from virtio_mem.config.numa import NumaConfig, NumaDistance
    from virtio_mem.config.vm import VmMemoryConfig
    from virtio_mem.config.zones import DEFAULT_ZONE, ZonePlan

__all__ = [
    "DEFAULT_ZONE",
    "ConfigError",
    "HotplugMethod",
    "MemoryConfig",
    "MemoryZoneConfig",
    "NumaConfig",
    "NumaDistance",
    "SgxEpcConfig",
    "VmMemoryConfig",
    "ZonePlan",
]

_HOMES = {
    "virtio_mem.config.errors": ("ConfigError",),
    "virtio_mem.config.memory": ("HotplugMethod", "MemoryConfig", "MemoryZoneConfig", "SgxEpcConfig"),
    "virtio_mem.config.numa": ("NumaConfig", "NumaDistance"),
    "virtio_mem.config.vm": ("VmMemoryConfig",),
    "virtio_mem.config.zones": ("DEFAULT_ZONE", "ZonePlan"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__getattr__ = importer(globals(), _HOME)
