"""Run again what a session put down, on the same device or on another, and compare.

A file has the lines of one session or of several. Each begins with its `wish`; empty lines, and what follows a `#`, are
for the reader. A line without an answer is run and compared with nothing, so a file can be written by hand.

Blocks are told by their number, so a session that was recorded elsewhere fits a region at another address. What has to
differ between two devices is not compared: where the region lies, the node, which features are on offer, and how much
of plugged memory the host holds already. That it holds nothing is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import NamedTuple

from vhost_user.errors import UsageError
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability, Chain, Target, TargetFailure, Wish
from virtio_mem.conformance.words import ARROW, BESIDE, Place, parse_chain, parse_wish, wish_words
from virtio_mem.protocol import REQUEST_SIZE

NO_NEED = Capability(0)
_ANYWHERE = Place(0, 1)
_OWN = ("addr=", "node_id=")
"""Fields of a configuration space that are a device's own affair."""

_FAILURE = "failure:"
_LOOKS = frozenset({"config", "state", "held", "same"})
"""Calls that by all accounts change nothing."""

_CHANGES_NOTHING = frozenset({"ERROR", "NACK", "ACK PLUGGED", "ACK UNPLUGGED", "ACK MIXED"})
"""Answers to requests that by all accounts changed nothing."""

_LONGEST = 86_400
"""Seconds that a file may let go by at one time."""

_MOST_TRIED = 40
"""Where more looks than these matter, they are not tried one by one."""


class Step(NamedTuple):
    """One call of a file: its line there, the call, and the answer that it got; "" where none is given."""

    number: int
    call: str
    answer: str


@dataclass(frozen=True)
class Script:
    """One session of a file."""

    wish: Wish
    steps: tuple[Step, ...]


class Replayed(NamedTuple):
    """A step and the answer that it got now."""

    step: Step
    now: str

    @property
    def same(self) -> bool:
        """Whether it is the answer that is in the file, as far as two devices have to agree."""
        return not self.step.answer or _essence(self.step, self.step.answer) == _essence(self.step, self.now)


@dataclass(frozen=True)
class Replay:
    """What came of a script. `failure` says why it ended before its time; "" where it did not."""

    script: Script
    replayed: tuple[Replayed, ...]
    failure: str = ""

    @property
    def differences(self) -> list[Replayed]:
        """The steps that got another answer."""
        return [one for one in self.replayed if not one.same]


