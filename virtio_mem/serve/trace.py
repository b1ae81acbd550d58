"""A device that puts down what it is asked, by its driver and by the host, and what it said: `serve --trace FILE`.

What a replay needs is in the file exactly once, wherever the process is killed. That rests on the order of writes that
intent.py tells of, and on this one: an answer's line is written when the answer can't be another one any more, and
before the used element is out. So what the guest has seen is in the file. The next process compares:

    the last answer and the first chain      The same: its line is there, and only its used element was missing.
    the record of a request in hand          Its answer will be ACK, unless it is a PLUG that the host has not acted on.
                                             The line is written at once if it is missing, as blocks have changed or are
                                             about to; or `system_reset`, where it was one.
    the last target, and the last pause      Others than the device's: they came a moment before the end.

The driver's `begin` is written with its first request, as front ends negotiate more often than drivers do. It names no
features, so that it fits other devices: those that were agreed on are in its answer. A BUSY that is no pause's comes
from the host, which is what `refuse on` says before it, and `refuse off` after it. Padding of requests is left out, as
devices have to pass over it, and so is how the driver cut up its buffers, except where they are too short.

A device that is not new, as after `--restore`, is made by the session's first lines. So it is where the file was
renamed: another one begins when the next worker comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial

from vhost_user.backend.batches import RingBatches
from vhost_user.chain import Chain
from vhost_user.errors import PeerError, UsageError
from virtio_mem.conformance.target import FILL, Used, Wish
from virtio_mem.conformance.target import Chain as AskedChain
from virtio_mem.conformance.words import Answer, Place, chain_words, config_words, request_bytes, wish_words
from virtio_mem.device import Effect, EffectType, VirtioMemDevice
from virtio_mem.geometry import Geometry
from virtio_mem.installed import version
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, RequestType, Response, ResponseType
from virtio_mem.region_memory import RegionMemory
from virtio_mem.serve.device import MemDevice
from virtio_mem.serve.files import TRACE_HEAD
from virtio_mem.serve.intent import ChainKey, Chains, Intent, Phase
from virtio_mem.serve.plan import ServedZone
from virtio_mem.serve.trace_file import TraceFile, asked_line, call_line
from virtio_mem.service import DeviceService

_MOST_AT_ONCE = 0xFFFF
"""Blocks that one request can name."""

_SYSTEM_RESET = call_line("system_reset")
_DEVICE_RESET = call_line("device_reset")


class Trace:
    """What is put down of one device of this geometry. All under the lock of the device's service."""

    def __init__(self, file: TraceFile, geometry: Geometry) -> None:
        self._file = file
        self._place = Place(geometry.addr, geometry.block_size)
        self._begun: int | None = None
        self._known: list[str] = []
        """Answers that are in the file already, if they are the next ones."""

    # What a process before this one left.

    def start(self, device: VirtioMemDevice, interrupted: Intent | None, zone_id: str) -> None:
        """Go on where the file is, or begin a session whose device is made as `device` is now."""
        tail, granted = self._file.tail, interrupted is not None and interrupted.phase is Phase.GRANTED
        if tail is None:
            self._file.begin(*_head(device, zone_id))
        else:
            self._begun = tail.begun
            if tail.refuses:
                self._file.write(call_line("refuse off"))
            if not tail.reset_since:
                self._known = [tail.asked]
        if interrupted is not None and (granted or interrupted.type is not EffectType.PLUG):
            self._certain(interrupted, done=tail is None and granted)
        if tail is not None:
            if tail.requested_size != device.requested_size:
                self.call(f"target {device.requested_size}")
            if tail.paused != device.paused:
                self.pause(device.paused)

    def _certain(self, intent: Intent, *, done: bool) -> None:
        """What comes of a request in hand. With `done`, the device had it behind itself when the session began."""
        tail = self._file.tail
        if not intent.chains:
            if not done and (tail is None or tail.last != _SYSTEM_RESET):
                self.system_reset(done=True)
            return
        # There are several where the process before this one wrote no trace.
        lines = [self._answered(chain, Response(ResponseType.ACK)) for chain in intent.chains]
        if tail is not None:
            self._file.write(*(line for line in lines if line != tail.asked))
        if tail is not None or done:
            self._known = lines

    # The driver.

    def begin(self, features: int, *, anew: bool) -> None:
        """Its next request is about to be served; `anew` for a driver of another front end than the one before."""
        if anew or self._begun != features:
            self._file.write(call_line("begin", f"agreed {features:#x}"))
            self._begun = features

    def refused(self, features: int) -> None:
        """It can't begin with these."""
        self._file.write(call_line(f"begin {features:#x}", f"refused {features:#x}"))
        self._begun = None

    def device_reset(self) -> None:
        """It reset the device, or is gone."""
        if self._begun is not None:
            self._file.write(_DEVICE_RESET)
        self._begun, self._known = None, []

    def answered(self, chain: ChainKey, response: Response, *, by_host: bool) -> None:
        """`response` is what it will get; `by_host` where that is a BUSY of the host's."""
        line = self._answered(chain, response)
        known, self._known = self._known, []
        if line in known:
            self._known = known[known.index(line) + 1 :]
            return
        if by_host:
            self._file.write(call_line("refuse on"), line, call_line("refuse off"))
        else:
            self._file.write(line)

    def _answered(self, chain: ChainKey, response: Response) -> str:
        request = chain.request
        words = chain_words(AskedChain(request_bytes(*request)), self._place)
        answer = response.type.name
        if request.type == RequestType.STATE and response.type is ResponseType.ACK:
            answer = f"{answer} {response.state.name}"
        return asked_line(words, answer, chain.head, chain.position)

    def returned(self, chain: Chain, where: int) -> None:
        """A chain that holds no request, or has no room for an answer, goes back empty to `where` in the used ring."""
        request = chain.read(0, min(chain.readable, REQUEST_SIZE))
        room = min(chain.writable, RESPONSE_SIZE)
        asked = AskedChain(request, (len(request),) if request else (), (room,) if room else ())
        line = asked_line(
            chain_words(asked, self._place), str(Answer.of(request, Used(0, FILL * room))), chain.id, where
        )
        if line not in self._known:
            self._file.write(line)
        self._known = []

    # The host.

    def call(self, call: str, answer: str = "done") -> None:
        """One of the host's moves."""
        self._file.write(call_line(call, answer))

    def pause(self, paused: bool) -> None:
        """Blocks are to stay as they are, or need not any more."""
        self.call(f"pause {'on' if paused else 'off'}")

    def system_reset(self, *, done: bool) -> None:
        """The machine was reset; without `done`, and the host refused to."""
        refusal = () if done else ("refuse on", "refuse off")
        self._file.write(*map(call_line, refusal[:1]), _SYSTEM_RESET, *map(call_line, refusal[1:]))
        self._begun, self._known = None, []

    def close(self) -> None:
        """Nothing more is put down."""
        self._file.close()


