"""A device in service: its effects are carried out on host memory and announced to those who share it.

For each request: ask the device; if it wants something done, do it; commit or abandon; answer. The steps of a PLUG
are populate (where memory is prefaulted), then tell each listener that memory came. Those of an UNPLUG are tell each
listener that memory goes, then discard it: a process that still had the range mapped could make the host allocate it
anew behind the discard. Whatever step refuses, those before it are undone, and the driver is told BUSY.

One lock serves each device, because requests come from a ring's thread and resizes from the host's.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol

from vhost_user.errors import HostError, UsageError
from vhost_user.units import ByteCount, GuestAddress, HostOffset, format_size
from virtio_mem.blocks import Run
from virtio_mem.device import Effect, EffectType, VirtioMemDevice
from virtio_mem.keeper import Keeper, KeepsNothing
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, Feature, Request, Response, ResponseType
from virtio_mem.refusals import RefusalLog
from virtio_mem.region_memory import RegionMemory
from virtio_mem.tally import Tally
from virtio_mem.turn_lock import TurnLock
from virtio_mem.unrequested import refusal, unrequested

log = logging.getLogger(__name__)

RETRY_INTERVAL = 1.0
"""Seconds between two notices to a driver that was told BUSY. Its own timer waits for 50 s at first; at one a second,
a driver that is refused again costs the host one request a second."""

_MANY_RUNS = 1024
"""Beyond these it is cheaper to ask about all of the region: a question costs some ten microseconds."""


def _no_shortage() -> None:
    """What is asked where no shortage of memory was the cause of a refusal."""


class Section(NamedTuple):
    """Neighbouring blocks that come or go: `size` bytes at guest address `addr`, at `offset` of the region's memory."""

    addr: GuestAddress
    offset: HostOffset
    size: ByteCount


class MemoryListener(Protocol):
    """Somebody who must know which parts of a region are plugged, such as a vhost-user daemon that maps them.

    Either method may refuse by raising HostError, having changed nothing; the driver's request is then undone and
    answered BUSY. (Any other exception counts as a refusal too, and is logged with its traceback.) An undone step is
    announced by the other method, and must not be refused then. Both are called under the service's lock, and must
    not call the service back.
    """

    def plugged(self, section: Section) -> None:
        """Memory came: it may be mapped and used."""

    def unplugging(self, section: Section) -> None:
        """Memory is about to go: nobody may touch it once this returns."""


