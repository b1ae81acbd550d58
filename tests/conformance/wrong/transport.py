"""Registers that say something else than they should, and writes and reads that should have no effect."""

from __future__ import annotations

from typing import Any

from tests.conformance.wrong.fault import fault
from vhost_user.device_status import Status
from vhost_user.units import ByteCount
from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.conformance.target import TargetFailure
from virtio_mem.conformance.targets.behind_ring import RingTransport
from virtio_mem.conformance.targets.ours import OurSubject
from virtio_mem.mmio_registers import Interrupt, Register
from virtio_mem.protocol import Feature


@fault("MEM-ID-1")
class AnotherDeviceType(RingTransport):
    """The device type is 25, which is a sound device."""

    def _read_register(self, offset: int) -> int:
        return 25 if offset == Register.DEVICE_ID else super()._read_register(offset)


@fault("MEM-ID-2")
class TwoQueues(RingTransport):
    """There is a second virtqueue, which nobody has a use for."""

    def _read_register(self, offset: int) -> int:
        if offset == Register.QUEUE_SIZE_MAX and self._queue_sel == 1:
            return 64
        return super()._read_register(offset)


class _Long(RingTransport):
    """A queue has more entries than the format allows."""

    def _read_register(self, offset: int) -> int:
        size = super()._read_register(offset)
        return size and 65536 if offset == Register.QUEUE_SIZE_MAX else size


@fault("RING-SPLIT-1")
class LongSplitQueue(_Long):
    """A split queue can have 65536 entries."""


@fault("RING-PACKED-1", ring="packed")
class LongPackedQueue(_Long):
    """A packed queue can have 65536 entries."""


@fault("STATUS-1")
class StatusFromBefore(RingTransport):
    """The status of a new device is that of a driver that was there before."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.status = Status.ACKNOWLEDGE


@fault("RESET-1")
class StatusStays(RingTransport):
    """After a reset the status says that the device was found."""

    def _forget_driver(self) -> None:
        super()._forget_driver()
        self.status = Status.ACKNOWLEDGE


@fault("STATUS-4")
class NeverNeedsAReset(RingTransport):
    """A ring that can't be served on is left alone without a word."""

    def fail(self) -> None:
        pass


@fault("STATUS-5")
class NeedsAResetInSilence(RingTransport):
    """The status tells that a reset is needed, and no notice does."""

    def fail(self) -> None:
        self.status |= Status.NEEDS_RESET
        self._raise(Interrupt.USED_BUFFER)


@fault("CFG-2")
class GenerationStays(RingTransport):
    """The generation is the same for ever."""

    def _generation_now(self) -> int:
        super()._generation_now()
        return 7


@fault("MEM-LAYOUT-2")
class DriverSetsItsTarget(RingTransport):
    """What the driver writes to requested_size is the target."""

    def write(self, offset: int, value: int, size: int = 4) -> None:
        if offset == Register.CONFIG + 48:
            self.service.device.requested_size = ByteCount(value * 4096)
        super().write(offset, value, size)


@fault("MEM-OP-8")
class UnpluggedMemoryIsNotThere(OurSubject):
    """UNPLUGGED_INACCESSIBLE is not on offer, and who reads unplugged memory is ended."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.service.device.offered_features &= ~Feature.UNPLUGGED_INACCESSIBLE
        self.offered_features &= ~int(Feature.UNPLUGGED_INACCESSIBLE)

    def read(self, offset: int, size: int) -> bytes:
        device = self.service.device
        block = offset // device.geometry.block_size
        if not device.blocks.count(Run(BlockIndex(block), 1)):
            raise TargetFailure("the guest read memory that is not there")
        return super().read(offset, size)
