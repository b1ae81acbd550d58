"""The virtio-mem device to a vhost-user back end: its configuration space, its ring, and what the front end does to it.

Blocks come by PLUG and go by UNPLUG, UNPLUG ALL and a system reset. Nothing else touches them: RESET_DEVICE, a status
of 0 and GET_VRING_BASE are what a driver that is unloaded and loaded looks like, and a guest that only reloads its
driver keeps its memory. A front end that goes, or comes with other memory, changes none either: the new guest's driver
sees plugged_size above 0, and begins with UNPLUG ALL.

Devices of one process may be served by several threads. They share nothing but the host's memory, of which each looks
at how much is left before it takes some. So one at a time does, or two zones that plug at once would both be told that
there is enough for one of them, and the OOM killer would have the last word.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vhost_user.backend.device import Device
from vhost_user.errors import HostError
from vhost_user.units import ByteCount, HostOffset
from virtio_mem.device import EffectType, VirtioMemDevice
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, Request, RequestType, Response, ResponseType
from virtio_mem.region_memory import RegionMemory
from virtio_mem.serve.files import located_at
from virtio_mem.serve.intent import MOST_CHAINS, Chains, Phase
from virtio_mem.serve.memory import FrontendMemory
from virtio_mem.serve.plan import ServedZone
from virtio_mem.serve.state import DeviceState
from virtio_mem.service import DeviceService

if TYPE_CHECKING:
    from vhost_user.backend.batches import RingBatches
    from vhost_user.backend.server import Endpoint
    from vhost_user.backend.vring import Vring
    from vhost_user.memory import Region
    from vhost_user.message import MemoryRegion
    from vhost_user.shared_memory import SharedMemory
    from virtio_mem.serve.snapshot import Content

log = logging.getLogger(__name__)

_taking = threading.Lock()
"""Whose holder looks at what the host has left, and takes of it. Nobody who has it waits for a device's lock."""


