"""What a device's observer makes of its requests: events, and the progress of an operation."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from vhost_user.units import ByteCount
from virtio_mem.control.zone import ControlledZone
from virtio_mem.protocol import Request, RequestType, Response, ResponseType
from virtio_mem.service import DeviceService

if TYPE_CHECKING:
    from virtio_mem.control.control import Control

log = logging.getLogger(__name__)

LOOK_SECONDS = 10.0
"""Between two looks at unplugged blocks, each of which takes a hundredth of a second where they are in many pieces."""

LOOK_SHARE = 100
"""So many times what the last look took, at least: of a terabyte of huge pages it can take half a second."""

_NAMES: dict[int, str] = {type_.value: type_.name for type_ in RequestType}


class ZoneWatch:
    """Watches the device of one zone from its making to `close()`. As an observer it has the device's lock."""

    def __init__(self, control: Control, zone: ControlledZone, service: DeviceService) -> None:
        self._control = control
        self._zone = zone
        self._service = service
        self._unplugged = ByteCount(0)
        self._look_at = float("-inf")
        self._touched = 0
        with service.lock:
            service.observers.append(self)

    def answered(self, request: Request, response: Response) -> None:
        """A request was answered: blocks came or went, or it was refused, or it was a question."""
        if response.type is not ResponseType.ACK:
            self._refused(request, response)
        elif request.type == RequestType.STATE:
            self._control.operations.answered(self._zone.id)
        else:
            self._moved(request)

    def discarded(self, unplugged: ByteCount, kept: ByteCount | None) -> None:
        """Bytes were given back to the host, which says what it still holds of them."""
        self._unplugged = unplugged
        self._control.events.publish("freed", self._zone.id, size=unplugged, held=kept)

    def _moved(self, request: Request) -> None:
        device, zone = self._service.device, self._zone
        place: dict[str, Any] = {"addr": request.addr, "size": request.nb_blocks * device.geometry.block_size}
        if request.type == RequestType.UNPLUG_ALL:
            place = {"addr": device.geometry.addr, "size": self._unplugged}
        kind = "plugged" if request.type == RequestType.PLUG else "unplugged"
        self._control.events.publish(kind, zone.id, **place, plugged=zone.size)
        anew = request.type == RequestType.UNPLUG_ALL
        operation = self._control.operations.moved(zone.id, zone.size, time.monotonic(), anew=anew)
        if operation is not None:
            self._control.tell(operation)

    def _refused(self, request: Request, response: Response) -> None:
        zone, reason = self._zone, response.reason
        self._control.events.publish(
            "refused",
            zone.id,
            request=_NAMES.get(request.type, "unknown"),
            answer=response.type.name,
            addr=request.addr,
            blocks=request.nb_blocks,
            reason=reason,
        )
        busy = reason if response.type is ResponseType.BUSY else ""
        error = reason if response.type is ResponseType.ERROR else ""
        self._control.operations.answered(zone.id, busy=busy, error=error)

    def look(self, now: float) -> None:
        """To be called about once a second, without the lock: tell of memory that the host came to hold for unplugged
        blocks."""
        if now < self._look_at:
            return
        began = time.monotonic()
        held, _ = self._zone.held_unplugged()
        self._look_at = now + max(LOOK_SECONDS, LOOK_SHARE * (time.monotonic() - began))
        before, self._touched = self._touched, held or 0
        if self._touched > before:
            log.warning("zone %s: the host holds %d bytes for unplugged blocks", self._zone.id, self._touched)
            self._control.events.publish("touched", self._zone.id, size=self._touched)

    def reclaimed(self, left: int) -> None:
        """What the host came to hold was given back, but for `left`: the next look tells of all beyond that."""
        self._touched = min(self._touched, left)

    def close(self) -> None:
        """Watch no more."""
        with self._service.lock:
            if self in self._service.observers:
                self._service.observers.remove(self)
