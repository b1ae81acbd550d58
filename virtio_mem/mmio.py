"""The virtio-mmio transport of one device: the registers through which a guest finds, sets up and drives it.

Section "Virtio Over MMIO" of the standard. A VMM places 512 bytes of registers somewhere in guest-physical space and
hands each access of a virtual CPU to `read()` and `write()`. The interrupt line and the thread that serves the queue
are the VMM's: this class calls `interrupt()` and `notified()`. It keeps no thread and no file descriptor.

A guest may write any value to any register in any order. What makes no sense is ignored, as on hardware, and changes
nothing; a queue that can't be used is not made ready; features that can't be accepted leave FEATURES_OK unset.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from vhost_user.device_status import Status
from vhost_user.errors import PeerError, UsageError
from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress
from vhost_user.vring import DeviceQueue, PackedQueue, PackedState, SplitQueue, SplitState
from virtio_mem.mmio_registers import MAGIC, VERSION, Interrupt, Register
from virtio_mem.mmio_state import MmioState, require_state
from virtio_mem.protocol import CONFIG_SIZE, QUEUE_COUNT, VIRTIO_ID_MEM, Feature
from virtio_mem.request_queue import GuestRequestQueue
from virtio_mem.service import DeviceService

MAX_QUEUE_SIZE = 256
TRANSPORT_FEATURES = Feature.VERSION_1 | Feature.RING_PACKED | Feature.EVENT_IDX | Feature.INDIRECT_DESC

_VENDOR_ID = int.from_bytes(b"vmem", "little")


_REGISTERS = frozenset(Register)

_QUEUE_ADDRESSES = {
    Register.QUEUE_DESC_LOW: ("desc", 0),
    Register.QUEUE_DESC_HIGH: ("desc", 32),
    Register.QUEUE_DRIVER_LOW: ("driver", 0),
    Register.QUEUE_DRIVER_HIGH: ("driver", 32),
    Register.QUEUE_DEVICE_LOW: ("device", 0),
    Register.QUEUE_DEVICE_HIGH: ("device", 32),
}


class MmioTransport:
    """The registers of one virtio-mem device, `service`. UsageError for None, which a zone without a device has.

    Registers are read, and interrupts acknowledged, without waiting for anything. While a request is carried out, which
    may take seconds where a daemon hangs, other writes wait, and reads of ConfigGeneration and the configuration. A
    snapshot of the machine lacks what they hold: save `state()` beside it, and `restore()` that into a new transport.

    `memory` has the driver's ring and buffers. `interrupt` says that there is a new cause in `interrupt_status`, which
    the driver may have acknowledged by then; it is called with the transport's locks held, and must wait for no thread
    that reads registers. `notified` is called when the driver kicks, and has `process()` called, now or by another
    thread. Call `notify_config()` after each resize, and once a second behind `MemoryManager.poll()`.
    """

    def __init__(
        self,
        service: DeviceService | None,
        memory: GuestMemory,
        *,
        interrupt: Callable[[], None],
        notified: Callable[[], None],
    ) -> None:
        if service is None:
            limit = "has to be a device in service, which a zone has that is hotplugged by virtio-mem"
            raise UsageError("service", service, limit, "give the zone hotplug_size, and hotplug_method=virtio-mem")
        if not isinstance(service, DeviceService):
            raise UsageError("service", type(service).__name__, "has to be a DeviceService", "give a zone's service")
        self.service = service
        self.queue: GuestRequestQueue | None = None
        self._memory = memory
        self._interrupt = interrupt
        self._notified = notified
        self._ring_lock = threading.RLock()  # taken before the service's lock
        self._interrupt_lock = threading.Lock()  # for `interrupt_status` alone: nothing else is done under it
        self._generation = 0
        self._last_config = service.device.config.encode()
        self._forget_driver()

    # Registers.

    def read(self, offset: int, size: int = 4) -> int:
        """What the driver reads at `offset`: `size` bytes, 4 in the registers, 1, 2, 4 or 8 in the configuration."""
        if offset < Register.CONFIG and offset != Register.CONFIG_GENERATION:
            return self._read_register(offset) if size == 4 else 0
        with self.service.lock:
            if offset >= Register.CONFIG:
                return self._read_config(offset - Register.CONFIG, size)
            return self._generation_now() if size == 4 else 0

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """The driver writes `value` at `offset`. All of the configuration space is read-only."""
        if size != 4 or offset not in _REGISTERS:
            return
        register, value = Register(offset), value & 0xFFFFFFFF
        if register is Register.QUEUE_NOTIFY:
            self._notified()
        elif register is Register.INTERRUPT_ACK:
            with self._interrupt_lock:
                self.interrupt_status &= ~Interrupt(value & 3)
        elif register is Register.STATUS:
            with self._ring_lock, self.service.lock:
                started = self._write_status(value)
            if started:
                self._notified()  # requests may wait already, and a notice
        elif register is Register.QUEUE_READY:
            with self._ring_lock, self.service.lock:
                self._write_ready(value)
        else:
            with self.service.lock:
                self._write_register(register, value)

    # The device's side.

    def process(self) -> bool:
        """Serve the queue. True where requests are left: call again, without waiting for a kick."""
        with self._ring_lock:
            if self.queue is None or self.status & (Status.DRIVER_OK | Status.NEEDS_RESET) != Status.DRIVER_OK:
                return False
            try:
                progress = self.queue.process()
            except PeerError:
                self.fail()
                return False
            if progress.notify:
                self._raise(Interrupt.USED_BUFFER)
            self.notify_config()
            return progress.more

    def notify_config(self) -> None:
        """Pass on a configuration change notice that the device has for its driver. Before DRIVER_OK the notice waits:
        the driver may have read the configuration already."""
        with self.service.lock:
            if Status.DRIVER_OK in self.status and self.service.device.take_config_notice():
                self._raise(Interrupt.CONFIG_CHANGE)

    def system_reset(self) -> bool:
        """The machine is reset: forget the driver, unplug everything. False where the host refused to unplug."""
        with self._ring_lock, self.service.lock:
            done = self.service.system_reset()
            self.service.device_reset()
            self._forget_driver()
        return done

    def state(self) -> MmioState:
        """What a snapshot has to have of the transport beside the device: for a machine whose vCPUs stand still."""
        with self._ring_lock, self.service.lock:
            queue = None if self.queue is None or Status.NEEDS_RESET in self.status else self.queue.queue
            return MmioState(
                int(self.status),
                self.driver_features,
                self._device_features_sel,
                self._driver_features_sel,
                self._queue_sel,
                self._queue_size,
                self._areas["desc"],
                self._areas["driver"],
                self._areas["device"],
                None if queue is None else tuple(queue.state()),
                int(self.interrupt_status),
                self._generation_now(),
            )

    def restore(self, state: MmioState) -> None:
        """Be as another transport was, for the same guest: its memory is there again, and its device's blocks are.

        The driver gets a configuration change notice, which may have been due, and requests that wait are served.
        UsageError where a driver has this transport already, and for what none can be like: then it is as a new one.
        """
        require_state(state)
        with self._ring_lock, self.service.lock:
            if self.status:
                limit = "has to be 0: a driver has this transport already"
                raise UsageError("status", f"{int(self.status):#x}", limit, "restore into a new one")
            try:
                self._adopt(state)
            except BaseException:
                self._forget_driver()
                raise
            notice = Interrupt.CONFIG_CHANGE if Status.DRIVER_OK in self.status else Interrupt(0)
            if notice or self.interrupt_status:
                self._raise(notice)
        if notice:
            self._notified()

    # Private.

    def _adopt(self, state: MmioState) -> None:
        self.status, self.driver_features = Status(state.status), state.driver_features
        self._device_features_sel, self._driver_features_sel = state.device_features_sel, state.driver_features_sel
        self._queue_sel, self._queue_size = state.queue_sel, state.queue_size
        self._areas = {"desc": state.desc, "driver": state.driver, "device": state.device}
        if state.queue is not None:
            self.queue = self._make_queue(state.queue)
            if self.queue is None:
                limit = "has to be where the ring of this guest's memory can be"
                raise UsageError("queue", state.queue, limit, "restore the memory first")
        if Status.FEATURES_OK in self.status and not self._accept_features():
            limit = f"have to be acceptable to a device that offers {self.offered_features:#x}"
            raise UsageError("driver_features", f"{state.driver_features:#x}", limit, "restore the same device")
        with self._interrupt_lock:
            self.interrupt_status = Interrupt(state.interrupt_status)
        self._generation = (state.generation + 1) & 0xFFFFFFFF  # the driver may have read a part before

    def _forget_driver(self) -> None:
        self.status = Status(0)
        with self._interrupt_lock:
            self.interrupt_status = Interrupt(0)
        self.driver_features = 0
        self.queue = None
        self._device_features_sel = self._driver_features_sel = self._queue_sel = 0
        self._queue_size = 0
        self._areas = {"desc": 0, "driver": 0, "device": 0}

    def _read_register(self, offset: int) -> int:
        """What is read without a lock: each is one attribute, or never changes."""
        selected = self._queue_sel < QUEUE_COUNT
        match offset:
            case Register.MAGIC_VALUE:
                return MAGIC
            case Register.VERSION:
                return VERSION
            case Register.DEVICE_ID:
                return VIRTIO_ID_MEM
            case Register.VENDOR_ID:
                return _VENDOR_ID
            case Register.DEVICE_FEATURES:
                return self._half(self.offered_features, self._device_features_sel)
            case Register.QUEUE_SIZE_MAX:
                return MAX_QUEUE_SIZE if selected else 0
            case Register.QUEUE_READY:
                return int(selected and self.queue is not None)
            case Register.INTERRUPT_STATUS:
                return int(self.interrupt_status)
            case Register.STATUS:
                return int(self.status)
            case Register.SHM_LEN_LOW | Register.SHM_LEN_HIGH | Register.SHM_BASE_LOW | Register.SHM_BASE_HIGH:
                return 0xFFFFFFFF  # no shared memory region
        return 0

    @property
    def offered_features(self) -> int:
        """The device's features and the transport's."""
        return int(self.service.device.offered_features | TRANSPORT_FEATURES)

    @staticmethod
    def _half(value: int, sel: int) -> int:
        return value >> 32 * sel & 0xFFFFFFFF if sel < 2 else 0

    def _read_config(self, offset: int, size: int) -> int:
        if size not in (1, 2, 4, 8) or offset % size or offset + size > CONFIG_SIZE:
            return 0
        self._generation_now()
        return int.from_bytes(self._last_config[offset : offset + size], "little")

    def _generation_now(self) -> int:
        """ConfigGeneration changes whenever the driver could have read part of one configuration, part of another."""
        config = self.service.device.config.encode()
        if config != self._last_config:
            self._last_config = config
            self._generation = (self._generation + 1) & 0xFFFFFFFF
        return self._generation

    def _write_register(self, register: Register, value: int) -> None:
        match register:
            case Register.DEVICE_FEATURES_SEL:
                self._device_features_sel = value
            case Register.DRIVER_FEATURES_SEL:
                self._driver_features_sel = value
            case Register.DRIVER_FEATURES if self._driver_features_sel < 2 and Status.FEATURES_OK not in self.status:
                shift = 32 * self._driver_features_sel
                self.driver_features = self.driver_features & ~(0xFFFFFFFF << shift) | value << shift
            case Register.QUEUE_SEL:
                self._queue_sel = value
            case _ if self._queue_sel < QUEUE_COUNT and self.queue is None:  # a ready queue can't be moved
                self._write_queue(register, value)

    def _write_queue(self, register: Register, value: int) -> None:
        if register is Register.QUEUE_SIZE:
            self._queue_size = value
        elif register in _QUEUE_ADDRESSES:
            area, shift = _QUEUE_ADDRESSES[register]
            self._areas[area] = self._areas[area] & ~(0xFFFFFFFF << shift) | value << shift

    def _write_ready(self, value: int) -> None:
        if self._queue_sel < QUEUE_COUNT and value in (0, 1):
            self.queue = self._make_queue() if value else None

    def _make_queue(self, where: Sequence[int] = ()) -> GuestRequestQueue | None:
        """The queue that the driver described, or None (QueueReady reads 0) where it can't be used. `where` is where it
        goes on, if not at the start."""
        if (
            self.queue is not None
            or Status.FEATURES_OK not in self.status
            or not 0 < self._queue_size <= MAX_QUEUE_SIZE
        ):
            return self.queue
        features = Feature(self.driver_features)
        desc, driver, device = (GuestAddress(self._areas[area]) for area in ("desc", "driver", "device"))
        event_idx, indirect = Feature.EVENT_IDX in features, Feature.INDIRECT_DESC in features
        more: dict[str, Any] = {"event_idx": event_idx, "indirect": indirect}
        queue: DeviceQueue
        try:
            if Feature.RING_PACKED in features:
                more.update(zip(PackedState._fields, where, strict=False))
                queue = PackedQueue(self._memory, self._queue_size, desc=desc, driver=driver, device=device, **more)
            else:
                more.update(zip(SplitState._fields, where, strict=False))
                queue = SplitQueue(self._memory, self._queue_size, desc=desc, avail=driver, used=device, **more)
        except PeerError:
            return None
        return GuestRequestQueue(self.service, queue)

    def _write_status(self, value: int) -> bool:
        """Returns whether the driver said DRIVER_OK just now."""
        if value == 0:
            self.service.device_reset()
            self._forget_driver()
            return False
        added = Status(value & 0xFF) & ~self.status
        if Status.FEATURES_OK in added and not self._accept_features():
            added &= ~(Status.FEATURES_OK | Status.DRIVER_OK)
        if Status.DRIVER_OK in added and Status.FEATURES_OK not in self.status | added:
            added &= ~Status.DRIVER_OK
        self.status |= added & ~Status.NEEDS_RESET
        return Status.DRIVER_OK in added

    def _accept_features(self) -> bool:
        features = self.driver_features
        if features & ~self.offered_features or Feature.VERSION_1 not in Feature(features):
            return False
        try:
            self.service.device.negotiate(features)
        except PeerError:
            return False
        return True

    def fail(self) -> None:
        """The device can't go on: tell the driver that it needs a reset. All else lives."""
        with self.service.lock:
            self.status |= Status.NEEDS_RESET
            self._raise(Interrupt.CONFIG_CHANGE | Interrupt.USED_BUFFER)  # what was served before is to be collected

    def _raise(self, cause: Interrupt) -> None:
        with self._interrupt_lock:
            self.interrupt_status |= cause
        self._interrupt()
