"""A driver of virtio-mem-pci: section "Virtio Over PCI Bus" of the standard, with a ring in memory that is shared.

The registers are reached by qtest. The ring and the buffers lie in the guest's RAM, which is a file that we have mapped
as QEMU has: so indices are stored and loaded whole, and a request costs one line of qtest, the notification.

Notices of a changed configuration are messages (MSI-X) where the device can send such: each is a write to a word of RAM
that is ours. Where it can't, they are a bit of the ISR status register. Either tells that there was at least one since
the last look; so a look follows everything that may cause one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from vhost_user.device_status import Status
from vhost_user.errors import PeerError
from vhost_user.memory import GuestMemory
from vhost_user.units import MIB, GuestAddress
from virtio_mem.conformance.target import RING_SIZE, Asks, Chain, Registers, Seen, Used
from virtio_mem.conformance.targets.qtest.client import Failure, QTest
from virtio_mem.conformance.targets.qtest.pci import MSIX, VENDOR, PciFunction
from virtio_mem.conformance.targets.ring_driver import CurrentRing, RingDriver
from virtio_mem.mmio_registers import Interrupt
from virtio_mem.protocol import CONFIG_SIZE, VIRTIO_ID_MEM, ConfigSpace

VIRTIO_VENDOR = 0x1AF4
FIRST_DEVICE = 0x1040
"""PCI device number n + 0x1040 is virtio device n, section "PCI Device Discovery"."""

_VIRTIO_CAPABILITY = 9
"""PCI's kind for what a vendor defines."""

_COMMON, _NOTIFY, _ISR, _DEVICE = 1, 2, 3, 4
_NAMES = {_COMMON: "common", _NOTIFY: "notification", _ISR: "ISR status", _DEVICE: "device"}
"""The structures of section "Virtio Structure PCI Capabilities" that every device has to have."""

_NO_VECTOR = 0xFFFF
_POLL_SECONDS = 0.001
_QUIET_LOOKS = 5
"""Accesses, each a moment after the last, after which QEMU's main loop, which serves them, has seen to a kick too."""


class Register(NamedTuple):
    """Of `struct virtio_pci_common_cfg`: offset and size in bytes."""

    at: int
    size: int


DEVICE_FEATURE_SELECT, DEVICE_FEATURE = Register(0x00, 4), Register(0x04, 4)
DRIVER_FEATURE_SELECT, DRIVER_FEATURE = Register(0x08, 4), Register(0x0C, 4)
CONFIG_MSIX_VECTOR = Register(0x10, 2)
DEVICE_STATUS = Register(0x14, 1)
NUM_QUEUES, CONFIG_GENERATION = Register(0x12, 2), Register(0x15, 1)
QUEUE_SELECT, QUEUE_SIZE = Register(0x16, 2), Register(0x18, 2)
QUEUE_MSIX_VECTOR, QUEUE_ENABLE, QUEUE_NOTIFY_OFF = Register(0x1A, 2), Register(0x1C, 2), Register(0x1E, 2)
QUEUE_ADDRESSES = (0x20, 0x28, 0x30)
"""Of the descriptors, the driver's area and the device's area: 64 bits each, in halves."""

CONFIG_WORD = GuestAddress(MIB)
QUEUE_WORD = GuestAddress(MIB + 4)
"""Where messages are written: that the configuration changed, and that a buffer was used. Firmware leaves alone what
is above 1 MiB until it runs, which it never does."""

_RING = GuestAddress(2 * MIB)
RAM_SIZE = 4 * MIB
"""What has to be there: the ring and its buffers end here."""


