"""`qemu[:BINARY][,option...]`: QEMU's own virtio-mem-pci, with the kit in the place of firmware, driver and guest.

    qemu                                     what PATH or the tree of scripts/peers has, memory in a memfd
    qemu:/opt/qemu/bin/qemu-system-x86_64    another one
    qemu,memory=hugetlb,prealloc=on          in huge pages, which the device allocates when it plugs

Options: memory=memfd, hugetlb, ram (QEMU's own) or tmpfs (a host that can run out of it: for root, and with
prealloc=on); dynamic-memslots=, prealloc= and packed= on or off, the device's own; block-size=, in bytes or with a
suffix such as M, in place of what a check wishes for.

Each device is a process of its own, made as the check wishes, but for what QEMU can't do: blocks have at least 1 MiB,
and at least a page, and there is always a node (ACPI_PXM), 127 being the highest. The host's target is set by the
monitor (`qom-set requested-size`). To have blocks stay as they are, a migration is begun that never gets anywhere:
QEMU's device is busy as long as it runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from vhost_user.errors import HostError, UsageError
from vhost_user.units import GIB, MIB, ByteCount, align_up
from virtio_mem.boot.qemu import cpu_model
from virtio_mem.boot.qmp import QemuRefused
from virtio_mem.config.option import Option, kind
from virtio_mem.config.values import Choice, Size, Toggle
from virtio_mem.conformance.target import Capability, Chain, Refused, Subject, Target, Used, Wish
from virtio_mem.conformance.targets.qtest.driver import PciDriver
from virtio_mem.conformance.targets.qtest.machine import PATIENCE, Machine, Program
from virtio_mem.conformance.targets.qtest.memory import KINDS, MEMDEV, RAM, Ram, RegionMemory, page_size_of
from virtio_mem.conformance.targets.qtest.migration import StuckMigration
from virtio_mem.protocol import ConfigSpace

_DEVICE = "device"
_SLOT = 5
"""The device's place on bus 0, away from what the chipset has there."""

_LEAST_BLOCK = MIB
_HIGHEST_NODE = 127
"""Of QEMU's virtio-mem, and of QEMU's machines."""

_ROOM = 4 * GIB
"""What the machine may have of memory beside the region, which begins at a GiB or at a multiple of its blocks."""

_WHERE_MEMORY_BEGINS = 4 * GIB

_WITHOUT = "graphics=off,hpet=off,i8042=off,pit=off,sata=off,smbus=off,usb=off"
"""What of a PC nobody needs here. A third of the time that it takes to start goes with it."""


