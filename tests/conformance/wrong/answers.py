"""The wrong answer."""

from __future__ import annotations

from tests.conformance.wrong.fault import fault
from tests.conformance.wrong.steps import Outcome, Steps
from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.device import Effect, EffectType, VirtioMemDevice
from virtio_mem.protocol import BlockState, Request, RequestType, Response, ResponseType

ACK, ERROR, BUSY = (Response(type_) for type_ in (ResponseType.ACK, ResponseType.ERROR, ResponseType.BUSY))


def is_(outcome: Outcome, type_: ResponseType) -> bool:
    """Whether a request has been decided, and so."""
    return isinstance(outcome, Response) and outcome.type is type_


@fault("DEP-NACK-1", source="Firecracker, handle_plug_request")
class ErrorBeyondTheTarget(Steps):
    """A PLUG beyond the target is an ERROR, after which Linux gives the device up."""

    def _plug(self, request: Request) -> Outcome:
        outcome = super()._plug(request)
        return ERROR if is_(outcome, ResponseType.NACK) else outcome


@fault("MEM-TARGET-1")
class NoTarget(Steps):
    """The target does not bound what can be plugged."""

    def _plug(self, request: Request) -> Outcome:
        requested, self.requested_size = self.requested_size, self.geometry.region_size
        outcome = super()._plug(request)
        self.requested_size = requested
        return outcome


@fault("DEP-NACK-2")
class TargetIsForTheFirstBlock(Steps):
    """A PLUG that begins below the target and ends above it is granted."""

    def _plug(self, request: Request) -> Outcome:
        run = self._run_of(request)
        below = self.plugged_size < self.requested_size
        if isinstance(run, Response) or not below or self.blocks.count(run):
            return super()._plug(request)
        return self._open(EffectType.PLUG, run)


@fault("DEP-BUSY-1", source="Firecracker and Cloud Hypervisor, which know no BUSY")
class ErrorForTheHost(VirtioMemDevice):
    """What the host can't do is the driver's ERROR."""

    def abandon(self, effect: Effect, reason: str) -> Response:
        super().abandon(effect, reason)
        return ERROR


@fault("DEP-BUSY-3", source="Cloud Hypervisor and Firecracker")
class UnplugAllIsAnError(VirtioMemDevice):
    """An UNPLUG ALL that the host can't do is an ERROR."""

    def abandon(self, effect: Effect, reason: str) -> Response:
        answer = super().abandon(effect, reason)
        return ERROR if effect.type is EffectType.UNPLUG_ALL else answer


@fault("DEP-UNKNOWN-1", source="Cloud Hypervisor before 97e16f249")
class UnknownTypeIsTheEnd(VirtioMemDevice):
    """A request of unknown type ends the device."""

    def request(self, request: Request) -> Outcome:
        RequestType(request.type)
        return super().request(request)


@fault("DEP-UNKNOWN-1")
class UnknownTypeIsGranted(VirtioMemDevice):
    """A request of unknown type gets ACK."""

    def request(self, request: Request) -> Outcome:
        return super().request(request) if request.type in list(RequestType) else ACK


@fault("MEM-UNPLUGALL-4")
class UnplugAllOfNothing(VirtioMemDevice):
    """An UNPLUG ALL with nothing plugged is an ERROR."""

    def request(self, request: Request) -> Outcome:
        if request.type == RequestType.UNPLUG_ALL and not self.plugged_size:
            return ERROR
        return super().request(request)


@fault("MEM-UNPLUGALL-1")
class UnplugAllOfARange(VirtioMemDevice):
    """An UNPLUG ALL must name a range that would do for the other requests."""

    def request(self, request: Request) -> Outcome:
        if request.type == RequestType.UNPLUG_ALL and (request.addr % self.geometry.block_size):
            return ERROR
        return super().request(request)


@fault("MEM-STATE-6")
class StateIsBusy(VirtioMemDevice):
    """A paused device answers BUSY even to STATE."""

    def request(self, request: Request) -> Outcome:
        return BUSY if self.paused else super().request(request)


@fault("MEM-STATE-6")
class StateBeyondTheTarget(VirtioMemDevice):
    """A STATE of more blocks than the target has is turned down as a PLUG would be."""

    def request(self, request: Request) -> Outcome:
        size = request.nb_blocks * self.geometry.block_size
        if request.type == RequestType.STATE and size > self.requested_size:
            return Response(ResponseType.NACK)
        return super().request(request)


