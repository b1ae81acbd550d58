"""The configuration space: fields that are wrong, stale, or change when they must not."""

from __future__ import annotations

from tests.conformance.wrong.fault import fault
from vhost_user.units import KIB, ByteCount, GuestAddress
from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.conformance.targets.ours import OurSubject
from virtio_mem.device import Effect, EffectType, VirtioMemDevice
from virtio_mem.geometry import Geometry
from virtio_mem.protocol import ConfigSpace, Response

PAGE = 4 * KIB


@fault("MEM-CONF-9", source="Cloud Hypervisor #985")
class BlocksOfThree(VirtioMemDevice):
    """block_size is three times a power of two."""

    @property
    def config(self) -> ConfigSpace:
        config = super().config
        return config._replace(block_size=ByteCount(3 * config.block_size))


@fault("MEM-CONF-10")
class AddrIsNotAligned(VirtioMemDevice):
    """The region begins within a block."""

    @property
    def config(self) -> ConfigSpace:
        config = super().config
        return config._replace(addr=GuestAddress(config.addr + PAGE))


@fault("MEM-CONF-11")
class RegionEndsWithinABlock(VirtioMemDevice):
    """region_size is no multiple of block_size."""

    @property
    def config(self) -> ConfigSpace:
        config = super().config
        return config._replace(region_size=ByteCount(config.region_size + PAGE))


@fault("MEM-CONF-12")
class UsableEndsWithinABlock(VirtioMemDevice):
    """usable_region_size is no multiple of block_size once something is plugged."""

    @property
    def config(self) -> ConfigSpace:
        config = super().config
        more = PAGE if config.plugged_size else 0
        return config._replace(usable_region_size=ByteCount(config.usable_region_size + more))


