"""A device and the naive model side by side: each move is made by both, and what the device shows is compared.

After each move: the answer, the configuration space, the notices, the state of every usable block, and what the host
holds of blocks that were given back. The first thing that is wrong is raised as Violation, by its clause. The session's
lines are then what led there; `essential()` leaves out of them the questions that were answered as they should be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from virtio_mem.conformance.check import Unsuitable, Violation
from virtio_mem.conformance.model import ACK, BUSY, Finding, Model, finding_of
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability, Chain, TargetFailure
from virtio_mem.conformance.words import Answer, request_bytes
from virtio_mem.protocol import REQUEST_SIZE, RESPONSE_SIZE, BlockState, ConfigSpace, Request, RequestType

MOST_BLOCKS = 0xFFFF
"""What a request can name at once."""

PATIENCE = 5
"""Seconds within which a notice that is due has to be there."""

_CLOSELY = 16
"""Of a run of blocks that are alike, how many are looked at by themselves."""

_PARTS = 32
"""Of such a run, how many requests are made to look at it."""

_NO_ANSWER = "MEM-WIRE-3"
"""What a device violates that gives no answer where the standard does not say which it should be."""

_QUESTIONS = frozenset({"config", "state", "held", "same"})


class Told(NamedTuple):
    """The clauses that a move puts at stake: of a block's state, "" for those of STATE itself, and of plugged_size."""

    state: str = ""
    size: str = "MEM-CONF-7"


_GRANTED = {
    RequestType.PLUG: Told("MEM-PLUG-8", "MEM-PLUG-9"),
    RequestType.UNPLUG: Told("MEM-UNPLUG-8", "MEM-UNPLUG-9"),
    RequestType.UNPLUG_ALL: Told("MEM-UNPLUGALL-4", "MEM-UNPLUGALL-5"),
}
_FOR_UNPLUGGED_BLOCKS = ("MEM-PLUG-8", "MEM-TARGET-1")
"""What the model says of a PLUG of blocks that are there and unplugged."""

NOTHING = Told()
_REFUSED = Told("DEP-REFUSED-1", "DEP-REFUSED-1")
_DEVICE_RESET = Told("MEM-INIT-2", "MEM-INIT-2")
_SYSTEM_RESET = Told("MEM-OP-11", "MEM-OP-11")


