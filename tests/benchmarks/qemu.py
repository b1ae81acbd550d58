"""QEMU's own virtio-mem device, with qtest in the place of a guest: what the conformance kit has, and a clock.

With ioeventfd=off the write that notifies is served before it is answered, so that is what is timed. What qtest itself
takes goes away where two kicks are subtracted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tests.benchmarks.measure import settle
from tests.benchmarks.ours import BLOCK_SIZE, REGION_SIZE, chains, require_granted
from vhost_user.memory import GuestMemory
from virtio_mem.conformance.targets.qtest.command_line import SLOT, QemuOptions, Shape, command_line
from virtio_mem.conformance.targets.qtest.driver import PciDriver
from virtio_mem.conformance.targets.qtest.machine import PATIENCE, Machine, Program
from virtio_mem.conformance.targets.qtest.memory import KINDS, Ram
from virtio_mem.protocol import Request


class QemuDevice(PciDriver):
    """The device of `machine`, whose RAM is `memory`."""

    def __init__(self, machine: Machine, memory: GuestMemory, release: str) -> None:
        super().__init__(machine.qtest, memory, SLOT, machine.failure, machine.patience)
        self.name = f"QEMU {release.split(maxsplit=1)[0]}"
        self._answered_at = time.perf_counter()
        self.set_up()
        accepted = self.begin(self.offered_features())
        assert accepted, "the device refuses what it offers"
        self.addr = self.config().addr

    def kick(self, requests: Sequence[Request]) -> float:
        """Have the requests served by one notification; seconds that the write takes. All are granted."""
        ring = self._ring.now
        wanted = ring.offer(chains(requests))
        assert wanted, "the device wants no notification"
        qtest, notify = self._qtest, self._notify
        settle(self._answered_at)
        start = time.perf_counter()
        qtest.store(notify, 0, 2)
        seconds = time.perf_counter() - start
        self._answered_at = start + seconds
        assert ring.collect(), ring.missing
        require_granted(ring, requests)
        return seconds


@contextmanager
def qemu_device(*, packed: bool = False) -> Iterator[QemuDevice]:
    """A device like ours: the same sizes, its region a memfd that is shared. HostError where there is no QEMU."""
    program, options = Program.find(None), QemuOptions(packed=packed)
    with ExitStack() as stack:
        ram = Ram()
        stack.callback(ram.close)
        region = KINDS[options.memory](REGION_SIZE)
        stack.callback(region.close)
        shape = Shape(REGION_SIZE, BLOCK_SIZE, REGION_SIZE, None)
        arguments = command_line(program, options, shape, ram, region)
        machine = Machine(program, arguments, [ram.fd, region.fd], PATIENCE)
        stack.callback(machine.close)
        machine.await_start()
        yield QemuDevice(machine, ram.memory, program.qemu.release)
