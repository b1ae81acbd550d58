"""What is plugged: the map of blocks, and what STATE tells of it."""

from __future__ import annotations

from tests.conformance.wrong.answers import ACK
from tests.conformance.wrong.fault import fault
from tests.conformance.wrong.steps import Outcome, Steps
from virtio_mem.blocks import BlockIndex, BlockMap, Run
from virtio_mem.protocol import BlockState, Request, RequestType, Response


class _WrongState(Steps):
    """A device that gets only STATE wrong."""

    def request(self, request: Request) -> Outcome:
        run = self._run_of(request)
        if request.type != RequestType.STATE or isinstance(run, Response):
            return super().request(request)
        return ACK._replace(state=self.wrong_state(run))

    def wrong_state(self, run: Run) -> BlockState:
        raise NotImplementedError


@fault("MEM-STATE-9")
class MixedIsPlugged(_WrongState):
    """Where one block is plugged, STATE says PLUGGED."""

    def wrong_state(self, run: Run) -> BlockState:
        return BlockState.PLUGGED if self.blocks.count(run) else BlockState.UNPLUGGED


@fault("MEM-STATE-9")
class MixedIsUnplugged(_WrongState):
    """Where one block is unplugged, STATE says UNPLUGGED."""

    def wrong_state(self, run: Run) -> BlockState:
        return BlockState.PLUGGED if self.blocks.count(run) == run.nb_blocks else BlockState.UNPLUGGED


@fault("MEM-STATE-9")
class LastBlockIsNotLookedAt(_WrongState):
    """STATE leaves out the last block of more than one."""

    def wrong_state(self, run: Run) -> BlockState:
        return self.blocks.state(run._replace(nb_blocks=max(1, run.nb_blocks - 1)))


@fault("MEM-STATE-9")
class OnlyTheEndsAreLookedAt(_WrongState):
    """STATE looks at the first block and at the last one."""

    def wrong_state(self, run: Run) -> BlockState:
        last = BlockIndex(run.first + run.nb_blocks - 1)
        ends = {self.blocks.state(Run(block, 1)) for block in (run.first, last)}
        return ends.pop() if len(ends) == 1 else BlockState.MIXED


@fault("MEM-STATE-7")
class ManyAreMixed(_WrongState):
    """More than one block is MIXED, whatever they are."""

    def wrong_state(self, run: Run) -> BlockState:
        return BlockState.MIXED if run.nb_blocks > 1 and self.blocks.count(run) else self.blocks.state(run)


@fault("MEM-STATE-8")
class UnpluggedIsMixed(_WrongState):
    """Several blocks of which none is plugged are MIXED."""

    def wrong_state(self, run: Run) -> BlockState:
        return self.blocks.state(run) if run.nb_blocks == 1 or self.blocks.count(run) else BlockState.MIXED


@fault("MEM-UNPLUGALL-4", source="Cloud Hypervisor before dfee31a84")
class UnplugAllOfSixteenBits(BlockMap):
    """UNPLUG ALL takes the number of blocks modulo 65536: above 128 GiB of 2 MiB blocks some stay plugged."""

    def unplug_all(self) -> None:
        self._bits[: len(self) & 0xFFFF] = 0
        self._plugged = 0


@fault("MEM-UNPLUGALL-4")
class UnplugAllForgetsTheLastBlock(BlockMap):
    """UNPLUG ALL leaves the last block of the region as it is."""

    def unplug_all(self) -> None:
        self._bits[: len(self) - 1] = 0
        self._plugged = 0


@fault("MEM-PLUG-8")
class PlugForgetsTheLastBlock(BlockMap):
    """A PLUG of several blocks leaves out the last one, but counts it."""

    def plug(self, run: Run) -> None:
        self._bits[run.first : run.first + max(1, run.nb_blocks - 1)] = 1
        self._plugged += run.nb_blocks


@fault("MEM-PLUG-8")
class PlugEndsWithItsWord(BlockMap):
    """A PLUG ends at the 64-bit word of the map in which it begins."""

    def plug(self, run: Run) -> None:
        end = min(run.first + run.nb_blocks, (run.first | 63) + 1)
        self._bits[run.first : end] = 1
        self._plugged += run.nb_blocks


