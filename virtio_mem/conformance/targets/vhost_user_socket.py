"""`vhost-user:SOCKET[,api=APISOCKET][,memory=hugetlb]`: any vhost-user virtio-mem device; the kit is its front end.

The memory is ours, so it is seen what the host holds of it, whatever the device says. What is the host's to do goes by
the API that `virtio-mem serve` has; without it the target stays where it is. It is one device for as long as it lives,
and one connection as long as nothing breaks it: there are daemons that serve one front end and end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from vhost_user.device_status import Status
from vhost_user.errors import HostError, UsageError
from vhost_user.message import ProtocolFeature
from virtio_mem.conformance.target import (
    LEAST_RING,
    Asks,
    Capability,
    Chain,
    Refused,
    Seen,
    Subject,
    Target,
    TargetFailure,
    Used,
    Wish,
    clear,
)
from virtio_mem.conformance.targets.ring_driver import CurrentRing, RingDriver
from virtio_mem.conformance.targets.vhost_user_host import HostSide
from virtio_mem.conformance.targets.vhost_user_link import PATIENCE, RAM_SIZE, Link
from virtio_mem.protocol import ConfigSpace

MEMORIES = ("memfd", "hugetlb")
"""What the region's memory may be: of ordinary pages or of huge ones, shared with the device either way."""

_POLL = 0.001
"""Seconds between two looks at the ring."""

_QUIET = 0.1
"""Seconds in which a device that is kicked does what it does not have to do, and a reader would not wait for."""

_GRACE = 0.5
"""Seconds that a notice has to come: it has a way of its own, and may be later than the answer to what caused it."""


class VhostUserSubject(Subject):
    """The device behind `link`. The link stays the target's."""

    def __init__(self, link: Link, host: HostSide | None) -> None:
        self._link = link
        self._host = host
        self._ring = CurrentRing()
        self._counted = link.config_changes()
        self.offered_features = link.offered_features
        self.ring_size = link.ring_size

    @property
    def _has_status(self) -> bool:
        return self._link.frontend.has(ProtocolFeature.STATUS)

    def begin(self, features: int) -> bool:
        """As a front end whose driver wants these features and no other."""
        self.device_reset()
        link = self._link
        with link.alive():
            self._set_status(Status.ACKNOWLEDGE | Status.DRIVER)
            if not link.agree(features) or not self._set_status(
                Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
            ):
                self.device_reset()
                return False
            self._counted = link.config_changes()
            ring = RingDriver(link.guest, link.ram, RAM_SIZE, features, link.ring_size)
            self._ring.start(ring)
            link.vring.start(ring.layout)
            self._set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)
        return True

    def _set_status(self, status: Status) -> bool:
        """Tell the device its status, where there is a message for it; whether it kept all of it."""
        if not self._has_status:
            return True
        frontend = self._link.frontend
        frontend.status = int(status)
        return frontend.status & status == status

    def config(self) -> ConfigSpace:
        """By GET_CONFIG, all of it at once."""
        return self._link.config()

    def submit(self, chains: Sequence[Chain]) -> list[Used]:
        """See `Subject`. TargetFailure also where all came back and no call did."""
        ring, link = self._ring.now, self._link
        deadline = time.monotonic() + PATIENCE
        link.vring.call.take()  # of the last kick, or of the ring's start: it says nothing of this one
        kick = ring.offer(chains)
        with link.alive():
            if kick:
                link.vring.kick.signal()
            called = not chains
            while not ((back := ring.collect()) and called):
                if not back and ring.queue.enable_interrupts():
                    continue
                if not link.wait_for_call(deadline):
                    what = "all buffers came back, and no call did" if ring.collect() else ring.missing
                    raise TargetFailure(f"{link.path}: {what} within {PATIENCE:g} s", silent=True)
                called = True
        return ring.results()

    def offer(self, chains: Sequence[Chain], asks: Asks) -> None:
        """See `Subject`."""
        with self._link.alive():
            self._link.frontend.requests.confirm()
        self._link.vring.call.take()  # of the ring's start, which is over now: it says nothing of what comes
        self._ring.or_before().put(chains, asks)

    def kick(self) -> None:
        """See `Subject`."""
        self._link.vring.kick.signal()

    def look(self, whole: bool) -> Seen:
        """See `Subject`. A ring that runs is stopped for it: all that the device has of it is done then."""
        ring, link = self._ring.now, self._link
        deadline = time.monotonic() + PATIENCE
        with link.alive():
            while not ring.collect() and whole:
                if time.monotonic() > deadline:
                    raise TargetFailure(f"{link.path}: {ring.missing} within {PATIENCE:g} s", silent=True)
                link.listen(_POLL)
            if not whole:
                link.listen(_QUIET)
            vring = link.vring
            running = vring.started
            if running:
                vring.stop()
            ring.collect()
            seen = Seen(ring.seen(), vring.call.take(), ring.device_flags)
            if running:
                vring.start(ring.layout, vring.base)
        return seen

    def overrun(self) -> None:
        """See `Subject`."""
        self._ring.now.overrun()

    def write_config(self, offset: int, data: bytes) -> None:
        """By SET_CONFIG, which the device may refuse."""
        self._link.write_config(offset, data)

    def device_reset(self) -> None:
        """Stop the ring, then a status of 0, or RESET_DEVICE where there is no status."""
        link = self._link
        self._ring.end()
        with link.alive():
            if link.vring.started:
                link.vring.stop()
            if self._has_status:
                link.frontend.status = 0
            elif link.frontend.has(ProtocolFeature.RESET_DEVICE):
                link.frontend.reset_device()

    def clean(self, requested_size: int) -> None:
        """Bring the device as near to a new one as a driver can, and a host if there is one."""
        config = self.config()
        if self._host is not None:
            self._host.pause(False)
            size = min(requested_size, config.region_size)
            with suppress(Refused):
                self._host.resize(size - size % max(1, config.block_size))
        clear(self)
        self._link.forget_content()

    # The host's side.

    def set_target(self, requested_size: int) -> None:
        """By the API."""
        self._api.resize(requested_size)

    def system_reset(self) -> None:
        """By the API."""
        self._api.system_reset()
        self._ring.end()

    def pause(self, paused: bool) -> None:
        """By the API."""
        self._api.pause(paused)

    @property
    def _api(self) -> HostSide:
        assert self._host is not None, "the target's capabilities say what there is"
        return self._host

    def advance(self, seconds: float) -> None:
        """Wait."""
        self._link.listen(seconds)

    def take_notices(self) -> int:
        """See `Subject`. Where none has come, one is waited for a moment."""
        if self._link.config_changes() == self._counted:
            self._link.listen(_GRACE, until_notice=True)
        before, self._counted = self._counted, self._link.config_changes()
        return max(0, self._counted - before)  # fewer than before on a connection that is new

    def held(self, offset: int, size: int) -> int:
        """Bytes of the region's file that are data, whoever wrote them."""
        return self._link.held(offset, size)

    def read(self, offset: int, size: int) -> bytes:
        """See `Subject`."""
        with self._link.view(offset, size) as view:
            return bytes(view)

    def write(self, offset: int, data: bytes) -> None:
        """See `Subject`."""
        with self._link.view(offset, len(data)) as view:
            view[:] = data

    def close(self) -> None:
        """Let the driver go, if the device still is there."""
        if not self._link.broken:
            with suppress(TargetFailure):
                self.device_reset()


