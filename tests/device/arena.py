"""A device in service on real host memory, side by side with the naive model: both make each move, and are compared."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.device.model import ModelDevice
from vhost_user.errors import HostError
from vhost_user.units import GIB, KIB, MIB, ByteCount, GuestAddress, HostOffset
from virtio_mem.device import VirtioMemDevice
from virtio_mem.geometry import Geometry, UsableRegion
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.protocol import BlockState, Request, RequestType, ResponseType
from virtio_mem.service import DeviceService
from virtio_mem.zone import Zone, ZoneSpec

BACKINGS = ("anonymous", "memfd", "hugetlb", "shared file", "private file")

ADDR = 4 * GIB
NB_BLOCKS = 512
MAX_PLUGGED = 64
"""The target never exceeds this many blocks, so that 64 huge pages are enough for a region of 512."""


def zone_spec(backing: str, directory: Path, hotplug_size: int) -> ZoneSpec:
    """A zone of nothing but a hotplug region, on `backing`. A transparent huge page would span many of our blocks.

    A regular file has boot memory only, so there the zone is that; see `region`.
    """
    size, none = ByteCount(hotplug_size), ByteCount(0)
    if backing.endswith("file"):
        path = directory / "zone"
        with path.open("wb") as file:
            file.truncate(hotplug_size)
        return ZoneSpec("mem0", size, file=path, shared=backing == "shared file", thp=False)
    if backing == "hugetlb":
        return ZoneSpec("mem0", none, size, hugepages=True, hugepage_size=ByteCount(2 * MIB))
    return ZoneSpec("mem0", none, size, shared=backing == "memfd", thp=False)


def region(zone: Zone) -> HostMemory:
    """What the device of a zone of `zone_spec` is on."""
    memory = zone.hotplug or zone.boot
    assert memory is not None
    return memory


def block_size_of(backing: str) -> int:
    """Small blocks where the pages are small, so that many requests cost little memory traffic."""
    return 2 * MIB if backing == "hugetlb" else 64 * KIB


class Refusing:
    """The zone's memory, which refuses while `refuses` is set, as a host that is short of everything would."""

    def __init__(self, memory: HostMemory) -> None:
        self.memory = memory
        self.refuses = False

    def _gate(self) -> None:
        if self.refuses:
            raise HostError("host", "short", "refused by the test")

    def populate(self, offset: HostOffset, size: ByteCount) -> None:
        self._gate()
        self.memory.populate(offset, size)

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        self._gate()
        self.memory.discard(offset, size)

    @property
    def page_size(self) -> ByteCount:
        return self.memory.page_size

    def held(self, offset: HostOffset, size: ByteCount) -> ByteCount:
        return self.memory.held(offset, size)

    def held_at_least(self, offset: HostOffset, size: ByteCount) -> tuple[ByteCount, bool]:
        return self.memory.held_at_least(offset, size)

    def shortage(self, offset: HostOffset, size: ByteCount) -> HostError | None:
        return self.memory.shortage(offset, size)


