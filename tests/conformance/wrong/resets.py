"""Resets that do too much or too little."""

from __future__ import annotations

from itertools import pairwise

from tests.conformance.wrong.answers import ACK
from tests.conformance.wrong.fault import fault
from vhost_user.units import ByteCount
from virtio_mem.blocks import BlockIndex
from virtio_mem.conformance.targets.in_process import Made
from virtio_mem.conformance.targets.ours import OurSubject
from virtio_mem.device import Effect, EffectType, VirtioMemDevice
from virtio_mem.protocol import Feature, Response
from virtio_mem.service import DeviceService


@fault("MEM-INIT-2")
class DeviceResetUnplugs(VirtioMemDevice):
    """A device reset unplugs every block."""

    def device_reset(self) -> None:
        super().device_reset()
        self.blocks.unplug_all()


@fault("MEM-INIT-2")
class DeviceResetPlugs(VirtioMemDevice):
    """A device reset fills the holes between plugged blocks."""

    def device_reset(self) -> None:
        super().device_reset()
        runs = list(self.blocks.plugged_runs())
        for one, other in pairwise(runs):
            end = one.first + one.nb_blocks
            self.blocks.plug(type(one)(BlockIndex(end), other.first - end))


@fault("MEM-CONF-16")
class DeviceResetShrinks(VirtioMemDevice):
    """A device reset sets the usable region anew from the target."""

    def device_reset(self) -> None:
        super().device_reset()
        self.usable_region_size = self.geometry.usable_size_for(self.requested_size)


@fault("DEP-TARGET-4")
class DeviceResetForgetsTheTarget(VirtioMemDevice):
    """After a device reset the target is 0."""

    def device_reset(self) -> None:
        super().device_reset()
        self.requested_size = ByteCount(0)


@fault("MEM-OP-11")
class SystemResetDoesNothing(DeviceService):
    """A reset of the machine is one of the device."""

    def system_reset(self) -> bool:
        self.device_reset()
        return True


@fault("DEP-HOST-3")
class SystemResetKeepsThePages(DeviceService):
    """A reset of the machine gives nothing back to the host."""

    def _unplug(self, effect: Effect) -> None:
        if effect.type is not EffectType.SYSTEM_RESET:
            super()._unplug(effect)


@fault("MEM-OP-11")
class SystemResetKeepsWhatIsBeyondTheTarget(VirtioMemDevice):
    """A reset of the machine unplugs no more than the target."""

    def commit(self, effect: Effect) -> Response:
        if effect.type is not EffectType.SYSTEM_RESET or self.plugged_size <= self.requested_size:
            return super().commit(effect)
        self._close(effect)
        return ACK


class _Sleeper(OurSubject):
    """A machine that can sleep, with nothing wrong yet."""

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        self.device_reset()


@fault("MEM-OP-12")
class SleepUnplugs(_Sleeper):
    """A machine that goes to sleep gives back what is plugged."""

    def sleep(self) -> None:
        self.system_reset()


@fault("MEM-OP-13")
class WakingUpUnplugs(_Sleeper):
    """A machine that wakes up is reset, and its blocks with it."""

    def wake(self) -> None:
        self.system_reset()


@fault("MEM-INIT-5")
class SleepIsKeptSecret(_Sleeper):
    """Blocks outlive the machine's sleep, and the driver is not told so."""

    def __init__(self, made: Made) -> None:
        super().__init__(made)
        self.service.device.offered_features &= ~Feature.PERSISTENT_SUSPEND
        self.offered_features &= ~int(Feature.PERSISTENT_SUSPEND)