class VhostUserTarget(Target):
    """The device at `socket`, and its host's side at `api_socket`, with the region in memory of one of MEMORIES.

    The constructor connects, and raises TargetFailure where there is no device, or one that can't be judged, HostError
    where there is not enough memory.
    """

    kind = "vhost-user"

    def __init__(self, socket: str, api_socket: str | None = None, *, memory: str = "memfd", name: str = "") -> None:
        if memory not in MEMORIES:
            raise UsageError("memory", memory, f"has to be one of {', '.join(MEMORIES)}")
        api = f",api={api_socket}" if api_socket else ""
        self.name = name or f"vhost-user:{socket}{api}" + (f",memory={memory}" if memory != "memfd" else "")
        self._socket = socket
        self._huge = memory == "hugetlb"
        self._host: HostSide | None = None
        self._link: Link | None = Link(socket, huge=self._huge)
        try:
            if api_socket is not None:
                self._host = HostSide(api_socket, self._link.config().addr)
            self.capabilities = self._capabilities(self._link)
        except BaseException:
            self._link.close()
            raise
        self.version = "a device that says no version" if self._host is None else f"virtio-mem {self._host.version}"

    def _capabilities(self, link: Link) -> Capability:
        """What can be done here. HostError where there is no memory to do it with."""
        if shortage := link.shortage(Wish().region_size):
            raise shortage
        capabilities = Capability.CONTENT | Capability.CONFIG_WRITES
        if link.ring_size >= LEAST_RING:
            capabilities |= Capability.CHAINS | Capability.RING
        with suppress(HostError):
            link.held(0, 1)
            capabilities |= Capability.HELD
        if link.frontend.channel is not None:
            capabilities |= Capability.NOTICES
        if self._host is not None:
            capabilities |= Capability.SET_TARGET | Capability.SYSTEM_RESET | Capability.PAUSE
        return capabilities

    def start(self, wish: Wish) -> Subject:
        """The same device again, with nothing plugged; with an API, its target is what was wished, as far as it can."""
        if self._link is None or self._link.broken:
            self._disconnect()
            self._link = Link(self._socket, huge=self._huge)
        subject = VhostUserSubject(self._link, self._host)
        subject.clean(wish.requested_size)
        return subject

    def _disconnect(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def close(self) -> None:
        """Leave the device, as it was found if there is an API."""
        host, self._host = self._host, None
        if host is not None:
            host.put_back()
        self._disconnect()