def parse_script(text: str) -> list[Script]:
    """The sessions of a file. UsageError with the number of the line that can't be read."""
    wishes: list[Wish] = []
    steps: list[list[Step]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        call, _, answer = words.partition(ARROW)
        try:
            if call.startswith("wish"):
                wishes.append(parse_wish(call))
                steps.append([])
            elif steps:
                action_of(call)
                steps[-1].append(Step(number, call, answer))
            else:
                raise UsageError("call", call, "comes before the first wish", "begin with a line such as 'wish ...'")
        except UsageError as error:
            error.locate(f"line {number}:")
            raise
    return [Script(wish, tuple(these)) for wish, these in zip(wishes, steps, strict=True)]


def script_of(lines: Sequence[str]) -> Script:
    """The script that a session's lines are."""
    (script,) = parse_script("\n".join(lines))
    return script


def replay(target: Target, script: Script) -> Replay:
    """Run one script on a device that is started for it. TargetFailure where none can be had.

    It ends early where the device fails, and where the target can't do what a step needs.
    """
    replayed: list[Replayed] = []
    with closing(target.start(script.wish)) as subject:
        session = Session(subject, script.wish, target.capabilities)
        session.config()
        for step in script.steps:
            need, act = action_of(step.call)
            if lacking := target.lacks(need):
                return Replay(script, tuple(replayed), f"line {step.number}: {lacking}")
            with suppress(TargetFailure):
                act(session)
            now = session.lines[-1].split(ARROW, 1)[1]
            replayed.append(Replayed(step, now))
            if now.startswith(_FAILURE):
                left = len(script.steps) - len(replayed)
                return Replay(script, tuple(replayed), f"line {step.number}: the device failed" if left else "")
    return Replay(script, tuple(replayed))


def shorten(target: Target, lines: Sequence[str]) -> tuple[str, ...]:
    """A session whose last answer shows a violation, without the looks and refusals that did not matter to it.

    What is left gets the same last answer from a new device. What changes the device, and BUSY, which it owes a notice
    for, is never left out: so what should have been the answer is still what it was. Without `Capability.RESTART` all
    of it matters.
    """
    script = script_of(lines)
    if not target.lacks(Capability.RESTART):
        idle = [step for step in script.steps[:-1] if _is_idle(step)]
        for chosen in [idle, *([step] for step in idle[:_MOST_TRIED])]:
            fewer = Script(script.wish, tuple(step for step in script.steps if step not in chosen))
            if len(fewer.steps) < len(script.steps) and _ends_alike(target, fewer):
                script = fewer
                if chosen is idle:
                    break
    return (wish_words(script.wish), *(f"{step.call}{ARROW}{step.answer}" for step in script.steps))


def _is_idle(step: Step) -> bool:
    if step.call.split()[0] in _LOOKS:
        return True
    return set(step.answer.split(BESIDE)) <= _CHANGES_NOTHING


def _ends_alike(target: Target, script: Script) -> bool:
    try:
        replayed = replay(target, script).replayed
    except TargetFailure:
        return False
    if len(replayed) < len(script.steps):
        return False
    (_, _, before), now = replayed[-1]
    return before == now or (before.startswith(_FAILURE) and now.startswith(_FAILURE))


def _essence(step: Step, answer: str) -> str:
    """What two devices have to agree on."""
    for word in ("failure", "refused"):
        if answer.startswith(f"{word}:"):
            return word
    match step.call.split()[0]:
        case "begin":
            return answer.split(maxsplit=1)[0]
        case "config":
            return " ".join(word for word in answer.split() if not word.startswith(_OWN))
        case "held" if step.answer != "0":
            return "bytes"
    return answer


# A call, from its words.

Action = tuple[Capability, Callable[[Session], object]]


def action_of(call: str) -> Action:
    """What a call needs, and how it is made. UsageError for words that are no call."""
    word, *rest = call.split()
    try:
        return _simple(word, rest) or _submitted(call)
    except (ValueError, KeyError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError("call", call, "can't be read") from error


def _simple(word: str, rest: Sequence[str]) -> Action | None:
    """Calls that name no request; None for the others."""
    match word, rest:
        case "begin", [] | [_]:
            features = int(rest[0], 0) if rest else None
            return NO_NEED, lambda session: session.begin(features)
        case "config" | "device_reset" | "system_reset" | "notices", []:
            return _NEEDS.get(word, NO_NEED), lambda session: getattr(session, word)()
        case "fill" | "same", [_, _, _]:
            block, nb_blocks, seed = map(int, rest)
            return Capability.CONTENT, lambda session: getattr(session, word)(block, nb_blocks, seed)
        case "held", [_, _]:
            first, count = map(int, rest)
            return Capability.HELD, lambda session: session.held(first, count)
        case "target", [size]:
            requested_size = int(size)
            return Capability.SET_TARGET, lambda session: session.set_target(requested_size)
        case "advance", [text]:
            seconds = float(text)
            if not 0 <= seconds <= _LONGEST:
                raise UsageError("advance", text, f"0 to {_LONGEST} seconds")
            return NO_NEED, lambda session: session.advance(seconds)
        case "refuse" | "pause", ["on" | "off" as state]:
            return _NEEDS[word], lambda session: getattr(session, word)(state == "on")
    return None


_NEEDS = {
    "system_reset": Capability.SYSTEM_RESET,
    "notices": Capability.NOTICES,
    "refuse": Capability.HOST_REFUSES,
    "pause": Capability.PAUSE,
}


def _submitted(call: str) -> Action:
    """A request, or several."""
    texts = call.removeprefix("batch ").split(BESIDE)
    chains = [parse_chain(text, _ANYWHERE) for text in texts]
    plain = all(chain == Chain(chain.request) and len(chain.request) == REQUEST_SIZE for chain in chains)
    need = NO_NEED if plain else Capability.CHAINS
    if call.startswith("batch "):
        return need, lambda session: session.batch([parse_chain(text, session.place) for text in texts])
    return need, lambda session: session.chain(parse_chain(call, session.place))
