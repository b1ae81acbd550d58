"""Our device as users have it, `virtio-mem serve` in processes of its own, and a VMM before it.

What is timed is from the kick to the call. Before it the requests are in the ring, after it the answers are read, so
that what the VMM's side costs is not counted as the device's.
"""

from __future__ import annotations

import mmap
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.backend.rig import EVERYTHING, FIRST_PACKED, SPLIT, Ram
from tests.benchmarks.measure import settle
from vhost_user import _native
from vhost_user.frontend import Frontend, FrontendVring, SharedRegion
from vhost_user.mapping import MAP_NORESERVE, Mapping
from vhost_user.units import GIB, MIB, ByteCount, GuestAddress
from vhost_user.vring import PackedLayout, SplitLayout
from virtio_mem.conformance.target import RING_SIZE, Chain, Used
from virtio_mem.conformance.targets.ring_driver import RingDriver
from virtio_mem.hostmem.memory import MADV_POPULATE_WRITE
from virtio_mem.protocol import Feature, Request, RequestType, Response, ResponseType

ADDR = GuestAddress(4 * GIB)
REGION_SIZE = ByteCount(GIB)
BLOCK_SIZE = ByteCount(2 * MIB)
RAM_SIZE = 2 * MIB

WAIT_SECONDS = 60.0

_DESC = 2
"""RING_EVENT_FLAGS_DESC of a packed ring: there is to be a notification for the descriptor that is named."""


