"""Machines of one zone on each kind of memory, with something in them."""

from __future__ import annotations

import random
from pathlib import Path

from vhost_user.units import MIB, ByteCount, GuestAddress, HostOffset
from virtio_mem.config import VmMemoryConfig
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.managed_zone import ManagedZone
from virtio_mem.manager import MemoryManager
from virtio_mem.protocol import Request, RequestType, ResponseType
from virtio_mem.service import DeviceService

BOOT, HOTPLUG, BLOCK = 4 * MIB, 32 * MIB, 2 * MIB
TARGET = 24 * MIB

OPTIONS = {
    "anonymous": "shared=off",
    "memfd": "shared=on",
    "hugetlb": "hugepages=on,hugepage_size=2M",
    "shared file": "shared=on,file={file}",
    "private file": "shared=off,file={file}",
    "shared directory": "shared=on,file={directory}",
    "private directory": "shared=off,file={directory}",
}


def config(kind: str, directory: Path) -> VmMemoryConfig:
    file = directory / "zone"
    if kind.endswith(" file") and not file.exists():
        # With data where nobody ever writes: a private zone begins with it. What is behind boot memory is none of ours.
        file.write_bytes(random.Random(kind).randbytes(BOOT + HOTPLUG))
    options = OPTIONS[kind].format(file=file, directory=directory)
    return VmMemoryConfig.parse(
        "--memory size=0,hotplug_method=virtio-mem "
        f"--memory-zone id=mem0,size={BOOT},hotplug_size={HOTPLUG},{options} --numa guest_numa_id=0,memory_zones=mem0"
    )


def service_of(manager: MemoryManager) -> DeviceService:
    service = manager.zones["mem0"].service
    assert service is not None
    return service


def ask(manager: MemoryManager, type_: RequestType, block: int, nb_blocks: int = 1) -> ResponseType:
    service = service_of(manager)
    addr = GuestAddress(service.device.geometry.addr + block * BLOCK)
    return service.request(Request(type_, addr, nb_blocks)).type


def fill(manager: MemoryManager, rng: random.Random) -> None:
    """Plug some blocks, and write to some of them: whole blocks, single bytes, or nothing."""
    manager.resize_zone("mem0", BOOT + TARGET)
    boot, hotplug = parts(manager.zones["mem0"])
    write(boot, 12345, b"boot memory")
    for block in rng.sample(range(HOTPLUG // BLOCK), 10):
        assert ask(manager, RequestType.PLUG, block) is ResponseType.ACK
        kind = rng.randrange(6)
        if kind == 0:
            write(hotplug, block * BLOCK, rng.randbytes(BLOCK))
        elif kind == 1:
            write(hotplug, block * BLOCK + rng.randrange(BLOCK), b"\1")


def parts(zone: ManagedZone) -> tuple[HostMemory, HostMemory]:
    assert zone.zone.boot is not None
    assert zone.zone.hotplug is not None
    return zone.zone.boot, zone.zone.hotplug


def write(memory: HostMemory, offset: int, data: bytes) -> None:
    with memory.view(HostOffset(offset), ByteCount(len(data))) as view:
        view[:] = data


def content(manager: MemoryManager) -> dict[str, bytes]:
    """Boot memory and each plugged block."""
    boot, hotplug = parts(manager.zones["mem0"])
    found = {"boot": _read(boot, 0, BOOT)}
    for run in service_of(manager).device.blocks.plugged_runs():
        for block in range(run.first, run.first + run.nb_blocks):
            found[f"block {block}"] = _read(hotplug, block * BLOCK, BLOCK)
    return found


def _read(memory: HostMemory, offset: int, size: int) -> bytes:
    with memory.view(HostOffset(offset), ByteCount(size)) as view:
        return bytes(view)
