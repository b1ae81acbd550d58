"""The virtio-mem device to a vhost-user back end: its configuration space, its ring, and what the front end does to it.

Blocks come by PLUG and go by UNPLUG, UNPLUG ALL and a system reset. Nothing else touches them: RESET_DEVICE, a status
of 0 and GET_VRING_BASE are what a driver that is unloaded and loaded looks like, and a guest that only reloads its
driver keeps its memory. A front end that goes, or comes with other memory, changes none either: the new guest's driver
sees plugged_size above 0, and begins with UNPLUG ALL.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from vhost_user.backend.device import Device
from vhost_user.chain import Chain
from vhost_user.memory import Region
from vhost_user.message import MemoryRegion
from virtio_mem.device import VirtioMemDevice
from virtio_mem.geometry import Geometry
from virtio_mem.protocol import Request, RequestType, Response
from virtio_mem.request_queue import read_request, write_response
from virtio_mem.serve.memory import FrontendMemory
from virtio_mem.serve.plan import ServedZone
from virtio_mem.service import DeviceService, Section

if TYPE_CHECKING:
    from vhost_user.backend.server import Endpoint
    from vhost_user.backend.vring import Vring
    from vhost_user.shared_memory import SharedMemory

log = logging.getLogger(__name__)


class MemDevice(Device):
    """Serves `zone`. `endpoint` is where it is served, set by whoever serves it: notices go there."""

    def __init__(self, zone: ServedZone) -> None:
        self.zone = zone
        self.name = f"zone {zone.id}"
        geometry = Geometry(
            addr=zone.addr,
            region_size=zone.hotplug_size,
            block_size=zone.block_size,
            node_id=zone.guest_numa_id,
        )
        self.device = VirtioMemDevice(
            geometry,
            requested_size=zone.hotplugged_size,
            unplugged_inaccessible=zone.unplugged_inaccessible,
        )
        self.features = int(self.device.offered_features)
        self.memory = FrontendMemory(zone.addr, zone.hotplug_size, zone.block_size, prefault=zone.prefault)
        self.service = DeviceService(self.device, self.memory)
        self.service.listeners.append(_Presence(self.memory))
        self.endpoint: Endpoint | None = None

    # What the front end and its driver do.

    @property
    def config(self) -> bytes:
        """The 56 bytes of `struct virtio_mem_config`."""
        with self.service.lock:
            return self.device.config.encode()

    def connected(self) -> None:
        """A front end came, and shares nothing yet."""
        with self.service.lock:
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
            self.service.prefault = self.memory.populates
            if came:
                log.info("%s: memory is there", self.name)
                self.device.retry_now()
        self.notify()

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
        return vring.serve(partial(self._serve, vring))

    def _serve(self, vring: Vring, chain: Chain) -> int:
        del vring
        return write_response(chain, self._answer(read_request(chain)))

    def _answer(self, request: Request) -> Response:
        response = self.service.request(request)
        log.info("%s: %s", self.name, _told(request, response))
        return response

    # What the host does.

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


class _Presence:
    """Refuses to plug what the front end doesn't share."""

    def __init__(self, memory: FrontendMemory) -> None:
        self._memory = memory

    def plugged(self, section: Section) -> None:
        self._memory.require(section.offset, section.size)

    def unplugging(self, section: Section) -> None:
        pass


def _told(request: Request, response: Response) -> str:
    """A request and its answer, for the log."""
    name = RequestType(request.type).name if request.type in _TYPES else f"request {request.type}"
    where = "" if request.type == RequestType.UNPLUG_ALL else f" {request.nb_blocks} blocks at {request.addr:#x}"
    why = f" ({response.reason})" if response.reason else ""
    return f"{name}{where}: {response.type.name}{why}"


_TYPES = {type_.value for type_ in RequestType}
