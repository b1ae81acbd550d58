"""A device in service: its effects are carried out on host memory and announced to those who share it.

For each request: ask the device; if it wants something done, do it; commit or abandon; answer. The steps of a PLUG
are populate (where memory is prefaulted), then tell each listener that memory came. Those of an UNPLUG are tell each
listener that memory goes, then discard it: a process that still had the range mapped could make the host allocate it
anew behind the discard. Whatever step refuses, those before it are undone, and the driver is told BUSY.

One lock serves each device, because requests come from a ring's thread and resizes from the host's.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple, Protocol

from vhost_user.errors import HostError
from vhost_user.units import ByteCount, GuestAddress, HostOffset
from virtio_mem.blocks import Run
from virtio_mem.device import Effect, EffectType, VirtioMemDevice
from virtio_mem.protocol import Request, RequestType, Response, ResponseType

log = logging.getLogger(__name__)

RETRY_INTERVAL = 1.0
"""Seconds between two notices to a driver that was told BUSY. Its own timer waits for 50 s at first; at one a second,
a driver that is refused again costs the host one request a second."""

_REQUEST_NAMES: dict[int, str] = {type_.value: type_.name for type_ in RequestType}


class RegionMemory(Protocol):
    """What a device in service needs of the host memory behind its region; ranges are in bytes from its start."""

    def populate(self, offset: HostOffset, size: ByteCount) -> None:
        """Make the host allocate the range. HostError, and nothing of the range held, where it can't."""

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        """Give the range back to the host. HostError, and the range as it was, where that fails."""

    def shortage(self, size: ByteCount) -> HostError | None:
        """Why `size` bytes could not be populated now, or None where nothing is known to stand against it."""


class Section(NamedTuple):
    """Neighbouring blocks that come or go: `size` bytes at guest address `addr`, at `offset` of the region's memory."""

    addr: GuestAddress
    offset: HostOffset
    size: ByteCount


class MemoryListener(Protocol):
    """Somebody who must know which parts of a region are plugged, such as a vhost-user daemon that maps them.

    Either method may raise HostError, having changed nothing; the driver's request is then undone and answered BUSY.
    An undone step is announced by the other method, and must not be refused then.
    """

    def plugged(self, section: Section) -> None:
        """Memory came: it may be mapped and used."""

    def unplugging(self, section: Section) -> None:
        """Memory is about to go: nobody may touch it once this returns."""


class DeviceService:
    """Serves one device. With `prefault`, memory is populated before a PLUG is granted."""

    def __init__(self, device: VirtioMemDevice, memory: RegionMemory, *, prefault: bool = False) -> None:
        self.device = device
        self.memory = memory
        self.prefault = prefault
        self.listeners: list[MemoryListener] = []
        self.answers: Counter[tuple[str, str]] = Counter()
        self.failed_undos = 0
        self.lock = threading.RLock()
        self._last_retry = float("-inf")
        self._refused_plug = ByteCount(0)

    def request(self, request: Request) -> Response:
        """Serve one request of the driver."""
        with self.lock:
            outcome = self.device.request(request)
            response = self._carry_out(outcome) if isinstance(outcome, Effect) else outcome
            self._record(request, response)
            return response

    def system_reset(self) -> bool:
        """Reset the machine's state of the device: every block is unplugged. False where the host refused to."""
        with self.lock:
            response = self._carry_out(self.device.system_reset())
        return response.type is ResponseType.ACK

    def resize(self, requested_size: int) -> None:
        """Set the device's target in bytes. UsageError as in `VirtioMemDevice.resize`."""
        with self.lock:
            self.device.resize(requested_size)

    def pause(self) -> None:
        """Answer BUSY to what would change a block; a request that is being served is served to its end first."""
        with self.lock:
            self.device.pause()

    def resume(self) -> None:
        """Serve again."""
        with self.lock:
            self.device.resume()

    def poll(self, now: float) -> None:
        """To be called about once a second, with a clock that never goes back, in seconds: where a driver was told
        BUSY and the cause has gone, or can't be known, it gets a notice to try again."""
        with self.lock:
            device = self.device
            if not device.owes_notice or device.paused or now - self._last_retry < RETRY_INTERVAL:
                return
            if self._refused_plug and self.memory.shortage(self._refused_plug):
                return
            self._last_retry = now
            device.retry_now()

    def _carry_out(self, effect: Effect) -> Response:
        try:
            if effect.type is EffectType.PLUG:
                self._plug(effect)
            else:
                self._unplug(effect)
        except HostError as error:
            log.warning("%s of %d bytes at %#x refused: %s", effect.type.value, effect.size, effect.offset, error)
            return self.device.abandon(effect, str(error))
        except BaseException:
            self.device.abandon(effect, "interrupted")
            raise
        return self.device.commit(effect)

    def _plug(self, effect: Effect) -> None:
        self._refused_plug = ByteCount(0)
        if self.prefault:
            try:
                self.memory.populate(effect.offset, effect.size)
            except HostError:
                self._refused_plug = effect.size
                raise
        told = 0
        try:
            for listener, section in self._announcements(effect):
                listener.plugged(section)
                told += 1
        except BaseException:
            for listener, section in islice(self._announcements(effect), told):
                self._undo(listener.unplugging, section)
            if self.prefault:
                self._undo(lambda section: self.memory.discard(section.offset, section.size), self._section(effect.run))
            raise

    def _unplug(self, effect: Effect) -> None:
        told = 0
        try:
            for listener, section in self._announcements(effect):
                listener.unplugging(section)
                told += 1
            if effect.size:
                self.memory.discard(effect.offset, effect.size)
        except BaseException:
            for listener, section in islice(self._announcements(effect), told):
                self._undo(listener.plugged, section)
            raise

    def _undo(self, step: Callable[[Section], None], section: Section) -> None:
        """Take one step back. One that fails must not keep the others from being taken: it is counted and logged."""
        try:
            step(section)
        except HostError as error:
            self.failed_undos += 1
            log.error("%d bytes at %#x could not be put back as they were: %s", section.size, section.addr, error)

    def _announcements(self, effect: Effect) -> Iterator[tuple[MemoryListener, Section]]:
        """Who is to be told of which sections, in order; the same each time, until the device commits."""
        if not self.listeners:
            return
        runs = self.device.blocks.plugged_runs() if effect.everything else iter((effect.run,))
        for run in runs:
            section = self._section(run)
            for listener in self.listeners:
                yield listener, section

    def _section(self, run: Run) -> Section:
        geometry = self.device.geometry
        offset, size = run.first * geometry.block_size, run.nb_blocks * geometry.block_size
        return Section(GuestAddress(geometry.addr + offset), HostOffset(offset), ByteCount(size))

    def _record(self, request: Request, response: Response) -> None:
        name = _REQUEST_NAMES.get(request.type, "unknown")
        self.answers[name, response.type.name] += 1
        if response.type is not ResponseType.ACK:
            log.debug("%s %#x+%d: %s: %s", name, request.addr, request.nb_blocks, response.type.name, response.reason)