class MemDevice(Device):
    """Serves `zone`, whose state is in the file `state_fd`, as big as `state_size()` says; blank for a new device.

    The descriptor stays the caller's. `endpoint` is where it is served, set by whoever serves it: notices go there.
    `make_service` puts the device in service. Raises what DeviceState does.
    """

    most_at_once = MOST_CHAINS
    """How many requests are taken from the ring together."""

    def __init__(
        self,
        zone: ServedZone,
        state_fd: int,
        make_service: Callable[[VirtioMemDevice, RegionMemory], DeviceService] = DeviceService,
    ) -> None:
        self.zone = zone
        self.name = f"zone {zone.id}"
        with located_at(state_fd, self.name):
            self.state = DeviceState(
                state_fd,
                zone.geometry,
                requested_size=zone.hotplugged_size,
                unplugged_inaccessible=zone.unplugged_inaccessible,
            )
        self.device = self.state.device
        self.features = int(self.device.offered_features)
        self.memory = _InTurn(zone.addr, zone.hotplug_size, zone.block_size, prefault=zone.prefault)
        self.service = make_service(self.device, self.memory)
        self.service.name = self.name
        self.service.unrequested_unplug = zone.unrequested_unplug
        self.service.require = self.memory.require  # what the front end doesn't share can't be plugged
        tally = self.service.tally
        tally.unplugged_bytes, tally.unreturned_bytes = self.state.counted
        self.state.counters = lambda: (tally.unplugged_bytes, tally.unreturned_bytes)
        self.service.keeper = self.state
        self._log = _Log(self.name)
        self._logs = False
        """Whether answers are written down."""
        self._settled = False
        """Whether nothing is open any more that a process before this one opened."""
        self._batches: RingBatches | None = None
        self.endpoint: Endpoint | None = None
        self.content: Content | None = None
        """What of a snapshot is to be written to the memory once it is there."""
        self.content_written: Callable[[], None] = lambda: None

    # What the front end and its driver do.

    @property
    def config(self) -> bytes:
        """The 56 bytes of `struct virtio_mem_config`."""
        with self.service.lock:
            return self.device.config.encode()

    def connected(self) -> None:
        """A front end came, and shares nothing yet."""
        with self.service.lock:
            self.service.another_guest()
            self.device.device_reset()
            self._attach(())

    def disconnected(self) -> None:
        """The front end went, with its memory. Blocks stay as they are."""
        with self.service.lock:
            self.device.device_reset()
            self.memory.detach()

    def negotiated(self, features: int) -> None:
        """The driver's features; see `VirtioMemDevice.negotiate`."""
        with self.service.lock:
            self.device.negotiate(features)

    def keeps_file(self, region: MemoryRegion) -> bool:
        """Of the regions that the zone lies in: memory is given back by their files."""
        return self.memory.overlaps(region.guest_address, region.size)

    def memory_changed(self, memory: SharedMemory) -> None:
        """What the front end shares now is what counts, whatever was plugged in what it shared before."""
        self._attach(memory.guest_memory.regions)

    def _attach(self, regions: Sequence[Region]) -> None:
        with self.service.lock:
            came = self.memory.attach(regions)
            if came and self.content is not None:
                came = self._write_content(self.content)
            self.service.prefault = self.memory.populates
            if came:
                log.info("%s: memory is there", self.name)
                self.settle()
                self.device.retry_now()
        self.notify()

    def _write_content(self, content: Content) -> bool:
        """Whether it is in the memory now. Without it, memory is as good as not there; unless nothing is plugged, as
        after a system reset that came first."""
        try:
            with _taking:
                memory = self.memory.require(HostOffset(0), self.zone.hotplug_size)
                if self.device.plugged_size:
                    content.write(self.device, memory, prefault=self.memory.populates)
                else:
                    content.give_back(memory)
        except HostError as error:
            log.error("%s: the snapshot is not restored: %s", self.name, error)
            self.memory.refuse(f"a snapshot is to be restored to it first: {error}")
            return False
        self.state.restored()
        self.content = None
        self.content_written()
        log.info("%s: the snapshot is restored", self.name)
        return True

    def set_status(self, status: int) -> None:
        """A status of 0 is the driver's reset of the device."""
        if status == 0:
            self.service.device_reset()

    def reset(self) -> None:
        """RESET_DEVICE: as a status of 0."""
        self.service.device_reset()

    # The ring.

    def on_kick(self, vring: Vring) -> bool:
        """Serve what is available, one ringful at most."""
        logs = log.isEnabledFor(logging.INFO)
        if not self._settled or self.state.intent is not None or logs is not self._logs:
            self._before_requests(logs)
        if self._batches is None or not self._batches.fits(vring):
            from vhost_user.backend.batches import RingBatches  # noqa: PLC0415 - rings come with a front end
            from vhost_user.vring import Batch  # noqa: PLC0415
            from virtio_mem.serve.at_once import AtOnce  # noqa: PLC0415

            batch = Batch(vring.size, self.most_at_once, REQUEST_SIZE, RESPONSE_SIZE)
            at_once = AtOnce(self.service, self.memory, self.state, batch) if self.most_at_once > 1 else None
            self._batches = RingBatches(vring, batch, self._serve, at_once)
        return self._batches.serve()

    def _serve(self, batches: RingBatches) -> None:
        """Serve requests, from the look at them until their driver has the answers: see intent.py.

        The driver is called before the last of them are counted and told of, which a guest need not wait for: Linux
        has one request under way. Those before them are told of once they have gone back, while the device is as they
        left it.
        """
        batch, tally = batches.batch, self.service.tally
        with self.service.lock:
            try:
                for first, end in batch.asking():
                    answered = first
                    while answered < end:
                        tally.hold()
                        answered += self._answer(*batch.part(answered, end))
                        self._give(batches, answered)
                batches.call()
            finally:
                tally.release()

    def _give(self, batches: RingBatches, end: int) -> None:
        there = False
        try:
            there = batches.give(end)
        finally:
            if there:
                self.state.done()
            else:
                self.state.unanswered()

    def _answer(self, keys: memoryview, requests: memoryview, answers: memoryview) -> int:
        """Answer the first of some requests, and those that are served together with it; how many."""
        chains = Chains(keys, requests)
        if self.state.intent is not None and self.state.granted_before(chain := chains.chain(0)):
            response = Response(ResponseType.ACK, reason="granted before, and not answered")
            answers[:RESPONSE_SIZE] = response.encode()
            if not self.state.counted_before(chain):
                self.service.replay(chain.request, response)
            return 1
        self.state.serving = chains
        try:
            return self.service.serve(requests, answers)
        finally:
            self.state.serving = None

    def _before_requests(self, logs: bool) -> None:
        with self.service.lock:
            self.settle()
            observers = self.service.observers
            if logs and not self._logs:
                observers.append(self._log)
            elif self._logs and not logs:
                observers.remove(self._log)
            self._settled, self._logs = True, logs

    def settle(self) -> None:
        """Bring to its end what a process before this one had opened. Under the service's lock."""
        intent = self.state.intent
        if intent is None or intent.phase is not Phase.OPEN:
            return
        run, block_size = intent.run, self.device.geometry.block_size
        try:
            self.memory.discard(HostOffset(run.first * block_size), ByteCount(run.nb_blocks * block_size))
        except HostError as error:
            log.warning("%s: what an interrupted %s left is not given back: %s", self.name, intent.type.value, error)
        if intent.type is EffectType.PLUG:
            self.state.undone()
        else:
            tally = self.service.tally
            tally.unplugged_bytes = max(tally.unplugged_bytes, intent.unplugged)
            self.state.finish(intent)
        log.info("%s: an interrupted %s is finished", self.name, intent.type.value)

    # What the host does.

    def resumed(self) -> None:
        """A session goes on that a process before this one had: what it told the driver last may not have come."""
        if self.endpoint is not None:
            self.endpoint.config_changed()

    def notify(self) -> None:
        """Send the driver a change notice if one is due. Any thread may call it."""
        with self.service.lock:
            due = self.device.take_config_notice()
        if due and self.endpoint is not None:
            self.endpoint.config_changed()

    def poll(self, now: float) -> None:
        """To be called once a second, with a clock that never goes back: see `DeviceService.poll`."""
        self.service.poll(now)
        self.notify()

    def close(self) -> None:
        """Let go of the state. The device is of no use any more."""
        with self.service.lock:
            self.memory.detach()
            self.state.close()


class _InTurn(FrontendMemory):
    """Takes memory of the host while no other device of this process does."""

    def populate(self, offset: HostOffset, size: ByteCount) -> None:
        with _taking:
            super().populate(offset, size)


class _Log:
    """Writes down who asked what, and what came of it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def answered(self, request: Request, response: Response) -> None:
        name = RequestType(request.type).name if request.type in _TYPES else f"request {request.type}"
        where = "" if request.type == RequestType.UNPLUG_ALL else f" {request.nb_blocks} blocks at {request.addr:#x}"
        why = f" ({response.reason})" if response.reason else ""
        log.info("%s: %s%s: %s%s", self._name, name, where, response.type.name, why)

    def discarded(self, unplugged: ByteCount, kept: ByteCount | None) -> None:
        pass


_TYPES = {type_.value for type_ in RequestType}
