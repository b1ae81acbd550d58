"""Where QEMU's machine q35 has a machine's zones, and what has to be told to QEMU and to the guest to bring it about.

QEMU takes one memory backend a NUMA node. It puts them one behind the other in the order of the nodes' numbers, cuts
the whole where low memory ends, and has the rest go on at 4 GiB. There is no way to leave a gap. By itself it ends low
memory at 2 GiB, or at 2.75 GiB where all RAM is below that (hw/i386/pc_q35.c); `max-ram-below-4g` ends it earlier.

    node       0 .. the user's highest     more             more      more          more      more
    backend    boot memory of the node's   boot memory of   filler    hotplug       filler    hotplug
               zone, or none               other zones                region              ... region

So low memory ends with boot memory, or at 2 GiB if there is more of it, and hotplug regions come at 4 GiB or above,
each in one piece. Each starts at a multiple of 128 MiB, the size of a Linux memory block; what has to lie between is
filler, anonymous memory that nobody touches.

QEMU's firmware tells the guest that all of this is RAM. What is behind boot memory has to be kept from it: by `mem=` on
the kernel's command line, which is a limit for memory found at boot, and none for what virtio_mem adds later. A driver
that is built into the kernel probes before that limit is lifted, and gets E2BIG (mm/memory_hotplug.c); for such a
kernel `memmap=` takes the range out of the firmware's list instead.

The extra nodes are real for QEMU only. Of a node with neither processors nor RAM that it was given, Linux makes nothing
that can be seen, and the device names the user's node for the memory that it adds. Of a user's node that has a hotplug
region and nothing else Linux would hear nothing: there the device is made a generic initiator of that node. Without
--numa the guest is told numa=off.

Linux numbers nodes as it hears of them: from processors in their order, then from initiators, then from memory. Where
that gives others than the user's numbers, there is a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vhost_user.errors import UsageError
from vhost_user.units import GIB, ByteCount, GuestAddress, HostOffset, align_up, format_size
from virtio_mem.config.errors import ConfigError
from virtio_mem.config.numa import LOCAL_DISTANCE, REMOTE_DISTANCE, NumaConfig
from virtio_mem.config.topology import distance_matrix, node_of
from virtio_mem.layout import HOTPLUG_ALIGNMENT, Layout, Placement, ZoneSize

LOW_END = GuestAddress(2 * GIB)
"""Where low memory ends at the latest."""

HIGH_START = GuestAddress(4 * GIB)

MAX_NODES = 128
"""NUMA nodes that QEMU has at most (MAX_NODES in include/system/numa.h)."""

ADDRESS_LIMIT = GuestAddress(1 << 46)
"""RAM ends below this: 64 TiB, what processors with four levels of page tables map."""

_NEXT_TO = LOCAL_DISTANCE + 1
"""The distance of an extra node to the node that its memory is for."""


class Backend(NamedTuple):
    """What a node of QEMU is given: a zone's boot memory or its hotplug region, or with no zone, filler."""

    zone: str
    hotplug: bool
    size: ByteCount


class QemuNode(NamedTuple):
    """A NUMA node as QEMU has it. `initiator` names the zone whose device makes the node known to the guest, if any."""

    cpus: tuple[int, ...] = ()
    backend: Backend | None = None
    initiator: str = ""


