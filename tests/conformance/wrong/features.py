"""Features that are offered, and not kept."""

from __future__ import annotations

from tests.conformance.wrong.answers import ERROR
from tests.conformance.wrong.fault import fault
from tests.conformance.wrong.steps import Outcome
from vhost_user.errors import PeerError
from vhost_user.units import ByteCount
from virtio_mem.conformance.targets.in_process import Made
from virtio_mem.conformance.targets.ours import OurSubject
from virtio_mem.device import Effect, VirtioMemDevice
from virtio_mem.protocol import ConfigSpace, Feature, Request, RequestType


@fault("FEAT-2")
class AllOrNothing(VirtioMemDevice):
    """A driver that leaves a feature out is refused."""

    def negotiate(self, features: int) -> None:
        if self.offered_features & ~Feature(features):
            raise PeerError("driver features", hex(features), "all that are offered")
        super().negotiate(features)


@fault("FEAT-5")
class OneDriverOnly(VirtioMemDevice):
    """After a device reset nobody is taken any more."""

    taken = False

    def negotiate(self, features: int) -> None:
        if self.taken:
            raise PeerError("driver features", hex(features), "taken once")
        super().negotiate(features)
        self.taken = True


@fault("FEAT-4")
class NobodyIsTaken(VirtioMemDevice):
    """Each driver is refused, whatever it takes."""

    def negotiate(self, features: int) -> None:
        raise PeerError("driver features", hex(features), "never right")


class _Takes(VirtioMemDevice):
    """A device that turns down each PLUG of a driver that took `feature`."""

    feature: Feature

    def request(self, request: Request) -> Outcome:
        if request.type == RequestType.PLUG and self.feature in self.acked_features:
            return ERROR
        return super().request(request)


@fault("MEM-FEAT-2")
class UnpluggedInaccessibleIsNoUse(_Takes):
    """Whoever takes UNPLUGGED_INACCESSIBLE can plug nothing."""

    feature = Feature.UNPLUGGED_INACCESSIBLE


@fault("MEM-FEAT-3")
class PersistentSuspendIsNoUse(_Takes):
    """Whoever takes PERSISTENT_SUSPEND can plug nothing."""

    feature = Feature.PERSISTENT_SUSPEND


@fault("CFG-3")
class NothingBeforeFeatures(VirtioMemDevice):
    """The target shows once features are taken."""

    @property
    def config(self) -> ConfigSpace:
        config = super().config
        return config if self.acked_features else config._replace(requested_size=ByteCount(0))


@fault("FEAT-4")
class TwoAtOnceAreNoUse(VirtioMemDevice):
    """Whoever takes both UNPLUGGED_INACCESSIBLE and PERSISTENT_SUSPEND can plug nothing."""

    def request(self, request: Request) -> Outcome:
        both = Feature.UNPLUGGED_INACCESSIBLE | Feature.PERSISTENT_SUSPEND
        if request.type == RequestType.PLUG and both in self.acked_features:
            return ERROR
        return super().request(request)


@fault("FEAT-6")
class OneBootOnly(VirtioMemDevice):
    """After a reset of the machine nobody is taken any more."""

    booted = False

    def system_reset(self) -> Effect:
        self.booted = True
        return super().system_reset()

    def negotiate(self, features: int) -> None:
        if self.booted:
            raise PeerError("driver features", hex(features), "taken at the first boot")
        super().negotiate(features)


@fault("FEAT-7")
class Legacy(OurSubject):
    """VIRTIO_F_VERSION_1 is not on offer."""

    def __init__(self, made: Made) -> None:
        super().__init__(made)
        self.offered_features &= ~int(Feature.VERSION_1)
