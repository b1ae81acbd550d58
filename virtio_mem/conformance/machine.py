"""Any sequence of moves, of the host and of the guest, hostile ones included, shrunk to the shortest that goes wrong.

Hypothesis chooses the moves, a `Referee` makes and judges them; `explore` runs it. Each sequence is run on a device
that has just been started, where the target can do that.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from itertools import pairwise
from typing import Any, ClassVar, Concatenate, ParamSpec, Protocol

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from vhost_user.errors import UsageError
from virtio_mem.conformance.check import Violation
from virtio_mem.conformance.model import Finding
from virtio_mem.conformance.referee import Referee, is_silence, violation
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.strategies import any_addr, any_count, any_type, cuts, known_types
from virtio_mem.conformance.target import Capability, Subject, Target, TargetFailure, Wish
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, Feature, RequestType

MOST_BLOCKS = 32
"""The largest target of most sequences, so that what is plugged at a time is little memory."""

_LARGE_IN = 5
"""One in so many sequences is about many blocks at a time: each number of blocks is some ten times what it is else."""

_PLUG, _UNPLUG, _UNPLUG_ALL, _STATE = RequestType
P = ParamSpec("P")


class Over(KeyboardInterrupt):
    """Time is up: Hypothesis passes it on at once, and takes nothing for a failure. It would try hundreds of sequences
    of nothing else."""


class Lab(Protocol):
    """Where devices come from, and who takes down what they do: see `explore`."""

    target: Target
    wish: Wish
    moves: int
    passed_over: frozenset[str]

    @property
    def is_over(self) -> bool:
        """No more devices are to be started."""

    def violated(self, violation: Violation, lines: list[str], *, silent: bool) -> None:
        """A clause that is not passed over was; `silent`, since the device let its time go by."""

    def sequence_ended(self) -> None:
        """A device was let go."""


def _move(act: Callable[Concatenate[Any, P], None]) -> Callable[Concatenate[Any, P], None]:
    """A rule that does nothing once its sequence has ended, or time is up."""

    @wraps(act)
    def judged(machine: DeviceMachine, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if machine.referee is not None and not machine.lab.is_over:
            machine.lab.moves += 1
            machine.judge(lambda: act(machine, *args, **kwargs))

    return judged


def _can(wanted: Capability) -> Callable[[DeviceMachine], bool]:
    return lambda machine: wanted in machine.lab.target.capabilities


class DeviceMachine(RuleBasedStateMachine):
    """One device and its moves. `lab` is set by a class made for the occasion."""

    lab: ClassVar[Lab]

    def __init__(self) -> None:
        super().__init__()
        self.referee: Referee | None = None
        self.scale = 1
        """What numbers of blocks are multiplied by."""
        self._subject: Subject | None = None

    @initialize(number=st.integers(0, _LARGE_IN - 1), scale=st.integers(10, 64))
    def start(self, number: int, scale: int) -> None:
        """Start a device. Over where time is up."""
        if self.lab.is_over:
            raise Over
        target, wish = self.lab.target, self.lab.wish
        if target.many is not None and number == _LARGE_IN - 1:
            with suppress(UsageError):  # where there is none so large, the sequence is one of the others
                self._subject = target.start(target.many)
                wish, self.scale = target.many, scale
        self._subject = self._subject or target.start(wish)
        self.referee = Referee(Session(self._subject, wish, target.capabilities))

    def judge(self, act: Callable[[], None]) -> None:
        """Make a move, and note what it shows."""
        try:
            act()
        except TargetFailure as failure:
            self._end(violation(Finding("MEM-WIRE-3", failure.what, "a device that serves on")), failure.silent)
        except Violation as violated:
            self._end(violated, is_silence(violated))

    def _end(self, violated: Violation, silent: bool) -> None:
        """It counts also where time is up meanwhile: a device that answers nothing has taken all of it."""
        lines, self.referee = self.now.session.lines, None
        if violated.clause not in self.lab.passed_over:
            self.lab.violated(violated, lines, silent=silent)
            raise violated from None

    def teardown(self) -> None:
        """Look at everything once more, and let the device go."""
        try:
            if self.referee is not None:
                self.judge(self.now.look_closely)
        finally:
            if self._subject is not None:
                self._subject.close()
                self.lab.sequence_ended()

    @property
    def now(self) -> Referee:
        """The device that runs."""
        assert self.referee is not None
        return self.referee

    # The guest.

    def _ask(self, type_: int, block: int, nb_blocks: int, shift: int = 0, **layout: Any) -> None:
        self.now.ask(type_, self.now.session.addr(block, shift), nb_blocks, **layout)

    @rule(block=st.integers(0, MOST_BLOCKS + 8), nb_blocks=st.integers(1, 8))
    @_move
    def plug(self, block: int, nb_blocks: int) -> None:
        """Anywhere."""
        self._ask(_PLUG, block, nb_blocks * self.scale)

    @rule(nb_blocks=st.integers(1, MOST_BLOCKS))
    @_move
    def plug_lowest(self, nb_blocks: int) -> None:
        """As a driver does: the lowest blocks that are free."""
        free = next((run for run in self.now.model.runs() if not run[2]), None)
        if free is not None:
            self._ask(_PLUG, free[0], min(nb_blocks * self.scale, free[1]))

    @rule(which=st.integers(0, 7), skip=st.integers(0, 3), nb_blocks=st.integers(1, 8))
    @_move
    def unplug_some(self, which: int, skip: int, nb_blocks: int) -> None:
        """Of what is plugged."""
        plugged = [run for run in self.now.model.runs() if run[2]]
        if plugged:
            first, length, _ = plugged[which % len(plugged)]
            skip %= length
            self._ask(_UNPLUG, first + skip, min(nb_blocks * self.scale, length - skip))

    @rule(type_=known_types, block=st.integers(0, MOST_BLOCKS + 8), nb_blocks=st.integers(1, 16))
    @_move
    def ask_anything(self, type_: int, block: int, nb_blocks: int) -> None:
        """Whether it fits or not."""
        self._ask(type_, block, nb_blocks * self.scale)

    @rule(which=st.integers(0, 7), last=st.booleans(), nb_blocks=st.integers(1, 16))
    @_move
    def ask_of_one_other(self, which: int, last: bool, nb_blocks: int) -> None:
        """STATE of blocks of which the first or the last is the only one that is not as the others."""
        if pairs := list(pairwise(self.now.model.runs())):
            (_, before, _), (edge, after, _) = pairs[which % len(pairs)]
            alike = min(nb_blocks * self.scale, before if last else after)
            self._ask(_STATE, edge - alike if last else edge - 1, alike + 1)

    @rule(type_=known_types, of_region=st.booleans(), before=st.integers(-2, 3), nb_blocks=st.integers(1, 4))
    @_move
    def ask_at_the_end(self, type_: int, of_region: bool, before: int, nb_blocks: int) -> None:
        """Around the end of the usable region or of the region."""
        end = self.now.session.nb_blocks if of_region else self.now.model.usable_blocks
        self._ask(type_, end - before, nb_blocks)

    @rule(type_=known_types, block=st.integers(-2, 8), nb_blocks=any_count, shift=st.sampled_from([0, 1, 4096, -1]))
    @_move
    def ask_askew(self, type_: int, block: int, nb_blocks: int, shift: int) -> None:
        """Below the region, between blocks, too many or none."""
        self._ask(type_, block, nb_blocks, shift)

    @rule(type_=any_type, addr=any_addr, nb_blocks=any_count)
    @_move
    def ask_nonsense(self, type_: int, addr: int, nb_blocks: int) -> None:
        """What no driver would."""
        self.now.ask(type_, addr, nb_blocks)

    @precondition(_can(Capability.CHAINS))
    @rule(
        type_=known_types,
        run=st.tuples(st.integers(0, 8), st.integers(1, 4)),
        readable=cuts(REQUEST_SIZE),
        room=cuts(RESPONSE_SIZE),
        indirect=st.booleans(),
    )
    @_move
    def ask_in_pieces(
        self, type_: int, run: tuple[int, int], readable: tuple[int, ...], room: tuple[int, ...], indirect: bool
    ) -> None:
        """The request and the room for the answer spread over descriptors."""
        indirect = indirect and Feature.INDIRECT_DESC in Feature(self.now.session.features & sum(Feature))
        self._ask(type_, *run, readable=readable, room=room, indirect=indirect)

    @precondition(_can(Capability.CONTENT))
    @rule(which=st.integers(0, 31), seed_=st.integers(0, 3))
    @_move
    def write(self, which: int, seed_: int) -> None:
        """Fill one of the plugged blocks."""
        model = self.now.model
        if model.plugged:
            addrs = sorted(model.plugged)
            self.now.write((addrs[which % len(addrs)] - model.addr) // model.block_size, seed_)

    @rule()
    @_move
    def device_reset(self) -> None:
        """The driver goes and comes back."""
        self.now.device_reset()

    # The host.

    @precondition(_can(Capability.SET_TARGET))
    @rule(blocks=st.integers(0, MOST_BLOCKS))
    @_move
    def set_target(self, blocks: int) -> None:
        """Up or down."""
        session = self.now.session
        self.now.set_target(min(blocks * self.scale, session.nb_blocks) * session.block_size)

    @precondition(_can(Capability.PAUSE))
    @rule(paused=st.booleans())
    @_move
    def pause(self, paused: bool) -> None:
        """Or go on."""
        self.now.hinder(paused=paused)

    @precondition(_can(Capability.HOST_REFUSES))
    @rule(refuses=st.booleans())
    @_move
    def refuse(self, refuses: bool) -> None:
        """Or have memory again."""
        self.now.hinder(refuses=refuses)

    @precondition(_can(Capability.SYSTEM_RESET))
    @rule()
    @_move
    def system_reset(self) -> None:
        """The whole machine."""
        self.now.system_reset()
