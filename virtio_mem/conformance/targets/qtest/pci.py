"""A PCI function and its registers, as firmware and a driver would set it up: PCI Local Bus Specification 3.0.

Configuration space is reached by the two ports of the PC's first mechanism. A machine of ours has one function with
memory of its own that anybody looks at, so its windows are placed at addresses that no chipset uses for anything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vhost_user.units import GuestAddress, align_up
from virtio_mem.conformance.targets.qtest.client import Failure, QTest

VENDOR = 0x00
COMMAND = 0x04
STATUS = 0x06
FIRST_BAR = 0x10
FIRST_CAPABILITY = 0x34

MEMORY_SPACE = 1 << 1
BUS_MASTER = 1 << 2
"""Of the command register: the function answers at its windows, and may write to memory."""

_HAS_CAPABILITIES = 1 << 4
_ADDRESS_PORT, _DATA_PORT = 0xCF8, 0xCFC
_ENABLE = 1 << 31
_BARS = 6
_IS_PORTS = 1
_IS_64_BIT = 4
_FLAGS = 0xF

_WINDOWS, _WINDOWS_END = 0xF0000000, 0xFEC00000
"""Above the RAM and PCI Express's configuration space of both of QEMU's PCs, below their interrupt controllers."""

_MOST_CAPABILITIES = 48
"""As many as have room in 192 bytes: more is a list in a circle."""

MSIX = 0x11
_MSIX_ENABLE = 1 << 15
_MSIX_ENTRY = 16


class PciCapability(NamedTuple):
    """One of the function's list: its kind, and where in configuration space it begins."""

    id: int
    offset: int


class PciFunction:
    """Function 0 of `device` on bus 0, whose configuration space is looked at anew by each call."""

    def __init__(self, qtest: QTest, failure: Failure, device: int) -> None:
        self._qtest, self._failure = qtest, failure
        self._select = _ENABLE | device << 11
        self.windows: dict[int, GuestAddress] = {}
        """Where `place_windows` put them, by the number of their base address register."""

    def get(self, offset: int, size: int) -> int:
        """1, 2 or 4 bytes of configuration space."""
        self._qtest.port_out(_ADDRESS_PORT, self._select | offset & 0xFC, 4)
        return self._qtest.port_in(_DATA_PORT + offset % 4, size)

    def set(self, offset: int, value: int, size: int) -> None:
        """Write 1, 2 or 4 bytes of configuration space."""
        self._qtest.port_out(_ADDRESS_PORT, self._select | offset & 0xFC, 4)
        self._qtest.port_out(_DATA_PORT + offset % 4, value, size)

    def capabilities(self) -> Iterator[PciCapability]:
        """Those in the list, in its order."""
        if not self.get(STATUS, 2) & _HAS_CAPABILITIES:
            return
        at = self.get(FIRST_CAPABILITY, 1) & 0xFC
        for _ in range(_MOST_CAPABILITIES):
            if not at:
                return
            yield PciCapability(self.get(at, 1), at)
            at = self.get(at + 1, 1) & 0xFC
        raise self._failure("the device's list of PCI capabilities has no end")

    def place_windows(self) -> None:
        """Give each memory window its place, and let the function answer there and write to memory."""
        at, bar = _WINDOWS, 0
        while bar < _BARS:
            register = FIRST_BAR + 4 * bar
            self.set(register, 0xFFFFFFFF, 4)
            mask = self.get(register, 4)
            wide = mask & _IS_64_BIT and not mask & _IS_PORTS
            if mask & ~_FLAGS and not mask & _IS_PORTS:
                size = (~(mask & ~_FLAGS) & 0xFFFFFFFF) + 1
                at = align_up(at, size)
                if at + size > _WINDOWS_END:
                    raise self._failure(f"the device's windows take more than {_WINDOWS_END - _WINDOWS} bytes")
                self.set(register, at, 4)
                if wide:
                    self.set(register + 4, 0, 4)
                self.windows[bar] = GuestAddress(at)
                at += size
            bar += 2 if wide else 1
        self.set(COMMAND, MEMORY_SPACE | BUS_MASTER, 2)

    def aim_messages(self, capability: PciCapability, targets: list[GuestAddress]) -> None:
        """Have interrupt message number n write a 1 to the 32 bits at `targets[n]`: MSI-X, PCI 3.0 section 6.8.2."""
        table = self.get(capability.offset + 4, 4)
        window = self.windows.get(table & 7)
        if window is None:
            raise self._failure(f"the MSI-X table is in window {table & 7}, which the device does not have")
        for number, target in enumerate(targets):
            entry = window + (table & ~7) + number * _MSIX_ENTRY
            for at, value in enumerate((target & 0xFFFFFFFF, target >> 32, 1, 0)):
                self._qtest.store(entry + 4 * at, value, 4)
        control = self.get(capability.offset + 2, 2)
        self.set(capability.offset + 2, control | _MSIX_ENABLE, 2)