@fault("MEM-UNPLUG-8")
class UnplugForgetsTheFirstBlock(BlockMap):
    """An UNPLUG of several blocks leaves out the first one, but counts it."""

    def unplug(self, run: Run) -> None:
        self._bits[run.first + (run.nb_blocks > 1) : run.first + run.nb_blocks] = 0
        self._plugged -= run.nb_blocks


@fault("MEM-CONF-7")
class UnplugTakesOneMore(BlockMap):
    """An UNPLUG unplugs the block behind the range as well, without counting it."""

    def unplug(self, run: Run) -> None:
        self._bits[run.first : run.first + run.nb_blocks + 1] = 0
        self._plugged -= run.nb_blocks


@fault("MEM-PLUG-8")
class PlugOfManyLeavesOneOut(BlockMap):
    """A PLUG of more than 32 blocks leaves the 33rd out, but counts it."""

    def plug(self, run: Run) -> None:
        super().plug(run)
        if run.nb_blocks > 32:
            self._bits[run.first + 32] = 0


@fault("MEM-PLUG-9")
class PlugCountsInEightBits(BlockMap):
    """plugged_size grows by the low byte of nb_blocks."""

    def plug(self, run: Run) -> None:
        super().plug(run)
        self._plugged -= run.nb_blocks & ~0xFF


@fault("MEM-UNPLUG-8")
class UnplugOfManyLeavesOneOut(BlockMap):
    """An UNPLUG of more than 40 blocks leaves the 41st plugged, without counting it."""

    def unplug(self, run: Run) -> None:
        super().unplug(run)
        if run.nb_blocks > 40:
            self._bits[run.first + 40] = 1


@fault("MEM-UNPLUG-9")
class UnplugCountsInEightBits(BlockMap):
    """plugged_size shrinks by the low byte of nb_blocks."""

    def unplug(self, run: Run) -> None:
        super().unplug(run)
        self._plugged += run.nb_blocks & ~0xFF


@fault("MEM-STATE-9")
class LastOfManyIsNotLookedAt(_WrongState):
    """STATE of more than 64 blocks leaves out the last one."""

    def wrong_state(self, run: Run) -> BlockState:
        return self.blocks.state(run._replace(nb_blocks=run.nb_blocks - (run.nb_blocks > 64)))


@fault("MEM-STATE-9")
class FirstOfManyIsNotLookedAt(_WrongState):
    """STATE of more than 255 blocks leaves out the first one."""

    def wrong_state(self, run: Run) -> BlockState:
        left_out = int(run.nb_blocks > 255)
        return self.blocks.state(Run(BlockIndex(run.first + left_out), run.nb_blocks - left_out))


@fault("MEM-STATE-7")
class PluggedManyAreMixed(_WrongState):
    """More than 100 blocks are MIXED where any of them is plugged."""

    def wrong_state(self, run: Run) -> BlockState:
        return BlockState.MIXED if run.nb_blocks > 100 and self.blocks.count(run) else self.blocks.state(run)


@fault("MEM-STATE-8")
class UnpluggedManyAreMixed(_WrongState):
    """More than 100 blocks are MIXED where any of them is unplugged."""

    def wrong_state(self, run: Run) -> BlockState:
        unplugged = self.blocks.count(run) < run.nb_blocks
        return BlockState.MIXED if run.nb_blocks > 100 and unplugged else self.blocks.state(run)


@fault("DEP-DRIVER-2")
class ForgetfulState(_WrongState):
    """After a device reset, STATE says UNPLUGGED of what was plugged before."""

    before: frozenset[int] = frozenset()

    def device_reset(self) -> None:
        super().device_reset()
        self.before = frozenset(
            block for first, nb_blocks in self.blocks.plugged_runs() for block in range(first, first + nb_blocks)
        )

    def wrong_state(self, run: Run) -> BlockState:
        return self.blocks.state(run) if run.first not in self.before else BlockState.UNPLUGGED
