"""A hotplug region as one daemon has it: the slots that have a plugged block, and no other.

The listener counts the plugged blocks of each slot itself. The device's own bitmap changes only when a request is
committed, after every listener was told, and an UNPLUG ALL tells of one run of blocks after the other: two runs may be
in one slot, which is empty only after the second.

For one thing it does look at the bitmap: whether it is told to take a step, or to take one back, which must not fail.
Blocks that come are unplugged there, and blocks that come back are plugged.
"""

from __future__ import annotations

from collections.abc import Iterator

from vhost_user.frontend import SharedRegion
from vhost_user.units import ByteCount, GuestAddress, HostOffset
from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.device import VirtioMemDevice
from virtio_mem.managed_zone import SharedPart
from virtio_mem.protocol import BlockState
from virtio_mem.service import Section
from virtio_mem.sharing.daemon import Daemon


def region_of(part: SharedPart, offset: int = 0, size: int | None = None) -> SharedRegion:
    """`size` bytes from `offset` of a part, or all of it, as the front end shares them."""
    size = part.size - offset if size is None else size
    return SharedRegion(GuestAddress(part.addr + offset), ByteCount(size), part.fd, HostOffset(part.offset + offset))


class PluggedSlots:
    """Keeps `daemon` in step with `device`, in slots of `slot_size` bytes; `part` is the device's region.

    To be made, and added to the listeners of the device's service, under the service's lock.
    """

    def __init__(self, daemon: Daemon, part: SharedPart, device: VirtioMemDevice, slot_size: ByteCount) -> None:
        self.slot_size = slot_size
        self._daemon = daemon
        self._part = part
        self._device = device
        self._blocks_a_slot = slot_size // device.geometry.block_size
        self._plugged = [0] * -(-part.size // slot_size)
        for run in device.blocks.plugged_runs():
            for slot, blocks in self._slots_of(run):
                self._plugged[slot] += blocks

    def regions(self) -> list[SharedRegion]:
        """What the daemon has, or is to get when it comes back."""
        return [self._region(slot) for slot, blocks in enumerate(self._plugged) if blocks]

    def plugged(self, section: Section) -> None:
        """See `MemoryListener`: share the slots that get their first block."""
        run, undoing = self._run_of(section), self._is(section, BlockState.PLUGGED)
        slots = dict(self._slots_of(run))
        new = [self._region(slot) for slot in slots if not self._plugged[slot]]
        if new:
            self._daemon.give(new, undoing=undoing)
        for slot, blocks in slots.items():
            self._plugged[slot] += blocks

    def unplugging(self, section: Section) -> None:
        """See `MemoryListener`: take back the slots that lose their last block."""
        run, undoing = self._run_of(section), self._is(section, BlockState.UNPLUGGED)
        slots = dict(self._slots_of(run))
        empty = [self._region(slot) for slot, blocks in slots.items() if self._plugged[slot] == blocks]
        if empty:
            self._daemon.take(empty, undoing=undoing)
        for slot, blocks in slots.items():
            self._plugged[slot] -= blocks

    def _is(self, section: Section, state: BlockState) -> bool:
        return self._device.blocks.state(self._run_of(section)) is state

    def _run_of(self, section: Section) -> Run:
        block_size = self._device.geometry.block_size
        return Run(BlockIndex(section.offset // block_size), section.size // block_size)

    def _slots_of(self, run: Run) -> Iterator[tuple[int, int]]:
        """Each slot that has blocks of the run, and how many."""
        first, end = int(run.first), run.first + run.nb_blocks
        while first < end:
            slot = first // self._blocks_a_slot
            next_first = min(end, (slot + 1) * self._blocks_a_slot)
            yield slot, next_first - first
            first = next_first

    def _region(self, slot: int) -> SharedRegion:
        offset = slot * self.slot_size
        return region_of(self._part, offset, min(self.slot_size, self._part.size - offset))
