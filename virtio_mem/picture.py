"""A device's blocks as a picture in the terminal: which are plugged, what is usable, where the target is.

    mem0 ▕████████████████▒···············              ▏ 1 GiB at 0x180000000
                          ▲ target 258 MiB
          plugged 258 MiB, usable 768 MiB, blocks of 2 MiB

A cell stands for as many neighbouring blocks as the width demands, or a block for as many cells.
"""

from __future__ import annotations

from enum import Enum

from vhost_user.units import GIB, KIB, MIB, TIB
from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.device import VirtioMemDevice


class Cell(Enum):
    """What a cell shows: all of its blocks plugged, some, or none; or that it begins outside the usable region."""

    PLUGGED = "█"
    MIXED = "▒"
    UNPLUGGED = "·"
    UNUSABLE = " "


def cells(device: VirtioMemDevice, width: int) -> list[Cell]:
    """`width` cells for the device's whole region, in ascending order of addresses."""
    nb_blocks = device.geometry.nb_blocks
    if not nb_blocks:
        return [Cell.UNUSABLE] * width
    usable = device.usable_region_size // device.geometry.block_size
    return [
        _cell(device, index * nb_blocks // width, (index + 1) * nb_blocks // width, usable) for index in range(width)
    ]


def _cell(device: VirtioMemDevice, first: int, end: int, usable: int) -> Cell:
    if first >= usable:
        return Cell.UNUSABLE
    nb_blocks = max(1, end - first)
    plugged = device.blocks.count(Run(BlockIndex(first), nb_blocks))
    if plugged == nb_blocks:
        return Cell.PLUGGED
    return Cell.MIXED if plugged else Cell.UNPLUGGED


def column_of(device: VirtioMemDevice, size: int, width: int) -> int:
    """The column, from 0 to `width`, at which `size` bytes of the region end."""
    return -(-size * width // device.geometry.region_size) if device.geometry.region_size else 0


def human_size(size: int) -> str:
    """`size` bytes for people to read: 1 GiB, 1.5 GiB, 258 MiB, 0 B."""
    for name, unit in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} B"


def draw(name: str, device: VirtioMemDevice, width: int = 64) -> list[str]:
    """The picture's lines: the cells, a ruler with the target, and the sizes."""
    geometry = device.geometry
    bar = "".join(cell.value for cell in cells(device, width))
    target = min(column_of(device, device.requested_size, width), width)
    ruler = " " * target + "▲" + f" target {human_size(device.requested_size)}"
    margin = " " * len(name)
    sizes = f"plugged {human_size(device.plugged_size)}, usable {human_size(device.usable_region_size)}"
    return [
        f"{name} ▕{bar}▏ {human_size(geometry.region_size)} at {geometry.addr:#x}",
        f"{margin}  {ruler}",
        f"{margin}  {sizes}, blocks of {human_size(geometry.block_size)}",
    ]
