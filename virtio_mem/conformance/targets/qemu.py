"""`qemu[:BINARY][,option...]`: QEMU's own virtio-mem-pci, with the kit in the place of firmware, driver and guest.

    qemu                                     what PATH or the tree of scripts/peers has, memory in a memfd
    qemu:/opt/qemu/bin/qemu-system-x86_64    another one
    qemu,memory=hugetlb,prealloc=on          in huge pages, which the device allocates when it plugs

Options: memory=memfd, hugetlb, ram (QEMU's own) or tmpfs (a host that can run out of it: for root, and with
prealloc=on); dynamic-memslots=, prealloc=, packed= and unplugged-inaccessible= on or off, the device's own;
block-size=, in bytes or with a suffix such as M, in place of what a check wishes for.

Each device is a process of its own, made as the check wishes, but for what QEMU can't do: blocks have at least 1 MiB,
and at least a page, and there is always a node (ACPI_PXM), 127 being the highest. The host's target is set by the
monitor (`qom-set requested-size`). To have blocks stay as they are, a migration is begun that never gets anywhere:
QEMU's device is busy as long as it runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple

from vhost_user.errors import HostError
from virtio_mem.boot.qmp import QemuRefused
from virtio_mem.conformance.check import MANY
from virtio_mem.conformance.target import (
    Asks,
    Capability,
    Chain,
    Refused,
    Registers,
    Seen,
    Subject,
    Target,
    Used,
    Wish,
)
from virtio_mem.conformance.targets.qtest.command_line import (
    DEVICE,
    SLOT,
    MemoryKind,
    QemuOptions,
    Shape,
    command_line,
    require_options,
    shape_of,
)
from virtio_mem.conformance.targets.qtest.driver import PciDriver
from virtio_mem.conformance.targets.qtest.fw_cfg import boot_memory
from virtio_mem.conformance.targets.qtest.machine import PATIENCE, Machine, Program
from virtio_mem.conformance.targets.qtest.memory import KINDS, Ram, RegionMemory
from virtio_mem.conformance.targets.qtest.migration import StuckMigration
from virtio_mem.conformance.targets.qtest.sleep import fall_asleep, wake_up
from virtio_mem.protocol import ConfigSpace


class QemuTarget(Target):
    """The QEMU at `program`, or one that there is. UsageError for what can't be asked of it, HostError without one.

    `patience` is how many seconds it may take to answer anything.
    """

    kind = "qemu"

    def __init__(
        self,
        program: str | None = None,
        options: QemuOptions | None = None,
        *,
        name: str = "qemu",
        patience: float = PATIENCE,
    ) -> None:
        self.name = name
        self._patience = patience
        self._options = options or QemuOptions()
        self._program = Program.find(program)
        require_options(self._options, self._program)
        self.version = f"QEMU {self._program.qemu.release}"
        self.capabilities = (
            Capability.RESTART | Capability.WISH | Capability.SET_TARGET | Capability.SYSTEM_RESET | Capability.NOTICES
            | Capability.CHAINS | Capability.CONTENT | Capability.PAUSE | Capability.RING | Capability.START
            | Capability.REGISTERS | Capability.CONFIG_WRITES | Capability.UNPLUGGED | Capability.BOOT_MEMORY
        )  # fmt: skip
        if self._program.has_qtest:
            self.capabilities |= Capability.TIME | Capability.SLEEP  # a machine that never ran can't sleep
        if not self._options.prealloc and self._options.memory is not MemoryKind.HUGETLB:
            self.many = MANY  # nothing of which is touched
        if self._options.memory is MemoryKind.TMPFS and self._options.prealloc:
            self.capabilities |= Capability.HOST_REFUSES
        self._subject: QemuSubject | None = None
        self._last: Shape | None = None
        self.waiting: Launched | None = None
        """One that is started while the last one is judged: as soon as two in a row were the same."""
        if self._host_tells():
            self.capabilities |= Capability.HELD

    @classmethod
    def parse(cls, rest: str) -> QemuTarget:
        """From what the user wrote behind `qemu`: `:BINARY,option=value,...`, of which any part may be missing."""
        program, *options = rest.removeprefix(":").split(",")
        if "=" in program:
            program, options = "", [program, *options]
        items = (item.partition("=") for item in options)
        text = ",".join(f"{key.replace('-', '_')}{equals}{value}" for key, equals, value in items)
        name = f"qemu:{program}" if program else "qemu"
        return cls(program or None, QemuOptions.parse(text), name=",".join([name, *options]))

    def _host_tells(self) -> bool:
        """Whether the host tells what it holds of such memory. HostError where it has none of it to give."""
        with closing(self.start(Wish())) as subject:
            subject.region.require_headroom()
            try:
                subject.held(0, subject.config().block_size)
            except HostError:
                return False
        return True

    def start(self, wish: Wish) -> QemuSubject:
        """A QEMU of its own, made as wished as far as QEMU can. TargetFailure with what it said where it can't."""
        shape = shape_of(wish, self._options)
        launched, self.waiting = self.waiting, None
        if launched is not None and launched.shape != shape:
            launched.close()
            launched = None
        launched = launched or self._launch(shape)
        with ExitStack() as undo:
            undo.callback(launched.close)
            self._subject = QemuSubject(launched, clock=self._program.has_qtest)
            undo.pop_all()
        if shape == self._last:
            self.waiting = self._launch(shape)
        self._last = shape
        return self._subject

    def _launch(self, shape: Shape) -> Launched:
        with ExitStack() as undo:
            ram = Ram()
            undo.callback(ram.close)
            region = KINDS[self._options.memory](shape.region_size)
            undo.callback(region.close)
            arguments = command_line(self._program, self._options, shape, ram, region)
            fds = [fd for fd in (ram.fd, region.fd) if fd >= 0]
            machine = Machine(self._program, arguments, fds, self._patience)
            undo.pop_all()
        return Launched(shape, machine, ram, region)

    def close(self) -> None:
        """End the QEMUs that still run. Closing twice is allowed; another start is, too."""
        for one in (self._subject, self.waiting):
            if one is not None:
                one.close()
        self._subject = self.waiting = self._last = None


