"""One front end's session: what each of its messages does. No socket; the loop only to wait for kicks.

A message is checked in three steps: the codec has looked at sizes, counts and descriptors; rules.py knows whether what
it needs was negotiated; and its handler looks at the state of things. Whatever refuses, nothing has changed.

A refusal is told to the front end if there is a way to: a non-zero acknowledgement where it asked for one (REPLY_ACK),
or the failure that the message's own reply has a form for. Otherwise the session ends, since the front end would take
silence for success; and it ends where the stream itself can't be trusted.

The handlers stand in three tables: this module's, the rings' (rings.py), and the ones for what is shared besides guest
memory (structures.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from vhost_user import _native
from vhost_user.backend.answer import Answer, Deferred, Handler
from vhost_user.backend.channel import BackendChannel, require_channel
from vhost_user.backend.device import DEVICE_SPECIFIC, Device
from vhost_user.backend.iotlb import IotlbHandlers
from vhost_user.backend.loop import EventLoop
from vhost_user.backend.memory import MemoryHandlers
from vhost_user.backend.negotiated import RING_FEATURES, Negotiated
from vhost_user.backend.postcopy import PostcopyHandlers
from vhost_user.backend.rings import RingHandlers
from vhost_user.backend.rules import Rule, Rules
from vhost_user.backend.structures import StructureHandlers
from vhost_user.connection import Connection, Received
from vhost_user.device_status import Status
from vhost_user.errors import Disconnected, FieldError, PeerError
from vhost_user.message import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    U64,
    VIRTIO_F_IOMMU_PLATFORM,
    BackendRequest,
    Config,
    FrontendRequest,
    ProtocolFeature,
    decode_payload,
    name_of,
    without_support,
)
from vhost_user.owned_fd import OwnedFd
from vhost_user.shared_memory import SharedMemory

log = logging.getLogger(__name__)

PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_SEND_FD
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.GPA_ADDRESSES
    | DEVICE_SPECIFIC
)
"""What may be offered, each bit working; CONFIG and DEVICE_SPECIFIC only for a device that has them. No other bit is:
front ends ack bits that they are offered, and some then rely on them."""

_SUCCESS, _FAILURE = (Answer(U64(code).encode()) for code in (0, 1))


class Session:
    """Serves one front end for one device; made when it connects, closed when it goes."""

    def __init__(
        self,
        device: Device,
        loop: EventLoop,
        *,
        protocol_features: ProtocolFeature = PROTOCOL_FEATURES,
        own_names: Callable[[], set[object]] = set,
    ) -> None:
        self._own_names = own_names
        self._faults_looked_at = _native.guard_faults()
        self.device = device
        self._loop = loop
        self.offered = device.features | RING_FEATURES | F_LOG_ALL | F_PROTOCOL_FEATURES
        self.offers = Answer(U64(self.offered).encode())
        """What GET_FEATURES is answered by, always, and changes nothing."""
        self.offered_protocol = _without_what_it_lacks(protocol_features, device)
        self.negotiated = Negotiated(SharedMemory(keeps_file=device.keeps_file))
        self.channel: BackendChannel | None = None
        self.rings = RingHandlers(device, loop, self.negotiated)
        self.postcopy = PostcopyHandlers(self.negotiated)
        self.rings.memory_to_come = lambda: self.postcopy.unacknowledged
        self.memory = MemoryHandlers(device, self.negotiated, self.rings, self.postcopy)
        self.structures = StructureHandlers(device, loop, self.negotiated, self.rings)
        self.iotlb = IotlbHandlers(loop, self.negotiated, self.rings)
        handlers: Mapping[FrontendRequest, Handler] = {
            **self.rings.table,
            **self.memory.table,
            **self.postcopy.table,
            **self.structures.table,
            **self.iotlb.table,
            FrontendRequest.GET_FEATURES: lambda *_: self.offers,
            FrontendRequest.SET_FEATURES: self._set_features,
            FrontendRequest.SET_OWNER: self._set_owner,
            FrontendRequest.RESET_OWNER: lambda *_: None,  # the document: ignore it
            FrontendRequest.GET_PROTOCOL_FEATURES: lambda *_: Answer(U64(int(self.offered_protocol)).encode()),
            FrontendRequest.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            FrontendRequest.GET_QUEUE_NUM: lambda *_: Answer(U64(device.queue_count).encode()),
            FrontendRequest.SET_BACKEND_REQ_FD: self._set_backend_req_fd,
            FrontendRequest.GET_CONFIG: self._get_config,
            FrontendRequest.SET_CONFIG: self._set_config,
            FrontendRequest.RESET_DEVICE: self._reset_device,
            FrontendRequest.SET_STATUS: self._set_status,
            FrontendRequest.SEND_RARP: lambda payload, _: device.send_rarp(payload.address),
            FrontendRequest.NET_SET_MTU: lambda payload, _: device.set_mtu(payload.value),
            FrontendRequest.GET_STATUS: lambda *_: Answer(U64(self.status).encode()),
        }
        self._rules = Rules(handlers, self.negotiated, self.offered, self.offered_protocol)
        self.accepted: Callable[[FrontendRequest, Any], None] = lambda *_: None
        """Called after each message that was not refused, with its payload: see journal.py."""
        self.tell_of_reset: Callable[[], None] = self.config_changed
        """Called for the notice that follows DEVICE_NEEDS_RESET."""
        self._config_due = False
        for vring in self.rings.vrings:
            vring.on_break = self._broke
        device.connected()

    def handle(self, received: Received) -> Answer | Deferred | None:
        """What to answer to a message, whose descriptors are taken or closed. Any error but ours ends the session."""
        rule: Rule | None = None
        try:
            if received.reply:
                name = name_of(received.request)
                raise PeerError("flags", f"{received.flags:#x}", f"{name} has to be a request, and no reply")
            # Whether to acknowledge is decided by what was agreed before the message.
            try:
                rule = self._rules.find(received.request)
                payload = decode_payload(rule.spec, received.body, len(received.fds))
                answer = rule.handler(payload, received.fds)
                self.accepted(rule.request, payload)
                if self._config_due:
                    self.config_changed()
            except FieldError as error:
                name = name_of(received.request)
                acknowledged = rule.acknowledged if rule else self._rules.acknowledges(received.request)
                if isinstance(error, Disconnected) or not (received.need_reply and acknowledged):
                    error.locate(name)
                    raise
                log.warning("%s refused: %s", name, error)
                return _FAILURE
        finally:
            received.close()
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s: %s", rule.spec.name, payload)
        if answer is None and rule.acknowledged and received.need_reply:
            return _SUCCESS
        return answer

    @property
    def _acked(self) -> ProtocolFeature:
        return self.negotiated.protocol_features

    # Negotiation.

    def _set_owner(self, _: object, __: list[OwnedFd]) -> None:
        self.negotiated.owned = True

    def _set_features(self, payload: U64, _: list[OwnedFd]) -> None:
        features = payload.value
        if unknown := features & ~self.offered:
            raise PeerError("features", f"{features:#x}", f"has bits that were not offered, {unknown:#x}")
        before = self.negotiated.features
        if self.rings.any_started and (before ^ features) & ~F_LOG_ALL:
            limit = "no more than logging may be switched while rings run"
            raise PeerError("features", f"{features:#x}", limit, "stop them first, by GET_VRING_BASE")
        if features & VIRTIO_F_IOMMU_PLATFORM and not self.negotiated.has(ProtocolFeature.BACKEND_REQ):
            limit = "needs BACKEND_REQ negotiated before, since translations are asked for on that channel"
            raise PeerError("features", "IOMMU_PLATFORM", limit, "send SET_PROTOCOL_FEATURES first")
        self.device.negotiated(features & ~(F_PROTOCOL_FEATURES | F_LOG_ALL))
        self.negotiated.features = features
        self.negotiated.features_set = True
        self.rings.features_set()

    def _set_protocol_features(self, payload: U64, _: list[OwnedFd]) -> None:
        if unknown := payload.value & ~int(self.offered_protocol):
            raise PeerError(
                "protocol features",
                f"{payload.value:#x}",
                f"has bits that were not offered, {unknown:#x}",
            )
        features = ProtocolFeature(payload.value)
        if lacking := without_support(features):
            raise PeerError("protocol features", features.name, f"has to have what {lacking.name} rests on")
        self.negotiated.protocol_features = features
        self.negotiated.memory.gpa_addresses = ProtocolFeature.GPA_ADDRESSES in features

    def _set_backend_req_fd(self, _: object, fds: list[OwnedFd]) -> None:
        sock = require_channel(fds[0], self._own_names())
        self._close_channel()
        self.channel = BackendChannel(Connection(sock, "back-end channel", most_fds=0), self._acked)
        self._loop.watch(self.channel, self._answer)
        self.iotlb.use(self.channel)

    def _answer(self) -> None:
        assert self.channel is not None
        try:
            self.channel.answer()
        except PeerError as error:
            log.info("back-end channel: %s", error)
            self._close_channel()

    def _close_channel(self) -> None:
        if self.channel is not None:
            self.iotlb.use(None)
            self._loop.forget(self.channel)
            self.channel.close()
            self.channel = None

    # The device.

    def _get_config(self, payload: Config, _: list[OwnedFd]) -> Answer:
        try:
            data = self.device.read_config(payload.offset, len(payload.data))
        except PeerError as error:
            log.warning("GET_CONFIG: %s", error)
            return Answer(b"")
        assert len(data) == len(payload.data)
        return Answer(Config(payload.offset, payload.flags, data).encode())

    def _set_config(self, payload: Config, _: list[OwnedFd]) -> None:
        if payload.flags not in (0, 1):
            raise PeerError("flags", payload.flags, "has to be 0, for what the driver writes, or 1, for migration")
        self.device.write_config(payload.offset, payload.data, migration=payload.flags == 1)

    def _reset_device(self, _: object, __: list[OwnedFd]) -> None:
        self.rings.reset()
        self.negotiated.status = 0
        self.device.reset()

    def _set_status(self, payload: U64, _: list[OwnedFd]) -> None:
        if payload.value > 0xFF:
            raise PeerError("status", payload.value, "has to be at most 255, the device status field being one byte")
        before = self.negotiated.status
        status = payload.value & ~int(Status.NEEDS_RESET)  # they write back what they read
        self.device.set_status(status)
        self.negotiated.status = status
        if payload.value == 0:
            self.rings.stop_broken()
        if self.rings.any_broken and not before & Status.DRIVER_OK:
            self._broke()  # QEMU starts rings before it says DRIVER_OK

    @property
    def status(self) -> int:
        """The device status: what the driver wrote, and whether a ring broke, which only a reset can mend."""
        return self.negotiated.status | (Status.NEEDS_RESET if self.rings.any_broken else 0)

    def _broke(self) -> None:
        # virtio 2.1.2, "Device Status Field": a notice follows DEVICE_NEEDS_RESET where DRIVER_OK is set.
        if self.negotiated.status & Status.DRIVER_OK:
            self.tell_of_reset()

    def config_changed(self) -> None:
        """Tell the front end that the configuration space is not as it was, if it asked for a channel to be told by.

        Not while all rings are stopped: then a back end sends nothing, by the document, and QEMU 11.1 crashes if it
        does. The front end is told once one is started and enabled.
        """
        self._config_due = not self.rings.any_running
        if self._config_due or self.channel is None or ProtocolFeature.CONFIG not in self._acked:
            return
        try:
            self.channel.send(BackendRequest.CONFIG_CHANGE_MSG)
        except PeerError as error:
            log.info("back-end channel: %s", error)
            self._close_channel()

    @property
    def unread_notices(self) -> bool:
        """Whether something that was sent on the back-end channel has not been read."""
        return self.channel is not None and self.channel.unread

    def require_memory(self) -> None:
        """Raise PeerError where memory that the front end shares is gone, because its file was truncated.

        Costs next to nothing as long as no access has found any memory missing.
        """
        negotiated, faults = self.negotiated, _native.guard_faults()
        if faults == self._faults_looked_at:
            return
        if (region := negotiated.memory.dead_region()) is not None:
            gone = f"region {region}"
        elif negotiated.log is not None and negotiated.log.dead:
            gone = "dirty log"
        elif negotiated.inflight is not None and negotiated.inflight.dead:
            gone = "inflight area"
        else:  # somebody else's
            self._faults_looked_at = faults
            return
        raise PeerError("memory", gone, "has to stay as long as it is shared", "don't truncate its file")

    def close(self) -> None:
        """Stop all rings, let go of everything that is the front end's, and tell the device.

        Each step is taken, whatever the ones before it raise.
        """
        with ExitStack() as steps:  # the last one first
            steps.callback(self.negotiated.memory.close)
            steps.callback(self.device.disconnected)
            steps.callback(self._close_channel)
            steps.callback(self.iotlb.close)
            steps.callback(self.structures.close)
            steps.callback(self.postcopy.close)
            steps.callback(self.rings.close)


def _without_what_it_lacks(features: ProtocolFeature, device: Device) -> ProtocolFeature:
    if not device.config:
        features &= ~ProtocolFeature.CONFIG
    if ProtocolFeature.PAGEFAULT in features & device.protocol_features:
        features &= ~ProtocolFeature.CONFIGURE_MEM_SLOTS
    features &= ~(DEVICE_SPECIFIC & ~device.protocol_features)
    return features & ~without_support(features)