class DeviceService:
    """Serves one device. With `prefault`, memory is populated before a PLUG is granted.

    Raises UsageError for a device whose blocks are smaller than the pages of its memory.
    """

    def __init__(self, device: VirtioMemDevice, memory: RegionMemory, *, prefault: bool = False) -> None:
        if device.geometry.block_size < memory.page_size:
            limit = f"at least the page size of its memory, {format_size(memory.page_size)}"
            raise UsageError("block_size", device.geometry.block_size, limit, "choose larger blocks or smaller pages")
        self.device = device
        self.memory = memory
        self.prefault = prefault
        self.listeners: list[MemoryListener] = []
        self.name = ""
        """What the log calls it."""
        self.require: Callable[[HostOffset, ByteCount], object] = lambda *_: None
        """Asked whether a range that is to be plugged may be. It refuses as a listener does, and hears of nothing else:
        an UNPLUG ALL would tell a listener of each run of blocks, and there can be millions."""
        self.unrequested_unplug = True
        """Whether an UNPLUG is granted that leaves the driver with less than the target."""
        self.keeper: Keeper = KeepsNothing()
        self.tally = Tally(device)
        self.observers = self.tally.observers
        self.failed_undos = 0
        self.lock = TurnLock()
        self._last_retry = float("-inf")
        self._shortage: Callable[[], HostError | None] = _no_shortage
        self._refusals = RefusalLog()
        self._logged_kept = False
        self._alone = 0
        """So many requests are to be served one by one."""
        self._closed = False

    @property
    def answers(self) -> Counter[tuple[str, str]]:
        """How often each request got each answer so far, by their names."""
        with self.lock:
            return self.tally.answers

    def request(self, request: Request) -> Response:
        """Serve one request of the driver."""
        with self.lock:
            outcome = self.device.request(request)
            response = self._carry_out(outcome) if isinstance(outcome, Effect) else outcome
            self.tally.answered(request, response)
            return response

    def serve(self, requests: memoryview, answers: memoryview) -> int:
        """Serve the first of the driver's `requests`, each of 24 bytes, and write their answers, each of 10; how many.

        One at least. More are served at once where no block changes, or where they change neighbouring blocks in the
        same way: memory comes or goes by one call to the host then, and listeners are told of it as one section. Where
        the host refuses that, each of them is tried alone.
        """
        with self.lock:
            count = 1 if self._alone else len(requests) // REQUEST_SIZE
            verdicts, effect = self.device.decide(requests, answers, count)
            self._alone = max(0, self._alone - len(verdicts))
            if effect is not None:
                response = self._carry_out(effect)
                if response.type is not ResponseType.ACK:
                    if len(verdicts) > 1:
                        self._alone = len(verdicts)
                        return self.serve(requests, answers)
                    answers[:RESPONSE_SIZE] = response.encode()
                    self.tally.answered(Request.decode(requests), response)
                    return 1
            self.tally.answered_all(requests, verdicts)
            return len(verdicts)

    def replay(self, request: Request, response: Response) -> None:
        """`request` gets `response` again, which it was to get from a process before this one: count it as well."""
        with self.lock:
            self.tally.answered(request, response)

    def device_reset(self) -> None:
        """The driver resets the device; see `VirtioMemDevice.device_reset`."""
        with self.lock:
            self.device.device_reset()

    def system_reset(self) -> bool:
        """The machine is reset: every block is unplugged.

        False, and nothing changed, where the host refused to, and while the device is paused: whoever paused it
        (migration, snapshot) relies on blocks to stay as they are. The next driver's UNPLUG ALL comes into play then.
        """
        with self.lock:
            if self.device.paused:
                return False
            response = self._carry_out(self.device.system_reset())
            self.keeper.done()
        return response.type is ResponseType.ACK

    def resize(self, requested_size: int) -> None:
        """Set the device's target in bytes. UsageError as in `VirtioMemDevice.resize`, and once it is closed."""
        with self.lock:
            if self._closed:
                raise UsageError("memory", "closed", "has to be open", "make it anew")
            self.device.resize(requested_size)
            self.keeper.changed()

    def info(self) -> dict[str, Any]:
        """The device as it is at one moment, as plain data; sizes in bytes."""
        with self.lock:
            device = self.device
            features = Feature(device.offered_features)
            return {
                **device.config._asdict(),
                "features": [feature.name for feature in Feature if feature in features],
                "prefault": self.prefault,
                "unrequested_unplug": self.unrequested_unplug,
                "paused": device.paused,
                "answers": {f"{request} {answer}": count for (request, answer), count in self.answers.items()},
                "failed_undos": self.failed_undos,
                "unplugged_bytes": self.tally.unplugged_bytes,
                "unreturned_bytes": self.tally.unreturned_bytes,
                "unrequested_bytes": self.tally.unrequested_bytes,
            }

    def pause(self) -> None:
        """Answer BUSY to what would change a block; a request that is being served is served to its end first."""
        with self.lock:
            self.device.pause()
            self.keeper.changed()

    def resume(self) -> None:
        """Serve again."""
        with self.lock:
            self.device.resume()
            self.keeper.changed()

    def close(self) -> None:
        """The memory is about to be closed: whatever would change a block is BUSY from now on."""
        with self.lock:
            self._closed = True

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._closed

    def poll(self, now: float) -> None:
        """To be called about once a second, with a clock that never goes back, in seconds: where a driver was told
        BUSY and the cause has gone, or can't be known, it gets a notice to try again."""
        with self.lock:
            self._logged_kept = False
            self._refusals.polled()
            self.tally.log_errors(self._who)
            device = self.device
            too_soon = now - self._last_retry < RETRY_INTERVAL
            if too_soon or device.paused or not device.owes_notice or self._shortage() is not None:
                return
            self._last_retry = now
            device.retry_now()

    def _carry_out(self, effect: Effect) -> Response:
        self._shortage = _no_shortage
        try:
            if self._closed:
                raise HostError("memory", "closed", "has to be open")
            if not self.unrequested_unplug:
                self._shortage = partial(refusal, self.device, effect)
                if unasked := self._shortage():
                    raise unasked
            self.keeper.opening(effect)  # an UNPLUG that is on record is carried out, whoever dies in it
            if effect.type is EffectType.PLUG:
                self._plug(effect)
            else:
                self._unplug(effect)
        except Exception as error:
            self._refusals.refused(self._who, effect, error)
            self.keeper.done()
            return self.device.abandon(effect, str(error))
        except BaseException:
            self.keeper.done()
            self.device.abandon(effect, "interrupted")
            raise
        self.not_refused()
        self.keeper.granted(effect)
        response = self.device.commit(effect)
        self.keeper.changed()
        return response

    def not_refused(self) -> None:
        """Something else happened than what was refused last."""
        self._refusals.granted()
        self._shortage = _no_shortage

    def another_guest(self) -> None:
        """What it is refused, or does wrong, is told aloud again."""
        self.not_refused()
        self._refusals.begin()
        self.tally.expect_errors()

    def _plug(self, effect: Effect) -> None:
        if self.prefault:
            try:
                self.memory.populate(effect.offset, effect.size)
            except HostError:
                self._shortage = partial(self.memory.shortage, effect.offset, effect.size)
                raise
        told = 0
        try:
            self.require(effect.offset, effect.size)
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
        gone: bool | None = False
        try:
            for listener, section in self._announcements(effect):
                listener.unplugging(section)
                told += 1
            if effect.size:
                gone = self.memory.discard(effect.offset, effect.size)
        except BaseException:
            for listener, section in islice(self._announcements(effect), told):
                self._undo(listener.plugged, section)
            raise
        self._verify(effect, gone)

    def _verify(self, effect: Effect, gone: bool | None) -> None:
        """Whether the bytes went back is for the host to say: two numbers, what was unplugged and what it still has."""
        unplugged = self.device.plugged_size if effect.everything else effect.size
        kept: ByteCount | None = None
        with suppress(HostError):
            sections = () if gone else self._discarded(effect)
            kept = ByteCount(sum(self.memory.held(section.offset, section.size) for section in sections))
            if kept:
                # A guest can touch its blocks while it unplugs them, as often as it likes: one line a poll is enough.
                level = logging.DEBUG if self._logged_kept else logging.WARNING
                self._logged_kept = True
                text = "%s%s: the host still holds %d of %d bytes"
                log.log(level, text, self._who, effect.type.value, kept, unplugged)
        self.tally.unrequested(unrequested(self.device, effect))
        self.tally.discarded(ByteCount(unplugged), kept)

    def _discarded(self, effect: Effect) -> Iterator[Section]:
        """What to ask the host about. Of a whole region the plugged parts: before Linux 6.7 the kernel looks at every
        page of a private range that it is asked about, and a region can have billions that were never there."""
        runs = self.device.blocks.few_plugged_runs(_MANY_RUNS + 1) if effect.everything else None
        yield from map(self._section, [effect.run] if runs is None else runs)

    def _undo(self, step: Callable[[Section], object], section: Section) -> None:
        """Take one step back. One that fails must not keep the others from being taken: it is counted and logged."""
        try:
            step(section)
        except Exception as error:
            self.failed_undos += 1
            text = "%s%d bytes at %#x could not be put back as they were: %s"
            log.exception(text, self._who, section.size, section.addr, error)

    @property
    def _who(self) -> str:
        return f"{self.name}: " if self.name else ""

    def _announcements(self, effect: Effect) -> Iterator[tuple[MemoryListener, Section]]:
        """Who is to be told of which sections, in order; the same each time, until the device commits."""
        if not self.listeners:
            return
        for run in self.device.blocks.plugged_runs() if effect.everything else (effect.run,):
            section = self._section(run)
            for listener in self.listeners:
                yield listener, section

    def _section(self, run: Run) -> Section:
        geometry = self.device.geometry
        offset, size = run.first * geometry.block_size, run.nb_blocks * geometry.block_size
        return Section(GuestAddress(geometry.addr + offset), HostOffset(offset), ByteCount(size))
