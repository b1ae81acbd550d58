"""What the host has nothing to do for is answered by the C core, while it has the ring in its hands.

Those are requests that change nothing, and a PLUG where memory is not populated and nobody is to be told first. Who
wants to know of each request is told once it has gone back; the driver is called before the last of them are told of.
"""

from __future__ import annotations

from vhost_user import _native
from vhost_user.vring import Batch
from virtio_mem._native import Plugs
from virtio_mem.serve.memory import FrontendMemory
from virtio_mem.serve.state import DeviceState
from virtio_mem.service import DeviceService


class AtOnce:
    """Answers the requests of `batch` for `service`, whose memory that is, as an `Answerer`.

    It is what it has the service's lock by: `with` it, the device is as it was, but for what it answered. Where it has
    answered all, it leaves the device prepared for what comes next, unless somebody else has had the lock by then: to
    prepare it takes a fifth of what Python has to do between a kick and its call.
    """

    def __init__(self, service: DeviceService, memory: FrontendMemory, state: DeviceState, batch: Batch) -> None:
        self.raw = _native.Answerer(*service.device.answering())
        self._service = service
        self._memory = memory
        self._state = state
        self._batch = batch
        self._prepared: int | None = None
        """In which turn of the lock the device was left prepared."""

    def ready(self) -> AtOnce | None:
        """See `Answerer`. A request that was granted and not answered is looked for among those that come; and a system
        reset that is refused may put it back after this, which has it all left to others."""
        return self if self._state.intent is None else None

    def __enter__(self) -> None:
        lock = self._service.lock
        lock.__enter__()
        try:
            prepared, self._prepared = self._prepared, None
            if prepared != lock.turns - 1:
                self._prepare()
        except BaseException:
            lock.__exit__(None, None, None)
            raise

    def _prepare(self) -> None:
        looks = self._service.tally.looks_at_each
        self.raw.ask_once(looks)
        self._service.device.prepare(self._plugs(), looks=looks, answers=self._state.intent is None)

    def _plugs(self) -> Plugs | None:
        """By what PLUGs are answered, where nobody has anything to do for them, or to say against them."""
        service, place = self._service, self._memory.place
        if place is None or service.prefault or service.listeners:
            return None
        return Plugs(self._state.record, *place)

    def __exit__(self, *_: object) -> None:
        service = self._service
        try:
            plugged, verdicts = service.device.answered_at_once()
            if plugged:
                service.not_refused()
                self._state.plugged_at_once(lost=self.raw.lost)
            if verdicts:
                service.tally.answered_all(self._batch.requests, verdicts)
            if not self._batch.count:  # else others answer the rest, and have the lock for it
                turn = service.lock.turns
                self._prepare()  # anew: who was told may have changed the device
                self._prepared = turn
        finally:
            service.lock.__exit__(None, None, None)
