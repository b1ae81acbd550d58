"""A connection to a vhost-user virtio-mem device, and the guest that is put before it: ordinary memory and the region.

The guest's memory lies in memfds of ours that nobody can shorten, so a device that tries costs us no SIGBUS; what it
does to the region's file shows in the file, by which the host's bytes are counted. Where the region lies is what the
device's configuration space says, whatever that is. Of huge pages a guest's touch could be its end, where the pool has
none: so what the guest is about to touch is populated first, and where that fails the guest would have been killed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from vhost_user.connection import connect
from vhost_user.errors import Disconnected, FieldError, HostError, Refused, TimedOut
from vhost_user.frontend import Frontend, SharedRegion
from vhost_user.mapping import PAGE_SIZE
from vhost_user.memory import GuestMemory, Region
from vhost_user.message import F_LOG_ALL, F_PROTOCOL_FEATURES, U64, FrontendRequest, ProtocolFeature, VringState
from vhost_user.units import GIB, MIB, ByteCount, GuestAddress, HostOffset, align_up
from virtio_mem.conformance.target import RING_SIZE, TargetFailure
from virtio_mem.hostmem import facts, files
from virtio_mem.hostmem.backing import Hugetlb, Memfd
from virtio_mem.hostmem.memory import HostMemory
from virtio_mem.protocol import CONFIG_SIZE, ConfigSpace, Feature

RAM_SIZE = ByteCount(2 * MIB)
"""Of the guest's ordinary memory, which holds the ring and the buffers."""

PATIENCE = 5.0
"""Seconds that the device has for each message and for each kick."""

_LOOK = 0.1
"""Seconds between two looks whether the device is still there, while a buffer is waited for."""

_RING_SIZES = tuple(RING_SIZE >> shift for shift in range(6))
"""What is tried, in this order. A request and its answer take two entries."""

_MOST_REGION = 1 << 45
"""Bytes of a region that are mapped: a fourth of what a process on x86-64 can address."""

_OWN_BITS = F_LOG_ALL | F_PROTOCOL_FEATURES
"""Feature bits that are the protocol's, and no driver's."""


def _memory(name: str, size: int, huge_page_size: ByteCount | None, undo: ExitStack) -> HostMemory:
    """A memfd of `size` bytes, mapped; it is left to `undo` to close it."""
    fd = files.memfd(name, ByteCount(size), huge_page_size)
    whole = HostOffset(0)
    backing = Memfd(fd) if huge_page_size is None else Hugetlb(fd, whole, huge_page_size, reserved=False)
    try:
        memory = HostMemory(backing, ByteCount(size))
    except BaseException:
        backing.close()
        raise
    undo.callback(memory.close)
    return memory


def _shared(memory: HostMemory, address: int) -> SharedRegion:
    assert memory.shareable_fd is not None
    return SharedRegion(GuestAddress(address), memory.size, memory.shareable_fd)


