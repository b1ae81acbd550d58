"""QEMU's command line for a virtio-mem device and as little else as there can be, and what the user may say of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from vhost_user.errors import UsageError
from vhost_user.units import GIB, MIB, ByteCount, align_up
from virtio_mem.boot.qemu import cpu_model
from virtio_mem.config.option import Option, kind
from virtio_mem.config.values import Choice, Size, Toggle
from virtio_mem.conformance.target import Wish
from virtio_mem.conformance.targets.qtest.machine import Program
from virtio_mem.conformance.targets.qtest.memory import MEMDEV, RAM, Ram, RegionMemory, page_size_of

DEVICE = "device"
"""Its name to QEMU."""

SLOT = 5
"""The device's place on bus 0, away from what the chipset has there."""

_LEAST_BLOCK = MIB
_HIGHEST_NODE = 127
"""Of QEMU's virtio-mem, and of QEMU's machines."""

_ROOM = 4 * GIB
"""What the machine may have of memory beside the region, which begins at a GiB or at a multiple of its blocks."""

_WHERE_MEMORY_BEGINS = 4 * GIB

_WITHOUT = "graphics=off,hpet=off,i8042=off,pit=off,sata=off,smbus=off,usb=off"
"""What of a PC nobody needs here. A third of the time that it takes to start goes with it."""


class MemoryKind(StrEnum):
    """What the region is made of."""

    MEMFD = "memfd"
    HUGETLB = "hugetlb"
    RAM = "ram"
    TMPFS = "tmpfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuOptions(Option):
    """What stands behind the program; sizes in bytes."""

    OPTION: ClassVar[str] = "qemu"

    memory: MemoryKind = field(default=MemoryKind.MEMFD, metadata=kind(Choice(MemoryKind)))
    dynamic_memslots: bool = field(default=False, metadata=kind(Toggle()))
    prealloc: bool = field(default=False, metadata=kind(Toggle()))
    packed: bool = field(default=False, metadata=kind(Toggle()))
    unplugged_inaccessible: bool = field(default=True, metadata=kind(Toggle()))
    block_size: ByteCount | None = field(default=None, metadata=kind(Size(zero=False)))


@dataclass(frozen=True)
class Shape:
    """A device as QEMU can have it; sizes in bytes."""

    region_size: int
    block_size: int
    requested_size: int
    node_id: int | None


def shape_of(wish: Wish, options: QemuOptions) -> Shape:
    """What comes nearest to a wish. HostError where the host has no such memory."""
    block_size = options.block_size or max(wish.block_size, _LEAST_BLOCK)
    block_size = max(block_size, page_size_of(options.memory))
    node_id = None if wish.node_id is None else min(wish.node_id, _HIGHEST_NODE)
    region_size, requested_size = (align_up(size, block_size) for size in (wish.region_size, wish.requested_size))
    return Shape(region_size, block_size, requested_size, node_id)


def require_options(options: QemuOptions, program: Program) -> None:
    """UsageError for one that this version does not have."""
    for name, value in _switches(options):
        if name not in program.device_options:
            limit = f"QEMU {program.qemu.release} does not have it"
            raise UsageError(f"qemu {name}", value, limit, "leave it out, or name a later QEMU")


def command_line(program: Program, options: QemuOptions, shape: Shape, ram: Ram, region: RegionMemory) -> list[str]:
    """All arguments but for the sockets."""
    accel = "qtest" if program.has_qtest else "tcg"
    end = _WHERE_MEMORY_BEGINS + _ROOM + shape.region_size
    size = f"size={RAM // MIB}M,slots=1,maxmem={(align_up(shape.region_size, GIB) + _ROOM) // MIB}M"
    return [
        *("-nodefaults", "-no-user-config", "-display", "none", "-cpu", cpu_model(accel, end), "-m", size),
        *ram.arguments("ram"),
        *_machine(f"q35,accel={accel},{_WITHOUT}", shape.node_id),
        *([] if program.has_qtest else ["-S"]),  # or firmware would run
        *region.arguments(),
        *_device(program, options, shape),
    ]


def _machine(machine: str, node_id: int | None) -> list[str]:
    if node_id is None:
        return ["-machine", f"{machine},memory-backend=ram"]
    arguments = ["-machine", machine, "-numa", "node,nodeid=0,memdev=ram"]
    for node in range(1, node_id + 1):
        arguments += ["-numa", f"node,nodeid={node}"]
    return arguments


def _device(program: Program, options: QemuOptions, shape: Shape) -> list[str]:
    words = [
        f"virtio-mem-pci,id={DEVICE},addr={SLOT:#x},memdev={MEMDEV}",
        f"block-size={shape.block_size},requested-size={shape.requested_size},node={shape.node_id or 0}",
        *(f"{name}={value}" for name, value in _switches(options)),
    ]
    if "ioeventfd" in program.device_options:
        words.append("ioeventfd=off")  # a notification is served before it is answered
    return ["-device", ",".join(words)]


def _switches(options: QemuOptions) -> list[tuple[str, str]]:
    """The device's own that are set, by QEMU's names, and what to."""
    on = {"dynamic-memslots": options.dynamic_memslots, "prealloc": options.prealloc, "packed": options.packed}
    switches = [(name, "on") for name, is_on in on.items() if is_on]
    if not options.unplugged_inaccessible:
        switches.append(("unplugged-inaccessible", "off"))
    return switches
