"""Host memory that is kept, or given back, when it must not be."""

from __future__ import annotations

from contextlib import suppress

from tests.conformance.wrong.fault import WrongMemory, behind, fault
from vhost_user import _native
from vhost_user.errors import UsageError
from vhost_user.units import KIB, MIB, ByteCount, HostOffset
from virtio_mem.conformance.targets.ours import OurSubject
from virtio_mem.device import Effect
from virtio_mem.region_memory import RegionMemory
from virtio_mem.service import DeviceService

PAGE = 4 * KIB

MADV_DONTNEED = 4
"""madvise(2)."""


@fault(
    "DEP-HOST-1", source="Firecracker, whose own note on discard_range says so, and Cloud Hypervisor before c397c9c95"
)
class DontneedOnASharedFile(WrongMemory):
    """What is unplugged goes from this process's page tables by MADV_DONTNEED, and stays in the file."""

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        memory = behind(self)
        _native.madvise(memory.address + offset, size, MADV_DONTNEED)


@fault("DEP-HOST-1")
class NothingIsGivenBack(WrongMemory):
    """Nothing that is unplugged goes back to the host."""

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        pass


@fault("DEP-HOST-1")
class OnlyTheFirstPageIsGivenBack(WrongMemory):
    """Of a range that is unplugged, one page goes back to the host."""

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        self.memory.discard(offset, self.page_size)


@fault("DEP-HOST-1")
class LastPageIsKept(WrongMemory):
    """Of a range that is unplugged, the last page stays with the host."""

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        self.memory.discard(offset, ByteCount(size - self.page_size))


@fault("DEP-HOST-1")
class GivenBackOneRequestLater(WrongMemory):
    """What is unplugged goes back to the host when the next range is unplugged."""

    def __init__(self, memory: RegionMemory) -> None:
        super().__init__(memory)
        self.waiting: list[tuple[HostOffset, ByteCount]] = []

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        for one in self.waiting:
            self.memory.discard(*one)
        self.waiting = [(offset, size)]


@fault("MEM-OP-4")
class GivenBackTwice(WrongMemory):
    """What was unplugged last goes back to the host again with the next range, plugged in the meantime or not."""

    last: tuple[HostOffset, ByteCount] | None = None

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        if self.last:
            self.memory.discard(*self.last)
        self.last = offset, size
        self.memory.discard(offset, size)


@fault("MEM-OP-4")
class OnePageMoreIsGivenBack(WrongMemory):
    """The page behind what is unplugged goes back to the host as well."""

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        self.memory.discard(offset, size)
        with suppress(UsageError):
            self.memory.discard(HostOffset(offset + size), self.page_size)


@fault("MEM-OP-4")
class OnePageBeforeIsGivenBack(WrongMemory):
    """The page before what is unplugged goes back to the host as well."""

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        self.memory.discard(offset, size)
        with suppress(UsageError):
            self.memory.discard(HostOffset(offset - self.page_size), self.page_size)


@fault("MEM-OP-4")
class PlugBeginsWithNothing(WrongMemory):
    """A PLUG empties the range that it plugs, and as much before it."""

    def populate(self, offset: HostOffset, size: ByteCount) -> None:
        start = max(0, offset - size)
        self.memory.discard(HostOffset(start), ByteCount(offset + size - start))
        self.memory.populate(offset, size)


@fault("DEP-HOST-2")
class UnplugAllKeepsThePages(DeviceService):
    """UNPLUG ALL gives nothing back to the host."""

    def _unplug(self, effect: Effect) -> None:
        if not effect.everything:
            super()._unplug(effect)


@fault("MEM-INIT-3")
class DeviceResetEmpties(DeviceService):
    """A device reset leaves the blocks plugged, and nothing in them."""

    def device_reset(self) -> None:
        super().device_reset()
        self.memory.discard(HostOffset(0), self.device.geometry.region_size)


@fault("MEM-OP-4")
class LowerTargetTakesTheRest(DeviceService):
    """A target below what is plugged takes the pages beyond it away at once."""

    def resize(self, requested_size: int) -> None:
        super().resize(requested_size)
        with suppress(UsageError):
            rest = self.device.geometry.region_size - requested_size
            self.memory.discard(HostOffset(requested_size), ByteCount(rest))


@fault("DEP-HOST-1", source="Firecracker #5793: what is unplugged inside a slot stays reachable")
class OnlyWholeSlotsAreGivenBack(WrongMemory):
    """What is unplugged goes back to the host where it is 16 MiB and aligned to them."""

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        if not (offset | size) % (16 * MIB):
            self.memory.discard(offset, size)


@fault("MEM-OP-6")
class FirstPageIsReadOnly(OurSubject):
    """What the guest writes to the first page of a write is lost."""

    def write(self, offset: int, data: bytes) -> None:
        super().write(offset + PAGE, data[PAGE:])


@fault("MEM-OP-4")
class DiscardsWhatLiesFourGiBBehind(WrongMemory):
    """With a block near the region's start, the memory 4 GiB behind it goes as well."""

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        self.memory.discard(offset, size)
        with suppress(UsageError):
            self.memory.discard(HostOffset(offset + (1 << 32)), size)


@fault("DEP-HOST-1")
class DiscardsInThirtyTwoBits(WrongMemory):
    """Of an offset, 32 bits are used: what lies further on is not given back."""

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        self.memory.discard(HostOffset(offset & 0xFFFFFFFF), size)
