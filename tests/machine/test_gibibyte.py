"""A gibibyte is plugged by requests, written, unplugged, and is back with the host: by the kernel's own counters.

A quarter of one is in the quick tier.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.counts import MEBIBYTES_THERE_AND_BACK
from tests.device.arena import BACKINGS
from tests.host import HugePagePool
from vhost_user.mapping import PAGE_SIZE
from vhost_user.units import MIB, ByteCount, GuestAddress, HostOffset
from virtio_mem.config import VmMemoryConfig
from virtio_mem.managed_zone import ManagedZone
from virtio_mem.manager import MemoryManager
from virtio_mem.protocol import Request, RequestType, ResponseType

ST_BLOCKS_UNIT = 512
SIZE = MEBIBYTES_THERE_AND_BACK * MIB
SLACK = 4 * MIB
"""What this process, or a file system's bookkeeping, may take or give back beside the zone."""

OPTIONS = {
    "anonymous": "shared=off",
    "memfd": "shared=on",
    "hugetlb": "hugepages=on,hugepage_size=2M",
    "shared file": "shared=on,file=%s",
    "private file": "shared=off,file=%s",
}
"""Files of a directory: a regular file has no hotplug region."""


def resident() -> int:
    """Bytes of anonymous memory of this process, /proc/self/status's RssAnon."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10


def taken(backing: str, zone: ManagedZone) -> int:
    """What the host gives to the zone, by a counter that knows nothing of the zone."""
    hotplug = zone.zone.hotplug
    assert hotplug is not None
    if backing in ("anonymous", "private file"):
        return resident()
    if backing == "hugetlb":
        pool = HugePagePool(2 * MIB)
        return (pool.counter("nr_hugepages") - pool.counter("free_hugepages")) * 2 * MIB
    return os.fstat(hotplug.backing.fd).st_blocks * ST_BLOCKS_UNIT


@pytest.mark.clause("MEM-PLUG-8", "MEM-UNPLUG-8", "MEM-OP-6")
@pytest.mark.parametrize(
    "backing",
    [pytest.param(name, marks=pytest.mark.needs_hugetlb) if name == "hugetlb" else name for name in BACKINGS],
)
def test_a_gibibyte_there_and_back(backing: str, tmp_path: Path, hugepages: Callable[[int, int], HugePagePool]) -> None:
    if backing == "hugetlb":
        hugepages(2 * MIB, SIZE // (2 * MIB))
    options = OPTIONS[backing].replace("%s", str(tmp_path))
    line = "--memory size=0,hotplug_method=virtio-mem --memory-zone id=boot,size=2M"
    zone = f"id=z,size=0,{options},hotplug_size={SIZE},hotplugged_size={SIZE}"
    with MemoryManager(VmMemoryConfig.parse(f"{line} {zone}")) as manager:
        managed = manager.zones["z"]
        assert managed.service is not None
        assert managed.zone.hotplug is not None
        base = managed.service.device.geometry.addr
        before = taken(backing, managed)

        def ask_all(type_: RequestType) -> None:
            assert managed.service is not None
            for start in range(0, SIZE, 128 * MIB):
                request = Request(type_, GuestAddress(base + start), 64)
                assert managed.service.request(request).type is ResponseType.ACK

        ask_all(RequestType.PLUG)
        for page in range(0, SIZE, PAGE_SIZE):
            manager.guest_memory.write(GuestAddress(base + page), b"guest")
        assert taken(backing, managed) - before + SLACK >= SIZE
        assert managed.zone.hotplug.held() == SIZE
        ask_all(RequestType.UNPLUG)
        assert taken(backing, managed) - before < SLACK
        assert managed.zone.hotplug.held(HostOffset(0), ByteCount(SIZE)) == 0
        info = managed.service.info()
        assert (info["plugged_size"], info["unplugged_bytes"], info["unreturned_bytes"]) == (0, SIZE, 0)