class Launched(NamedTuple):
    """A QEMU that has been started and may not be there yet, and its memory."""

    shape: Shape
    machine: Machine
    ram: Ram
    region: RegionMemory

    def close(self) -> None:
        """End it, and let the memory go. Closing twice is allowed."""
        self.machine.close()
        self.region.close()
        self.ram.close()


class QemuSubject(Subject):
    """A device in a QEMU of its own, once that is there. Takes over what was launched."""

    def __init__(self, launched: Launched, *, clock: bool) -> None:
        self._launched = launched
        self.machine, self.region = launched.machine, launched.region
        self._clock = clock
        self._migration: StuckMigration | None = None
        self.machine.await_start()
        self._driver = PciDriver(
            self.machine.qtest, launched.ram.memory, SLOT, self.machine.failure, self.machine.patience
        )
        self._driver.set_up()
        self.offered_features = self._driver.offered_features()
        self._addr = self.config().addr

    def begin(self, features: int) -> bool:
        """See `Subject`."""
        return self._driver.begin(features)

    def config(self) -> ConfigSpace:
        """See `Subject`."""
        return self._driver.config()

    def submit(self, chains: Sequence[Chain]) -> list[Used]:
        """See `Subject`. TargetFailure at once where the device asks for a reset instead of answering."""
        return self._driver.submit(chains)

    def device_reset(self) -> None:
        """See `Subject`."""
        self._driver.reset()

    def prepare(self, features: int) -> bool:
        """See `Subject`."""
        return self._driver.prepare(features)

    def go(self) -> None:
        """See `Subject`."""
        self._driver.go()

    def offer(self, chains: Sequence[Chain], asks: Asks) -> None:
        """See `Subject`."""
        self._driver.offer(chains, asks)

    def kick(self) -> None:
        """See `Subject`."""
        self._driver.notify()

    def look(self, whole: bool) -> Seen:
        """See `Subject`."""
        return self._driver.look(whole)

    def overrun(self) -> None:
        """See `Subject`."""
        self._driver.overrun()

    def registers(self) -> Registers:
        """See `Subject`."""
        return self._driver.registers()

    def write_config(self, offset: int, data: bytes) -> None:
        """See `Subject`."""
        self._driver.write_config(offset, data)

    def set_target(self, requested_size: int) -> None:
        """`qom-set requested-size`; Refused with what QEMU says."""
        arguments = {"path": f"/machine/peripheral/{DEVICE}", "property": "requested-size", "value": requested_size}
        try:
            self.machine.execute("qom-set", arguments)
        except QemuRefused as refusal:
            raise Refused(refusal.limit) from None
        self._driver.take_causes()

    def advance(self, seconds: float) -> None:
        """By QEMU's virtual clock where that is ours, else by waiting."""
        if self._clock:
            self.machine.qtest.step_clock(round(seconds * 1e9))
        else:
            time.sleep(seconds)
        self._driver.take_causes()

    def system_reset(self) -> None:
        """See `Subject`. Afterwards the device is set up again as firmware does it."""
        self.machine.system_reset()
        self._driver.set_up()

    def boot_memory(self) -> list[tuple[int, int]]:
        """What QEMU tells the firmware."""
        return boot_memory(self.machine.qtest, self.machine.failure)

    def sleep(self) -> None:
        """S3, as the guest's firmware would."""
        fall_asleep(self.machine)

    def wake(self) -> None:
        """See `Subject`. Afterwards the device is set up again as firmware does it."""
        wake_up(self.machine)
        self._driver.set_up()

    def take_notices(self) -> int:
        """At least so many: several that come of one call are one."""
        return self._driver.take_notices()

    def held(self, offset: int, size: int) -> int:
        """By the host's own counters."""
        return self.region.held(self.machine, self._addr, offset, size)

    def read(self, offset: int, size: int) -> bytes:
        """As the processor would, by guest address."""
        return self.machine.qtest.read(self._addr + offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """As the processor would, by guest address."""
        self.machine.qtest.write(self._addr + offset, data)

    def refuse(self, refuses: bool) -> None:
        """A file system that is full, and a file that keeps what it has."""
        self.region.refuse(refuses)
        self._driver.take_causes()

    def pause(self, paused: bool) -> None:
        """By a migration that goes nowhere."""
        if self._migration is not None:
            self._migration.end()
            self._migration = None
            self.machine.disregard_words()
        if paused:
            self._migration = StuckMigration(self.machine)
        self._driver.take_causes()

    def close(self) -> None:
        """See `Subject`."""
        if self._migration is not None:
            self._migration.close()
        self._launched.close()
