"""`ring[:split|packed]`: our own device behind a virtqueue in shared memory and the registers of virtio-mmio.

All in this process and in one thread: a kick is served before it returns.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import ClassVar

from vhost_user.device_status import Status
from vhost_user.errors import UsageError
from vhost_user.mapping import Mapping
from vhost_user.memory import GuestMemory, Region
from vhost_user.units import MIB, ByteCount, GuestAddress
from virtio_mem.conformance.target import RING_SIZE, Asks, Capability, Chain, Registers, Seen, TargetFailure, Used
from virtio_mem.conformance.targets.in_process import OURS, InProcess, InProcessTarget, Made, Parts, alive
from virtio_mem.conformance.targets.ring_driver import CurrentRing, RingDriver
from virtio_mem.mmio import MmioTransport
from virtio_mem.mmio_registers import Interrupt, Register
from virtio_mem.protocol import CONFIG_SIZE, ConfigSpace, Feature
from virtio_mem.request_queue import GuestRequestQueue

FORMS = ("split", "packed")

RAM_SIZE = ByteCount(2 * MIB)
"""Of the guest's ordinary memory, at address 0, which holds the ring and the buffers."""

_MOST_QUEUES = 8
"""How many queues are looked for."""


class RingTransport(MmioTransport):
    """Ours, with another queue where the parts have one, and without packed rings where they are not wanted."""

    def __init__(self, made: Made, memory: GuestMemory, packed: bool, notified: Callable[[], None]) -> None:
        super().__init__(made.service, memory, interrupt=lambda: None, notified=notified)
        self._parts = made.parts
        self._packed = packed

    @property
    def offered_features(self) -> int:
        """As the transport's own."""
        offered = super().offered_features
        return offered if self._packed else offered & ~int(Feature.RING_PACKED)

    def _make_queue(self, where: Sequence[int] = ()) -> GuestRequestQueue | None:
        made = super()._make_queue(where)
        return made if made is None else self._parts.make_queue(self.service, made.queue)


