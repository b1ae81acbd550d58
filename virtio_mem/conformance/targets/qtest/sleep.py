"""Suspend to RAM and waking up, as the guest's ACPI tables would have it: the registers of QEMU's q35, an ICH9.

Sources: ICH9 datasheet, "Power Management I/O Registers"; ACPI, "PM1 Control Registers"; hw/acpi/core.c in QEMU, which
takes the sleep type 1 for S3.
"""

from __future__ import annotations

import time

from virtio_mem.conformance.targets.qtest.machine import Machine
from virtio_mem.conformance.targets.qtest.pci import PciFunction

_BRIDGE = 31
"""The device on bus 0 that has these registers."""

_PMBASE, _ACPI_CNTL = 0x40, 0x44
_PORTS = 0x600
_IS_PORTS = 1
_ACPI_ENABLE = 1 << 7
_PM1_CONTROL = 4
_SLEEP_ENABLE, _S3 = 1 << 13, 1 << 10

_POLL_SECONDS = 0.001


def fall_asleep(machine: Machine) -> None:
    """What a guest does last; the machine is suspended afterwards. TargetFailure where it does not come to that."""
    bridge = PciFunction(machine.qtest, machine.failure, _BRIDGE)
    bridge.set(_PMBASE, _PORTS | _IS_PORTS, 4)
    bridge.set(_ACPI_CNTL, _ACPI_ENABLE, 1)
    machine.qtest.port_out(_PORTS + _PM1_CONTROL, _SLEEP_ENABLE | _S3, 2)
    _await(machine, "suspended")


def wake_up(machine: Machine) -> None:
    """Somebody presses a key; the processor's side of the machine is reset by it."""
    machine.execute("system_wakeup")
    _await(machine, "running")


def _await(machine: Machine, wanted: str) -> None:
    deadline = time.monotonic() + machine.patience
    while (status := machine.execute("query-status")["status"]) != wanted:
        if time.monotonic() > deadline:
            raise machine.failure(f"QEMU is {status}, not {wanted}, after {machine.patience:g} s")
        time.sleep(_POLL_SECONDS)
