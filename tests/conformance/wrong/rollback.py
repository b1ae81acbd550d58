"""Requests that the host can't carry out, and that leave something behind all the same."""

from __future__ import annotations

from tests.conformance.wrong.fault import WrongMemory, behind, fault
from vhost_user.errors import HostError, UsageError
from vhost_user.units import ByteCount, HostOffset
from virtio_mem.device import Effect, EffectType, VirtioMemDevice
from virtio_mem.protocol import BlockState, Response


@fault("DEP-REFUSED-1", source="Cloud Hypervisor, state_change_request")
class RefusedPlugIsMarked(VirtioMemDevice):
    """A PLUG that the host refuses leaves its blocks marked as plugged, and not counted."""

    def abandon(self, effect: Effect, reason: str) -> Response:
        response = super().abandon(effect, reason)
        if effect.type is EffectType.PLUG:
            self.blocks._bits[effect.run.first : effect.run.first + effect.run.nb_blocks] = 1
        return response


@fault("DEP-REFUSED-1")
class RefusedUnplugIsMarked(VirtioMemDevice):
    """An UNPLUG that the host refuses leaves its blocks unplugged."""

    def abandon(self, effect: Effect, reason: str) -> Response:
        response = super().abandon(effect, reason)
        if effect.type is EffectType.UNPLUG:
            self.blocks.put(effect.run, BlockState.UNPLUGGED)
        return response


@fault("DEP-REFUSED-1", source="Dragonball, whose UNPLUG ALL can fail half way")
class HalfAnUnplugAll(VirtioMemDevice):
    """An UNPLUG ALL that the host refuses has unplugged the first run of blocks, without counting it."""

    def abandon(self, effect: Effect, reason: str) -> Response:
        response = super().abandon(effect, reason)
        for first, nb_blocks in list(self.blocks.plugged_runs())[:1]:
            if effect.type is EffectType.UNPLUG_ALL:
                self.blocks._bits[first : first + nb_blocks] = 0
        return response


@fault("DEP-REFUSED-1")
class RefusedUnplugAllShrinks(VirtioMemDevice):
    """An UNPLUG ALL that the host refuses leaves the blocks as they are, and the usable region as if it had not."""

    def abandon(self, effect: Effect, reason: str) -> Response:
        response = super().abandon(effect, reason)
        if effect.type is EffectType.UNPLUG_ALL:
            self.usable_region_size = self.geometry.usable_size_for(self.requested_size)
        return response


@fault("DEP-HOST-4")
class RefusedPlugKeepsPages(WrongMemory):
    """A PLUG that the host refuses half way leaves the first half of its pages allocated."""

    def populate(self, offset: HostOffset, size: ByteCount) -> None:
        try:
            self.memory.populate(offset, size)
        except HostError:
            behind(self).populate(offset, size)
            raise


@fault("DEP-REFUSED-1")
class RefusedUnplugEmpties(WrongMemory):
    """An UNPLUG that the host refuses has taken what was in the blocks."""

    def discard(self, offset: HostOffset, size: ByteCount) -> None:
        try:
            self.memory.discard(offset, size)
        except HostError:
            behind(self).discard(offset, size)
            raise


@fault("MEM-CONF-14")
class RefusedTargetIsSet(VirtioMemDevice):
    """A target that is no multiple of block_size is refused, and set all the same."""

    def resize(self, requested_size: int) -> None:
        try:
            super().resize(requested_size)
        except UsageError:
            self.requested_size = ByteCount(requested_size)
            raise
