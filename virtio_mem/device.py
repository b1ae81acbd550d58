"""The virtio-mem device, sans-IO: a request goes in, a response or an effect comes out.

The device owns no memory and calls nobody. A request that needs the host ends in an `Effect`, which says what must
happen to which range of the region; whoever runs the device does that and then calls exactly one of `commit()`, which
changes the state and gives the answer, or `abandon()`, which changes nothing and gives BUSY. So the order is always:
validate, act on the host, commit, answer; and `commit()` is the one place where blocks change, but for a PLUG that the
host has nothing to do for, which the C core can answer at once (`answering()`).

    outcome = device.request(request)
    if isinstance(outcome, Effect):
        ... discard or populate `outcome`'s range ...
        outcome = device.commit(outcome)          # or device.abandon(outcome, "why not")

`decide()` does the same for many requests at a time, as they are on the wire. The rules are there once, for both: one
pure function of the C core, csrc/rules.c.

The order of checks, where the standard leaves room: range, alignment and count first (ERROR, a MUST), then the blocks'
state (ERROR, a MUST), then the target (NACK), then whether the device is paused (BUSY). The Linux driver takes NACK as
"try again now", BUSY as "try again later" and ERROR as "broken for good", so an answer that is only wrong in kind can
still cost a guest its device. After a BUSY the device owes the driver a configuration change notice as soon as the
cause has gone, because the driver's own timer waits for 50 s and longer.

Invariants: plugged_size <= usable_region_size <= region_size; requested_size <= usable_region_size; all of them
multiples of block_size; no plugged block outside the usable region.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from vhost_user.errors import PeerError, UsageError
from vhost_user.units import ByteCount, HostOffset
from virtio_mem import _native
from virtio_mem._native import Buffer
from virtio_mem.blocks import BlockIndex, BlockMap, Run
from virtio_mem.geometry import Geometry
from virtio_mem.protocol import (
    RESPONSE_SIZE,
    BlockState,
    ConfigSpace,
    Feature,
    Request,
    RequestType,
    Response,
    ResponseType,
)
from virtio_mem.verdict import VERDICTS

_ACK = Response(ResponseType.ACK)


class EffectType(Enum):
    """Why the host has to act."""

    PLUG = "PLUG"
    UNPLUG = "UNPLUG"
    UNPLUG_ALL = "UNPLUG_ALL"
    SYSTEM_RESET = "system reset"


_REQUESTED: dict[int, EffectType] = {
    RequestType.PLUG: EffectType.PLUG,
    RequestType.UNPLUG: EffectType.UNPLUG,
    RequestType.UNPLUG_ALL: EffectType.UNPLUG_ALL,
}


class Effect(NamedTuple):
    """What the host must do first, to the blocks of `run`: they are the `size` bytes at `offset` of the region.

    `requests` of a driver wait for it, one behind the other, and get the same answer. Only where it is abandoned and
    they are several they get none, and are to be decided on again, one by one.

    PLUG: make the range usable. The others: take it away for good. With UNPLUG_ALL and SYSTEM_RESET the range is the
    whole region, whatever is plugged in it: by reading unplugged blocks a guest may have made the host allocate there.
    """

    type: EffectType
    run: Run
    offset: HostOffset
    size: ByteCount
    requests: int = 1

    @property
    def everything(self) -> bool:
        """Whether all of the region goes, plugged or not."""
        return self.type in (EffectType.UNPLUG_ALL, EffectType.SYSTEM_RESET)


class Decision(NamedTuple):
    """What becomes of the first of some requests: a key of `VERDICTS` for each.

    Without an effect they are answered. With one they are to change blocks, and have the answer that `commit()` or
    `abandon()` gives, see `Effect`; what is said of each here is the ACK.
    """

    verdicts: bytes
    effect: Effect | None


class VirtioMemDevice:
    """One virtio-mem device (standard, section "Memory Device").

    `requested_size` in bytes is the target at start; `unplugged_inaccessible` says whether that feature is offered.
    Raises UsageError for a target that the region can't hold.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        requested_size: int = 0,
        unplugged_inaccessible: bool = True,
    ) -> None:
        self.geometry = geometry
        self.blocks = BlockMap(geometry.nb_blocks)
        self.offered_features = Feature.PERSISTENT_SUSPEND
        if geometry.node_id is not None:
            self.offered_features |= Feature.ACPI_PXM
        if unplugged_inaccessible:
            self.offered_features |= Feature.UNPLUGGED_INACCESSIBLE
        self.acked_features = Feature(0)
        self.requested_size = geometry.checked_target(requested_size)
        self.usable_region_size = geometry.usable_size_for(self.requested_size)
        self.paused = False
        self._rules = _native.Rules(geometry.addr, geometry.region_size, geometry.block_size)
        self._answer = bytearray(RESPONSE_SIZE)
        self._pending: Effect | None = None
        self._notice = False
        self._owes_notice = False

    # What the driver can read.

    @property
    def plugged_size(self) -> ByteCount:
        """Bytes that are plugged. O(1)."""
        return ByteCount(self.blocks.plugged * self.geometry.block_size)

    @property
    def config(self) -> ConfigSpace:
        """The configuration space as it is now."""
        geometry = self.geometry
        return ConfigSpace(
            block_size=geometry.block_size,
            node_id=geometry.node_id or 0,
            addr=geometry.addr,
            region_size=geometry.region_size,
            usable_region_size=self.usable_region_size,
            plugged_size=self.plugged_size,
            requested_size=self.requested_size,
        )

    def take_config_notice(self) -> bool:
        """Whether a configuration change notice is due; asking takes it."""
        notice, self._notice = self._notice, False
        return notice

    # What the driver does.

    def negotiate(self, features: int) -> None:
        """The driver accepts `features`; bits that are not this device's own (0 to 23) are passed over.

        Raises PeerError, and accepts nothing, for a bit that was not offered, and where UNPLUGGED_INACCESSIBLE was
        offered and is not accepted: the standard allows to stop there, and a driver that reads unplugged memory would
        make the host allocate it.
        """
        mine = features & 0xFFFFFF
        if mine & ~self.offered_features:
            raise PeerError("driver features", hex(mine), f"within the offered {int(self.offered_features):#x}")
        if Feature.UNPLUGGED_INACCESSIBLE in self.offered_features & ~Feature(mine):
            limit = "VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE (bit 1) must be accepted"
            raise PeerError("driver features", hex(mine), limit, "use a driver that knows it (Linux 5.16 or later)")
        self.acked_features = Feature(mine)

    def request(self, request: Request) -> Response | Effect:
        """Decide on a request. An Effect must be committed or abandoned before the next request."""
        verdicts, effect = self.decide(request.encode(), self._answer, 1)
        return VERDICTS[verdicts[0]].response if effect is None else effect

    def decide(self, requests: Buffer, answers: Buffer, count: int) -> Decision:
        """Decide on the first of `count` requests, one at least, each of 24 bytes; write their answers, each of 10.

        All that can be answered without a change to a block; or those that change neighbouring blocks in one and the
        same way, until one comes that doesn't.
        """
        assert self._pending is None, "the effect of the request before is still open"
        verdicts, granted = self._rules.decide(*self._present, requests, answers, count)
        if granted is None:
            if self.paused and any(VERDICTS[each].response.type is ResponseType.BUSY for each in verdicts):
                self._owes_notice = True
            return Decision(verdicts, None)
        type_, first, nb_blocks = granted
        run = Run(BlockIndex(first), nb_blocks)
        return Decision(verdicts, self._open(_REQUESTED[type_], run, len(verdicts)))

    def answering(self) -> tuple[int, int]:
        """By what the C core answers requests at once: the address of a `vu_answer` function, and of its `device`.

        It answers as `decide()` does what needs neither the host nor a notice later, by the state of the device at
        `prepare()`; a PLUG among them changes the blocks.
        """
        return self._rules.answering()

    def prepare(self, plugs: _native.Plugs | None = None, *, looks: bool = False, answers: bool = True) -> None:
        """Requests are about to be answered at once, during which nobody else changes the device.

        PLUGs are by `plugs`, where the host has nothing to do for them. What is answered is counted for
        `take_answered()`; where somebody `looks`, `answered_at_once()` says it of each request instead.
        """
        assert self._pending is None
        self._rules.set(*self._present)
        self._rules.prepare(plugs, looks, answers)

    def answered_at_once(self) -> _native.AnsweredAtOnce:
        """What was answered since `prepare()` or the last call. Until something else is called it stays prepared."""
        answered = self._rules.answered()
        self.blocks.came(answered.plugged)
        return answered

    def take_answered(self) -> dict[int, int]:
        """How often each key of VERDICTS was answered so since the last call."""
        return self._rules.take_counts()

    @property
    def _present(self) -> tuple[_native.Bits, tuple[int, int, int], bool]:
        return self.blocks.memory, (self.usable_region_size, self.plugged_size, self.requested_size), self.paused

    def device_reset(self) -> None:
        """The driver resets the device: features are forgotten; blocks, sizes and memory stay (section
        "Device Initialization")."""
        assert self._pending is None
        self.acked_features = Feature(0)
        self._owes_notice = False

    # What the host does.

    def adopt(self, requested_size: int, usable_region_size: int, blocks: BlockMap) -> None:
        """Be where another device of this geometry was; `blocks` is the device's map from now on.

        For a device that nobody has used yet. Raises UsageError, and changes nothing, where no device can be there.
        """
        assert not self.blocks.plugged and self._pending is None and len(blocks) == self.geometry.nb_blocks
        target, usable = self._checked_sizes(requested_size, usable_region_size)
        nb_usable = usable // self.geometry.block_size
        beyond = Run(BlockIndex(nb_usable), len(blocks) - nb_usable)
        if beyond.nb_blocks and (outside := blocks.count(beyond)):
            raise UsageError("plugged", f"{outside} blocks", f"within usable_region_size, {usable}")
        self.requested_size, self.usable_region_size, self.blocks = target, usable, blocks

    def _checked_sizes(self, requested_size: int, usable_region_size: int) -> tuple[ByteCount, ByteCount]:
        target, block_size = self.geometry.checked_target(requested_size), self.geometry.block_size
        if usable_region_size % block_size or not target <= usable_region_size <= self.geometry.region_size:
            limit = (
                f"blocks of {block_size}, from requested_size, {target}, to region_size, {self.geometry.region_size}"
            )
            raise UsageError("usable_region_size", usable_region_size, limit)
        return target, ByteCount(usable_region_size)

    def finish(self, type_: EffectType, run: Run) -> None:
        """Do to the blocks what an effect was to do that a device before this one didn't bring to its end."""
        assert self._pending is None
        if type_ in (EffectType.UNPLUG_ALL, EffectType.SYSTEM_RESET):
            self._unplug_everything(type_)
        else:
            self.blocks.put(run, BlockState.PLUGGED if type_ is EffectType.PLUG else BlockState.UNPLUGGED)

    def resize(self, requested_size: int) -> None:
        """Set the target, in bytes; it grows the usable region and gives notice.

        The same target again gives notice only while the driver has not reached it. Raises UsageError, and changes
        nothing, unless the target is a multiple of block_size and at most region_size.
        """
        target = self.geometry.checked_target(requested_size)
        usable = max(self.usable_region_size, self.geometry.usable_size_for(target))
        if (target, usable) != (self.requested_size, self.usable_region_size) or target != self.plugged_size:
            self._notice = True
        self.requested_size, self.usable_region_size = target, usable

    def system_reset(self) -> Effect:
        """The machine is reset: every block is to be unplugged, even where the driver's UNPLUG_ALL would be refused.

        Commit or abandon the effect like a request's; the device is reset with it. Abandoned, nothing changes: the
        blocks stay plugged, as the standard allows.
        """
        return self._open(EffectType.SYSTEM_RESET, self._everything)

    def pause(self) -> None:
        """Answer BUSY to everything that would change a block, until `resume()`: for migration and snapshots."""
        self.paused = True

    def resume(self) -> None:
        """Serve again; a driver that was told BUSY meanwhile gets a notice."""
        self.paused = False
        self.retry_now()

    def retry_now(self) -> None:
        """The cause of an earlier BUSY may be gone: give notice if a driver was told BUSY, so that it tries again."""
        if self._owes_notice:
            self._notice, self._owes_notice = True, False

    @property
    def owes_notice(self) -> bool:
        """Whether a driver was told BUSY and has had no notice since."""
        return self._owes_notice

    # The end of an effect.

    def commit(self, effect: Effect) -> Response:
        """The host has done what `effect` says: change the state, and answer."""
        self._close(effect)
        if effect.type is EffectType.PLUG:
            self.blocks.plug(effect.run)
        elif effect.type is EffectType.UNPLUG:
            self.blocks.unplug(effect.run)
        else:
            self._unplug_everything(effect.type)
        return _ACK

    def abandon(self, effect: Effect, reason: str) -> Response:
        """The host could not do it: nothing changes, the driver is told BUSY. (A system reset tells no driver, and of
        several requests none is answered yet.)"""
        self._close(effect)
        self._owes_notice |= effect.type is not EffectType.SYSTEM_RESET and effect.requests == 1
        return Response(ResponseType.BUSY, reason=reason)

    # Private.

    @property
    def _everything(self) -> Run:
        return Run(BlockIndex(0), self.geometry.nb_blocks)

    def _unplug_everything(self, cause: EffectType) -> None:
        """The only place where the usable region shrinks. UNPLUG_ALL needs no notice: its driver knows."""
        self.blocks.unplug_all()
        usable = self.geometry.usable_size_for(self.requested_size)
        if cause is EffectType.SYSTEM_RESET:
            self.device_reset()
            self._notice |= usable != self.usable_region_size
        self.usable_region_size = usable

    def _open(self, type_: EffectType, run: Run, requests: int = 1) -> Effect:
        block_size = self.geometry.block_size
        offset, size = HostOffset(run.first * block_size), ByteCount(run.nb_blocks * block_size)
        self._pending = Effect(type_, run, offset, size, requests)
        return self._pending

    def _close(self, effect: Effect) -> None:
        assert effect is self._pending, "only the effect given last can end, once"
        self._pending = None