class PciDriver:
    """Drives the virtio-mem device that is PCI device `slot`; RAM is `memory`. Set up is what `set_up` does.

    `seconds` is how long the device may take with requests or a reset. What goes wrong is raised as `failure` makes it.
    """

    def __init__(self, qtest: QTest, memory: GuestMemory, slot: int, failure: Failure, seconds: float) -> None:
        self._qtest, self._memory, self._failure = qtest, memory, failure
        self._function = PciFunction(qtest, failure, slot)
        self._seconds = seconds
        self._ring = CurrentRing()
        self._given_up = ""
        self._notices = 0

    def set_up(self) -> None:
        """What firmware and a bus driver do: find the device, place its windows. Again after each system reset."""
        function = self._function
        found = function.get(VENDOR, 4)
        if found != VIRTIO_VENDOR | (FIRST_DEVICE + VIRTIO_ID_MEM) << 16:
            raise self._failure(f"in the place of the virtio-mem device is PCI device {found:#x}")
        function.place_windows()
        self._structures: dict[int, GuestAddress] = {}
        msix = None
        for capability in function.capabilities():
            if capability.id == MSIX:
                msix = capability
            elif capability.id == _VIRTIO_CAPABILITY:
                self._take_structure(capability.offset)
        for kind, name in _NAMES.items():
            if kind not in self._structures:
                raise self._failure(f"the device has no {name} structure")
        self._messages = msix is not None
        if msix is not None:
            function.aim_messages(msix, [CONFIG_WORD, QUEUE_WORD])

    def _take_structure(self, offset: int) -> None:
        """One of `struct virtio_pci_cap`; the first of each kind is the one that the device prefers."""
        get = self._function.get
        kind, window = get(offset + 3, 1), get(offset + 4, 1)
        if kind in self._structures or kind not in _NAMES or window not in self._function.windows:
            return
        self._structures[kind] = GuestAddress(self._function.windows[window] + get(offset + 8, 4))
        if kind == _NOTIFY:
            self._notify_multiplier = get(offset + 16, 4)

    # The device's registers.

    def offered_features(self) -> int:
        """Bits 0 to 63."""
        offered = 0
        for half in (0, 1):
            self._set(DEVICE_FEATURE_SELECT, half)
            offered |= self._get(DEVICE_FEATURE) << 32 * half
        return offered

    def status(self) -> Status:
        """The device status field."""
        return Status(self._get(DEVICE_STATUS))

    def reset(self) -> None:
        """Status 0, and wait until the device says so too."""
        self._ring.end()
        self._set(DEVICE_STATUS, 0)
        deadline = time.monotonic() + self._seconds
        while status := self._get(DEVICE_STATUS):
            if time.monotonic() > deadline:
                raise self._failure(f"the device's status is {status:#x} {self._seconds:g} s after its reset")
            time.sleep(_POLL_SECONDS)

    def begin(self, features: int) -> bool:
        """Section "Driver Requirements: Device Initialization"; whether FEATURES_OK stayed. Else reset again."""
        if not self.prepare(features):
            return False
        self.go()
        return True

    def prepare(self, features: int) -> bool:
        """See `Subject`."""
        self.reset()
        status = Status.ACKNOWLEDGE
        for bit in (Status.ACKNOWLEDGE, Status.DRIVER):
            status |= bit
            self._set(DEVICE_STATUS, status)
        for half in (0, 1):
            self._set(DRIVER_FEATURE_SELECT, half)
            self._set(DRIVER_FEATURE, features >> 32 * half & 0xFFFFFFFF)
        status |= Status.FEATURES_OK
        self._set(DEVICE_STATUS, status)
        if not self.status() & Status.FEATURES_OK:
            self.reset()
            return False
        self._set_up_vectors()
        self._ring.start(self._set_up_ring(features))
        self._given_up = ""
        return True

    def go(self) -> None:
        """See `Subject`."""
        self._set(DEVICE_STATUS, self.status() | Status.DRIVER_OK)
        self.take_causes()
        self._notices = 0

    def config(self) -> ConfigSpace:
        """The device's configuration space. Nothing goes on in QEMU meanwhile."""
        return ConfigSpace.decode(self._qtest.read(self._structures[_DEVICE], CONFIG_SIZE))

    def submit(self, chains: Sequence[Chain]) -> list[Used]:
        """Make all available, notify once where the device wants to be notified, and wait for all."""
        ring = self._ring.now
        if self._given_up:
            raise self._failure(f"since the last reset {self._given_up}")
        if ring.offer(chains):
            self.notify()
        self._wait_for_all(ring)
        if not self._told() and chains:
            raise self._failure("all buffers came back, and no interrupt did")
        return ring.results()

    def _wait_for_all(self, ring: RingDriver) -> None:
        deadline = time.monotonic() + self._seconds
        while not ring.collect():
            if self.status() & Status.NEEDS_RESET:
                self._given_up = f"{ring.missing}, and the device needs a reset"
            elif time.monotonic() > deadline:
                self._given_up = f"{ring.missing} within {self._seconds:g} s"
            if self._given_up:
                failure = self._failure(self._given_up)
                failure.silent = time.monotonic() > deadline
                raise failure
            time.sleep(_POLL_SECONDS)

    def offer(self, chains: Sequence[Chain], asks: Asks) -> None:
        """See `Subject`."""
        self.take_causes()
        self._ring.or_before().put(chains, asks)

    def notify(self) -> None:
        """See `Subject`."""
        self._qtest.store(self._notify, 0, 2)

    def look(self, whole: bool) -> Seen:
        """See `Subject`."""
        ring = self._ring.now
        if whole:
            self._wait_for_all(ring)
        else:
            for _ in range(_QUIET_LOOKS):
                self.status()
                time.sleep(_POLL_SECONDS)
            ring.collect()
        return Seen(ring.seen(), self._told(), ring.device_flags)

    def _told(self) -> bool:
        """Whether buffers were said to be used. QEMU may be between using one and saying so; not after an access."""
        if self.take_causes():
            return True
        self.status()
        return self.take_causes()

    def overrun(self) -> None:
        """See `Subject`."""
        self._ring.now.overrun()

    def registers(self) -> Registers:
        """See `Subject`."""
        self._set(QUEUE_SELECT, 0)
        virtio_id = (self._function.get(VENDOR, 4) >> 16) - FIRST_DEVICE
        return Registers(
            virtio_id,
            queues=self._get(NUM_QUEUES),
            queue_size=self._get(QUEUE_SIZE),
            status=int(self.status()),
            generation=self._get(CONFIG_GENERATION),
        )

    def write_config(self, offset: int, data: bytes) -> None:
        """See `Subject`."""
        self._qtest.write(self._structures[_DEVICE] + offset, data)

    def take_causes(self) -> bool:
        """See whether a notice has come; whether buffers were said to be used."""
        if self._messages:
            changed, used = (self._take_message(word) for word in (CONFIG_WORD, QUEUE_WORD))
        else:
            causes = self._qtest.load(self._structures[_ISR], 1)
            changed, used = bool(causes & Interrupt.CONFIG_CHANGE), bool(causes & Interrupt.USED_BUFFER)
        self._notices += changed
        return used

    def _take_message(self, word: GuestAddress) -> bool:
        came = self._memory.load32(word) != 0
        self._memory.store32(word, 0)
        return came

    def take_notices(self) -> int:
        """How many looks since the last call have found one."""
        self.take_causes()
        notices, self._notices = self._notices, 0
        return notices

    def _set_up_vectors(self) -> None:
        if not self._messages:
            return
        self._set(QUEUE_SELECT, 0)
        for register, number in ((CONFIG_MSIX_VECTOR, 0), (QUEUE_MSIX_VECTOR, 1)):
            self._set(register, number)
            if self._get(register) == _NO_VECTOR:
                raise self._failure("the device has no room for two interrupt vectors")

    def _set_up_ring(self, features: int) -> RingDriver:
        self._set(QUEUE_SELECT, 0)
        entries = min(RING_SIZE, self._get(QUEUE_SIZE))
        try:
            ring = RingDriver(self._memory, _RING, RAM_SIZE - _RING, features, entries)
        except PeerError as error:
            raise self._failure(f"the device's queue can't be: {error}") from error
        self._set(QUEUE_SIZE, entries)
        for at, area in zip(QUEUE_ADDRESSES, ring.layout.areas.values(), strict=True):
            self._set(Register(at, 4), area.address & 0xFFFFFFFF)
            self._set(Register(at + 4, 4), area.address >> 32)
        offset = self._get(QUEUE_NOTIFY_OFF)
        self._notify = self._structures[_NOTIFY] + offset * self._notify_multiplier
        self._set(QUEUE_ENABLE, 1)
        if not self._get(QUEUE_ENABLE):
            raise self._failure("the device does not take its ring: queue_enable stays 0")
        return ring

    def _get(self, register: Register) -> int:
        return self._qtest.load(self._structures[_COMMON] + register.at, register.size)

    def _set(self, register: Register, value: int) -> None:
        self._qtest.store(self._structures[_COMMON] + register.at, value, register.size)