@fault("MEM-CONF-13")
class PluggedSizeInPages(VirtioMemDevice):
    """plugged_size counts pages of 4 KiB."""

    @property
    def config(self) -> ConfigSpace:
        config = super().config
        return config._replace(plugged_size=ByteCount(config.plugged_size // PAGE))


@fault("MEM-CONF-14")
class AnyTarget(VirtioMemDevice):
    """The target may be any number of bytes."""

    def resize(self, requested_size: int) -> None:
        rest = requested_size % self.geometry.block_size
        super().resize(requested_size - rest)
        self.requested_size = ByteCount(requested_size)


@fault("MEM-LAYOUT-3")
class UsableBeyondTheRegion(VirtioMemDevice):
    """With a target near the region's size, the usable region is larger than the region."""

    def resize(self, requested_size: int) -> None:
        super().resize(requested_size)
        self.usable_region_size = ByteCount(
            max(self.usable_region_size, requested_size + 64 * self.geometry.block_size)
        )


@fault("MEM-CONF-3")
class BlockSizeChanges(VirtioMemDevice):
    """The block size is another once nothing is plugged any more."""

    unplugged = False

    def commit(self, effect: Effect) -> Response:
        self.unplugged = effect.everything
        return super().commit(effect)

    @property
    def config(self) -> ConfigSpace:
        config = super().config
        return config._replace(block_size=ByteCount(config.block_size << self.unplugged))


@fault("MEM-CONF-4")
class NodeFollowsTheTarget(VirtioMemDevice):
    """node_id is another after the target was set."""

    resized = 0

    def resize(self, requested_size: int) -> None:
        super().resize(requested_size)
        self.resized += 1

    @property
    def config(self) -> ConfigSpace:
        return super().config._replace(node_id=self.resized)


@fault("MEM-CONF-5")
class AddrFollowsTheFirstBlock(VirtioMemDevice):
    """addr is the address of the first plugged block."""

    @property
    def config(self) -> ConfigSpace:
        config = super().config
        first = next((run.first for run in self.blocks.plugged_runs()), 0)
        return config._replace(addr=GuestAddress(config.addr + first * config.block_size))


@fault("MEM-CONF-6")
class RegionGrowsWithTheTarget(VirtioMemDevice):
    """region_size is what is usable of it."""

    @property
    def config(self) -> ConfigSpace:
        config = super().config
        return config._replace(region_size=config.usable_region_size)


@fault("MEM-CONF-8", source="Firecracker, handle_unplug_all_request")
class NothingIsUsableAfterUnplugAll(VirtioMemDevice):
    """UNPLUG ALL sets usable_region_size to 0, whatever the target is."""

    def commit(self, effect: Effect) -> Response:
        response = super().commit(effect)
        if effect.everything:
            self.usable_region_size = ByteCount(0)
        return response


@fault("MEM-CONF-8")
class UsableStaysBehind(VirtioMemDevice):
    """The usable region does not grow with the target."""

    def resize(self, requested_size: int) -> None:
        usable = self.usable_region_size
        super().resize(requested_size)
        self.usable_region_size = usable


@fault("MEM-CONF-16")
class UsableShrinksWithTheTarget(VirtioMemDevice):
    """The usable region becomes smaller with the target, whatever is plugged."""

    def resize(self, requested_size: int) -> None:
        super().resize(requested_size)
        self.usable_region_size = self.geometry.usable_size_for(ByteCount(requested_size))


@fault("MEM-CONF-16")
class UsableShrinksWithUnplug(VirtioMemDevice):
    """The usable region ends with what the target needs as soon as an UNPLUG leaves nothing plugged."""

    def commit(self, effect: Effect) -> Response:
        response = super().commit(effect)
        if not self.plugged_size:
            self.usable_region_size = self.geometry.usable_size_for(self.requested_size)
        return response


@fault("MEM-START-1")
class StartsPlugged(VirtioMemDevice):
    """The first block is plugged from the start."""

    def __init__(self, geometry: Geometry, *, requested_size: int = 0) -> None:
        super().__init__(geometry, requested_size=requested_size)
        if geometry.nb_blocks:
            self.blocks.plug(Run(BlockIndex(0), 1))


class _Stale(VirtioMemDevice):
    """plugged_size is not brought up to date by some requests."""

    stale: EffectType
    shown = ByteCount(0)

    def commit(self, effect: Effect) -> Response:
        response = super().commit(effect)
        if effect.type is not self.stale:
            self.shown = self.plugged_size
        return response

    @property
    def config(self) -> ConfigSpace:
        return super().config._replace(plugged_size=self.shown)


@fault("MEM-PLUG-9")
class SizeBeforePlug(_Stale):
    """plugged_size does not follow a PLUG."""

    stale = EffectType.PLUG


@fault("MEM-UNPLUG-9")
class SizeBeforeUnplug(_Stale):
    """plugged_size does not follow an UNPLUG."""

    stale = EffectType.UNPLUG


@fault("MEM-UNPLUGALL-5")
class SizeBeforeUnplugAll(_Stale):
    """plugged_size does not follow an UNPLUG ALL."""

    stale = EffectType.UNPLUG_ALL


@fault("MEM-CONF-7", source="Cloud Hypervisor #1593")
class SizeBeforeSystemReset(_Stale):
    """plugged_size is after a reset of the machine what it was before."""

    stale = EffectType.SYSTEM_RESET


@fault("DEP-TARGET-4", source="Firecracker #6076, with MiB of which 2**44 were no bytes")
class TargetOfThirtyTwoBits(VirtioMemDevice):
    """The target is taken modulo 4 GiB."""

    def resize(self, requested_size: int) -> None:
        super().resize(requested_size % 2**32)


@fault("MEM-FEAT-1")
class NoNode(VirtioMemDevice):
    """ACPI_PXM is on offer, and node_id is 0 all the same."""

    @property
    def config(self) -> ConfigSpace:
        return super().config._replace(node_id=0)


@fault("CFG-1")
class BigEndian(VirtioMemDevice):
    """The most significant byte of each size comes first."""

    @property
    def config(self) -> ConfigSpace:
        return ConfigSpace._make(
            value if name == "node_id" else int.from_bytes(value.to_bytes(8, "little"), "big")
            for name, value in super().config._asdict().items()
        )


@fault("MEM-LAYOUT-1")
class SizesAreSwapped(VirtioMemDevice):
    """plugged_size and requested_size are in each other's place."""

    @property
    def config(self) -> ConfigSpace:
        config = super().config
        return config._replace(plugged_size=config.requested_size, requested_size=config.plugged_size)


@fault("MEM-CONF-15")
class RegionBeyondTheLastAddress(VirtioMemDevice):
    """The region begins with the last block of the address space."""

    @property
    def config(self) -> ConfigSpace:
        config = super().config
        return config._replace(addr=GuestAddress(2**64 - config.block_size))


@fault("MEM-CONF-17")
class UsableGrowsSilently(VirtioMemDevice):
    """The usable region grows with what is plugged, and nobody is told."""

    def commit(self, effect: Effect) -> Response:
        response = super().commit(effect)
        if effect.type is EffectType.PLUG:
            usable = self.usable_region_size + self.geometry.block_size
            self.usable_region_size = ByteCount(min(usable, self.geometry.region_size))
        return response


@fault("MEM-REGION-2")
class RegionIsBootMemory(OurSubject):
    """The region's first blocks are among what the guest's tables call RAM."""

    def boot_memory(self) -> list[tuple[int, int]]:
        return [(0, 1 << 30), (self.config().addr, 64 << 20)]
