"""The guest's NUMA nodes together: the rules between them, and how far each is from each.

Distances need not be symmetric: ACPI's table holds both directions of every pair, and Cloud Hypervisor fills each from
what was said of it. So a direction that is given stays as it is given; one that is missing has the other direction's
value; where both are missing it is 20, and 10 from a node to itself. Two directions that differ are legal, but rarely
meant, and get a warning.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations

from virtio_mem.config.errors import ConfigError
from virtio_mem.config.numa import LOCAL_DISTANCE, REMOTE_DISTANCE, NumaConfig

_EXCLUSIVE = ("cpus", "memory_zones", "sgx_epc_sections", "pci_segments")
"""The keys whose elements belong to one node at most."""


def check_nodes(nodes: Sequence[NumaConfig], zones: Collection[str], sections: Collection[str]) -> None:
    """Raise ConfigError where the nodes can't be together, or name a zone, a section or a node that does not exist."""
    _check_ids(nodes)
    ids = [node.guest_numa_id for node in nodes]
    for node in nodes:
        if not (node.device_id or node.cpus or node.memory_zones or node.sgx_epc_sections):
            raise node.error("guest_numa_id", "is a node with nothing in it", "add cpus, memory_zones or device_id")
        _check_exist(node, "memory_zones", node.memory_zones, zones)
        _check_exist(node, "sgx_epc_sections", node.sgx_epc_sections, sections)
        _check_exist(node, "distances", [entry.destination for entry in node.distances], ids)
    for key in _EXCLUSIVE:
        _check_exclusive(nodes, key)


def distance_matrix(nodes: Sequence[NumaConfig]) -> dict[int, dict[int, int]]:
    """`matrix[a][b]`, the distance from node `a` to node `b`, for all nodes in ascending order of `guest_numa_id`."""
    given = _given(nodes)
    ids = sorted(node.guest_numa_id for node in nodes)

    def distance(a: int, b: int) -> int:
        default = LOCAL_DISTANCE if a == b else REMOTE_DISTANCE
        return given.get((a, b), given.get((b, a), default))

    return {a: {b: distance(a, b) for b in ids} for a in ids}


def node_warnings(nodes: Sequence[NumaConfig], zones: Collection[str]) -> Iterator[str]:
    """What is allowed, and yet may not do what was meant."""
    if not nodes:
        return
    ids = sorted(node.guest_numa_id for node in nodes)
    if 0 not in ids:
        yield "--numa: there is no node with guest_numa_id=0, yet the PCI bus belongs to node 0; give one node that id"
    for zone in zones:
        if not any(zone in node.memory_zones for node in nodes):
            yield f"--numa memory_zones: zone {zone} is on no node; Linux ignores a topology that leaves memory out"
    matrix = distance_matrix(nodes)
    for a, b in combinations(ids, 2):
        there, back = matrix[a][b], matrix[b][a]
        if there != back:
            yield f"--numa distances: {there} from node {a} to node {b}, but {back} back; give one direction for both"
        if LOCAL_DISTANCE in (there, back):
            yield f"--numa distances: {LOCAL_DISTANCE} between nodes {a} and {b}; Linux ignores all distances then"


def node_of(nodes: Sequence[NumaConfig], zone: str) -> int | None:
    """The `guest_numa_id` of the node that a zone belongs to, if any."""
    return next((node.guest_numa_id for node in nodes if zone in node.memory_zones), None)


def _given(nodes: Sequence[NumaConfig]) -> dict[tuple[int, int], int]:
    return {(node.guest_numa_id, entry.destination): entry.distance for node in nodes for entry in node.distances}


def _check_ids(nodes: Sequence[NumaConfig]) -> None:
    seen: set[int] = set()
    for node in nodes:
        if node.guest_numa_id in seen:
            raise node.error("guest_numa_id", "is used by more than one --numa", "give every node its own")
        seen.add(node.guest_numa_id)


def _check_exist(node: NumaConfig, key: str, named: Sequence[object], existing: Collection[object]) -> None:
    for name in named:
        if name not in existing:
            there = ", ".join(map(str, existing)) or "none"
            raise ConfigError(node.label(key), name, "does not exist", f"choose among those that do: {there}")


def _check_exclusive(nodes: Sequence[NumaConfig], key: str) -> None:
    owners: dict[object, int] = {}
    for node in nodes:
        for element in getattr(node, key):
            if element in owners:
                limit = f"belongs to node {owners[element]} already, and can't belong to two"
                raise ConfigError(node.label(key), element, limit, "name it on one node only")
            owners[element] = node.guest_numa_id