@dataclass(frozen=True)
class MachineLayout:
    """All of it. `nodes` are in the order of their numbers; `placements` are guest addresses, as the manager's.

    `low_size` bytes are below the 32-bit hole, `size` in all. The guest may use what is below `boot_end`. `user_nodes`
    are the numbers of the user's nodes, and `zone_nodes` says on which node the guest sees each zone, None for none.
    `distances` are between QEMU's nodes, empty where none are to be told.
    """

    nodes: tuple[QemuNode, ...]
    placements: Layout
    low_size: ByteCount
    boot_end: GuestAddress
    user_nodes: tuple[int, ...]
    zone_nodes: dict[str, int | None]
    distances: dict[int, dict[int, int]]

    @property
    def numa(self) -> bool:
        """Whether the guest is to see nodes."""
        return bool(self.user_nodes)

    @property
    def size(self) -> ByteCount:
        """Bytes of RAM that QEMU has, filler included."""
        return ByteCount(sum(node.backend.size for node in self.nodes if node.backend))

    @property
    def end(self) -> GuestAddress:
        """The first guest address behind RAM."""
        return _address(self.size, self.low_size)

    @property
    def numbers_in_linux(self) -> dict[int, int]:
        """What Linux calls each of QEMU's nodes that it hears of before it drops what `mem=` keeps from it."""
        by_cpu = sorted((cpu, number) for number, node in enumerate(self.nodes) for cpu in node.cpus)
        initiators = [number for number, node in enumerate(self.nodes) if node.initiator]
        with_memory = [number for number, node in enumerate(self.nodes) if node.backend]
        heard_of = dict.fromkeys([*(number for _, number in by_cpu), *initiators, *with_memory])
        return {number: index for index, number in enumerate(heard_of)}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user may not expect."""
        if not self.numa:
            return ()
        numbers = self.numbers_in_linux
        others = {number: numbers[number] for number in self.user_nodes if numbers.get(number, number) != number}
        told = ", ".join(f"node {number} is its node{linux}" for number, linux in others.items())
        return (f"--numa: Linux numbers nodes by their first processor: {told}",) if told else ()


def lay_out_machine(zones: Iterable[ZoneSize], numa: Sequence[NumaConfig], nb_cpus: int) -> MachineLayout:
    """Lay out a machine. UsageError for what QEMU can't have, with the reason."""
    zones = list(zones)
    zone_nodes = {zone.id: node_of(numa, zone.id) for zone in zones}
    nodes = _user_nodes(zones, zone_nodes, numa, nb_cpus)
    owners = list(range(len(nodes)))  # of each node of QEMU's, the user's node that its memory is for, or itself
    for zone in zones:
        if zone_nodes[zone.id] is None and zone.size:
            if numa:
                zone_nodes[zone.id] = len(nodes)
            _add(nodes, owners, Backend(zone.id, False, zone.size), None)
    boot_size = ByteCount(sum(node.backend.size for node in nodes if node.backend))
    low_size = ByteCount(min(boot_size, LOW_END))
    boot = _place_boot(nodes, {zone.id: zone for zone in zones}, low_size)
    boot_end = _address(boot_size, low_size)
    hotplug: list[Placement] = []
    cursor: int = max(boot_end, HIGH_START)
    for zone in zones:
        if not zone.hotplug_size:
            continue
        addr = align_up(cursor, max(HOTPLUG_ALIGNMENT, zone.page_size, zone.block_size))
        if addr > cursor:
            _add(nodes, owners, Backend("", False, ByteCount(addr - cursor)), None)
        _add(nodes, owners, Backend(zone.id, True, zone.hotplug_size), zone_nodes[zone.id])
        hotplug.append(Placement(zone.id, GuestAddress(addr), zone.hotplug_size, HostOffset(0)))
        cursor = hotplug[-1].end
        if cursor > ADDRESS_LIMIT:
            limit = f"ends at {cursor:#x}; RAM ends at {ADDRESS_LIMIT:#x}"
            raise UsageError(f"zone {zone.id} hotplug_size", format_size(zone.hotplug_size), limit, "make it smaller")
    if len(nodes) > MAX_NODES:
        limit = f"take {len(nodes)} NUMA nodes of QEMU's, which has at most {MAX_NODES}"
        raise UsageError("zones", len(zones), limit, "use fewer zones, or lower guest_numa_ids")
    return MachineLayout(
        nodes=tuple(nodes),
        placements=Layout(tuple(boot), tuple(hotplug)),
        low_size=low_size,
        boot_end=boot_end,
        user_nodes=tuple(node.guest_numa_id for node in numa),
        zone_nodes=zone_nodes,
        distances=_distances(numa, owners),
    )


def _address(offset: int, low_size: int) -> GuestAddress:
    """Where the byte at `offset` of RAM is; at the end of low memory, the end itself."""
    return GuestAddress(offset if offset <= low_size else HIGH_START + offset - low_size)


def _add(nodes: list[QemuNode], owners: list[int], backend: Backend, owner: int | None) -> None:
    owners.append(len(nodes) if owner is None else owner)
    nodes.append(QemuNode(backend=backend))


# The user's nodes.