@contextmanager
def served(socket: Path, *, prefault: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """`virtio-mem serve`, ready, with one zone that the guest is asked to plug all of."""
    size = f"hotplug_size={REGION_SIZE},hotplugged_size={REGION_SIZE},block_size={BLOCK_SIZE}"
    zone = f"id=mem0,socket={socket},addr={ADDR},{size},prefault={'on' if prefault else 'off'}"
    command = [sys.executable, "-m", "virtio_mem", "serve", "--zone", zone]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line == b"ready\n", line
            yield process
        finally:
            process.terminate()


class Vmm:
    """Has the guest's memory, and has it served at `socket`: ordinary memory, and the region in the file `fd`.

    The file stays the caller's. `service` is the process that was started to serve it.
    """

    def __init__(self, socket: Path, fd: int, service: int, *, packed: bool = False) -> None:
        self.fd = fd
        self.ring_features = EVERYTHING if packed else SPLIT
        self.service = service
        with ExitStack() as undo:
            self.ram = Ram(RAM_SIZE, user=None)
            undo.callback(self.ram.close)
            os.ftruncate(fd, REGION_SIZE)
            self._region = Mapping(REGION_SIZE, mmap.MAP_SHARED | MAP_NORESERVE, fd, alignment=BLOCK_SIZE)
            undo.callback(self._region.close)
            features = self.ring_features | int(Feature.UNPLUGGED_INACCESSIBLE)
            self.frontend = undo.enter_context(Frontend.connect(str(socket), features=features))
            self.frontend.regions.share([self.ram.region, SharedRegion(ADDR, REGION_SIZE, fd)])
            self._undo = undo.pop_all()

    def start(self, layout: SplitLayout | PackedLayout) -> FrontendVring:
        """Have the ring at `layout`, whose driver is the caller's, served from its beginning on."""
        vring = self.frontend.vring(0)
        vring.start(layout, 0 if isinstance(layout, SplitLayout) else FIRST_PACKED)
        return vring

    def populate(self, nb_blocks: int) -> None:
        """The guest uses the first blocks."""
        _native.madvise(self._region.address, nb_blocks * BLOCK_SIZE, MADV_POPULATE_WRITE)

    def close(self) -> None:
        self._undo.close()


class OurDevice:
    """The device, driven by a guest of `vmm` through a ring of so many entries."""

    addr = ADDR

    def __init__(self, vmm: Vmm, entries: int = RING_SIZE) -> None:
        self.vmm = vmm
        self._ring = RingDriver(vmm.ram.memory, GuestAddress(0), RAM_SIZE, vmm.ring_features, entries)
        self._offered = 0
        self._answered_at = time.perf_counter()
        self._vring = vmm.start(self._ring.layout)
        self._calls = select.poll()
        self._calls.register(self._vring.call.fileno(), select.POLLIN)

    def kick(self, requests: Sequence[Request]) -> float:
        """Have the requests served by one kick; seconds until the call. All are granted."""
        ring, kick = self._ring, self._vring.kick
        self._until_asleep()
        wanted = ring.offer(chains(requests))
        assert wanted or not self._offered, "the device wants no kick"  # once it may look by itself: it was enabled
        self._offered += len(requests)
        settle(self._answered_at)
        start = time.perf_counter()
        kick.signal()
        self._wait()
        seconds = time.perf_counter() - start
        while not ring.collect():  # a device may call without a reason, and look at its ring without a kick
            if not ring.queue.enable_interrupts():
                self._wait()
                seconds = time.perf_counter() - start
        self._answered_at = start + seconds
        require_granted(ring, requests)
        return seconds

    def rouse(self) -> None:
        """Have the device do something, so that it has slept no longer than before any other kick. For whoever made it
        wait."""
        self.kick(block_requests(RequestType.STATE, 1))

    def _until_asleep(self) -> None:
        """The device looks at its ring for a while; what is put there afterwards waits for the kick."""
        end = time.monotonic() + WAIT_SECONDS
        while not self._asleep():
            assert time.monotonic() < end, "the device does not go to sleep"
            time.sleep(0.0001)

    def _asleep(self) -> bool:
        """Whether it wants to be told of the next chain; each has taken one of the ring's entries so far."""
        memory, layout = self.vmm.ram.memory, self._ring.layout
        if isinstance(layout, SplitLayout):
            return memory.load16(GuestAddress(layout.used + 4 + 8 * layout.size)) == self._offered % 2**16
        position = self._offered % layout.size | (1 - self._offered // layout.size % 2) << 15
        return memory.load32(layout.device) == _DESC << 16 | position

    def _wait(self) -> None:
        ready = self._calls.poll(1000 * WAIT_SECONDS)
        assert ready, "no call came"
        self._vring.call.take()


def chains(requests: Sequence[Request]) -> list[Chain]:
    """Each in one descriptor of the ring, as Linux has it."""
    return [Chain(request.encode(), indirect=True) for request in requests]


def require_granted(ring: RingDriver, requests: Sequence[Request]) -> None:
    """All that came back was answered ACK."""
    for request, used in zip(requests, ring.results(), strict=True):
        _require_ack(request, used)


def _require_ack(request: Request, used: Used) -> None:
    response = Response.decode(used.room)
    assert response.type is ResponseType.ACK, f"{request}: {response}"


def block_requests(type_: RequestType, nb_blocks: int, addr: GuestAddress = ADDR) -> list[Request]:
    """A request for each of the region's first blocks."""
    return [Request(type_, GuestAddress(addr + block * BLOCK_SIZE), 1) for block in range(nb_blocks)]


@contextmanager
def our_vmm(*, prefault: bool = False, memfd_flags: int = 0, packed: bool = False) -> Iterator[Vmm]:
    """A VMM before a service of its own. `memfd_flags` are those of the region's file."""
    with ExitStack() as stack:
        socket = Path(stack.enter_context(TemporaryDirectory())) / "mem0.sock"
        fd = os.memfd_create("region", os.MFD_CLOEXEC | memfd_flags)
        stack.callback(os.close, fd)
        process = stack.enter_context(served(socket, prefault=prefault))
        vmm = Vmm(socket, fd, process.pid, packed=packed)
        stack.callback(vmm.close)
        yield vmm


@contextmanager
def our_device(*, prefault: bool = False, memfd_flags: int = 0, packed: bool = False) -> Iterator[OurDevice]:
    """A device of its own, in memory of its own; see `our_vmm`."""
    with our_vmm(prefault=prefault, memfd_flags=memfd_flags, packed=packed) as vmm:
        yield OurDevice(vmm)