@fault("MEM-PLUG-6")
class PlugTwice(Steps):
    """Plugging what is plugged is no error."""

    def _plug(self, request: Request) -> Outcome:
        run = self._run_of(request)
        if not isinstance(run, Response) and self.blocks.state(run) is BlockState.PLUGGED:
            return ACK
        return super()._plug(request)


@fault("MEM-UNPLUG-6")
class UnplugTwice(Steps):
    """Unplugging what is unplugged is no error."""

    def _unplug(self, request: Request) -> Outcome:
        run = self._run_of(request)
        if not isinstance(run, Response) and self.blocks.state(run) is BlockState.UNPLUGGED:
            return ACK
        return super()._unplug(request)


@fault("MEM-PLUG-6")
class OnlyTheFirstBlockIsLookedAt(Steps):
    """A PLUG is refused for its first block only; the others may be plugged."""

    def _plug(self, request: Request) -> Outcome:
        run = self._run_of(request)
        if isinstance(run, Response) or self.blocks.state(run) is not BlockState.MIXED:
            return super()._plug(request)
        first = self.blocks.state(run._replace(nb_blocks=1))
        return ACK if first is BlockState.UNPLUGGED else ERROR


@fault("MEM-UNPLUG-6")
class UnplugOfMixedBlocks(Steps):
    """An UNPLUG passes over the blocks that are unplugged already."""

    def _unplug(self, request: Request) -> Outcome:
        run = self._run_of(request)
        if not isinstance(run, Response) and self.blocks.state(run) is BlockState.MIXED:
            self.blocks.put(run, BlockState.UNPLUGGED)
            return ACK
        return super()._unplug(request)


@fault("MEM-PLUG-8")
class PlugIsOnlyPromised(VirtioMemDevice):
    """A PLUG gets ACK, and nothing is plugged."""

    def commit(self, effect: Effect) -> Response:
        if effect.type is EffectType.PLUG:
            self._close(effect)
            return ACK
        return super().commit(effect)


@fault("MEM-UNPLUG-8")
class UnplugIsOnlyPromised(VirtioMemDevice):
    """An UNPLUG gets ACK, and nothing is unplugged."""

    def commit(self, effect: Effect) -> Response:
        if effect.type is EffectType.UNPLUG:
            self._close(effect)
            return ACK
        return super().commit(effect)


@fault("DEP-BUSY-2")
class ErrorForAnUnplug(VirtioMemDevice):
    """An UNPLUG that the host can't do is an ERROR."""

    def abandon(self, effect: Effect, reason: str) -> Response:
        answer = super().abandon(effect, reason)
        return ERROR if effect.type is EffectType.UNPLUG else answer


@fault("DEP-BUSY-4")
class BusyForGood(Steps):
    """Once a PLUG was BUSY, every later one is."""

    busy = False

    def abandon(self, effect: Effect, reason: str) -> Response:
        self.busy = True
        return super().abandon(effect, reason)

    def _plug(self, request: Request) -> Outcome:
        outcome = super()._plug(request)
        if not self.busy or not isinstance(outcome, Effect):
            return outcome
        return self.abandon(outcome, "as before")


@fault("DEP-USABLE-1", source="Firecracker in effect, until the host sets the target again")
class NothingAfterUnplugAll(Steps):
    """After UNPLUG ALL each PLUG is BUSY until the host sets a target."""

    closed = False

    def commit(self, effect: Effect) -> Response:
        self.closed = self.closed or effect.type is EffectType.UNPLUG_ALL
        return super().commit(effect)

    def resize(self, requested_size: int) -> None:
        self.closed = False
        super().resize(requested_size)

    def _plug(self, request: Request) -> Outcome:
        outcome = super()._plug(request)
        return self.abandon(outcome, "closed") if self.closed and isinstance(outcome, Effect) else outcome


@fault("DEP-TARGET-3")
class LowerTargetUnplugs(VirtioMemDevice):
    """A target below what is plugged unplugs the last blocks by itself."""

    def resize(self, requested_size: int) -> None:
        super().resize(requested_size)
        end = requested_size // self.geometry.block_size
        if self.blocks.plugged > end:
            self.blocks.put(Run(BlockIndex(end), len(self.blocks) - end), BlockState.UNPLUGGED)