def _user_nodes(
    zones: Sequence[ZoneSize], zone_nodes: dict[str, int | None], numa: Sequence[NumaConfig], nb_cpus: int
) -> list[QemuNode]:
    """QEMU's numbers have no gaps, so a number that the user left out is a node with nothing in it."""
    if not numa:
        return [QemuNode(cpus=tuple(range(nb_cpus)))]
    for node in numa:
        _check_node(node, nb_cpus)
    count = max(node.guest_numa_id for node in numa) + 1
    cpus = {node.guest_numa_id: node.cpus for node in numa}
    named = {cpu for node in numa for cpu in node.cpus}
    # Linux takes a processor that no table mentions for one of node 0; QEMU wants each to be mentioned.
    cpus[0] = tuple(sorted({*cpus.get(0, ()), *set(range(nb_cpus)) - named}))
    return [_user_node(number, cpus.get(number, ()), zones, zone_nodes) for number in range(count)]


def _check_node(node: NumaConfig, nb_cpus: int) -> None:
    if node.guest_numa_id >= MAX_NODES:
        raise node.error("guest_numa_id", f"QEMU's nodes are 0 to {MAX_NODES - 1}", "use a lower number")
    for cpu in node.cpus:
        if cpu >= nb_cpus:
            limit = f"does not exist: --cpus boot={nb_cpus} makes 0 to {nb_cpus - 1}"
            raise ConfigError(node.label("cpus"), cpu, limit, "raise --cpus boot, or leave it out")
    for key in ("device_id", "sgx_epc_sections"):
        if getattr(node, key):
            raise node.error(key, "is of Cloud Hypervisor's own devices, which QEMU has not", f"leave {key} out")
    if set(node.pci_segments) - {0}:
        raise node.error("pci_segments", "QEMU's machine q35 has segment 0 only", "leave pci_segments out")


def _user_node(
    number: int, cpus: tuple[int, ...], zones: Sequence[ZoneSize], zone_nodes: dict[str, int | None]
) -> QemuNode:
    mine = [zone for zone in zones if zone_nodes[zone.id] == number]
    with_boot = [zone for zone in mine if zone.size]
    if len(with_boot) > 1:
        first, second, *_ = with_boot
        limit = f"has boot memory of zone {first.id} and of zone {second.id}; QEMU takes one memory backend a node"
        raise ConfigError(
            f"--numa guest_numa_id={number} memory_zones",
            f"[{','.join(zone.id for zone in with_boot)}]",
            limit,
            "give one of them a node of its own, or size=0 and a hotplugged_size",
        )
    backend = Backend(with_boot[0].id, False, with_boot[0].size) if with_boot else None
    hotplug = next((zone.id for zone in mine if zone.hotplug_size), "")
    return QemuNode(cpus, backend, initiator="" if cpus or backend else hotplug)


# Memory and distances.


def _place_boot(nodes: Iterable[QemuNode], zones: dict[str, ZoneSize], low_size: int) -> list[Placement]:
    """Where QEMU has boot memory. UsageError where a huge page would have to begin in the middle of one."""
    placed: list[Placement] = []
    offset = 0
    for node in nodes:
        if node.backend is None:
            continue
        zone, size, page_size = node.backend.zone, node.backend.size, zones[node.backend.zone].page_size
        if offset % page_size:
            limit = f"would start at {offset:#x}, in the middle of a page of {format_size(page_size)}"
            remedy = f"make the boot memory before it a multiple of {format_size(page_size)}"
            raise UsageError(f"zone {zone} size", format_size(size), limit, remedy)
        low = min(size, max(0, low_size - offset))
        if low:
            placed.append(Placement(zone, GuestAddress(offset), ByteCount(low), HostOffset(0)))
        if low < size:
            addr = GuestAddress(HIGH_START + offset + low - low_size)
            placed.append(Placement(zone, addr, ByteCount(size - low), HostOffset(low)))
        offset += size
    return placed


def _distances(numa: Sequence[NumaConfig], owners: Sequence[int]) -> dict[int, dict[int, int]]:
    """Between QEMU's nodes: an extra node is where its owner is. Nothing for a machine with one node."""
    if len(numa) < 2:
        return {}
    given = distance_matrix(numa)

    def distance(a: int, b: int) -> int:
        if a == b:
            return LOCAL_DISTANCE
        if owners[a] == owners[b]:
            return _NEXT_TO
        return given.get(owners[a], {}).get(owners[b], REMOTE_DISTANCE)

    numbers = range(len(owners))
    return {a: {b: distance(a, b) for b in numbers} for a in numbers}
