"""A machine without processors: memory, devices behind virtio-mmio, and the loop that serves them.

The guest is a process of its own. It gets the machine's shared memory as file descriptors, reaches the registers over
a socket, kicks by an eventfd and is interrupted by one, which is what KVM's ioeventfd and irqfd are to a VMM. A VMM in
Python would put vCPU threads where this has a socket, and leave the rest as it is.

One thread serves everything; a resize may come from any other.
"""

from __future__ import annotations

import json
import logging
import os
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from vhost_user.errors import PeerError, UsageError
from vhost_user.units import GuestAddress
from virtio_mem.manager import ManagedZone, MemoryManager
from virtio_mem.mmio import MmioTransport
from virtio_mem.mmio_bus import MmioBus
from virtio_mem.mmio_registers import REGISTER_SPACE

log = logging.getLogger(__name__)

MMIO_BASE = GuestAddress(0xD000_0000)
"""Where the first device's registers are: inside the 32-bit hole, which no zone reaches into."""

POLL_INTERVAL = 0.25
"""Seconds between two looks at whether a driver that was told BUSY can be asked to try again."""

_EVENTFD_FLAGS = os.EFD_CLOEXEC | os.EFD_NONBLOCK
_MAX_FDS = 253
"""unix(7): no more file descriptors than this pass in one message."""


@dataclass(frozen=True)
class Slot:
    """One device's place in the machine: its registers, and the eventfds by which it is kicked and interrupts."""

    zone: str
    base: GuestAddress
    transport: MmioTransport
    kick: int
    irq: int


class Machine:
    """Serves `manager`'s devices to one guest from `start()` to `close()`. The manager stays the caller's."""

    def __init__(self, manager: MemoryManager) -> None:
        self.manager = manager
        self.bus = MmioBus()
        self.slots: list[Slot] = []
        self._fds: list[int] = []
        self._stop = self._eventfd()
        for zone in manager.zones.values():
            if zone.service is not None:
                self._add_device(zone)
        self.link, self._guest_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._thread = threading.Thread(target=self._serve, name="virtio-mem-machine", daemon=True)

    def _add_device(self, zone: ManagedZone) -> None:
        assert zone.service is not None
        kick, irq = self._eventfd(), self._eventfd()
        transport = MmioTransport(
            zone.service,
            self.manager.guest_memory,
            interrupt=lambda: _signal(irq),
            notified=lambda: _signal(kick),
        )
        base = GuestAddress(MMIO_BASE + len(self.slots) * REGISTER_SPACE)
        self.bus.add(base, transport)
        self.slots.append(Slot(zone.plan.spec.id, base, transport, kick, irq))

    def _eventfd(self) -> int:
        fd = os.eventfd(0, _EVENTFD_FLAGS)
        self._fds.append(fd)
        return fd

    # The guest.

    def take_guest_link(self) -> socket.socket:
        """The guest's end of the socket, once, with the description of the machine waiting in it.

        The first datagram is JSON, with all file descriptors that it numbers from 0: `memory`, a list of `addr`,
        `size`, `offset` and `fd` for each shared part; `devices`, a list of `zone`, `mmio`, `kick` and `irq`.
        """
        fds: list[int] = []

        def number(fd: int) -> int:
            fds.append(fd)
            return len(fds) - 1

        memory = [
            {"addr": part.addr, "size": part.size, "offset": part.offset, "fd": number(part.fd)}
            for part in self.manager.shared_parts()
        ]
        devices = [
            {"zone": slot.zone, "mmio": slot.base, "kick": number(slot.kick), "irq": number(slot.irq)}
            for slot in self.slots
        ]
        if not memory:
            raise UsageError("shared", "off", "a guest in another process needs shared memory", "add shared=on")
        if len(fds) > _MAX_FDS:
            raise UsageError("zones", len(self.manager.zones), f"at most {_MAX_FDS} file descriptors for the guest")
        description = json.dumps({"memory": memory, "devices": devices}).encode()
        socket.send_fds(self.link, [description], fds)
        return self._guest_link

    # The host.

    def start(self) -> None:
        """Serve, in a thread of its own."""
        self._thread.start()

    def resize(self, size: int) -> None:
        """`MemoryManager.resize`, and the guest is told."""
        self.manager.resize(size)
        self._notify_config()

    def resize_zone(self, zone_id: str, size: int) -> None:
        """`MemoryManager.resize_zone`, and the guest is told."""
        self.manager.resize_zone(zone_id, size)
        self._notify_config()

    def system_reset(self) -> bool:
        """Reset the machine: every device forgets its driver and unplugs everything. False where the host refused."""
        done = [slot.transport.system_reset() for slot in self.slots]
        return all(done)

    def close(self) -> None:
        """Stop serving, close the sockets and the eventfds."""
        if self._thread.is_alive():
            os.eventfd_write(self._stop, 1)
            self._thread.join()
        self.link.close()
        self._guest_link.close()
        while self._fds:
            os.close(self._fds.pop())

    def _notify_config(self) -> None:
        for slot in self.slots:
            slot.transport.notify_config()

    # The loop.

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._stop, selectors.EVENT_READ, lambda: False)
            selector.register(self.link, selectors.EVENT_READ, lambda: self._serve_access(selector))
            for slot in self.slots:
                selector.register(slot.kick, selectors.EVENT_READ, self._kick_handler(slot))
            next_poll = time.monotonic()
            while True:
                ready = selector.select(max(0.0, next_poll - time.monotonic()))
                going_on = [key.data() for key, _ in ready]
                if not all(going_on):
                    return
                now = time.monotonic()
                if now >= next_poll:
                    next_poll = now + POLL_INTERVAL
                    self.manager.poll(now)
                    self._notify_config()

    def _serve_access(self, selector: selectors.BaseSelector) -> bool:
        try:
            alive = self.bus.serve(self.link)
        except PeerError as error:
            log.warning("the guest is cut off: %s", error)
            alive = False
        if not alive:
            selector.unregister(self.link)
        return True

    @staticmethod
    def _kick_handler(slot: Slot) -> Callable[[], bool]:
        def serve() -> bool:
            with suppress(BlockingIOError):  # the guest has this eventfd too, and may have read it
                os.eventfd_read(slot.kick)
            if slot.transport.process():
                _signal(slot.kick)
            return True

        return serve


def _signal(fd: int) -> None:
    """Add one to an eventfd that the guest has too. It may have filled it, and then needs no further signal; it may
    even have made it blocking, so the write is tried only where it will not wait."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if poll.poll(0):
        with suppress(BlockingIOError):
            os.eventfd_write(fd, 1)
