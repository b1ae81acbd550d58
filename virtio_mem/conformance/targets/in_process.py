"""Devices of ours in this process, on real host memory: what `self` and `ring` have in common, the host's side.

What a device is made of can be replaced part by part (`Parts`): that is how devices that are wrong in one way are put
before the kit. The clock is the kit's: no time goes by but what `advance` says.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, NamedTuple

from vhost_user.errors import HostError, UsageError
from vhost_user.mapping import PAGE_SIZE
from vhost_user.units import GIB, ByteCount, GuestAddress, HostOffset, align_up
from vhost_user.vring import DeviceQueue
from virtio_mem.conformance.check import FINE
from virtio_mem.conformance.target import Capability, Refused, Subject, Target, TargetFailure, Wish
from virtio_mem.device import VirtioMemDevice
from virtio_mem.geometry import Geometry
from virtio_mem.hostmem import facts
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.installed import version
from virtio_mem.mmio import MmioTransport
from virtio_mem.protocol import Request
from virtio_mem.region_memory import RegionMemory
from virtio_mem.request_queue import GuestRequestQueue
from virtio_mem.service import DeviceService
from virtio_mem.zone import Zone, ZoneSpec

ADDR = GuestAddress(4 * GIB)
"""Where the region lies: behind a guest's ordinary memory, aligned to every block size that there is."""

BACKINGS = ("anonymous", "memfd", "hugetlb", "file", "private-file")
"""The kinds of host memory. The files are where temporary files are, the first one shared, the second private."""


def _device(geometry: Geometry, requested_size: int) -> VirtioMemDevice:
    return VirtioMemDevice(geometry, requested_size=requested_size)


def _memory(memory: RegionMemory) -> RegionMemory:
    return memory


def _service(device: VirtioMemDevice, memory: RegionMemory) -> DeviceService:
    return DeviceService(device, memory, prefault=True)


def _answer(service: DeviceService, request: bytes) -> bytes:
    return service.request(Request.decode(request)).encode()


@dataclass(frozen=True)
class Parts:
    """What a device of ours is made of, in the order in which it is made.

    `make_memory` gets the host's memory, which refuses while the check says so. `answer` gets the 24 bytes of a request
    and gives those of the response; it is used where no ring is, and `make_queue` where one is. `make_transport` is for
    another class than `RingTransport`, and called as that is.
    """

    make_device: Callable[[Geometry, int], VirtioMemDevice] = _device
    make_memory: Callable[[RegionMemory], RegionMemory] = _memory
    make_service: Callable[[VirtioMemDevice, RegionMemory], DeviceService] = _service
    answer: Callable[[DeviceService, bytes], bytes] = _answer
    make_queue: Callable[[DeviceService, DeviceQueue], GuestRequestQueue] = GuestRequestQueue
    make_transport: Callable[..., MmioTransport] | None = None


OURS = Parts()
"""A device as it should be."""


class _Refusing:
    """Memory of a host that gives none and takes none back while `refuses` is set."""

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self.refuses = False

    @property
    def page_size(self) -> ByteCount:
        return self._memory.page_size

    def populate(self, offset: HostOffset, size: ByteCount) -> None:
        self._look(offset, size)
        self._memory.populate(offset, size)

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        self._look(offset, size)
        self._memory.discard(offset, size)

    def held(self, offset: HostOffset, size: ByteCount) -> ByteCount:
        return self._memory.held(offset, size)

    def held_at_least(self, offset: HostOffset, size: ByteCount) -> tuple[ByteCount, bool]:
        return self._memory.held_at_least(offset, size)

    def shortage(self, offset: HostOffset, size: ByteCount) -> HostError | None:
        return self._refusal(offset, size) or self._memory.shortage(offset, size)

    def _look(self, offset: HostOffset, size: ByteCount) -> None:
        if refusal := self._refusal(offset, size):
            raise refusal

    def _refusal(self, offset: HostOffset, size: ByteCount) -> HostError | None:
        return HostError("memory", f"{offset:#x}+{size:#x}", "the check has the host refuse") if self.refuses else None


def _region(zone: Zone) -> HostMemory:
    """What the device is on. A regular file has boot memory only: of a zone on one it is that."""
    memory = zone.hotplug or zone.boot
    assert memory is not None
    return memory


class Made(NamedTuple):
    """A device in service, and what it is in service on."""

    zone: Zone
    gate: _Refusing
    service: DeviceService
    parts: Parts


@contextmanager
def alive() -> Iterator[None]:
    """What a device in this process raises would have been its end in another one: TargetFailure."""
    try:
        yield
    except (TargetFailure, Refused):
        raise
    except Exception as error:
        raise TargetFailure(f"the device raised {type(error).__name__}: {error}") from error