def _head(device: VirtioMemDevice, zone_id: str) -> Iterator[str]:
    """The lines by which another device becomes what this one is: the same geometry, blocks, and sizes."""
    geometry, target, usable = device.geometry, device.requested_size, device.usable_region_size
    yield f"{TRACE_HEAD.decode()} of zone {zone_id!r}, virtio-mem {version()}"
    yield f"# {config_words(device.config)}"
    first: int = target
    if device.plugged_size > target or geometry.usable_size_for(target) != usable:
        first = _target_of(geometry, usable)
    yield wish_words(Wish(geometry.region_size, geometry.block_size, first, geometry.node_id))
    if device.plugged_size:
        yield "begin"
        for run in device.blocks.plugged_runs():
            for start in range(run.first, run.first + run.nb_blocks, _MOST_AT_ONCE):
                yield f"plug {start} {min(_MOST_AT_ONCE, run.first + run.nb_blocks - start)}"
        yield _DEVICE_RESET
    if first != target:
        yield call_line(f"target {target}")
    if device.paused:
        yield call_line("pause on")


def _target_of(geometry: Geometry, usable: int) -> int:
    """The largest target that has this usable region."""
    slack = geometry.usable_size_for(geometry.checked_target(geometry.block_size)) - geometry.block_size
    return usable if usable == geometry.region_size else max(0, usable - slack)


