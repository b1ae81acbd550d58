"""A device whose rules are steps that can be got wrong one at a time: what it answers is what ours answers."""

from __future__ import annotations

from virtio_mem.blocks import BlockIndex, Run
from virtio_mem.device import Effect, EffectType, VirtioMemDevice
from virtio_mem.protocol import BlockState, Request, RequestType, Response, ResponseType

Outcome = Response | Effect


class Steps(VirtioMemDevice):
    """Faults of `decide()` are none of its: it is to be asked one request at a time."""

    def request(self, request: Request) -> Outcome:
        if request.type == RequestType.PLUG:
            return self._plug(request)
        if request.type == RequestType.UNPLUG:
            return self._unplug(request)
        run = self._run_of(request)
        if request.type != RequestType.STATE:
            return super().request(request)
        return run if isinstance(run, Response) else Response(ResponseType.ACK, self.blocks.state(run))

    def _plug(self, request: Request) -> Outcome:
        run = self._run_of(request)
        if isinstance(run, Response):
            return run
        if self.blocks.state(run) is not BlockState.UNPLUGGED:
            return Response(ResponseType.ERROR, reason="a block is plugged already")
        if self.plugged_size + run.nb_blocks * self.geometry.block_size > self.requested_size:
            return Response(ResponseType.NACK, reason="plugged_size would exceed requested_size")
        return self._granted(EffectType.PLUG, run)

    def _unplug(self, request: Request) -> Outcome:
        run = self._run_of(request)
        if isinstance(run, Response):
            return run
        if self.blocks.state(run) is not BlockState.PLUGGED:
            return Response(ResponseType.ERROR, reason="a block is unplugged already")
        return self._granted(EffectType.UNPLUG, run)

    def _granted(self, type_: EffectType, run: Run) -> Outcome:
        effect = self._open(type_, run)
        return self.abandon(effect, "the device is paused") if self.paused else effect

    def _run_of(self, request: Request) -> Run | Response:
        """The blocks that a request names, or the ERROR that it earns by naming none, or some that it may not."""
        block_size = self.geometry.block_size
        offset = request.addr - self.geometry.addr
        if offset % block_size:
            return Response(ResponseType.ERROR, reason="addr is not aligned to block_size")
        if not request.nb_blocks:
            return Response(ResponseType.ERROR, reason="nb_blocks is 0")
        if offset < 0 or offset + request.nb_blocks * block_size > self.usable_region_size:
            return Response(ResponseType.ERROR, reason="a block is outside the usable region")
        return Run(BlockIndex(offset // block_size), request.nb_blocks)
