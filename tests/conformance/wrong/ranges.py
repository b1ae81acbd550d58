"""Ranges: where the region begins and ends, and what is a block's address."""

from __future__ import annotations

from typing import ClassVar

from tests.conformance.wrong.answers import ACK, ERROR
from tests.conformance.wrong.fault import fault
from tests.conformance.wrong.steps import Outcome, Steps
from vhost_user.units import KIB, ByteCount, GuestAddress
from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.device import VirtioMemDevice
from virtio_mem.protocol import BlockState, Request, RequestType, Response


class _OnlyFor(Steps):
    """A device whose ranges are wrong for requests of `type_` only."""

    type_: ClassVar[RequestType]

    def _run_of(self, request: Request) -> Run | Response:
        return self._wrong_run(request) if request.type == self.type_ else super()._run_of(request)

    def _right_run(self, request: Request) -> Run | Response:
        return super()._run_of(request)

    def _wrong_run(self, request: Request) -> Run | Response:
        raise NotImplementedError


@fault("MEM-PLUG-8", source="Cloud Hypervisor #6736")
class LastBlockIsOutside(_OnlyFor):
    """A PLUG that ends where the usable region ends is an ERROR."""

    type_ = RequestType.PLUG

    def _wrong_run(self, request: Request) -> Run | Response:
        end = request.addr + request.nb_blocks * self.geometry.block_size
        return ERROR if end == self.geometry.addr + self.usable_region_size else self._right_run(request)


class _OneBlockMore(_OnlyFor):
    """The usable region seems one block larger than it is."""

    def _wrong_run(self, request: Request) -> Run | Response:
        usable, self.usable_region_size = self.usable_region_size, _block_more(self)
        run = self._right_run(request)
        self.usable_region_size = usable
        return run


def _block_more(device: VirtioMemDevice) -> ByteCount:
    more = device.usable_region_size + device.geometry.block_size
    return ByteCount(min(more, device.geometry.region_size))


@fault("MEM-PLUG-5")
class PlugOneBlockBeyond(_OneBlockMore):
    """The block behind the usable region can be plugged."""

    type_ = RequestType.PLUG


@fault("MEM-STATE-5")
class StateOneBlockBeyond(_OneBlockMore):
    """A STATE may go one block beyond the usable region."""

    type_ = RequestType.STATE


class _WholeRegion(_OnlyFor):
    """The region's end counts, and not that of its usable part."""

    def _wrong_run(self, request: Request) -> Run | Response:
        usable, self.usable_region_size = self.usable_region_size, self.geometry.region_size
        run = self._right_run(request)
        self.usable_region_size = usable
        return run


@fault("MEM-PLUG-5")
class PlugInTheWholeRegion(_WholeRegion):
    """All of the region can be plugged, usable or not."""

    type_ = RequestType.PLUG


@fault("MEM-STATE-5")
class StateOfTheWholeRegion(_WholeRegion):
    """STATE is answered for all of the region, usable or not."""

    type_ = RequestType.STATE


class _Below(_OnlyFor):
    """What lies below the region is taken for its first blocks."""

    def _wrong_run(self, request: Request) -> Run | Response:
        below = request.addr < self.geometry.addr
        return self._right_run(request._replace(addr=self.geometry.addr)) if below else self._right_run(request)


@fault("MEM-STATE-5", source="Cloud Hypervisor before 1dd588fa6, Dragonball")
class StateBelowTheRegion(_Below):
    """A STATE below the region is answered from whatever is found there."""

    type_ = RequestType.STATE


@fault("MEM-PLUG-5")
class PlugBelowTheRegion(_Below):
    """A PLUG below the region plugs something."""

    type_ = RequestType.PLUG


@fault("MEM-UNPLUG-5")
class UnplugBelowTheRegion(_Below):
    """An UNPLUG below the region unplugs something."""

    type_ = RequestType.UNPLUG


@fault("MEM-UNPLUG-5")
class UnplugOverTheEnd(_OnlyFor):
    """An UNPLUG that reaches beyond the usable region is cut to what is inside."""

    type_ = RequestType.UNPLUG

    def _wrong_run(self, request: Request) -> Run | Response:
        room = (self.geometry.addr + self.usable_region_size - request.addr) // self.geometry.block_size
        return self._right_run(request._replace(nb_blocks=max(0, min(room, request.nb_blocks))))


@fault("MEM-PLUG-5", source="Cloud Hypervisor #4859, found by oss-fuzz")
class EndOfTheRangeWraps(_OnlyFor):
    """The end of a range is taken modulo 2**64, and an end below the region's is fine."""

    type_ = RequestType.PLUG

    def _wrong_run(self, request: Request) -> Run | Response:
        end = request.addr + request.nb_blocks * self.geometry.block_size
        wrapped = end > 2**64 and end % 2**64 <= self.geometry.addr + self.usable_region_size
        return Run(BlockIndex(0), 1) if wrapped else self._right_run(request)


class _RoundedDown(_OnlyFor):
    """An address within a block stands for the block."""

    def _wrong_run(self, request: Request) -> Run | Response:
        inside = request.addr % self.geometry.block_size
        return self._right_run(request._replace(addr=GuestAddress(request.addr - inside)))


@fault("MEM-PLUG-3")
class PlugIsRoundedDown(_RoundedDown):
    """A PLUG need not be aligned."""

    type_ = RequestType.PLUG


@fault("MEM-UNPLUG-3")
class UnplugIsRoundedDown(_RoundedDown):
    """An UNPLUG need not be aligned."""

    type_ = RequestType.UNPLUG


@fault("MEM-STATE-3")
class StateIsAlignedToPages(_RoundedDown):
    """A STATE must be aligned to pages, not to blocks."""

    type_ = RequestType.STATE

    def _wrong_run(self, request: Request) -> Run | Response:
        return ERROR if request.addr % (4 * KIB) else super()._wrong_run(request)


class _NoBlocks(VirtioMemDevice):
    """A range of no blocks is fine."""

    type_: ClassVar[RequestType]

    def request(self, request: Request) -> Outcome:
        if request.type == self.type_ and not request.nb_blocks:
            return ACK._replace(state=BlockState.UNPLUGGED)
        return super().request(request)


@fault("MEM-PLUG-4")
class PlugOfNoBlocks(_NoBlocks):
    """A PLUG of no blocks is granted: there is nothing to do."""

    type_ = RequestType.PLUG


@fault("MEM-UNPLUG-4")
class UnplugOfNoBlocks(_NoBlocks):
    """An UNPLUG of no blocks is granted: there is nothing to do."""

    type_ = RequestType.UNPLUG


@fault("MEM-STATE-4")
class StateOfNoBlocks(_NoBlocks):
    """A STATE of no blocks says that all of them are unplugged."""

    type_ = RequestType.STATE


@fault("MEM-REGION-1")
class RegionHasNoEnd(Steps):
    """The block behind the region can be plugged."""

    def _plug(self, request: Request) -> Outcome:
        behind = request.addr == self.geometry.addr + self.geometry.region_size
        return ACK if behind and request.nb_blocks == 1 else super()._plug(request)


@fault("MEM-PLUG-8")
class BlocksAreCountedInSixteenBits(Steps):
    """Block 65536 is block 0, to PLUG, UNPLUG and STATE alike."""

    def _run_of(self, request: Request) -> Run | Response:
        run = super()._run_of(request)
        return Run(BlockIndex(run.first & 0xFFFF), run.nb_blocks) if isinstance(run, Run) else run
