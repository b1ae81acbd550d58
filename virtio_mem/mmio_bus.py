"""Guest-physical register space: which device's registers an access reaches, in this process or from another.

In a VM, an access of the guest to a device's registers is an exit that the VMM serves. A guest that is a process of its
own sends each access as one datagram over a SOCK_SEQPACKET socket instead, and waits for the answer.
"""

from __future__ import annotations

import socket
import struct
from typing import Protocol

from vhost_user.errors import PeerError, UsageError
from vhost_user.units import GuestAddress
from virtio_mem.mmio_registers import REGISTER_SPACE

_ACCESS = struct.Struct("<BB6xQQ")  # kind, size, address, value
_VALUE = struct.Struct("<Q")
_READ, _WRITE = 0, 1

MAX_FDS = 253
"""unix(7): no more file descriptors than this pass in one message between machine and guest."""

_SIZES = (1, 2, 4, 8)


class Registers(Protocol):
    """Something with registers; `offset` counts from their start, `size` is 1, 2, 4 or 8 bytes."""

    def read(self, offset: int, size: int = 4) -> int:
        """Read `size` bytes."""

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """Write `size` bytes."""


class MmioBus:
    """Devices' registers by guest address. What no device answers reads as all ones, and swallows writes."""

    def __init__(self) -> None:
        self._devices: dict[int, Registers] = {}

    def add(self, base: GuestAddress, device: Registers) -> None:
        """Place `device`'s registers at `base`, a multiple of REGISTER_SPACE that is still free."""
        if base % REGISTER_SPACE or base in self._devices:
            raise UsageError("base", hex(base), f"has to be a free multiple of {REGISTER_SPACE:#x}", "choose another")
        self._devices[base] = device

    def read(self, addr: int, size: int = 4) -> int:
        """What the guest reads at `addr`."""
        device = self._devices.get(addr - addr % REGISTER_SPACE)
        return device.read(addr % REGISTER_SPACE, size) if device else (1 << 8 * size) - 1

    def write(self, addr: int, value: int, size: int = 4) -> None:
        """The guest writes `value` at `addr`."""
        device = self._devices.get(addr - addr % REGISTER_SPACE)
        if device:
            device.write(addr % REGISTER_SPACE, value, size)

    def serve(self, link: socket.socket) -> bool:
        """Serve one access that waits on `link`. False once the guest is gone.

        Raises PeerError for a datagram that is no access; nothing was done then.
        """
        try:
            message = link.recv(_ACCESS.size + 1)
        except ConnectionResetError:
            return False
        if not message:
            return False
        if len(message) != _ACCESS.size:
            raise PeerError("register access", f"{len(message)} bytes", f"has to be a datagram of {_ACCESS.size} bytes")
        kind, size, addr, value = _ACCESS.unpack(message)
        if kind not in (_READ, _WRITE) or size not in _SIZES:
            raise PeerError("register access", f"kind {kind}, size {size}", "has to be kind 0 or 1, size 1, 2, 4 or 8")
        if kind == _WRITE:
            self.write(addr, value, size)
        answer = _VALUE.pack(self.read(addr, size) if kind == _READ else 0)
        try:
            link.send(answer, socket.MSG_DONTWAIT)
        except (BrokenPipeError, ConnectionResetError):
            return False
        except BlockingIOError:
            raise PeerError(
                "register access", "answers left unread", "each answer has to be read before the next access"
            ) from None
        return True


class RemoteRegisters:
    """The guest's end: the registers at `base`, reached over `link`."""

    def __init__(self, link: socket.socket, base: GuestAddress) -> None:
        self._link = link
        self._base = base

    def read(self, offset: int, size: int = 4) -> int:
        """Read `size` bytes at `offset`."""
        return self._access(_READ, offset, size, 0)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """Write `size` bytes at `offset`."""
        self._access(_WRITE, offset, size, value)

    def _access(self, kind: int, offset: int, size: int, value: int) -> int:
        self._link.send(_ACCESS.pack(kind, size, self._base + offset, value))
        answer = self._link.recv(_VALUE.size)
        if len(answer) != _VALUE.size:
            raise PeerError(
                "register access", f"{len(answer)} bytes", "has to be an answer of 8 bytes: the machine is gone"
            )
        return int(_VALUE.unpack(answer)[0])
