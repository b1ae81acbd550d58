"""The guest as a process: takes the machine's description, maps its memory, drives its devices until switched off.

It reports on standard output, a JSON object a line: `{"event": "online", "zone", "addr", "size"}` for each range that
it has plugged and filled, `offline` for each that it gave up, and `{"event": "outcome", "zone", "outcome",
"plugged_size"}` after each run towards a target. What it fills a range with is a pattern that `check` can recognise.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import socket
import sys
from contextlib import ExitStack
from typing import Any

from vhost_user.errors import HostError, PeerError
from vhost_user.mapping import MAP_NORESERVE, PAGE_SIZE, Mapping
from vhost_user.memory import GuestMemory, Region
from vhost_user.units import ByteCount, GuestAddress, HostOffset
from virtio_mem import doorbell
from virtio_mem.guest.memory_driver import GuestRange, MemoryDriver, Outcome
from virtio_mem.guest.virtio_mmio import WANTED, MmioDevice
from virtio_mem.mmio_bus import MAX_FDS, RemoteRegisters
from virtio_mem.protocol import Feature

RING_BASE = GuestAddress(0x10_0000)
"""Where the first device's ring lies: at 1 MiB, in boot memory."""

RING_SPACE = 0x1_0000
"""Guest memory for one device's ring and buffers."""

RETRY_SECONDS = 50.0
"""How long Linux's driver waits at first before it tries again by itself."""

_MAX_DESCRIPTION = 1 << 20


class MachineGoneError(Exception):
    """The other end of the link is closed: the guest is switched off."""


def pattern(addr: GuestAddress) -> bytes:
    """What the guest writes at the start of the page at `addr`: no two pages alike."""
    return b"virtio-mem page " + addr.to_bytes(8, "big").hex().encode()


class GuestProcess:
    """The guest at the other end of `link`."""

    def __init__(self, link: socket.socket, *, packed: bool = False) -> None:
        self._link = link
        with ExitStack() as undo:
            self._undo = undo
            description = self._take_description()
            self.memory = GuestMemory([self._map(part) for part in description["memory"]])
            undo.callback(self.memory.replace, ())
            features = WANTED | Feature.RING_PACKED if packed else WANTED
            self._devices = [
                self._bring_up(number, device, features) for number, device in enumerate(description["devices"])
            ]
            self._undo = undo.pop_all()

    def _take_description(self) -> dict[str, Any]:
        message, fds, _, _ = socket.recv_fds(self._link, _MAX_DESCRIPTION, MAX_FDS)
        self._fds = fds
        for fd in fds:
            self._undo.callback(os.close, fd)
        if not message:
            raise MachineGoneError
        description: dict[str, Any] = json.loads(message)
        return description

    def _map(self, part: dict[str, int]) -> Region:
        fd, size = self._fds[part["fd"]], ByteCount(part["size"])
        alignment = max(PAGE_SIZE, os.fstatvfs(fd).f_bsize)  # on hugetlbfs, the size of a huge page
        flags = mmap.MAP_SHARED | MAP_NORESERVE
        mapping = self._undo.enter_context(Mapping(size, flags, fd, HostOffset(part["offset"]), alignment=alignment))
        return Region(GuestAddress(part["addr"]), size, mapping)

    def _bring_up(self, number: int, device: dict[str, Any], features: Feature) -> _DrivenDevice:
        registers = RemoteRegisters(self._link, GuestAddress(device["mmio"]))
        at = GuestAddress(RING_BASE + number * RING_SPACE)
        kick, irq = self._fds[device["kick"]], self._fds[device["irq"]]
        port = MmioDevice(
            registers,
            self.memory,
            at,
            kick=lambda: doorbell.ring(kick),
            wait=lambda: self._await(irq),
            features=features,
        )
        return _DrivenDevice(device["zone"], port, irq, self)

    def _await(self, irq: int) -> None:
        """Wait for an interrupt. MachineGoneError where none can come any more."""
        poll = select.poll()
        poll.register(irq, select.POLLIN)
        poll.register(self._link, 0)
        poll.poll()
        if not doorbell.answer(irq):
            raise MachineGoneError

    def run(self) -> None:
        """Drive every device until the machine is switched off."""
        poll = select.poll()
        poll.register(self._link, 0)
        for device in self._devices:
            poll.register(device.irq, select.POLLIN)
            device.run()
        while True:
            ready = {fd for fd, _ in poll.poll(RETRY_SECONDS * 1000 if self._anyone_busy else None)}
            if self._link.fileno() in ready:
                return
            for device in self._devices:
                if device.irq in ready:
                    device.interrupted()
                elif not ready:
                    device.run()

    @property
    def _anyone_busy(self) -> bool:
        return any(device.outcome is Outcome.BUSY for device in self._devices)

    def close(self) -> None:
        """Unmap and close everything but the link."""
        self._devices = []
        self._undo.close()


class _DrivenDevice:
    """A device, its driver, and the guest's use of the memory that it gets."""

    def __init__(self, zone: str, port: MmioDevice, irq: int, guest: GuestProcess) -> None:
        self.zone = zone
        self.port = port
        self.irq = irq
        self.outcome = Outcome.REACHED
        self._memory = guest.memory
        self._driver = MemoryDriver(port, online=self._online, offline=self._offline)

    def run(self) -> None:
        """Go towards the target, as often as a notice comes meanwhile, and report how far that went."""
        self.port.config_changed = True
        while self.port.config_changed and self.outcome is not Outcome.BROKEN:
            self.port.config_changed = False
            self.outcome = self._driver.run()
        _report("outcome", self.zone, outcome=self.outcome.name, plugged_size=self._driver.plugged_size)

    def interrupted(self) -> None:
        """Look at what the interrupt was about."""
        doorbell.answer(self.irq)
        self.port.acknowledge()
        if self.port.config_changed:
            self.run()

    def _online(self, plugged: GuestRange) -> None:
        for addr in range(plugged.addr, plugged.addr + plugged.size, PAGE_SIZE):
            self._memory.write(GuestAddress(addr), pattern(GuestAddress(addr)))
        _report("online", self.zone, addr=plugged.addr, size=plugged.size)

    def _offline(self, unwanted: GuestRange) -> bool:
        """Give a range up, having looked whether each page still holds what was written to it."""
        for addr in range(unwanted.addr, unwanted.addr + unwanted.size, PAGE_SIZE):
            expected = pattern(GuestAddress(addr))
            if self._memory.read(GuestAddress(addr), len(expected)) != expected:
                _report("damaged", self.zone, addr=addr)
        _report("offline", self.zone, addr=unwanted.addr, size=unwanted.size)
        return True


def _report(event: str, zone: str, **details: int | str) -> None:
    sys.stdout.write(json.dumps({"event": event, "zone": zone, **details}) + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """`python -m virtio_mem.guest FD [packed]`: be the guest at the other end of socket `FD`."""
    with socket.socket(fileno=int(arguments[0])) as link:
        guest = None
        try:
            guest = GuestProcess(link, packed="packed" in arguments)
            guest.run()
        except (MachineGoneError, BrokenPipeError, ConnectionResetError):
            pass
        except (PeerError, HostError) as error:
            sys.stderr.write(f"guest: {error}\n")
            return 1
        finally:
            if guest is not None:
                guest.close()
    return 0