class Link:
    """The connection to the device at the unix socket `path`, set up as far as any driver's life needs it.

    With `huge` the region is of huge pages of the kernel's default size, of which the pool may have too few.
    Every method raises TargetFailure where the device is gone, does not answer or breaks the protocol, and then it is
    `broken`: only `close()` is left.
    """

    def __init__(self, path: str, *, huge: bool = False) -> None:
        self.broken = False
        self._huge = huge
        self.path = path
        with ExitStack() as undo, self.alive():
            wanted = int(sum(Feature))
            self.frontend = undo.enter_context(Frontend.connect(path, features=wanted, timeout=PATIENCE))
            if not self.frontend.has(ProtocolFeature.CONFIG):
                raise TargetFailure(f"{path}: the device offers no configuration space (protocol feature CONFIG)")
            config = self.config()
            page_size = facts.default_hugepage_size() if huge else ByteCount(PAGE_SIZE)
            start = config.addr // page_size * page_size
            size = align_up(config.addr + config.region_size, page_size) - start
            if not 0 < size <= _MOST_REGION or start + size > 2**64:
                raise TargetFailure(f"{path}: no memory can be put where the configuration space says: {config}")
            self._skip = config.addr - start
            self._region = _memory("region", size, page_size if huge else None, undo)
            self.ram = GuestAddress(0 if start >= RAM_SIZE else align_up(start + size, GIB))
            ram = _memory("ram", RAM_SIZE, None, undo)
            self.guest = GuestMemory([Region(self.ram, RAM_SIZE, ram.mapping)])
            undo.callback(self.guest.replace, ())
            self.frontend.regions.share([_shared(self._region, start), _shared(ram, self.ram)])
            self.vring = self.frontend.vring(0)
            self.ring_size = self._ring_size()
            self._undo = undo.pop_all()

    @contextmanager
    def alive(self) -> Iterator[None]:
        """What shows that the device is of no use any more is a TargetFailure."""
        try:
            yield
        except TargetFailure:
            self.broken = True
            raise
        except FieldError as error:
            self.broken = True
            raise TargetFailure(f"{self.path}: {error}", silent=isinstance(error, TimedOut)) from error

    def _ring_size(self) -> int:
        """How many entries the ring gets: the most that the device takes, as far as anybody needs them."""
        for entries in _RING_SIZES:
            size = VringState(self.vring.index, entries)
            if self._taken(partial(self.frontend.requests.tell, FrontendRequest.SET_VRING_NUM, size)):
                return entries
        raise TargetFailure(f"{self.path}: the device takes no ring of {_RING_SIZES[-1]} to {_RING_SIZES[0]} entries")

    @property
    def offered_features(self) -> int:
        """What is for a driver to accept."""
        return self.frontend.offered & ~_OWN_BITS

    def config(self) -> ConfigSpace:
        """The configuration space as it is now."""
        with self.alive():
            return ConfigSpace.decode(self.frontend.get_config(0, CONFIG_SIZE))

    # The region.

    def _pages(self, offset: int, size: int) -> tuple[HostOffset, ByteCount]:
        """The whole pages of the region's memory that a range of the region touches."""
        page_size, start = self._region.page_size, self._skip + offset
        first = start // page_size * page_size
        return HostOffset(first), ByteCount(align_up(start + size, page_size) - first)

    def held(self, offset: int, size: int) -> int:
        """What the host holds for a range of the region, whoever touched it."""
        return self._region.held(*self._pages(offset, size))

    def shortage(self, size: int) -> HostError | None:
        """Why the host could not give the first `size` bytes of the region, if it could not."""
        whole_pages = align_up(size, self._region.page_size)
        return self._region.shortage(HostOffset(0), ByteCount(min(whole_pages, self._region.size)))

    def view(self, offset: int, size: int) -> memoryview:
        """The region's memory, as the guest has it."""
        if self._huge:
            with self.alive():
                self._region.populate(*self._pages(offset, size))
        return self._region.view(HostOffset(self._skip + offset), ByteCount(size))

    def forget_content(self) -> None:
        """Have the region hold nothing, whatever a device left there."""
        self._region.discard(HostOffset(0), self._region.size)

    # What comes by itself.

    def config_changes(self) -> int:
        """How many configuration change notices have come so far."""
        with self.alive():
            self.frontend.serve_channel()
        channel = self.frontend.channel
        return 0 if channel is None else channel.config_changes

    def listen(self, seconds: float, *, until_notice: bool = False) -> None:
        """Take what comes on the back end's channel for so long, or until a notice came."""
        deadline, before = time.monotonic() + seconds, self.config_changes()
        with self.alive():
            while (left := deadline - time.monotonic()) > 0:
                channel = self.frontend.channel
                if channel is None:
                    time.sleep(left)
                else:
                    self.frontend.requests.wait_ready(channel.fileno(), left)
                if until_notice and self.config_changes() > before:
                    return

    def wait_for_call(self, deadline: float) -> bool:
        """Wait for a call of the ring until `deadline`, by time.monotonic(); whether one came."""
        with self.alive():
            while (left := deadline - time.monotonic()) > 0:
                try:
                    if self.vring.wait(min(left, _LOOK)):
                        return True
                except Disconnected as error:
                    raise TargetFailure(f"{self.path}: the device closed the connection") from error
                if self.vring.failed:
                    raise TargetFailure(f"{self.path}: the device signalled an error of its ring")
        return False

    def agree(self, features: int) -> bool:
        """SET_FEATURES; whether the device took them."""
        bits = features | self.frontend.offered & F_PROTOCOL_FEATURES
        with self.alive():
            agreed = self._taken(partial(self.frontend.requests.tell, FrontendRequest.SET_FEATURES, U64(bits)))
        if agreed:
            self.frontend.features = bits
        return agreed

    def write_config(self, offset: int, data: bytes) -> None:
        """SET_CONFIG of what the driver writes, which the device is to refuse where it is not the driver's to write."""
        with self.alive():
            self._taken(partial(self.frontend.set_config, offset, data))

    def _taken(self, tell: Callable[[], None]) -> bool:
        """Whether the device took a message. One that breaks off instead has refused it, and is come back to."""
        try:
            tell()
            self.frontend.requests.confirm()
        except Refused:
            return False
        except Disconnected:
            self.frontend.reconnect(connect(self.path, timeout=PATIENCE))
            return False
        return True

    def close(self) -> None:
        """Close the connection and let the memory go. Closing twice is allowed."""
        self._undo.close()