class RingSubject(InProcess):
    """A device that is asked through a ring."""

    def __init__(self, made: Made, *, packed: bool) -> None:
        super().__init__(made)
        self._ram = Mapping(RAM_SIZE, mmap.MAP_SHARED)
        self._guest = GuestMemory([Region(GuestAddress(0), RAM_SIZE, self._ram)])
        self._kicked = False
        self._transport = (made.parts.make_transport or RingTransport)(made, self._guest, packed, self._kick)
        self._ring = CurrentRing()
        self.offered_features = self._transport.offered_features

    def _kick(self) -> None:
        self._kicked = True

    def _serve(self) -> None:
        """What the device's thread does when it is kicked."""
        while self._kicked:
            self._kicked = self._transport.process()

    # The driver's side: "MMIO-specific Initialization And Device Operation".

    def _read(self, register: int) -> int:
        return self._transport.read(register)

    def _write(self, register: int, value: int) -> None:
        self._transport.write(register, value)

    def _add_status(self, bit: Status) -> int:
        self._write(Register.STATUS, self._read(Register.STATUS) | bit)
        return self._read(Register.STATUS)

    def begin(self, features: int) -> bool:
        """As a driver does that wants these features and no other."""
        if not self.prepare(features):
            return False
        self.go()
        return True

    def prepare(self, features: int) -> bool:
        """See `Subject`."""
        with alive():
            self.device_reset()
            self._add_status(Status.ACKNOWLEDGE)
            self._add_status(Status.DRIVER)
            for half in (0, 1):
                self._write(Register.DRIVER_FEATURES_SEL, half)
                self._write(Register.DRIVER_FEATURES, features >> 32 * half & 0xFFFFFFFF)
            if not self._add_status(Status.FEATURES_OK) & Status.FEATURES_OK:
                self.device_reset()
                return False
            self._ring.start(self._set_up_ring(features))
        return True

    def go(self) -> None:
        """See `Subject`."""
        with alive():
            self._notices = 0
            self._add_status(Status.DRIVER_OK)
            self._serve()
            self._collect_notices()

    def _set_up_ring(self, features: int) -> RingDriver:
        self._write(Register.QUEUE_SEL, 0)
        entries = min(RING_SIZE, self._read(Register.QUEUE_SIZE_MAX))
        ring = RingDriver(self._guest, GuestAddress(0), RAM_SIZE, features, entries)
        self._write(Register.QUEUE_SIZE, entries)
        lows = (Register.QUEUE_DESC_LOW, Register.QUEUE_DRIVER_LOW, Register.QUEUE_DEVICE_LOW)
        for low, area in zip(lows, ring.layout.areas.values(), strict=True):
            self._write(low, area.address & 0xFFFFFFFF)
            self._write(low + 4, area.address >> 32)
        self._write(Register.QUEUE_READY, 1)
        if not self._read(Register.QUEUE_READY):
            raise TargetFailure("the device does not take its ring: QueueReady stays 0")
        return ring

    def config(self) -> ConfigSpace:
        """Read word by word; nothing changes it meanwhile."""
        with alive():
            words = [self._read(Register.CONFIG + offset) for offset in range(0, CONFIG_SIZE, 4)]
        return ConfigSpace.decode(b"".join(word.to_bytes(4, "little") for word in words))

    def submit(self, chains: Sequence[Chain]) -> list[Used]:
        """See `Subject`. TargetFailure also where all came back and no interrupt did."""
        ring = self._ring.now
        if ring.offer(chains):
            self._write(Register.QUEUE_NOTIFY, 0)
        seen = self.look(whole=True)
        if chains and not seen.notified:
            raise TargetFailure("all buffers came back, and no interrupt did")
        return ring.results()

    def offer(self, chains: Sequence[Chain], asks: Asks) -> None:
        """See `Subject`."""
        self._ring.or_before().put(chains, asks)

    def kick(self) -> None:
        """See `Subject`."""
        with alive():
            self._write(Register.QUEUE_NOTIFY, 0)

    def look(self, whole: bool) -> Seen:
        """See `Subject`. All is quiet when it returns."""
        ring = self._ring.now
        with alive():
            self._serve()
            back = ring.collect()
            interrupts = self._acknowledge()
        if whole and not back:
            broken = self._read(Register.STATUS) & Status.NEEDS_RESET
            raise TargetFailure(f"{ring.missing}{', and the device needs a reset' if broken else ''}")
        return Seen(ring.seen(), Interrupt.USED_BUFFER in interrupts, ring.device_flags)

    def overrun(self) -> None:
        """See `Subject`."""
        self._ring.now.overrun()

    def registers(self) -> Registers:
        """See `Subject`."""
        with alive():
            sizes = []
            for queue in range(_MOST_QUEUES):
                self._write(Register.QUEUE_SEL, queue)
                sizes.append(self._read(Register.QUEUE_SIZE_MAX))
            self._write(Register.QUEUE_SEL, 0)
            device_id, status = self._read(Register.DEVICE_ID), self._read(Register.STATUS)
            generation = self._read(Register.CONFIG_GENERATION)
        return Registers(device_id, sum(map(bool, sizes)), sizes[0], status, generation)

    def write_config(self, offset: int, data: bytes) -> None:
        """See `Subject`."""
        with alive():
            for at, byte in enumerate(data):
                self._transport.write(Register.CONFIG + offset + at, byte, 1)

    def _acknowledge(self) -> Interrupt:
        """Take the interrupts that came, and count the notices among them."""
        causes = Interrupt(self._read(Register.INTERRUPT_STATUS) & 3)
        self._write(Register.INTERRUPT_ACK, int(causes))
        self._notices += Interrupt.CONFIG_CHANGE in causes
        return causes

    def _collect_notices(self) -> None:
        self._transport.notify_config()
        self._acknowledge()

    def device_reset(self) -> None:
        """See `Subject`."""
        with alive():
            self._write(Register.STATUS, 0)
            if self._read(Register.STATUS):
                raise TargetFailure("the device's status is not 0 after a reset")
        self._ring.end()

    def system_reset(self) -> None:
        """See `Subject`."""
        with alive():
            self._transport.system_reset()
        self._ring.end()

    def close(self) -> None:
        """Let all memory go."""
        self._guest.replace(())
        self._ram.close()
        super().close()


class RingTarget(InProcessTarget):
    """Our device behind a ring that is `form`; a packed one is offered, and it is for the driver to take it.

    UsageError for a form that there is not, and as `InProcessTarget`.
    """

    kind = "ring"
    abilities: ClassVar[Capability] = ~(Capability.SLEEP | Capability.BOOT_MEMORY)

    def __init__(self, form: str = "split", backing: str = "memfd", *, parts: Parts = OURS, name: str = "") -> None:
        if form not in FORMS:
            raise UsageError("ring", form, f"has to be one of {', '.join(FORMS)}")
        self._form = form
        super().__init__(name or f"ring:{form}", backing, parts)

    def _made(self, made: Made) -> InProcess:
        return RingSubject(made, packed=self._form == "packed")
