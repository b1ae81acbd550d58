"""A naive virtio-mem device: the standard's rules over a set of addresses, written for reading, not for speed.

It says what a device may answer, not what it has to: where the standard leaves a choice, `Expectation.allowed` has more
than one answer, and the model goes on with the one that was given. What drivers depend on besides is narrower, and is
kept apart as `Expectation.depended`. It shares no code with the device of this project beyond the names of types and
states, so that the two can be compared.

    expectation = model.expect(request)
    ... ask the device; `finding_of(expectation, answer, state)` says what is wrong with the answer ...
    model.apply(request, answer)
    ... read the configuration space; `model.look(config)` gives what is wrong with it ...
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from virtio_mem.protocol import BlockState, ConfigSpace, Request, RequestType, ResponseType

ACK, NACK, BUSY, ERROR = ResponseType
ANYTHING = frozenset(ResponseType)
NOT_NOW = frozenset({ACK, BUSY})
"""What the standard names for a request that is in order. Drivers depend on it that BUSY passes: `Referee` waits."""

_KNOWN = {RequestType.PLUG: "PLUG", RequestType.UNPLUG: "UNPLUG", RequestType.STATE: "STATE"}


class Finding(NamedTuple):
    """Something that a device should not have done: the clause, what was, and what should have been."""

    clause: str
    was: str
    should: str


class Expectation(NamedTuple):
    """What may come of a request.

    `clause` is what an answer outside `allowed` violates; `rule` what one outside `depended` does: an id of what
    drivers depend on. `why` is the ground of both in words; `state` goes with an ACK to STATE.
    """

    allowed: frozenset[ResponseType]
    clause: str
    why: str
    depended: frozenset[ResponseType]
    rule: str = ""
    state: BlockState | None = None


def only(answer: ResponseType, clause: str, why: str, state: BlockState | None = None) -> Expectation:
    """The standard leaves no choice."""
    return Expectation(frozenset({answer}), clause, why, frozenset({answer}), clause, state)


@dataclass
class Model:
    """Every plugged block is its guest address in `plugged`; sizes in bytes.

    `paused` and `host_refuses` are what the host's side did to the device.
    """

    addr: int
    region_size: int
    block_size: int
    requested_size: int = 0
    usable_region_size: int = 0
    node_id: int = 0
    paused: bool = False
    host_refuses: bool = False
    plugged: set[int] = field(default_factory=set)
    may_shrink: bool = False
    """The usable region may be smaller at the next look: an UNPLUG ALL was granted, or the system was reset."""

    @classmethod
    def of(cls, config: ConfigSpace) -> Model:
        """A device as it is when it has just been made: no block is plugged."""
        return cls(
            config.addr,
            config.region_size,
            config.block_size,
            config.requested_size,
            config.usable_region_size,
            config.node_id,
        )

    @property
    def plugged_size(self) -> int:
        """Bytes that are plugged."""
        return len(self.plugged) * self.block_size

    @property
    def hindered(self) -> bool:
        """Whether the host's side keeps blocks from changing."""
        return self.paused or self.host_refuses

    @property
    def usable_blocks(self) -> int:
        """How many blocks the driver may name."""
        return self.usable_region_size // self.block_size

    def runs(self) -> Iterator[tuple[int, int, bool]]:
        """The usable region as runs of blocks alike: the first block, how many, whether they are plugged."""
        first, end = 0, self.usable_blocks
        numbers = sorted((addr - self.addr) // self.block_size for addr in self.plugged)
        ordered = enumerate(number for number in numbers if number < end)
        for _, run in groupby(ordered, lambda pair: pair[1] - pair[0]):
            blocks = [number for _, number in run]
            if first < blocks[0]:
                yield first, blocks[0] - first, False
            yield blocks[0], len(blocks), True
            first = blocks[-1] + 1
        if first < end:
            yield first, end - first, False

    # Requests.

    def expect(self, request: Request) -> Expectation:
        """What may come of `request` now."""
        if request.type == RequestType.UNPLUG_ALL:
            if self.hindered and not self.plugged:
                return Expectation(NOT_NOW, "MEM-UNPLUGALL-4", "nothing is plugged", NOT_NOW, "DEP-BUSY-3")
            return self._in_order("MEM-UNPLUGALL-4", "DEP-BUSY-3", "UNPLUG ALL is granted, or has to wait")
        if request.type not in _KNOWN:
            return Expectation(ANYTHING, "", "no such type", frozenset({ERROR}), "DEP-UNKNOWN-1")
        type_ = RequestType(request.type)
        name = f"MEM-{_KNOWN[type_]}"
        if request.addr % self.block_size:
            return only(ERROR, f"{name}-3", "addr is not aligned")
        if not request.nb_blocks:
            return only(ERROR, f"{name}-4", "nb_blocks is 0")
        blocks = self._blocks(request)
        if blocks[0] not in self._usable or blocks[-1] not in self._usable:
            return only(ERROR, f"{name}-5", "a block lies outside the usable region")
        count = sum(block in self.plugged for block in blocks)
        if type_ is RequestType.STATE:
            return self._state(count, len(blocks))
        if type_ is RequestType.PLUG:
            return self._plug(count, len(blocks))
        if count < len(blocks):
            return only(ERROR, "MEM-UNPLUG-6", "a block is unplugged already")
        return self._in_order("MEM-UNPLUG-8", "DEP-BUSY-2", "all the blocks are plugged")

    def apply(self, request: Request, answer: ResponseType) -> None:
        """The device gave `answer`: go where it is now."""
        if answer is not ACK:
            return
        if request.type == RequestType.PLUG:
            self.plugged.update(self._blocks(request))
        elif request.type == RequestType.UNPLUG:
            self.plugged.difference_update(self._blocks(request))
        elif request.type == RequestType.UNPLUG_ALL:
            self.plugged.clear()
            self.may_shrink = True

    def _blocks(self, request: Request) -> range:
        end = request.addr + request.nb_blocks * self.block_size
        return range(request.addr, end, self.block_size)

    @property
    def _usable(self) -> range:
        return range(self.addr, self.addr + self.usable_region_size, self.block_size)

    @staticmethod
    def _state(count: int, asked: int) -> Expectation:
        if count == asked:
            return only(ACK, "MEM-STATE-6", "all the blocks are plugged", BlockState.PLUGGED)
        if count:
            return only(ACK, "MEM-STATE-6", f"{count} of {asked} blocks are plugged", BlockState.MIXED)
        return only(ACK, "MEM-STATE-6", "none of the blocks is plugged", BlockState.UNPLUGGED)

    def _plug(self, count: int, asked: int) -> Expectation:
        if count:
            return only(ERROR, "MEM-PLUG-6", "a block is plugged already")
        if self.plugged_size + asked * self.block_size <= self.requested_size:
            why = "the blocks are unplugged and the target allows them"
            return self._in_order("MEM-PLUG-8", "DEP-BUSY-1", why)
        reached = self.plugged_size >= self.requested_size
        allowed = ANYTHING - {ACK} if reached else ANYTHING
        why = "the target is reached" if reached else "it would go beyond the target"
        rule = "DEP-ORDER-1" if self.hindered else "DEP-NACK-1" if reached else "DEP-NACK-2"
        return Expectation(allowed, "MEM-TARGET-1", why, frozenset({NACK}), rule)

    def _in_order(self, clause: str, rule: str, why: str) -> Expectation:
        """A request that nothing in it stands against; the host may, and then only drivers care how it is refused."""
        if self.paused:
            return Expectation(ANYTHING, clause, "the device is paused", frozenset({BUSY}), rule)
        if self.host_refuses:
            return Expectation(ANYTHING, clause, "the host refuses", NOT_NOW, rule)
        return Expectation(NOT_NOW, clause, why, NOT_NOW, "DEP-BUSY-4")

    # The host.

    def resize(self, requested_size: int) -> None:
        """The host set another target."""
        self.requested_size = requested_size

    def system_reset(self, config: ConfigSpace, *, unplugged: bool) -> None:
        """The machine was reset, and whether that unplugged every block. `config` may be another device's by it."""
        self.may_shrink = True
        if unplugged:
            self.plugged.clear()
            for name in _FIXED.values():
                setattr(self, name, getattr(config, name))

    # The configuration space.

    def look(self, config: ConfigSpace) -> Iterator[Finding]:
        """What is wrong with the configuration space; the usable region that the device chose is taken over."""
        for clause, name in _FIXED.items():
            yield from _differs(clause, name, getattr(config, name), getattr(self, name))
        yield from _differs("MEM-CONF-7", "plugged_size", config.plugged_size, self.plugged_size)
        yield from _differs("DEP-TARGET-4", "requested_size", config.requested_size, self.requested_size)
        usable, before = config.usable_region_size, self.usable_region_size
        if usable < config.requested_size:
            yield Finding(
                "MEM-CONF-8", f"usable_region_size {usable}", f"at least requested_size, {config.requested_size}"
            )
        if usable % self.block_size:
            yield Finding("MEM-CONF-12", f"usable_region_size {usable}", f"a multiple of {self.block_size}")
        if usable > self.region_size:
            yield Finding("MEM-LAYOUT-3", f"usable_region_size {usable}", f"at most region_size, {self.region_size}")
        if usable < before and not self.may_shrink:
            yield Finding("MEM-CONF-16", f"usable_region_size {usable}", f"at least {before}, what it was")
        if config.plugged_size > usable:
            yield Finding("MEM-REGION-1", f"{config.plugged_size} bytes plugged", f"at most the usable {usable}")
        self.usable_region_size, self.may_shrink = usable, False


_STATES = {BlockState.PLUGGED: "MEM-STATE-7", BlockState.UNPLUGGED: "MEM-STATE-8", BlockState.MIXED: "MEM-STATE-9"}
_FIXED = {
    "MEM-CONF-3": "block_size",
    "MEM-CONF-4": "node_id",
    "MEM-CONF-5": "addr",
    "MEM-CONF-6": "region_size",
}
"""What no device may change but by a system reset, by clause."""


def _differs(clause: str, name: str, was: int, should: int) -> Iterator[Finding]:
    if was != should:
        yield Finding(clause, f"{name} {was}", str(should))


def finding_of(expectation: Expectation, answer: ResponseType, state: BlockState | None = None) -> Finding | None:
    """What is wrong with an answer, or None: the standard's clause where there is one, else what drivers depend on."""
    for among, clause in ((expectation.allowed, expectation.clause), (expectation.depended, expectation.rule)):
        if answer not in among:
            names = " or ".join(one.name for one in sorted(among))
            return Finding(clause, answer.name, f"{names}: {expectation.why}")
    if answer is ACK and expectation.state is not None and state is not expectation.state:
        was = "no state" if state is None else state.name
        return Finding(_STATES[expectation.state], was, f"{expectation.state.name}: {expectation.why}")
    return None
