"""A machine without processors: memory, devices behind virtio-mmio, and the loop that serves them.

The guest is a process of its own. It gets the machine's shared memory as file descriptors, reaches the registers over
a socket, kicks by a pipe and is interrupted by one (see doorbell.py), where a VMM has KVM's ioeventfd and irqfd. A
VMM in Python would put vCPU threads where this has a socket, and leave the rest as it is.

One thread serves everything; a resize may come from any other.
"""

from __future__ import annotations

import json
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from vhost_user.errors import PeerError, UsageError
from vhost_user.units import GuestAddress
from virtio_mem.doorbell import Doorbell
from virtio_mem.managed_zone import ManagedZone
from virtio_mem.manager import MemoryManager
from virtio_mem.mmio import MmioTransport
from virtio_mem.mmio_bus import MAX_FDS, MmioBus
from virtio_mem.mmio_registers import REGISTER_SPACE

log = logging.getLogger(__name__)

MMIO_BASE = GuestAddress(0xD000_0000)
"""Where the first device's registers are: inside the 32-bit hole, which no zone reaches into."""

POLL_INTERVAL = 0.25
"""Seconds between two looks at whether a driver that was told BUSY can be asked to try again."""


@dataclass(frozen=True)
class Slot:
    """One device's place in the machine: its registers, and how it is kicked and interrupts."""

    zone: str
    base: GuestAddress
    transport: MmioTransport
    kick: Doorbell
    irq: Doorbell


class Machine:
    """Serves `manager`'s devices to one guest from `start()` to `close()`; the manager stays the caller's.

    A context manager, which closes but does not start.
    """

    def __init__(self, manager: MemoryManager) -> None:
        self.manager = manager
        self.bus = MmioBus()
        self.slots: list[Slot] = []
        self._link_taken = False
        self._state = "new"
        self._changing = threading.Lock()
        with ExitStack() as undo:
            self._undo = undo
            self._stop = self._doorbell()
            for zone in manager.zones.values():
                if zone.service is not None:
                    self._add_device(zone)
            self.link, self._guest_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.enter_context(self.link)
            undo.enter_context(self._guest_link)
            self._undo = undo.pop_all()
        self._thread = threading.Thread(target=self._serve, name="virtio-mem-machine", daemon=True)

    def _add_device(self, zone: ManagedZone) -> None:
        assert zone.service is not None
        kick, irq = self._doorbell(), self._doorbell()
        transport = MmioTransport(
            zone.service,
            self.manager.guest_memory,
            interrupt=irq.ring,
            notified=kick.ring,
        )
        base = GuestAddress(MMIO_BASE + len(self.slots) * REGISTER_SPACE)
        self.bus.add(base, transport)
        self.slots.append(Slot(zone.plan.spec.id, base, transport, kick, irq))

    def _doorbell(self) -> Doorbell:
        doorbell = Doorbell()
        self._undo.callback(doorbell.close)
        return doorbell

    # The guest.

    def take_guest_link(self) -> socket.socket:
        """The guest's end of the socket, with the description of the machine waiting in it; UsageError a second time.

        The first datagram is JSON, with all file descriptors that it numbers from 0: `memory`, a list of `addr`,
        `size`, `offset` and `fd` for each shared part; `devices`, a list of `zone`, `mmio`, `kick` and `irq`.
        """
        if self._link_taken:
            raise UsageError("guest link", "taken", "a machine has one guest", "make another machine for another guest")
        fds: list[int] = []

        def number(fd: int) -> int:
            fds.append(fd)
            return len(fds) - 1

        memory = [
            {"addr": part.addr, "size": part.size, "offset": part.offset, "fd": number(part.fd)}
            for part in self.manager.shared_parts()
        ]
        devices = [
            {"zone": slot.zone, "mmio": slot.base, "kick": number(slot.kick.writer), "irq": number(slot.irq.reader)}
            for slot in self.slots
        ]
        if not memory:
            raise UsageError("shared", "off", "a guest in another process needs shared memory", "add shared=on")
        if len(fds) > MAX_FDS:
            limit = f"may take at most {MAX_FDS} file descriptors in one message to the guest, and need {len(fds)}"
            raise UsageError("zones", len(self.manager.zones), limit, "have fewer zones")
        self._link_taken = True
        description = json.dumps({"memory": memory, "devices": devices}).encode()
        socket.send_fds(self.link, [description], fds)
        return self._guest_link

    # The host.

    def start(self) -> None:
        """Serve, in a thread of its own. UsageError a second time, and once it is closed."""
        with self._changing:
            if self._state != "new":
                raise UsageError("machine", self._state, "has to be new to be started", "make another machine")
            self._thread.start()
            self._state = "started"

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
        """Stop serving, and close the sockets and the pipes. Closing twice is allowed."""
        with self._changing:
            self._state = "closed"
        if self._thread.is_alive():
            self._stop.ring()
            self._thread.join()
        self._undo.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _notify_config(self) -> None:
        for slot in self.slots:
            slot.transport.notify_config()

    # The loop.

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._stop.reader, selectors.EVENT_READ, lambda: False)
            selector.register(self.link, selectors.EVENT_READ, lambda: self._serve_access(selector))
            for slot in self.slots:
                selector.register(slot.kick.reader, selectors.EVENT_READ, self._kick_handler(slot))
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
            slot.kick.answer()
            try:
                more = slot.transport.process()
            except Exception:
                log.exception("the device of zone %s can't go on", slot.zone)
                slot.transport.fail()
                more = False
            if more:
                slot.kick.ring()
            return True

        return serve
