"""What a session does with the messages about rings, and with their kicks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial

from vhost_user.backend.answer import Answer, Handler
from vhost_user.backend.device import Device
from vhost_user.backend.loop import Call, EventLoop
from vhost_user.backend.negotiated import Negotiated
from vhost_user.backend.vring import Vring
from vhost_user.errors import PeerError
from vhost_user.event import Event
from vhost_user.message import FrontendRequest, ProtocolFeature, VringAddr, VringFd, VringState
from vhost_user.owned_fd import OwnedFd

log = logging.getLogger(__name__)

POLL_INTERVAL = 0.001
"""Seconds between two looks at a ring that the front end gave no kick descriptor for: such a ring is to be polled."""


class RingHandlers:
    """The handlers of ring messages, and the rings."""

    def __init__(self, device: Device, loop: EventLoop, negotiated: Negotiated) -> None:
        self._device = device
        self._loop = loop
        self._negotiated = negotiated
        self._poll_timer: Call | None = None
        self._closed = False
        self.vrings = [Vring(index, negotiated, device.max_queue_size) for index in range(device.queue_count)]
        for vring in self.vrings:
            vring.others_wait = loop.due
        self.memory_to_come: Callable[[], bool] = lambda: False
        """Whether guest memory must not be touched yet."""
        self.on_trouble: Callable[[], None] = lambda: None
        """Called after a device has served a ring: memory may have failed under it."""
        self.held = False
        """Whether rings are rebuilt, and none is served until `release()`."""
        self.serves_later = False
        """Whether a ring that starts is not served before the message is done with."""
        self.table: Mapping[FrontendRequest, Handler] = {
            FrontendRequest.SET_VRING_NUM: self._set_vring_num,
            FrontendRequest.SET_VRING_ADDR: self._set_vring_addr,
            FrontendRequest.SET_VRING_BASE: self._set_vring_base,
            FrontendRequest.GET_VRING_BASE: self._get_vring_base,
            FrontendRequest.SET_VRING_KICK: self._set_vring_kick,
            FrontendRequest.SET_VRING_CALL: self._set_vring_call,
            FrontendRequest.SET_VRING_ERR: self._set_vring_err,
            FrontendRequest.SET_VRING_ENABLE: self._set_vring_enable,
        }

    def __getitem__(self, index: int) -> Vring:
        if index >= len(self.vrings):
            raise PeerError("index", index, f"has to be one of the device's {len(self.vrings)} rings")
        return self.vrings[index]

    @property
    def any_started(self) -> bool:
        """Whether a ring runs."""
        return any(vring.started for vring in self.vrings)

    @property
    def any_broken(self) -> bool:
        """Whether a ring can't go on before it is stopped and started anew."""
        return any(vring.broken is not None for vring in self.vrings)

    @property
    def any_running(self) -> bool:
        """Whether a ring is started and enabled."""
        return any(vring.started and vring.enabled for vring in self.vrings)

    def within(self, address: int, size: int) -> Vring | None:
        """A running ring of which a part lies in a range of guest memory."""
        for vring in self.vrings:
            if vring.queue is None:
                continue
            for area in vring.queue.layout.areas.values():
                if area.address < address + size and address < area.address + area.size:
                    return vring
        return None

    # Messages.

    def _set_vring_num(self, payload: VringState, _: list[OwnedFd]) -> None:
        self[payload.index].set_size(payload.num)

    def _set_vring_addr(self, payload: VringAddr, _: list[OwnedFd]) -> None:
        self[payload.index].set_address(payload)

    def _set_vring_base(self, payload: VringState, _: list[OwnedFd]) -> None:
        self[payload.index].set_base(payload.num)

    def _get_vring_base(self, payload: VringState, _: list[OwnedFd]) -> Answer:
        vring = self[payload.index]
        return Answer(VringState(payload.index, self.stop(vring)).encode())

    def _set_vring_kick(self, payload: VringFd, fds: list[OwnedFd]) -> None:
        vring = self[payload.index]
        if self.memory_to_come():
            raise PeerError(
                str(vring), "started", "has to wait until the reply to SET_MEM_TABLE was acknowledged, in postcopy"
            )
        kick = Event.to_wait(fds[0]) if fds else None
        was_started = vring.started
        try:
            if not was_started:
                vring.start()
        except BaseException as error:
            if not (self.held and isinstance(error, PeerError)):
                if kick is not None:
                    kick.close()
                raise
            vring.fail(error)  # as it had failed before, or would have
        self._replace_kick(vring, kick)
        if not was_started:
            vring.call_again()
        # What was made available before needs no kick.
        if self.serves_later:
            self.serve_soon(vring)
        else:
            self._serve(vring)

    def _replace_kick(self, vring: Vring, kick: Event | None) -> None:
        self._forget_kick(vring)
        vring.kick, vring.polled = kick, kick is None
        if kick is not None:
            self._loop.watch(kick, partial(self._kicked, vring))
        elif self._poll_timer is None:
            self._poll_timer = self._loop.call_later(POLL_INTERVAL, self._poll)

    def _forget_kick(self, vring: Vring) -> None:
        if vring.kick is not None:
            self._loop.forget(vring.kick)
            vring.kick.close()
            vring.kick = None

    def _set_vring_call(self, payload: VringFd, fds: list[OwnedFd]) -> None:
        vring = self[payload.index]
        call = Event.to_signal(fds[0]) if fds else None
        if vring.call is not None:
            vring.call.close()
        vring.call = call
        if vring.started:
            vring.call_again()

    def _set_vring_err(self, payload: VringFd, fds: list[OwnedFd]) -> None:
        vring = self[payload.index]
        err = Event.to_signal(fds[0]) if fds else None
        if vring.err is not None:
            vring.err.close()
        vring.err = err

    def _set_vring_enable(self, payload: VringState, _: list[OwnedFd]) -> None:
        if payload.num not in (0, 1):
            raise PeerError("num", payload.num, "has to be 1 to enable the ring, 0 to disable it")
        vring = self[payload.index]
        vring.enabled = payload.num == 1
        self._serve(vring)

    # Running.

    def features_set(self) -> None:
        """SET_FEATURES came: without protocol features each ring is enabled at once, and logging may have changed."""
        for vring in self.vrings:
            vring.enabled = vring.enabled or self._negotiated.starts_enabled
            vring.update_log()
            self._serve(vring)

    def memory_moved(self) -> None:
        """The memory table is another one: a running ring that is not where it was can't go on."""
        for vring in self.vrings:
            if vring.broken is None and vring.moved():
                vring.fail(PeerError(str(vring), "moved", "the memory table has to keep the rings that run"))

    def _kicked(self, vring: Vring) -> None:
        try:
            vring.take_kick()
        except (EOFError, OSError) as error:
            log.info("%s: there will be no more kicks: %s", vring, error)
            self._forget_kick(vring)
        self._serve(vring)

    def _poll(self) -> None:
        self._poll_timer = None
        polled = [vring for vring in self.vrings if vring.polled and vring.started]
        if polled and not self._closed:
            self._poll_timer = self._loop.call_later(POLL_INTERVAL, self._poll)
        for vring in polled:
            self._serve(vring)

    def serve_soon(self, vring: Vring) -> None:
        """Have the device look at `vring` again, without a kick: once, however often it is asked for meanwhile."""
        if not vring.serve_pending:
            vring.serve_pending = True
            self._loop.call_soon(partial(self._serve_pending, vring))

    def _serve_pending(self, vring: Vring) -> None:
        vring.serve_pending = False
        self._serve(vring)

    def release(self) -> None:
        """Rings are rebuilt: have the device look at each, for what was in flight and for kicks that nobody saw."""
        self.held = False
        for vring in self.vrings:
            if vring.queue is not None:
                vring.queue.mark_ring()
            self._serve(vring)

    def _serve(self, vring: Vring) -> None:
        if self.held:
            return
        if vring.waiting and vring.broken is None and not self._closed:
            self._build(vring)
        if not vring.active or self._closed:
            return
        try:
            more = self._device.on_kick(vring)
            if vring.miss is not None:
                vring.on_miss(vring)
        except PeerError as error:
            self._call_for_what_went_back(vring)
            vring.fail(error)
            more = False
        except Exception as error:  # whatever it is, a driver would wait for an answer that won't come
            self._call_for_what_went_back(vring)
            vring.fail_by_device(self._device.name, error)
            more = False
        if more:
            self.serve_soon(vring)
        self.on_trouble()

    @staticmethod
    def _call_for_what_went_back(vring: Vring) -> None:
        """The device was stopped between that and its call, and nobody will call later."""
        with suppress(PeerError, OSError):
            vring.notify()

    def _build(self, vring: Vring) -> None:
        try:
            vring.build()
        except PeerError as error:
            vring.fail(error)
        if vring.waiting:
            vring.on_miss(vring)

    def go_on(self, vring: Vring) -> None:
        """What `vring` missed is there now: give back what it owes, and have the device look at it."""
        try:
            if vring.queue is not None and vring.broken is None and vring.queue.settle():
                vring.notify()
        except PeerError as error:
            vring.fail(error)
        self._serve(vring)

    def stop(self, vring: Vring) -> int:
        """Drain and stop a ring; where it was. PeerError where its memory is gone, and it is stopped even so."""
        self._forget_kick(vring)
        if vring.queue is None:
            return vring.stop()
        try:
            if vring.broken is None:
                self._complete(vring)
                vring.queue.settle()
                vring.notify()
        except PeerError as error:
            log.info("%s: stopped without being drained: %s", vring, error)
        self._device.stopped(vring)
        return vring.stop()

    def _complete(self, vring: Vring) -> None:
        negotiated = self._negotiated
        if negotiated.inflight is not None and negotiated.has(ProtocolFeature.GET_VRING_BASE_INFLIGHT):
            self._device.suspend(vring)
        else:
            self._device.drain(vring)
            assert vring.in_flight == 0, f"{self._device.name} kept {vring.in_flight} chains of {vring}"

    def stop_broken(self) -> None:
        """A status of 0: no ring is broken after it. Those that run are the front end's to stop."""
        for vring in self.vrings:
            if vring.broken is not None:
                self.stop(vring)

    def reset(self) -> None:
        """RESET_DEVICE: every ring is stopped, disabled, and as it was at first."""
        for vring in self.vrings:
            self.stop(vring)
            vring.enabled = self._negotiated.starts_enabled
            vring.base = None

    def close(self) -> None:
        """Stop everything, for good; each ring, whatever the device makes of the one before."""
        self._closed = True
        if self._poll_timer is not None:
            self._poll_timer.cancel()
        with ExitStack() as steps:
            for vring in self.vrings:
                steps.callback(vring.close)
                steps.callback(self.stop, vring)
