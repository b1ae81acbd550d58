"""Machines with zones to share, and requests of their guests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.sharing.daemon import FakeDaemon
from vhost_user.frontend import Frontend
from vhost_user.units import MIB, GuestAddress
from virtio_mem.config import VmMemoryConfig
from virtio_mem.geometry import UsableRegion
from virtio_mem.manager import MemoryManager
from virtio_mem.protocol import Request, RequestType, ResponseType
from virtio_mem.service import DeviceService

ACK, BUSY = ResponseType.ACK, ResponseType.BUSY
BLOCK = 2 * MIB
ONE_ZONE = "--memory size=16M,shared=on,hotplug_method=virtio-mem,hotplug_size=128M,hotplugged_size=128M"


def manage(line: str = ONE_ZONE, block_size: int = BLOCK) -> MemoryManager:
    config = VmMemoryConfig.parse(line)
    return MemoryManager(config, block_size=block_size, usable_region=UsableRegion.WHOLE_REGION)


def service_of(manager: MemoryManager, zone_id: str = "mem0") -> DeviceService:
    service = manager.zones[zone_id].service
    assert service is not None
    return service


def ask(
    manager: MemoryManager, type_: RequestType, block: int = 0, nb_blocks: int = 1, zone_id: str = "mem0"
) -> ResponseType:
    service = service_of(manager, zone_id)
    geometry = service.device.geometry
    addr = GuestAddress(geometry.addr + block * geometry.block_size)
    return service.request(Request(type_, addr, nb_blocks)).type


def plug(manager: MemoryManager, block: int = 0, nb_blocks: int = 1, zone_id: str = "mem0") -> ResponseType:
    return ask(manager, RequestType.PLUG, block, nb_blocks, zone_id)


def unplug(manager: MemoryManager, block: int = 0, nb_blocks: int = 1, zone_id: str = "mem0") -> ResponseType:
    return ask(manager, RequestType.UNPLUG, block, nb_blocks, zone_id)


def unplug_all(manager: MemoryManager, zone_id: str = "mem0") -> ResponseType:
    return ask(manager, RequestType.UNPLUG_ALL, zone_id=zone_id)


@contextmanager
def daemon_at(slots: int | None = 509, timeout: float = 5.0) -> Iterator[tuple[FakeDaemon, Frontend]]:
    """A daemon and the front end that is connected to it; both end with the block."""
    daemon = FakeDaemon(slots)
    try:
        with daemon.frontend(timeout) as frontend:
            yield daemon, frontend
    finally:
        daemon.end()


def slots_of(daemon: FakeDaemon, manager: MemoryManager, zone_id: str = "mem0") -> list[tuple[int, int]]:
    """The daemon's regions within the hotplug region: offset and size, in blocks."""
    geometry = service_of(manager, zone_id).device.geometry
    region = range(geometry.addr, geometry.addr + geometry.region_size)
    return [
        ((each.guest_address - geometry.addr) // geometry.block_size, each.size // geometry.block_size)
        for address, each in sorted(daemon.regions.items())
        if address in region
    ]
