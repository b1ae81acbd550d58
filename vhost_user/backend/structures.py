"""What a session does with what is shared besides guest memory: dirty log, inflight areas, the device's state."""

from __future__ import annotations

from collections.abc import Mapping

from vhost_user.backend.answer import Answer, Deferred, Handler
from vhost_user.backend.device import Device
from vhost_user.backend.loop import EventLoop
from vhost_user.backend.negotiated import Negotiated
from vhost_user.backend.rings import RingHandlers
from vhost_user.backend.state_transfer import StateTransfer
from vhost_user.dirty_log import DirtyLog
from vhost_user.errors import FieldError, PeerError
from vhost_user.inflight import InflightBuffer
from vhost_user.message import (
    PHASE_STOPPED,
    U64,
    DeviceState,
    DeviceStateReply,
    FrontendRequest,
    Inflight,
    Log,
    TransferDirection,
)
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import ByteCount, HostOffset


class StructureHandlers:
    """The handlers of these messages, and what came with them."""

    def __init__(self, device: Device, loop: EventLoop, negotiated: Negotiated, rings: RingHandlers) -> None:
        self._device = device
        self._loop = loop
        self._negotiated = negotiated
        self._rings = rings
        self._transfer: StateTransfer | None = None
        self.table: Mapping[FrontendRequest, Handler] = {
            FrontendRequest.SET_LOG_BASE: self._set_log_base,
            FrontendRequest.SET_LOG_FD: lambda *_: None,  # a hint that nobody is obliged to give
            FrontendRequest.GET_INFLIGHT_FD: self._get_inflight_fd,
            FrontendRequest.SET_INFLIGHT_FD: self._set_inflight_fd,
            FrontendRequest.SET_DEVICE_STATE_FD: self._set_device_state_fd,
            FrontendRequest.CHECK_DEVICE_STATE: self._check_device_state,
        }

    # The dirty log.

    def _set_log_base(self, payload: Log | U64, fds: list[OwnedFd]) -> Answer:
        if not isinstance(payload, Log):
            raise PeerError("SET_LOG_BASE", "an address", "has to come with a descriptor", "negotiate LOG_SHMFD")
        log, before = DirtyLog(fds[0], payload.size, payload.offset), self._negotiated.log
        self._negotiated.log = log
        for vring in self._rings.vrings:
            vring.update_log()
        if before is not None:
            before.close()
        return Answer(U64(0).encode())

    # Inflight areas.

    def _get_inflight_fd(self, payload: Inflight, _: list[OwnedFd]) -> Answer:
        self._check_queues(payload)
        fd, size, offset = InflightBuffer.create(payload.num_queues, payload.queue_size, packed=self._negotiated.packed)
        return Answer(payload.answer(ByteCount(size), HostOffset(offset)).encode(), (fd,))

    def _set_inflight_fd(self, payload: Inflight, fds: list[OwnedFd]) -> None:
        self._check_queues(payload)
        if self._rings.any_started:
            raise PeerError("inflight", "set", "has to be given before rings are started", "stop them first")
        buffer = InflightBuffer.open(
            fds[0],
            payload.mmap_size,
            payload.mmap_offset,
            payload.num_queues,
            payload.queue_size,
            packed=self._negotiated.packed,
        )
        if self._negotiated.inflight is not None:
            self._negotiated.inflight.close()
        self._negotiated.inflight = buffer

    def _check_queues(self, payload: Inflight) -> None:
        if not 1 <= payload.num_queues <= self._device.queue_count:
            raise PeerError(
                "num_queues", payload.num_queues, f"has to be 1 to the device's {self._device.queue_count} queues"
            )
        if not 1 <= payload.queue_size <= self._device.max_queue_size:
            raise PeerError("queue_size", payload.queue_size, f"has to be 1 to {self._device.max_queue_size} entries")

    # The device's state.

    @property
    def transferring(self) -> bool:
        """Whether state is being saved or loaded, or was and the front end has not asked how it went."""
        return self._transfer is not None

    def _set_device_state_fd(self, payload: DeviceState, fds: list[OwnedFd]) -> Answer:
        try:
            self._begin_transfer(payload, fds)
        except FieldError:
            return Answer(DeviceStateReply(error=1, no_fd=True).encode())
        return Answer(DeviceStateReply(error=0, no_fd=True).encode())

    def _begin_transfer(self, payload: DeviceState, fds: list[OwnedFd]) -> None:
        if payload.direction not in set(TransferDirection) or payload.phase != PHASE_STOPPED:
            raise PeerError("direction, phase", payload, "has to be 0 to save or 1 to load, while stopped, which is 0")
        if self._rings.any_started:
            raise PeerError("device state", "moved", "every ring has to be stopped")
        self._drop_transfer()
        if payload.direction == TransferDirection.SAVE:
            self._transfer = StateTransfer.save(self._loop, fds[0], self._device.save_state())
        else:
            limit = self._device.state_size_limit
            self._transfer = StateTransfer.load(self._loop, fds[0], limit, self._device.load_state)

    def _check_device_state(self, _: object, __: list[OwnedFd]) -> Deferred:
        deferred = Deferred()
        if self._transfer is None:
            deferred.resolve(Answer(U64(1).encode()))
        else:
            self._transfer.when_done(lambda good: deferred.resolve(Answer(U64(0 if good else 1).encode())))
        return deferred

    def _drop_transfer(self) -> None:
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None

    def close(self) -> None:
        """Let go of everything."""
        self._drop_transfer()
        for structure in (self._negotiated.log, self._negotiated.inflight):
            if structure is not None:
                structure.close()
        self._negotiated.log = self._negotiated.inflight = None
