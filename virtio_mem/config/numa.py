"""`--numa`: one node of the topology that the guest sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

from virtio_mem.config.errors import ConfigError
from virtio_mem.config.lists import NAMES, Integers, ListOf
from virtio_mem.config.option import Option, kind
from virtio_mem.config.values import NAME, U32, Kind

MAX_CPU = 8191
"""The highest number of a virtual CPU: Cloud Hypervisor has at most 8192 of them, by KVM on x86-64."""

MAX_PCI_SEGMENT = 95
"""The highest PCI segment: Cloud Hypervisor has at most 96 of them."""

LOCAL_DISTANCE = 10
"""A node's distance to itself, and the smallest that there is: ACPI's table of distances (SLIT) has 0 to 9 reserved."""

REMOTE_DISTANCE = 20
"""The distance between two nodes for which none is given: twice the local one, as Linux assumes too."""

UNREACHABLE = 255
"""The distance of a node that can't be reached, and the greatest that there is."""


@dataclass(frozen=True, slots=True)
class NumaDistance:
    """How far memory of node `destination` is from the node that this belongs to; `1@15` in text.

    Relative to 10, which is a node's distance to itself: 20 takes twice the time. 255 is unreachable.
    """

    destination: int
    distance: int

    def __post_init__(self) -> None:
        U32.check("destination", self.destination)
        if not isinstance(self.distance, int) or not LOCAL_DISTANCE <= self.distance <= UNREACHABLE:
            limit = f"must be {LOCAL_DISTANCE} to {UNREACHABLE}"
            raise ConfigError("distance", self.distance, limit, "10 is local, 20 twice as far, 255 unreachable")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The distance from its text, such as `1@15`. Raises ConfigError."""
        destination, at, distance = text.partition("@")
        if not at:
            raise ConfigError("a distance", text, "must be node@distance", "write it like 1@15")
        return cls(U32.read("destination", destination), U32.read("distance", distance))

    def __str__(self) -> str:
        return f"{self.destination}@{self.distance}"


class _Distance(Kind[NumaDistance]):
    """An element of `distances`."""

    def read(self, where: str, text: str) -> NumaDistance:
        """A NumaDistance."""
        try:
            return NumaDistance.parse(text)
        except ConfigError as error:
            raise ConfigError(where, text, f"{error.field} {error.limit}", error.remedy) from None

    def check(self, where: str, value: object) -> NumaDistance:
        """A NumaDistance, which has checked itself."""
        if not isinstance(value, NumaDistance):
            raise ConfigError(where, value, "must be a NumaDistance", "give NumaDistance(destination, distance)")
        return value

    def show(self, value: NumaDistance) -> str:
        """Such as 1@15."""
        return str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class NumaConfig(Option):
    """`--numa`: which CPUs, memory zones and other things belong to a guest NUMA node, and how far other nodes are.

    A node with `device_id` is a generic initiator: it has that device, and neither CPUs nor memory.
    """

    OPTION: ClassVar[str] = "--numa"
    IDENTITY: ClassVar[str] = "guest_numa_id"

    guest_numa_id: int = field(metadata=kind(U32))
    cpus: tuple[int, ...] = field(default=(), metadata=kind(Integers(MAX_CPU)))
    distances: tuple[NumaDistance, ...] = field(default=(), metadata=kind(ListOf(_Distance())))
    memory_zones: tuple[str, ...] = field(default=(), metadata=kind(NAMES))
    sgx_epc_sections: tuple[str, ...] = field(default=(), metadata=kind(NAMES))
    pci_segments: tuple[int, ...] = field(default=(), metadata=kind(Integers(MAX_PCI_SEGMENT)))
    device_id: str | None = field(default=None, metadata=kind(NAME))

    def _check_rules(self) -> None:
        if self.device_id is not None and (self.cpus or self.memory_zones):
            limit = "is for a node with neither cpus nor memory_zones"
            raise self.error("device_id", limit, "give the device a node of its own")
        if 0 in self.pci_segments and self.guest_numa_id:
            raise self.error("pci_segments", "segment 0 always belongs to node 0", "leave segment 0 out")
        seen: set[int] = set()
        for destination, distance in ((entry.destination, entry.distance) for entry in self.distances):
            if destination in seen:
                limit = f"has more than one distance to node {destination}"
                raise self.error("distances", limit, "give one for each node")
            if destination == self.guest_numa_id and distance != LOCAL_DISTANCE:
                limit = f"a node's distance to itself is {LOCAL_DISTANCE}"
                raise self.error("distances", limit, f"leave {destination}@{distance} out")
            seen.add(destination)
