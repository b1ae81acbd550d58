"""Configuration change notices that are missed, and others that nobody should get."""

from __future__ import annotations

from tests.conformance.wrong.fault import fault
from tests.conformance.wrong.steps import Outcome, Steps
from vhost_user.errors import UsageError
from virtio_mem.conformance.targets.ours import OurSubject
from virtio_mem.device import Effect, EffectType, VirtioMemDevice
from virtio_mem.protocol import Request, Response


@fault("MEM-CONF-18")
class NoNoticeOfTheTarget(VirtioMemDevice):
    """A new target comes without a notice."""

    def resize(self, requested_size: int) -> None:
        notice = self._notice
        super().resize(requested_size)
        self._notice = notice


@fault("MEM-CONF-18")
class NoNoticeOfALowerTarget(VirtioMemDevice):
    """A new target comes with a notice only where the driver has something to plug."""

    def resize(self, requested_size: int) -> None:
        notice = self._notice
        super().resize(requested_size)
        self._notice = self._notice if requested_size > self.plugged_size else notice


@fault("MEM-CONF-18")
class OneNoticeForAll(VirtioMemDevice):
    """There is a notice of the first target, and of none after it."""

    noticed = False

    def resize(self, requested_size: int) -> None:
        super().resize(requested_size)
        self._notice, self.noticed = self._notice and not self.noticed, True


@fault("MEM-CONF-19")
class NoticeOfEachPlug(VirtioMemDevice):
    """Each PLUG and UNPLUG brings a notice, since plugged_size is another."""

    def commit(self, effect: Effect) -> Response:
        self._notice = True
        return super().commit(effect)


@fault("DEP-BUSY-5")
class NoNoticeAfterBusy(VirtioMemDevice):
    """Whoever was told BUSY must find out alone when it is over."""

    def retry_now(self) -> None:
        pass


@fault("DEP-BUSY-5")
class NoticeAfterTheFirstBusy(VirtioMemDevice):
    """The first time that a BUSY is over there is a notice, and never again."""

    noticed = False

    def retry_now(self) -> None:
        if self.owes_notice and not self.noticed:
            self.noticed = True
            super().retry_now()


@fault("DEP-TARGET-1", source="Cloud Hypervisor #4001 and #4003")
class NoTargetWithoutADriver(VirtioMemDevice):
    """The target can't be set before a driver is there."""

    def resize(self, requested_size: int) -> None:
        if not self.acked_features:
            raise UsageError("requested_size", requested_size, "set once the device is active")
        super().resize(requested_size)


@fault("DEP-TARGET-2", source="Cloud Hypervisor, where a retry of resize fails")
class SameTargetIsRefused(VirtioMemDevice):
    """The target that the device has already is refused."""

    def resize(self, requested_size: int) -> None:
        if requested_size == self.requested_size:
            raise UsageError("requested_size", requested_size, "another one than now")
        super().resize(requested_size)


@fault("DEP-DRIVER-1")
class NoticeForPlugsOnly(Steps):
    """A driver that was told BUSY at an UNPLUG gets no notice when it is over."""

    def abandon(self, effect: Effect, reason: str) -> Response:
        owed = self._owes_notice
        response = super().abandon(effect, reason)
        self._owes_notice = owed or effect.type is EffectType.PLUG
        return response

    def _unplug(self, request: Request) -> Outcome:
        owed = self._owes_notice
        outcome = super()._unplug(request)
        self._owes_notice = owed
        return outcome


@fault("RESET-2")
class NoticeForNobody(OurSubject):
    """A new target brings a notice at once, whether a driver is there or not."""

    def _collect_notices(self) -> None:
        self._has_driver = True
        super()._collect_notices()
