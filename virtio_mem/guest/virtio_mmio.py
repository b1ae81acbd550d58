"""The driver's side of virtio-mmio for a virtio-mem device: set it up, read its configuration, send it requests.

Section "MMIO-specific Initialization And Device Operation" of the standard.
"""

from __future__ import annotations

from collections.abc import Callable

from vhost_user.device_status import Status
from vhost_user.errors import PeerError
from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress
from vhost_user.vring import PackedDriver, PackedLayout, SplitDriver, SplitLayout
from vhost_user.vring.driver import DriverQueue
from virtio_mem.mmio_bus import Registers
from virtio_mem.mmio_registers import MAGIC, VERSION, Interrupt, Register
from virtio_mem.protocol import (
    CONFIG_SIZE,
    REQUEST_SIZE,
    RESPONSE_SIZE,
    VIRTIO_ID_MEM,
    ConfigSpace,
    Feature,
    Request,
    Response,
)

WANTED = Feature.VERSION_1 | Feature.UNPLUGGED_INACCESSIBLE | Feature.ACPI_PXM | Feature.EVENT_IDX
QUEUE_SIZE = 64
_MAX_CONFIG_READS = 100


class MmioDevice:
    """One device behind `registers`, brought to DRIVER_OK; its ring and buffers lie in `memory` from `at` on.

    `kick` notifies the device; `wait` returns when it may have interrupted, and raises where nothing more is to come.
    Raises PeerError for a device that isn't virtio-mem, or that breaks the rules.
    """

    def __init__(
        self,
        registers: Registers,
        memory: GuestMemory,
        at: GuestAddress,
        *,
        kick: Callable[[], None],
        wait: Callable[[], None],
        features: Feature = WANTED,
    ) -> None:
        self._registers = registers
        self._memory = memory
        self._kick = kick
        self._wait = wait
        self.config_changed = False
        self._identify()
        self.features = self._negotiate(features)
        self._queue = self._set_up_queue(at)
        self._set_status(Status.DRIVER_OK)

    # What the memory driver calls.

    def config(self) -> ConfigSpace:
        """The configuration space, as it was at one moment: read again where it changed meanwhile."""
        for _ in range(_MAX_CONFIG_READS):
            generation = self._registers.read(Register.CONFIG_GENERATION)
            words = [self._registers.read(Register.CONFIG + offset) for offset in range(0, CONFIG_SIZE, 4)]
            if self._registers.read(Register.CONFIG_GENERATION) == generation:
                return ConfigSpace.decode(b"".join(word.to_bytes(4, "little") for word in words))
        raise PeerError("ConfigGeneration", "always another", f"has to be the same within {_MAX_CONFIG_READS} reads")

    def request(self, request: Request) -> Response:
        """Send one request, and wait for its response."""
        self._memory.write(self._request_at, request.encode())
        self._queue.add([(self._request_at, REQUEST_SIZE)], [(self._response_at, RESPONSE_SIZE)])
        if self._queue.needs_kick():
            self._kick()
        while (used := self._queue.get_used()) is None:
            if self._queue.enable_interrupts():
                continue
            self._wait()
            self.acknowledge()
        _, length = used
        if length < RESPONSE_SIZE:
            raise PeerError("used length", length, f"has to be a response of {RESPONSE_SIZE} bytes")
        return Response.decode(self._memory.read(self._response_at, RESPONSE_SIZE))

    def acknowledge(self) -> None:
        """After an interrupt: take note of its causes. Raises PeerError for a device that needs a reset."""
        causes = Interrupt(self._registers.read(Register.INTERRUPT_STATUS) & 3)
        if causes:
            self._registers.write(Register.INTERRUPT_ACK, int(causes))
        if Interrupt.CONFIG_CHANGE in causes:
            self.config_changed = True
            status = self._registers.read(Register.STATUS)
            if status & Status.NEEDS_RESET:
                raise PeerError(
                    "device status", hex(status), "has to be without DEVICE_NEEDS_RESET", "reset the device"
                )

    def reset(self) -> None:
        """Reset the device, and wait until it is."""
        self._registers.write(Register.STATUS, 0)
        while self._registers.read(Register.STATUS):
            pass

    # Bringing it up.

    def _identify(self) -> None:
        for register, expected in (
            (Register.MAGIC_VALUE, MAGIC),
            (Register.VERSION, VERSION),
            (Register.DEVICE_ID, VIRTIO_ID_MEM),
        ):
            value = self._registers.read(register)
            if value != expected:
                raise PeerError(register.name, hex(value), f"has to be {expected:#x}")

    def _negotiate(self, wanted: Feature) -> Feature:
        self.reset()
        self._set_status(Status.ACKNOWLEDGE)
        self._set_status(Status.DRIVER)
        offered = 0
        for half in (0, 1):
            self._registers.write(Register.DEVICE_FEATURES_SEL, half)
            offered |= self._registers.read(Register.DEVICE_FEATURES) << 32 * half
        features = Feature(int(wanted) & offered)
        for half in (0, 1):
            self._registers.write(Register.DRIVER_FEATURES_SEL, half)
            self._registers.write(Register.DRIVER_FEATURES, int(features) >> 32 * half & 0xFFFFFFFF)
        self._set_status(Status.FEATURES_OK)
        if not self._registers.read(Register.STATUS) & Status.FEATURES_OK:
            self._set_status(Status.FAILED)
            raise PeerError("features", hex(features), "have to be a subset that the device accepts")
        return features

    def _set_up_queue(self, at: GuestAddress) -> DriverQueue:
        self._registers.write(Register.QUEUE_SEL, 0)
        size = min(QUEUE_SIZE, self._registers.read(Register.QUEUE_SIZE_MAX))
        event_idx = Feature.EVENT_IDX in self.features
        layout = PackedLayout.place(size, at) if Feature.RING_PACKED in self.features else SplitLayout.place(size, at)
        self._request_at = GuestAddress(layout.end)
        self._response_at = GuestAddress(layout.end + REQUEST_SIZE)
        queue: DriverQueue
        if isinstance(layout, PackedLayout):
            queue = PackedDriver(self._memory, layout, event_idx=event_idx)
        else:
            queue = SplitDriver(self._memory, layout, event_idx=event_idx)
        self._registers.write(Register.QUEUE_SIZE, size)
        names = (Register.QUEUE_DESC_LOW, Register.QUEUE_DRIVER_LOW, Register.QUEUE_DEVICE_LOW)
        for low, area in zip(names, layout.areas.values(), strict=True):
            self._registers.write(low, area.address & 0xFFFFFFFF)
            self._registers.write(low + 4, area.address >> 32)
        self._registers.write(Register.QUEUE_READY, 1)
        if not self._registers.read(Register.QUEUE_READY):
            raise PeerError("QueueReady", 0, "has to be 1: the device refuses the queue")
        return queue

    def _set_status(self, bit: Status) -> None:
        self._registers.write(Register.STATUS, self._registers.read(Register.STATUS) | bit)
