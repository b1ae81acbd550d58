"""`--memory`, `--memory-zone` and `--sgx-epc`: the memory that a machine has."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from vhost_user.units import KIB, ByteCount, is_power_of_two
from virtio_mem.config.option import Option, kind
from virtio_mem.config.values import FILE, NAME, NONZERO_SIZE, SIZE, TOGGLE, U32, Choice, show_size

EPC_PAGE_SIZE = 4 * KIB
"""The size of an enclave page, in bytes."""


class HotplugMethod(StrEnum):
    """How memory comes and goes while the machine runs."""

    ACPI = "acpi"
    VIRTIO_MEM = "virtio-mem"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig(Option):
    """`--memory`: all the memory of a machine, or with `size=0`, what applies to all of its zones. Sizes are in bytes.

    `hugepage_size` of None is the host's default huge page size.
    """

    OPTION: ClassVar[str] = "--memory"

    size: ByteCount = field(metadata=kind(SIZE))
    mergeable: bool = field(default=False, metadata=kind(TOGGLE))
    shared: bool = field(default=False, metadata=kind(TOGGLE))
    hugepages: bool = field(default=False, metadata=kind(TOGGLE))
    hugepage_size: ByteCount | None = field(default=None, metadata=kind(NONZERO_SIZE))
    hotplug_method: HotplugMethod = field(default=HotplugMethod.ACPI, metadata=kind(Choice(HotplugMethod)))
    hotplug_size: ByteCount | None = field(default=None, metadata=kind(NONZERO_SIZE))
    hotplugged_size: ByteCount | None = field(default=None, metadata=kind(NONZERO_SIZE))
    prefault: bool = field(default=False, metadata=kind(TOGGLE))
    reserve: bool = field(default=False, metadata=kind(TOGGLE))
    thp: bool = field(default=True, metadata=kind(TOGGLE))

    def _check_rules(self) -> None:
        _check_backing(self)
        if self.hotplugged_size is not None and self.hotplug_method is HotplugMethod.ACPI:
            limit = "needs hotplug_method=virtio-mem: what ACPI adds can't be taken away again"
            raise self.error("hotplugged_size", limit, "add hotplug_method=virtio-mem, or leave hotplugged_size out")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryZoneConfig(Option):
    """`--memory-zone`: one part of the machine's memory, and how the host backs it. Sizes are in bytes.

    `mergeable` of None is what --memory says. A zone of size 0 has memory only once it is hotplugged. `file` is a
    regular file of at least `size` bytes for boot memory, or a directory where both parts have unnamed files.
    """

    OPTION: ClassVar[str] = "--memory-zone"
    IDENTITY: ClassVar[str] = "id"

    id: str = field(metadata=kind(NAME))
    size: ByteCount = field(metadata=kind(SIZE))
    file: Path | None = field(default=None, metadata=kind(FILE))
    shared: bool = field(default=False, metadata=kind(TOGGLE))
    hugepages: bool = field(default=False, metadata=kind(TOGGLE))
    hugepage_size: ByteCount | None = field(default=None, metadata=kind(NONZERO_SIZE))
    host_numa_node: int | None = field(default=None, metadata=kind(U32))
    hotplug_size: ByteCount | None = field(default=None, metadata=kind(NONZERO_SIZE))
    hotplugged_size: ByteCount | None = field(default=None, metadata=kind(NONZERO_SIZE))
    prefault: bool = field(default=False, metadata=kind(TOGGLE))
    reserve: bool = field(default=False, metadata=kind(TOGGLE))
    mergeable: bool | None = field(default=None, metadata=kind(TOGGLE))

    def _check_rules(self) -> None:
        _check_backing(self)
        if self.size == 0 and self.hotplug_size is None:
            raise self.error("size", "a zone has a size, a hotplug_size or both", "give it one, or leave the zone out")


@dataclass(frozen=True, slots=True, kw_only=True)
class SgxEpcConfig(Option):
    """`--sgx-epc`: a section of the enclave page cache. `size` is in bytes, a multiple of 4 KiB."""

    OPTION: ClassVar[str] = "--sgx-epc"
    IDENTITY: ClassVar[str] = "id"

    id: str = field(metadata=kind(NAME))
    size: ByteCount = field(metadata=kind(NONZERO_SIZE))
    prefault: bool = field(default=False, metadata=kind(TOGGLE))

    def _check_rules(self) -> None:
        if self.size % EPC_PAGE_SIZE:
            limit = f"must be a multiple of the enclave page size, {show_size(EPC_PAGE_SIZE)}"
            raise self.error("size", limit, f"round it to {show_size(EPC_PAGE_SIZE)}")


def _check_backing(option: MemoryConfig | MemoryZoneConfig) -> None:
    """The rules that hold for --memory and for a zone."""
    if option.hugepage_size is not None:
        if not option.hugepages:
            raise option.error("hugepage_size", "needs hugepages=on", "add hugepages=on, or leave hugepage_size out")
        if not is_power_of_two(option.hugepage_size):
            raise option.error("hugepage_size", "must be a power of two", "choose one such as 2M or 1G")
    if option.shared and option.mergeable:
        limit = "can't go with shared=on: the host merges private memory only"
        raise option.error("mergeable", limit, "leave out mergeable=on or shared=on")
    if option.hotplugged_size is None:
        return
    if option.hotplug_size is None:
        raise option.error("hotplugged_size", "needs hotplug_size", "add a hotplug_size of at least as much")
    if option.hotplugged_size > option.hotplug_size:
        limit = f"can't exceed hotplug_size={show_size(option.hotplug_size)}"
        raise option.error("hotplugged_size", limit, "lower hotplugged_size, or raise hotplug_size")