class Arena:
    """Both devices and the memory. Every move asserts that they agree."""

    def __init__(self, backing: str, directory: Path, *, whole_region: bool = False) -> None:
        block_size = block_size_of(backing)
        region_size = NB_BLOCKS * block_size
        self.zone = Zone(zone_spec(backing, directory, region_size))
        self.held = region(self.zone).held
        self.memory = Refusing(region(self.zone))
        geometry = Geometry(
            addr=GuestAddress(ADDR),
            region_size=ByteCount(region_size),
            block_size=ByteCount(block_size),
            usable_region=UsableRegion.WHOLE_REGION if whole_region else UsableRegion.REQUESTED_PLUS_SLACK,
        )
        self.device = VirtioMemDevice(geometry)
        self.service = DeviceService(self.device, self.memory, prefault=True)
        self.model = ModelDevice(ADDR, region_size, block_size, whole_region=whole_region)
        self.block_size = block_size
        self.requests = 0

    def close(self) -> None:
        self.zone.close()

    def request(self, type_: int, block: int, nb_blocks: int, shift: int = 0) -> ResponseType:
        """The guest asks; the answers agree, and what an ACK did to the range shows in the host's own counters."""
        addr = (ADDR + block * self.block_size + shift) % 2**64
        request = Request(type_, GuestAddress(addr), nb_blocks)
        self.requests += 1
        expected, state = self.model.answer(request)
        response = self.service.request(request)
        assert response.type is expected, (request, response)
        if state is not None:
            assert response.state is state, (request, response)
        if expected is ResponseType.ACK and type_ in (RequestType.PLUG, RequestType.UNPLUG):
            size = nb_blocks * self.block_size
            held = self.held(HostOffset(addr - ADDR), ByteCount(size))
            assert held == (size if type_ == RequestType.PLUG else 0), request
        self.check_config()
        return response.type

    def resize(self, blocks: int) -> None:
        self.model.resize(blocks * self.block_size)
        self.service.resize(blocks * self.block_size)
        self.check_config()

    def pause(self, paused: bool) -> None:
        self.model.paused = paused
        (self.device.pause if paused else self.device.resume)()

    def refuse(self, refuses: bool) -> None:
        self.model.host_refuses = self.memory.refuses = refuses

    def system_reset(self) -> None:
        assert self.service.system_reset() is self.model.reset_machine()
        self.check_config()

    def check_config(self) -> None:
        config, model = self.device.config, self.model
        assert (config.plugged_size, config.requested_size) == (model.plugged_size, model.requested_size)
        assert config.usable_region_size == model.usable_region_size
        assert config.requested_size <= config.usable_region_size <= config.region_size
        assert config.plugged_size <= config.usable_region_size

    def check_bytes(self) -> None:
        """The bitmap, and all that the host holds, to the byte."""
        addrs = {
            ADDR + block * self.block_size
            for first, nb_blocks in self.device.blocks.plugged_runs()
            for block in range(first, first + nb_blocks)
        }
        assert addrs == self.model.plugged
        assert self.held() == self.model.plugged_size

    def check_everything(self) -> None:
        """The same by asking the device for the state of each block."""
        for block in range(self.model.usable_region_size // self.block_size):
            addr = ADDR + block * self.block_size
            response = self.service.request(Request(RequestType.STATE, GuestAddress(addr), 1))
            assert (response.state is BlockState.PLUGGED) == (addr in self.model.plugged)
        self.check_bytes()


def random_move(arena: Arena, rng: random.Random) -> None:
    """One move, of the guest mostly, hostile at times."""
    moves: list[tuple[float, Callable[[], object]]] = [
        (40, lambda: arena.request(RequestType.PLUG, rng.randrange(NB_BLOCKS), rng.randint(1, 8))),
        (30, lambda: arena.request(RequestType.UNPLUG, *_plugged_run(arena, rng))),
        (10, lambda: arena.request(RequestType.STATE, rng.randrange(NB_BLOCKS), rng.randint(1, 32))),
        (8, lambda: arena.request(rng.randrange(6), rng.randint(-8, NB_BLOCKS + 8), rng.choice([0, 1, 2, 512, 65535]))),
        (3, lambda: arena.request(rng.randrange(4), rng.randrange(NB_BLOCKS), 1, shift=rng.choice([1, 4096, -1]))),
        (1, lambda: arena.request(RequestType.UNPLUG_ALL, rng.randint(-8, NB_BLOCKS), rng.randrange(65536))),
        (5, lambda: arena.resize(rng.randint(0, MAX_PLUGGED))),
        (1, lambda: arena.pause(rng.random() < 0.3)),
        (1, lambda: arena.refuse(rng.random() < 0.3)),
        (1, arena.device.device_reset),
        (0.1, arena.system_reset),
    ]
    weights = [weight for weight, _ in moves]
    rng.choices([move for _, move in moves], weights)[0]()


def _plugged_run(arena: Arena, rng: random.Random) -> tuple[int, int]:
    runs = list(arena.device.blocks.plugged_runs())
    if not runs:
        return rng.randrange(NB_BLOCKS), 1
    first, nb_blocks = rng.choice(runs)
    skip = rng.randrange(nb_blocks)
    return first + skip, rng.randint(1, nb_blocks - skip + (rng.random() < 0.1))