class InProcess(Subject):
    """The host's side of a device of ours. Takes over what `made` has."""

    def __init__(self, made: Made) -> None:
        self._zone, self._gate, self.service, self.parts = made
        self._memory = _region(self._zone)
        self._now = 0.0
        self._notices = 0

    @abstractmethod
    def _collect_notices(self) -> None:
        """Count what notices are there for a driver; called after whatever may have caused one."""

    def set_target(self, requested_size: int) -> None:
        """Refused where the device can't have so much, or not in whole blocks."""
        with alive():
            try:
                self.service.resize(requested_size)
            except UsageError as error:
                raise Refused(str(error)) from None
            self._collect_notices()

    def advance(self, seconds: float) -> None:
        """Poll the device as its daemon does, once a second."""
        end = self._now + seconds
        with alive():
            while self._now < end:
                self._now = min(self._now + 1.0, end)
                self.service.poll(self._now)
                self._collect_notices()

    def take_notices(self) -> int:
        """See `Subject`."""
        notices, self._notices = self._notices, 0
        return notices

    def held(self, offset: int, size: int) -> int:
        """By the host's own counters."""
        return self._memory.held(HostOffset(offset), ByteCount(size))

    def read(self, offset: int, size: int) -> bytes:
        """See `Subject`."""
        with self._memory.view(HostOffset(offset), ByteCount(size)) as view:
            return bytes(view)

    def write(self, offset: int, data: bytes) -> None:
        """See `Subject`."""
        with self._memory.view(HostOffset(offset), ByteCount(len(data))) as view:
            view[:] = data

    def refuse(self, refuses: bool) -> None:
        """Both to populate and to discard."""
        self._gate.refuses = refuses

    def pause(self, paused: bool) -> None:
        """As for migration and snapshots."""
        with alive():
            (self.service.pause if paused else self.service.resume)()
            self._collect_notices()

    def close(self) -> None:
        """Let the memory go."""
        self._zone.close()


class InProcessTarget(Target):
    """Our device on `backing`, made of `parts`.

    Raises UsageError for a backing that there is not, HostError where the host can't provide it.
    """

    abilities: ClassVar[Capability]
    """What can be done where the host tells what it holds."""
    many = FINE

    def __init__(self, name: str, backing: str, parts: Parts) -> None:
        if backing not in BACKINGS:
            raise UsageError("backing", backing, f"has to be one of {', '.join(BACKINGS)}")
        self.name = name
        self.version = f"virtio-mem {version()}"
        self.parts = parts
        self._backing = backing
        self._page_size = facts.default_hugepage_size() if backing == "hugetlb" else ByteCount(PAGE_SIZE)
        self._subject: InProcess | None = None
        with ExitStack() as undo:
            self._directory = Path(undo.enter_context(TemporaryDirectory(prefix="virtio-mem-")))
            told = self._host_tells()
            self._undo = undo.pop_all()
        self.capabilities = self.abilities if told else self.abilities & ~Capability.HELD

    def _host_tells(self) -> bool:
        """Whether the host tells what it holds of such memory. HostError where it has none of it to give."""
        size = self._whole_pages(Wish().region_size)
        with Zone(self._spec(size)) as zone:
            memory = _region(zone)
            if shortage := memory.shortage(HostOffset(0), size):
                raise shortage
            try:
                memory.held()
            except HostError:
                return False
        return True

    def _spec(self, size: ByteCount) -> ZoneSpec:
        """A zone of nothing but `size` bytes. Blocks may be smaller than a transparent huge page."""
        none, backing = ByteCount(0), self._backing
        if backing == "hugetlb":
            return ZoneSpec("mem0", none, size, hugepages=True)
        if not backing.endswith("file"):
            return ZoneSpec("mem0", none, size, shared=backing == "memfd", thp=False)
        path = self._directory / "zone"
        with path.open("wb") as file:
            file.truncate(size)
        return ZoneSpec("mem0", size, file=path, shared=backing == "file", thp=False)

    def _whole_pages(self, size: int) -> ByteCount:
        return ByteCount(align_up(size, self._page_size))

    def start(self, wish: Wish) -> Subject:
        """A new device on new memory. Blocks are at least as large as the pages, whatever was wished."""
        with ExitStack() as undo:
            zone = undo.enter_context(Zone(self._spec(self._whole_pages(wish.region_size))))
            self._subject = self._made(self._in_service(zone, wish))
            undo.pop_all()
        return self._subject

    def _in_service(self, zone: Zone, wish: Wish) -> Made:
        memory = _region(zone)
        block_size = ByteCount(max(wish.block_size, self._page_size))
        size = memory.size
        geometry = Geometry(addr=ADDR, region_size=size, block_size=block_size, node_id=wish.node_id)
        gate, parts = _Refusing(memory), self.parts
        device = parts.make_device(geometry, align_up(wish.requested_size, block_size))
        return Made(zone, gate, parts.make_service(device, parts.make_memory(gate)), parts)

    @abstractmethod
    def _made(self, made: Made) -> InProcess:
        """The subject that a device in service is, its driver's side added."""

    def close(self) -> None:
        """End what was started for it."""
        if self._subject is not None:
            self._subject.close()
        self._undo.close()
