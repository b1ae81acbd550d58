"""Used buffer notifications of which the driver wanted none, or that it wanted and did not get, and kicks too early."""

from __future__ import annotations

from tests.conformance.wrong.fault import fault
from tests.conformance.wrong.rings import memory_of
from vhost_user.chain import Chain
from vhost_user.device_status import Status
from vhost_user.units import GuestAddress
from vhost_user.vring import SplitLayout
from virtio_mem.conformance.targets.behind_ring import RingTransport
from virtio_mem.mmio_registers import Interrupt
from virtio_mem.request_queue import GuestRequestQueue, Progress


class _Split(GuestRequestQueue):
    """Serves a split ring, and looks at parts of it that others don't look at."""

    served = 0

    @property
    def layout(self) -> SplitLayout:
        layout = self.queue.layout
        assert isinstance(layout, SplitLayout)
        return layout

    def load(self, address: int) -> int:
        return memory_of(self).load16(GuestAddress(address))

    def store(self, address: int, value: int) -> None:
        memory_of(self).store16(GuestAddress(address), value)

    def _serve(self, chain: Chain) -> None:
        self.served += 1
        super()._serve(chain)

    def process(self) -> Progress:
        self.served = 0
        return self.decide(super().process())

    def decide(self, progress: Progress) -> Progress:
        raise NotImplementedError


@fault("RING-NOTIFY-1")
class UsedEventAlwaysCounts(_Split):
    """used_event decides on notifications, whatever was negotiated."""

    def decide(self, progress: Progress) -> Progress:
        event = self.load(self.layout.avail + 4 + 2 * self.queue.size)
        since = (self.load(self.layout.used + 2) - event - 1) % 2**16
        return progress._replace(notify=since < self.served)


@fault("RING-NOTIFY-2")
class NotifiesWhoPolls(_Split):
    """The flag by which a driver wants no notification is not looked at."""

    def decide(self, progress: Progress) -> Progress:
        return progress._replace(notify=self.served > 0)


@fault("RING-NOTIFY-6")
class NotifiesOfEachEntry(NotifiesWhoPolls):
    """The event that the driver names is not looked at."""


@fault("RING-PACKED-10", ring="packed")
class NotifiesADisabledRing(GuestRequestQueue):
    """The driver's event flags are not looked at."""

    def process(self) -> Progress:
        before = self.queue.state()
        progress = super().process()
        return progress._replace(notify=self.queue.state() != before)


@fault("RING-NOTIFY-4")
class FlagAlwaysCounts(_Split):
    """The flag by which a driver wants no notification counts with EVENT_IDX, too."""

    def decide(self, progress: Progress) -> Progress:
        return progress._replace(notify=progress.notify and not self.load(self.layout.avail))


@fault("RING-NOTIFY-7")
class MarkInTheUsedFlags(_Split):
    """A bit of the used ring's flags that has no meaning is set."""

    def decide(self, progress: Progress) -> Progress:
        self.store(self.layout.used, self.load(self.layout.used) | 1 << 15)
        return progress


@fault("RING-NOTIFY-9")
class UsedFlagsWithEventIdx(_Split):
    """A device that polls says so by the used ring's flags, with EVENT_IDX as well."""

    def decide(self, progress: Progress) -> Progress:
        self.store(self.layout.used, 1)
        return progress


@fault("RING-NOTIFY-11")
class KickForNothingIsTheEnd(_Split):
    """A second kick with nothing on the ring ends the device's thread, for good."""

    idle = 0

    def decide(self, progress: Progress) -> Progress:
        self.idle += not self.served
        return progress

    def process(self) -> Progress:
        return super().process() if self.idle < 2 else Progress(notify=False, more=False)


@fault("STATUS-2", source="QEMU's virtio-pci")
class ServesBeforeDriverOk(RingTransport):
    """A kick is served as soon as there is a ring."""

    def process(self) -> bool:
        status = self.status
        if self.queue is not None:
            self.status |= Status.DRIVER_OK
        try:
            return super().process()
        finally:
            self.status = status


@fault("STATUS-3")
class NotifiesBeforeDriverOk(RingTransport):
    """A kick before DRIVER_OK is answered by an interrupt, and not served."""

    def process(self) -> bool:
        if Status.DRIVER_OK not in self.status:
            self._raise(Interrupt.USED_BUFFER)
        return super().process()


@fault("RESET-3")
class ServesAfterAReset(RingTransport):
    """The ring is served on after a reset."""

    before: GuestRequestQueue | None = None

    def _forget_driver(self) -> None:
        self.before = self.queue
        super()._forget_driver()

    def process(self) -> bool:
        if self.queue is None and self.before is not None:
            self.before.process()
        return super().process()