class MemoryKind(StrEnum):
    """What the region is made of."""

    MEMFD = "memfd"
    HUGETLB = "hugetlb"
    RAM = "ram"
    TMPFS = "tmpfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuOptions(Option):
    """What stands behind the program; sizes in bytes."""

    OPTION: ClassVar[str] = "qemu"

    memory: MemoryKind = field(default=MemoryKind.MEMFD, metadata=kind(Choice(MemoryKind)))
    dynamic_memslots: bool = field(default=False, metadata=kind(Toggle()))
    prealloc: bool = field(default=False, metadata=kind(Toggle()))
    packed: bool = field(default=False, metadata=kind(Toggle()))
    block_size: ByteCount | None = field(default=None, metadata=kind(Size(zero=False)))


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
        self._require_options()
        self.version = f"QEMU {self._program.qemu.release}"
        self.capabilities = (
            Capability.RESTART | Capability.WISH | Capability.SET_TARGET | Capability.SYSTEM_RESET | Capability.NOTICES
            | Capability.CHAINS | Capability.CONTENT | Capability.PAUSE
        )  # fmt: skip
        if self._program.has_qtest:
            self.capabilities |= Capability.TIME
        if self._options.memory is MemoryKind.TMPFS and self._options.prealloc:
            self.capabilities |= Capability.HOST_REFUSES
        self._subject: QemuSubject | None = None
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

    def _require_options(self) -> None:
        """Older versions have not all of them."""
        for name in ("dynamic_memslots", "prealloc", "packed"):
            option = name.replace("_", "-")
            if getattr(self._options, name) and option not in self._program.device_options:
                limit = f"QEMU {self._program.qemu.release} does not have it"
                raise UsageError(f"qemu {option}", "on", limit, "leave it out, or name a later QEMU")

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
        options = self._options
        block_size = options.block_size or max(wish.block_size, _LEAST_BLOCK)
        block_size = max(block_size, page_size_of(options.memory))
        size = align_up(wish.region_size, block_size)
        with ExitStack() as undo:
            ram = Ram()
            undo.callback(ram.close)
            region = KINDS[options.memory](size)
            undo.callback(region.close)
            arguments = [
                *self._machine_arguments(ram, wish.node_id, size),
                *region.arguments(),
                *self._device_arguments(wish, block_size),
            ]
            fds = [fd for fd in (ram.fd, region.fd) if fd >= 0]
            machine = Machine(self._program, arguments, fds, self._patience)
            undo.callback(machine.close)
            self._subject = QemuSubject(machine, ram, region, clock=self._program.has_qtest)
            undo.pop_all()
        return self._subject

    def _machine_arguments(self, ram: Ram, node_id: int | None, size: int) -> list[str]:
        accel = "qtest" if self._program.has_qtest else "tcg"
        end = _WHERE_MEMORY_BEGINS + _ROOM + size
        arguments = ["-nodefaults", "-no-user-config", "-display", "none", "-cpu", cpu_model(accel, end)]
        arguments += ["-m", f"size={RAM // MIB}M,slots=1,maxmem={(align_up(size, GIB) + _ROOM) // MIB}M"]
        arguments += ram.arguments("ram")
        machine = f"q35,accel={accel},{_WITHOUT}"
        if node_id is None:
            arguments += ["-machine", f"{machine},memory-backend=ram"]
        else:
            arguments += ["-machine", machine, "-numa", "node,nodeid=0,memdev=ram"]
            for node in range(1, min(node_id, _HIGHEST_NODE) + 1):
                arguments += ["-numa", f"node,nodeid={node}"]
        return arguments if self._program.has_qtest else [*arguments, "-S"]

    def _device_arguments(self, wish: Wish, block_size: int) -> list[str]:
        options = self._options
        requested = align_up(wish.requested_size, block_size)
        words = [
            f"virtio-mem-pci,id={_DEVICE},addr={_SLOT:#x},memdev={MEMDEV}",
            f"block-size={block_size},requested-size={requested},node={min(wish.node_id or 0, _HIGHEST_NODE)}",
        ]
        words += [
            f"{option}=on"
            for option, on in (
                ("dynamic-memslots", options.dynamic_memslots),
                ("prealloc", options.prealloc),
                ("packed", options.packed),
            )
            if on
        ]
        if "ioeventfd" in self._program.device_options:
            words.append("ioeventfd=off")  # a notification is served before it is answered
        return ["-device", ",".join(words)]

    def close(self) -> None:
        """End the QEMU that still runs. Closing twice is allowed."""
        if self._subject is not None:
            self._subject.close()


class QemuSubject(Subject):
    """A device in a QEMU of its own. Takes over all that it is given."""

    def __init__(self, machine: Machine, ram: Ram, region: RegionMemory, *, clock: bool) -> None:
        self.region = region
        self.machine, self._ram = machine, ram
        self._clock = clock
        self._migration: StuckMigration | None = None
        self._driver = PciDriver(machine.qtest, ram.memory, _SLOT, machine.failure, machine.patience)
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

    def set_target(self, requested_size: int) -> None:
        """`qom-set requested-size`; Refused with what QEMU says."""
        arguments = {"path": f"/machine/peripheral/{_DEVICE}", "property": "requested-size", "value": requested_size}
        try:
            self.machine.execute("qom-set", arguments)
        except QemuRefused as refusal:
            raise Refused(refusal.limit) from None
        self._driver.look()

    def advance(self, seconds: float) -> None:
        """By QEMU's virtual clock where that is ours, else by waiting."""
        if self._clock:
            self.machine.qtest.step_clock(round(seconds * 1e9))
        else:
            time.sleep(seconds)
        self._driver.look()

    def system_reset(self) -> None:
        """See `Subject`. Afterwards the device is set up again as firmware does it."""
        self.machine.system_reset()
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
        self._driver.look()

    def pause(self, paused: bool) -> None:
        """By a migration that goes nowhere."""
        if self._migration is not None:
            self._migration.end()
            self._migration = None
            self.machine.disregard_words()
        if paused:
            self._migration = StuckMigration(self.machine)
        self._driver.look()

    def close(self) -> None:
        """See `Subject`."""
        if self._migration is not None:
            self._migration.close()
        self.machine.close()
        self.region.close()
        self._ram.close()
