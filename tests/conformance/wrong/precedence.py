"""The right answers in the wrong order: which of them a request gets that is wrong in two ways."""

from __future__ import annotations

from tests.conformance.wrong.answers import BUSY, is_
from tests.conformance.wrong.fault import fault
from tests.conformance.wrong.steps import Outcome, Steps
from virtio_mem.device import VirtioMemDevice
from virtio_mem.protocol import Request, RequestType, Response, ResponseType

NACK = Response(ResponseType.NACK)


class _TargetFirst(Steps):
    """Compares with the target before anything else, where `asks` says so."""

    def asks(self, request: Request) -> bool:
        return True

    def _plug(self, request: Request) -> Outcome:
        size = request.nb_blocks * self.geometry.block_size
        if self.asks(request) and self.plugged_size + size > self.requested_size:
            return NACK
        return super()._plug(request)


@fault("MEM-PLUG-5", source="Cloud Hypervisor and Dragonball, before they look at the range")
class TargetBeforeRange(_TargetFirst):
    """A PLUG that is both too much and outside the usable region gets NACK."""

    def asks(self, request: Request) -> bool:
        return request.addr % self.geometry.block_size == 0


@fault("MEM-PLUG-3", source="Cloud Hypervisor and Dragonball, before they look at the range")
class TargetBeforeAlignment(_TargetFirst):
    """A PLUG that is both too much and not aligned gets NACK."""

    def asks(self, request: Request) -> bool:
        return request.addr % self.geometry.block_size != 0


@fault("MEM-PLUG-6", source="QEMU, which looks at the blocks last")
class TargetBeforeBlocks(_TargetFirst):
    """A PLUG that is both too much and over a plugged block gets NACK."""

    def asks(self, request: Request) -> bool:
        return not isinstance(self._run_of(request), Response)


@fault("MEM-PLUG-6")
class BusyBeforeError(Steps):
    """While the device is paused, a PLUG of a plugged block gets BUSY."""

    def _plug(self, request: Request) -> Outcome:
        bad = isinstance(self._run_of(request), Response)
        return BUSY if self.paused and not bad else super()._plug(request)


@fault("DEP-ORDER-1")
class BusyBeforeNack(Steps):
    """While the device is paused, a PLUG beyond the target gets BUSY."""

    def _plug(self, request: Request) -> Outcome:
        outcome = super()._plug(request)
        return BUSY if self.paused and is_(outcome, ResponseType.NACK) else outcome


@fault("MEM-UNPLUG-3")
class BusyBeforeAlignment(VirtioMemDevice):
    """While the device is paused, an UNPLUG that is not aligned gets BUSY."""

    def request(self, request: Request) -> Outcome:
        return BUSY if self.paused and request.type == RequestType.UNPLUG else super().request(request)
