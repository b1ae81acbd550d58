"""The memory options of one machine together, and the zones that they ask for.

An option can be right alone and wrong in company: `--memory size=0` is what goes with zones, and no memory at all
without them. So each option checks itself when it is made, and the machine checks what holds between them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from vhost_user.units import U64_MAX
from virtio_mem.config import topology
from virtio_mem.config.args import group_values, only_value
from virtio_mem.config.errors import ConfigError
from virtio_mem.config.memory import HotplugMethod, MemoryConfig, MemoryZoneConfig, SgxEpcConfig
from virtio_mem.config.numa import NumaConfig
from virtio_mem.config.option import Option
from virtio_mem.config.values import show_size
from virtio_mem.config.zones import DEFAULT_ZONE, ZonePlan, default_plan, zone_plan
from virtio_mem.layout import HOTPLUG_ALIGNMENT

DEFAULT_MEMORY = "size=512M"
"""What Cloud Hypervisor takes for --memory when the option is not there at all."""

MAX_DEVICE_NODE = 2**16 - 1
"""The highest node that a virtio-mem device can name: `node_id` in its configuration space has 16 bits."""

_ZONE_KEYS = ("shared", "hugepages", "hugepage_size", "prefault", "reserve")
"""The keys of --memory that describe its own zone only; Cloud Hypervisor ignores them where there are others."""

PAGE_STRUCTURE_SHARE = 64
"""Linux keeps a `struct page` of 64 bytes for each page of 4 KiB. That of plugged memory has to lie in memory that is
there before, and never in a movable zone."""

_OPTIONS: dict[str, type[Option]] = {
    "memory": MemoryConfig,
    "zones": MemoryZoneConfig,
    "numa": NumaConfig,
    "sgx_epc": SgxEpcConfig,
}


def only_memory(values: Sequence[str], default: str = DEFAULT_MEMORY) -> str:
    """The text of --memory among a program's arguments, or `default` where it is not there. Raises ConfigError where it
    is there more than once."""
    return only_value(MemoryConfig.OPTION, values, default, "describe parts by --memory-zone")


@dataclass(frozen=True, slots=True, kw_only=True)
class VmMemoryConfig:
    """All memory options of one machine. Raises ConfigError where they can't be together.

    `warnings` says what is allowed and yet may not do what was meant.
    """

    memory: MemoryConfig
    zones: tuple[MemoryZoneConfig, ...] = ()
    numa: tuple[NumaConfig, ...] = ()
    sgx_epc: tuple[SgxEpcConfig, ...] = ()

    @classmethod
    def from_options(
        cls,
        memory: str = DEFAULT_MEMORY,
        zones: Iterable[str] = (),
        numa: Iterable[str] = (),
        sgx_epc: Iterable[str] = (),
    ) -> Self:
        """The configuration from the text of each option, such as `size=0` and `["id=mem0,size=1G"]`."""
        return cls(
            memory=MemoryConfig.parse(memory),
            zones=tuple(map(MemoryZoneConfig.parse, zones)),
            numa=tuple(map(NumaConfig.parse, numa)),
            sgx_epc=tuple(map(SgxEpcConfig.parse, sgx_epc)),
        )

    @classmethod
    def from_args(cls, arguments: Sequence[str]) -> Self:
        """The configuration from a program's arguments, such as `["--memory", "size=1G"]`, and nothing else in them."""
        values = group_values(arguments, [option.OPTION for option in _OPTIONS.values()])
        memory = only_memory(values[MemoryConfig.OPTION])
        return cls.from_options(
            memory, values[MemoryZoneConfig.OPTION], values[NumaConfig.OPTION], values[SgxEpcConfig.OPTION]
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """The configuration from one line, with the quotes of a shell."""
        if not isinstance(text, str):
            raise ConfigError("arguments", text, "must be one line of text", "give a list of words to from_args()")
        try:
            arguments = shlex.split(text)
        except ValueError as error:
            raise ConfigError("arguments", text, f"can't be cut into words: {error}", "end every quote") from None
        return cls.from_args(arguments)

    def to_args(self) -> list[str]:
        """The arguments that `from_args` turns back into this configuration."""
        groups = ((self.memory,), self.zones, self.numa, self.sgx_epc)
        return [word for group in groups if group for word in (group[0].OPTION, *map(str, group))]

    def __str__(self) -> str:
        """The arguments as a line for a shell; `parse` reads it back."""
        return shlex.join(self.to_args())

    def __post_init__(self) -> None:
        if not isinstance(self.memory, MemoryConfig):
            raise ConfigError("memory", self.memory, "must be a MemoryConfig", "give a MemoryConfig")
        for name in ("zones", "numa", "sgx_epc"):
            of = _OPTIONS[name]
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)) or not all(isinstance(value, of) for value in values):
                raise ConfigError(name, values, f"must be a tuple of {of.__name__}", f"give {of.__name__} objects")
            object.__setattr__(self, name, tuple(values))
        self._check_memory()
        self._check_zones()
        topology.check_nodes(self.numa, self._zone_ids, [section.id for section in self.sgx_epc])
        self._check_device_nodes()

    @property
    def user_zones(self) -> bool:
        """Whether the zones were described one by one, and not by --memory alone."""
        return bool(self.zones)

    def zone_plans(self) -> tuple[ZonePlan, ...]:
        """The zones to build: those of --memory-zone in their order, or the default zone that --memory describes."""
        if not self.zones:
            return (default_plan(self.memory, topology.node_of(self.numa, DEFAULT_ZONE)),)
        return tuple(zone_plan(self.memory, zone, topology.node_of(self.numa, zone.id)) for zone in self.zones)

    def distance_matrix(self) -> dict[int, dict[int, int]]:
        """`matrix[a][b]`, the distance from NUMA node `a` to node `b`, for all nodes; see `topology`."""
        return topology.distance_matrix(self.numa)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed and yet may not do what was meant: the option, what is odd about it, what to do."""
        nodes = topology.node_warnings(self.numa, self._zone_ids)
        return (*self._memory_warnings(), *self._hotplug_warnings(), *self._size_warnings(), *nodes)

    @property
    def _zone_ids(self) -> tuple[str, ...]:
        return tuple(zone.id for zone in self.zones) or (DEFAULT_ZONE,)

    def _check_memory(self) -> None:
        """The rules between --memory and the zones."""
        memory = self.memory
        if not self.zones:
            if memory.size == 0:
                raise memory.error("size", "0 needs memory zones", "add --memory-zone, or give --memory a size")
            return
        if memory.size:
            raise memory.error("size", "must be 0 where there are memory zones", "write --memory size=0")
        for key in ("hotplug_size", "hotplugged_size"):
            if getattr(memory, key) is not None:
                raise memory.error(key, "has no zone to go to where there are memory zones", f"move {key} to a zone")
        if not any(zone.size for zone in self.zones):
            limit = "is 0 in every zone, so the machine has no memory to start with"
            raise ConfigError("--memory-zone size", 0, limit, "give one zone a size")

    def _check_zones(self) -> None:
        """The rules between the zones, and between a zone and what it takes over from --memory."""
        seen: set[str] = set()
        named: tuple[MemoryZoneConfig | SgxEpcConfig, ...] = (*self.zones, *self.sgx_epc)
        for option in named:
            if option.id in seen:
                raise option.error("id", "is used more than once", "give every zone and every EPC section its own")
            seen.add(option.id)
        for zone in self.zones:
            if zone.hotplug_size is not None and self.memory.hotplug_method is HotplugMethod.ACPI:
                limit = "needs hotplug_method=virtio-mem: ACPI can't resize a zone"
                raise zone.error("hotplug_size", limit, "add hotplug_method=virtio-mem to --memory")
            if zone.shared and zone.mergeable is None and self.memory.mergeable:
                limit = "can't go with mergeable=on, which --memory gives to every zone"
                raise zone.error("shared", limit, "add mergeable=off to the zone")
        total = sum(plan.spec.size + plan.spec.hotplug_size for plan in self.zone_plans())
        if total > U64_MAX:
            raise ConfigError("sum of sizes", show_size(total), "exceeds 2**64 - 1 bytes", "lower size or hotplug_size")

    def _check_device_nodes(self) -> None:
        for plan in self.zone_plans():
            if plan.spec.hotplug_size and (plan.guest_numa_id or 0) > MAX_DEVICE_NODE:
                limit = f"is above {MAX_DEVICE_NODE}, the highest node that the device of zone {plan.spec.id} can name"
                raise ConfigError("--numa guest_numa_id", plan.guest_numa_id, limit, "give the node a lower id")

    def _memory_warnings(self) -> Iterator[str]:
        for key in _ZONE_KEYS if self.zones else ():
            if key in self.memory.explicit:
                yield f"--memory {key}: has no effect where there are memory zones; write it on --memory-zone"

    def _hotplug_warnings(self) -> Iterator[str]:
        """Cloud Hypervisor refuses such sizes. Other guests than Linux can have use for all of it."""
        if self.memory.hotplug_method is not HotplugMethod.VIRTIO_MEM:
            return
        for option in self.zones or (self.memory,):
            size = option.hotplug_size or 0
            if rest := size % HOTPLUG_ALIGNMENT:
                whole = size - rest
                use = " or ".join(show_size(near) for near in (whole, whole + HOTPLUG_ALIGNMENT) if near)
                lost = f"the last {show_size(rest)} of {show_size(size)}" if whole else show_size(size)
                why = f"it plugs multiples of {show_size(HOTPLUG_ALIGNMENT)}"
                yield f"{option.label('hotplug_size')}: a Linux guest can't use {lost}, as {why}; use {use}"

    def _size_warnings(self) -> Iterator[str]:
        """More than half of boot memory is more than a guest can spare that has something to do besides."""
        if self.memory.hotplug_method is not HotplugMethod.VIRTIO_MEM:
            return
        specs = [plan.spec for plan in self.zone_plans()]
        boot, hotplug = sum(spec.size for spec in specs), sum(spec.hotplug_size for spec in specs)
        if (need := hotplug // PAGE_STRUCTURE_SHARE) > boot // 2:
            why = f"a Linux guest that has all of it in a movable zone needs {show_size(need)} for page structures"
            limit = f"of its {show_size(boot)} of boot memory"
            yield f"hotplug_size={show_size(hotplug)}: {why}, {limit}; raise size, or lower hotplug_size"