class Referee:
    """A session whose device has just been started, and the model. The driver begins at once.

    Raises Unsuitable where the device does not take the driver, or is not as a device that has just been made.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        if not session.begin():
            raise Unsuitable("the device does not agree to the features that it offers")
        config = session.config()
        if config.plugged_size or not config.block_size:
            raise Unsuitable("blocks are plugged already" if config.plugged_size else "block_size is 0")
        self.model = Model.of(config)
        self.written: dict[int, int] = {}
        """Plugged blocks that were written to, and the seed of what is in each."""
        self._seen = config
        self._owes_notice = False
        self._notices_come()

    # What the driver does.

    def ask(
        self,
        type_: int,
        addr: int,
        nb_blocks: int,
        *,
        readable: tuple[int, ...] = (REQUEST_SIZE,),
        room: tuple[int, ...] = (RESPONSE_SIZE,),
        indirect: bool = False,
    ) -> None:
        """Any request, cut up in any way: see `Chain`. One that is BUSY with nothing against it is made again later."""
        request = Request(type_, addr, nb_blocks)  # type: ignore[arg-type]
        chain = Chain(request_bytes(type_, addr, nb_blocks), readable, room, indirect)
        told = NOTHING if type_ == RequestType.STATE else _REFUSED
        answer = self._answer(request, chain)
        if answer.type is BUSY and not self.model.hindered:
            self.look(told)
            answer = self._answer_later(request, chain)
        if answer.type is ACK and type_ in _GRANTED:
            told = _GRANTED[RequestType(type_)]
            self._granted(request)
        elif self.model.expect(request).clause in _FOR_UNPLUGGED_BLOCKS:
            self._look_at_host(*self._range(request), "DEP-HOST-4")
        self.look(told)

    def _answer(self, request: Request, chain: Chain) -> Answer:
        """One answer, which is as it may be."""
        expectation = self.model.expect(request)
        try:
            answer = self.session.chain(chain)
        except TargetFailure as failure:
            clause = expectation.clause or expectation.rule or _NO_ANSWER
            raise violation(Finding(clause, failure.what, "an answer")) from failure
        if answer.type is not None:
            _judge(finding_of(expectation, answer.type, answer.state))
            self._owes_notice |= answer.type is BUSY
        elif expectation.clause:
            _judge(Finding(_NO_ANSWER, str(answer), "a response of 10 bytes"))
        return answer

    def _answer_later(self, request: Request, chain: Chain) -> Answer:
        """The answer to a request that was BUSY though the host did nothing: it is granted soon, and woken for."""
        self.session.advance(PATIENCE)
        woken = self._notices_come()
        answer = self._answer(request, chain)
        if answer.type is BUSY:
            should = "ACK by then: the host does nothing against it"
            _judge(Finding("DEP-BUSY-4", f"BUSY, and again {PATIENCE} s later", should))
        if not woken:
            _judge(Finding("DEP-BUSY-5", "no notice after BUSY", f"one within {PATIENCE} s, as the request is granted"))
        return answer

    def write(self, block: int, seed: int) -> None:
        """Fill a plugged block."""
        self.session.fill(block, 1, seed)
        self.written[block] = seed

    def device_reset(self) -> None:
        """The driver's reset, and its begin anew: nothing changes."""
        self.session.device_reset()
        self._begin("FEAT-5")
        self.look(_DEVICE_RESET)
        self._look_at_bytes("MEM-INIT-3")

    # What the host does.

    def set_target(self, requested_size: int) -> None:
        """Another target; the host's side may refuse it."""
        before = self.model.requested_size
        if self.session.set_target(requested_size):
            self.model.resize(requested_size)
        clause = "DEP-TARGET-2" if requested_size == before else "DEP-TARGET-3"
        self.look(Told(clause, clause))

    def system_reset(self) -> None:
        """The machine is reset: every block should be unplugged, unless the host can't."""
        self.session.system_reset()
        self._begin("FEAT-6")
        config = self.session.config()
        plugged_size = config.plugged_size
        if not config.block_size:
            _judge(Finding("MEM-CONF-9", "block_size 0 after a system reset", "a power of two"))
        if plugged_size and not self.model.hindered:
            _judge(Finding("MEM-OP-11", f"{plugged_size} bytes plugged after a system reset", "none"))
        if not plugged_size:
            self.written.clear()
            self._look_at_host(0, self.session.nb_blocks, "DEP-HOST-3")
        self.model.system_reset(config, unplugged=not plugged_size)
        self.look(_SYSTEM_RESET)

    def hinder(self, *, paused: bool | None = None, refuses: bool | None = None) -> None:
        """Pause the device or let it go on; have the host refuse or not. A driver that was told BUSY hears of
        its end."""
        if paused is not None:
            self.session.pause(paused)
            self.model.paused = paused
        if refuses is not None:
            self.session.refuse(refuses)
            self.model.host_refuses = refuses
        if self._owes_notice and not self.model.hindered:
            self._owes_notice = False
            if not self._notices_come(wait=True):
                _judge(Finding("DEP-BUSY-5", "no notice after BUSY", "a notice as soon as the cause has gone"))
        self.look()

    # What is looked at.

    def look(self, told: Told = NOTHING) -> None:
        """Compare all that a driver can see."""
        config = self.session.config()
        due = self._notice_due(config)
        for finding in self.model.look(config):
            _judge(finding._replace(clause=told.size) if finding.clause == NOTHING.size else finding)
        self._seen = config
        if not self._notices_come(wait=bool(due)) and due:
            _judge(Finding(due, "no configuration change notice", "one"))
        for first, nb_blocks, plugged in self.model.runs():
            for part in range(first, first + nb_blocks, MOST_BLOCKS)[:_PARTS]:
                self._look_at(part, min(MOST_BLOCKS, first + nb_blocks - part), plugged, told.state)

    def look_closely(self) -> None:
        """Blocks by themselves, all that was written, and what the host holds of what was given back."""
        for first, nb_blocks, plugged in self.model.runs():
            for block in range(first, first + min(nb_blocks, _CLOSELY)):
                self._look_at(block, 1, plugged, "")
        self._look_at_bytes("MEM-OP-4")
        for first, nb_blocks, plugged in self.model.runs():
            if not plugged:
                self._look_at_host(first, nb_blocks, "DEP-HOST-1")

    def _look_at(self, block: int, nb_blocks: int, plugged: bool, clause: str) -> None:
        should = BlockState.PLUGGED if plugged else BlockState.UNPLUGGED
        answer = self.session.state(block, nb_blocks)
        if answer.state is not should:
            clause = clause or ("MEM-STATE-7" if plugged else "MEM-STATE-8")
            _judge(Finding(clause, f"{self.session.lines[-1]}", f"ACK {should.name}"))

    def _look_at_bytes(self, clause: str) -> None:
        for block, seed in sorted(self.written.items()):
            if not self.session.same(block, 1, seed):
                _judge(Finding(clause, f"other bytes in block {block}", "what was written there"))

    def _look_at_host(self, block: int, nb_blocks: int, clause: str) -> None:
        if self.session.can(Capability.HELD) and (held := self.session.held(block, nb_blocks)):
            _judge(Finding(clause, f"{held} bytes held for {nb_blocks} unplugged blocks from {block} on", "none"))

    # Private.

    def _begin(self, clause: str) -> None:
        self._owes_notice = False
        if not self.session.begin():
            _judge(Finding(clause, "features refused that were agreed to before", "the device as it was"))
        self._notices_come()

    def _granted(self, request: Request) -> None:
        """What follows from an ACK, for the model and for the bytes."""
        self.model.apply(request, ACK)
        if request.type == RequestType.UNPLUG_ALL:
            self.written.clear()
            self._look_at_host(0, self.session.nb_blocks, "DEP-HOST-2")
        elif request.type == RequestType.UNPLUG:
            first, nb_blocks = self._range(request)
            for block in range(first, first + nb_blocks):
                self.written.pop(block, None)
            self._look_at_host(first, nb_blocks, "DEP-HOST-1")

    def _range(self, request: Request) -> tuple[int, int]:
        return (request.addr - self.model.addr) // self.model.block_size, request.nb_blocks

    def _notice_due(self, config: ConfigSpace) -> str:
        """The clause by which the driver must have had a notice, if any."""
        if config.requested_size != self._seen.requested_size:
            return "MEM-CONF-18"
        if config.usable_region_size != self._seen.usable_region_size and not self.model.may_shrink:
            return "MEM-CONF-17"
        return ""

    def _notices_come(self, *, wait: bool = False) -> bool:
        """Whether notices came; all that did are taken. True where the target can't tell.

        At any notice a driver tries again: should it be told BUSY then, it is owed another one.
        """
        if not self.session.can(Capability.NOTICES):
            return True
        came = self.session.notices()
        for _ in range(PATIENCE if wait else 0):
            if came:
                break
            self.session.advance(1)
            came = self.session.notices()
        self._owes_notice = self._owes_notice and not came
        return bool(came)


class _Violations(dict[str, type[Violation]]):
    """A class for each clause: what shrinks a failure tells failures apart by their class."""

    def __missing__(self, clause: str) -> type[Violation]:
        self[clause] = type("Violation", (Violation,), {})
        return self[clause]


_violations = _Violations()


def violation(finding: Finding) -> Violation:
    """The finding to raise."""
    return _violations[finding.clause](*finding)


def is_silence(violated: Violation) -> bool:
    """Whether it is one since the device let its time go by."""
    return isinstance(violated.__cause__, TargetFailure) and violated.__cause__.silent


def _judge(finding: Finding | None) -> None:
    if finding is not None:
        raise violation(finding)


def essential(lines: Sequence[str]) -> list[str]:
    """The lines without the questions that were answered as they should be: the moves, and the last line.

    Notices stay where one that did not come is what is wrong, since asking takes those that came.
    """
    said = [line.split(" ", 1)[0] for line in lines]
    left_out = _QUESTIONS if said[-1:] == ["notices"] else (*_QUESTIONS, "notices")
    return [line for line, word in zip(lines[:-1], said, strict=False) if word not in left_out] + list(lines[-1:])