class TracedService(DeviceService):
    """Puts down what the host does."""

    def __init__(self, trace: Trace, device: VirtioMemDevice, memory: RegionMemory) -> None:
        super().__init__(device, memory)
        self._trace = trace

    def resize(self, requested_size: int) -> None:
        """See DeviceService."""
        with self.lock:
            try:
                super().resize(requested_size)
            except UsageError as error:
                self._trace.call(f"target {requested_size}", f"refused: {error}")
                raise
            self._trace.call(f"target {requested_size}")

    def pause(self) -> None:
        """See DeviceService."""
        with self.lock:
            before = self.device.paused
            super().pause()
            if not before:
                self._trace.pause(True)

    def resume(self) -> None:
        """See DeviceService."""
        with self.lock:
            before = self.device.paused
            super().resume()
            if before:
                self._trace.pause(False)

    def system_reset(self) -> bool:
        """See DeviceService."""
        with self.lock:
            if self.device.paused:
                self._trace.system_reset(done=True)  # which changes no block there either
            return super().system_reset()

    def _carry_out(self, effect: Effect) -> Response:
        response = super()._carry_out(effect)
        if effect.type is EffectType.SYSTEM_RESET:
            self._trace.system_reset(done=response.type is ResponseType.ACK)
        return response


class TracedDevice(MemDevice):
    """A MemDevice that appends to `file`, which it closes with itself."""

    most_at_once = 1
    """So that a line is there for no answer but one that may have gone out, and the next process can compare."""

    def __init__(self, zone: ServedZone, state_fd: int, file: TraceFile) -> None:
        self._trace = Trace(file, zone.geometry)
        self._features = 0
        self._anew = True
        super().__init__(zone, state_fd, partial(TracedService, self._trace))
        self._trace.start(self.device, self.state.interrupted, zone.id)

    def connected(self) -> None:
        """See MemDevice. A session that is rebuilt begins so too."""
        super().connected()
        self._anew = True

    def resumed(self) -> None:
        """See MemDevice. Its driver is the one that asked before."""
        self._anew = False
        super().resumed()

    def disconnected(self) -> None:
        """See MemDevice."""
        super().disconnected()
        self._reset()

    def negotiated(self, features: int) -> None:
        """See MemDevice."""
        with self.service.lock:
            try:
                super().negotiated(features)
            except PeerError:
                self._trace.refused(features)
                raise
            self._features = features

    def set_status(self, status: int) -> None:
        """See MemDevice."""
        super().set_status(status)
        if status == 0:
            self._reset()

    def reset(self) -> None:
        """See MemDevice."""
        super().reset()
        self._reset()

    def _reset(self) -> None:
        with self.service.lock:
            self._trace.device_reset()

    def _serve(self, batches: RingBatches) -> None:
        batch = batches.batch
        if batch.reason(0) in {"request_too_short", "no_room_for_response"}:
            with self.service.lock, suppress(PeerError):  # its memory may be gone, which is nobody's request
                self._begin()
                self._trace.returned(batches.chain(0), batch.position(0))
        super()._serve(batches)

    def _answer(self, keys: memoryview, requests: memoryview, answers: memoryview) -> int:
        self._begin()
        chain = Chains(keys, requests).chain(0)
        written = self.state.counted_before(chain)
        count = super()._answer(keys, requests, answers)
        if written:
            return count
        response = Response.decode(answers)
        by_host = response.type is ResponseType.BUSY and not self.device.paused
        self._trace.answered(chain, response, by_host=by_host)
        return count

    def _begin(self) -> None:
        self._trace.begin(self._features, anew=self._anew)
        self._anew = False

    def close(self) -> None:
        """See MemDevice."""
        super().close()
        self._trace.close()
