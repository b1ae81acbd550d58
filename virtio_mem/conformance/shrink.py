"""Leave out of a sequence, move by move, what a violation does not take.

What should come of a move depends on those before it, so each shorter sequence is judged anew: by the referee, who says
whether it violates the same clause. What is found by a check whose clause the referee has no eye for stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

from vhost_user.errors import FieldError
from virtio_mem.conformance.check import Unsuitable, Violation
from virtio_mem.conformance.model import Finding
from virtio_mem.conformance.referee import NOTHING, Referee, Told, essential, is_silence
from virtio_mem.conformance.replay import FAILURE, shorten
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import FILL, Capability, Odd, Target, TargetFailure, Wish
from virtio_mem.conformance.words import ARROW, REQUESTS, parse_chain, parse_wish, request_bytes
from virtio_mem.protocol import REQUEST_SIZE, Request

GONE = "MEM-WIRE-3"
"""What a device violates that fails where it is not known what it should say."""

_MOVES = frozenset({"target", "pause", "refuse", "device_reset", "system_reset", "fill", *REQUESTS})
_LOOKS = frozenset({"begin", "config", "notices", "advance", "same", "held"})
"""What the referee does by himself."""


class Shorter(NamedTuple):
    """A sequence that shows a violation, and what it shows, "" where that is what it was.

    `note` says why it may have more than it need; "" where nothing more could be left out.
    """

    lines: tuple[str, ...]
    was: str = ""
    should: str = ""
    note: str = ""


class _Found(NamedTuple):
    finding: Finding
    lines: tuple[str, ...]
    moves: int


class _Unfit(Exception):  # noqa: N818
    """The sequence is not one of moves that the referee can make, or the device lets its time go by."""


def shortened(
    target: Target, clause: str, lines: Sequence[str], *, seconds: float, stopped: Callable[[], bool] = lambda: False
) -> Shorter:
    """A sequence to a violation of `clause`, without what does not matter to it.

    It ends after `seconds`, or once `stopped`, with what is shortest by then.
    """
    if lacking := target.lacks(Capability.RESTART):
        return Shorter(tuple(lines), note=f"not shortened: {lacking}")
    shrinking = _Shrinking(target, clause, _failed(lines), time.monotonic() + seconds, stopped)
    try:
        found = shrinking.least(lines, Referee) or shrinking.least(lines, _Deaf)
    except _Unfit:
        found = None
    if found is None or len(found.lines) > len(lines):
        least = Shorter(tuple(lines) if shrinking.is_over else shorten(target, lines, shrinking.ends))
    else:
        least = Shorter(found.lines, found.finding.was, found.finding.should)
    return least._replace(note="not shortened to the end: there was no more time") if shrinking.is_over else least


class _Deaf(Referee):
    """One who hears answers to requests and sees nothing else: a device may be wrong in more than one way."""

    def look(self, told: Told = NOTHING) -> None:  # noqa: ARG002 - nothing is told of it
        list(self.model.look(self.session.config()))  # for the usable region

    def look_closely(self) -> None:
        pass

    def _look_at_host(self, block: int, nb_blocks: int, clause: str) -> None:
        pass

    def _look_at_bytes(self, clause: str) -> None:
        pass


@dataclass
class _Shrinking:
    """Of one violation, of whatever clause where the device fails by the same call. `is_over` where it ended before its
    time."""

    target: Target
    clause: str
    failed: str
    """The call that the device failed by; "" where it did not."""
    deadline: float
    stopped: Callable[[], bool]
    is_over: bool = False

    def ends(self) -> bool:
        """Whether it is to end now. It is asked before each move: one sequence may take all of the time."""
        self.is_over = self.is_over or self.stopped() or time.monotonic() >= self.deadline
        return self.is_over

    def least(self, lines: Sequence[str], referee: type[Referee]) -> _Found | None:
        """As few of the moves as show it to such a referee; None where all of them don't."""
        wish, moves = parse_wish(lines[0]), [line.partition(ARROW)[0] for line in lines[1:]]
        moves = [move for move in moves if move.split()[0] not in _LOOKS]
        best = self._judged(wish, moves, referee)
        size = 0 if best is None else max(1, best.moves // 2)
        while best is not None and size and not self.is_over:
            for fewer in _left_out(moves[: best.moves], size):
                if (found := self._judged(wish, fewer, referee)) is not None:
                    best, moves = found, fewer
                    break
            else:
                size //= 2
        return best

    def _judged(self, wish: Wish, moves: Sequence[str], referee: type[Referee]) -> _Found | None:
        """What is found, if it is against the clause."""
        if self.ends():
            return None
        try:
            with closing(self.target.start(wish)) as subject:
                found = self._found(Session(subject, wish, self.target.capabilities), moves, referee)
        except (TargetFailure, FieldError, Unsuitable):
            return None
        if found is None or found.finding.clause == self.clause:
            return found
        return found if self.failed and _failed(found.lines) == self.failed else None

    def _found(self, session: Session, moves: Sequence[str], referee: type[Referee]) -> _Found | None:
        """The first violation of any clause; None also where it ends before."""
        made = 0
        try:
            judge = referee(session)
            for made, move in enumerate(moves, start=1):  # noqa: B007 - how far it came
                if self.ends():
                    return None
                _make(judge, move)
            if self.ends():
                return None
            judge.look_closely()
        except Violation as violated:
            if is_silence(violated):
                raise _Unfit from None
            finding = Finding(violated.clause, violated.was, violated.should)
        except TargetFailure as failure:
            if failure.silent:
                raise _Unfit from None
            finding = Finding(GONE, failure.what, "a device that serves on")
        else:
            return None
        return _Found(finding, tuple(essential(session.lines)), made)


def _failed(lines: Sequence[str]) -> str:
    """The call by which a session ended with the device; "" where it did not."""
    call, _, answer = lines[-1].partition(ARROW)
    return call if answer.startswith(FAILURE) else ""


def _left_out(moves: Sequence[str], size: int) -> Iterator[list[str]]:
    """The moves but for `size` neighbouring ones, the last of them first."""
    for end in range(len(moves), 0, -size):
        yield [*moves[: max(0, end - size)], *moves[end:]]


def _make(referee: Referee, move: str) -> None:
    """Make a move as the machine does."""
    word, *rest = move.split()
    if word not in _MOVES:
        raise _Unfit
    match word:
        case "target":
            referee.set_target(int(rest[0]))
        case "pause":
            referee.hinder(paused=rest[0] == "on")
        case "refuse":
            referee.hinder(refuses=rest[0] == "on")
        case "device_reset":
            referee.device_reset()
        case "system_reset":
            referee.system_reset()
        case "fill":
            block, nb_blocks, seed = map(int, rest)
            for each in range(block, block + nb_blocks):
                if referee.session.addr(each) in referee.model.plugged:
                    referee.write(each, seed)
        case _:
            _ask(referee, move)


def _ask(referee: Referee, move: str) -> None:
    chain = parse_chain(move, referee.session.place)
    type_, addr, nb_blocks = Request.decode(chain.request.ljust(REQUEST_SIZE, b"\0"))
    plain = chain.request == request_bytes(type_, addr, nb_blocks) and (chain.fill, chain.odd) == (FILL[0], Odd(0))
    if not plain:
        raise _Unfit
    referee.ask(type_, addr, nb_blocks, readable=chain.readable, room=chain.room, indirect=chain.indirect)
