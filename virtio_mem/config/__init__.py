"""The memory of a machine as its owner describes it, with Cloud Hypervisor's options.

They are `--memory`, `--memory-zone`, `--numa` and `--sgx-epc`. Each is a frozen object, made from keyword arguments, or
from the option's text by `parse`, and printed as such text by `str`. `VmMemoryConfig` is all of them together.
"""

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
