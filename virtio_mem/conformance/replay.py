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
from virtio_mem.conformance.calls import action_of
from virtio_mem.conformance.session import Session
from virtio_mem.conformance.target import Capability, Target, TargetFailure, Wish
from virtio_mem.conformance.words import (
    ARROW,
    BESIDE,
    CUT,
    LONGEST,
    NO_FLAG,
    parse_wish,
    wish_words,
    without_picture,
)

_OWN = ("addr=", "node_id=")
"""Fields of a configuration space that are a device's own affair."""

_OWN_REGISTERS = ("queue_size=", "generation=")
"""The same of registers."""

FAILURE = "failure:"
"""What the answer of a device that failed begins with."""

_LOOKS = frozenset({"config", "state", "held", "same"})
"""Calls that by all accounts change nothing."""

_PASSED_OVER = frozenset({"notices", "look", "registers", "peek", "fill", "write_config", "boot_memory"})
"""The same of calls that matter to no other answer but to what the same target can't be asked either."""

_HINDRANCES = frozenset({"refuse", "pause"})
"""Calls that keep blocks from changing, until they are taken back."""

BUSY = "BUSY"

_CHANGES_NOTHING = frozenset({"ERROR", "NACK", "ACK PLUGGED", "ACK UNPLUGGED", "ACK MIXED"})
"""Answers to requests that by all accounts changed nothing."""

_MOST_TRIED = 40
"""Where more looks than these matter, they are not tried one by one."""


class Step(NamedTuple):
    """One call of a file: its line there, the call, and the answer that it got; "" where none is given."""

    number: int
    call: str
    answer: str
    is_cut: bool = False
    """The answer's end is missing."""


@dataclass(frozen=True)
class Script:
    """One session of a file."""

    wish: Wish
    steps: tuple[Step, ...]


class Replayed(NamedTuple):
    """A step and the answer that it got now; `apart` says why that can't be compared, "" where it can.

    A step that was not made at all has no answer.
    """

    step: Step
    now: str
    apart: str = ""

    @property
    def same(self) -> bool:
        """Whether it is the answer that is in the file, as far as two devices have to agree."""
        if not self.step.answer or self.apart:
            return True
        return _essence(self.step, self.step.answer) == _essence(self.step, self.now)


@dataclass(frozen=True)
class Replay:
    """What came of a script. `failure` says that the device failed before the script's end; "" where it did not."""

    script: Script
    replayed: tuple[Replayed, ...]
    failure: str = ""

    @property
    def differences(self) -> list[Replayed]:
        """The steps that got another answer."""
        return [one for one in self.replayed if not one.same]

    @property
    def apart(self) -> list[Replayed]:
        """The steps whose answers can't be compared here."""
        return [one for one in self.replayed if one.apart]


def parse_script(text: str) -> list[Script]:
    """The sessions of a file, also as a terminal shows them. UsageError with the number of the line that can't be
    read."""
    wishes: list[Wish] = []
    steps: list[list[Step]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = without_picture(line).partition("#")[0].strip()
        if not words:
            continue
        call, arrow, answer = words.partition(ARROW)
        is_cut = len(words) == LONGEST and words.endswith(CUT)
        try:
            if call.startswith("wish"):
                wishes.append(parse_wish(call))
                steps.append([])
            elif is_cut and not arrow:
                raise UsageError("call", call, "its end is missing", "take the line from where it is whole")
            elif steps:
                action_of(call)
                steps[-1].append(Step(number, call, answer, is_cut))
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


def replay(target: Target, script: Script, is_over: Callable[[], bool] = lambda: False) -> Replay:
    """Run one script on a device that is started for it. TargetFailure where none can be had.

    It ends early where the device fails, and before the first step at which it `is_over`. What this target can't do is
    passed over, as far as the others' answers mean the same without it: see `_Gaps`.
    """
    replayed: list[Replayed] = []
    gaps = _Gaps(target)
    with closing(target.start(script.wish)) as subject:
        session = Session(subject, script.wish, target.capabilities)
        session.config()
        for step in script.steps:
            if is_over():
                break
            _, act = action_of(step.call)
            if gaps.passes_over(step):
                replayed.append(Replayed(step, "", gaps.why))
                continue
            with suppress(TargetFailure):
                act(session)
            now = session.lines[-1].split(ARROW, 1)[1]
            replayed.append(Replayed(step, now, gaps.why_apart(step)))
            if now.startswith(FAILURE):
                left = len(script.steps) - len(replayed)
                return Replay(script, tuple(replayed), f"line {step.number}: the device failed" if left else "")
    return Replay(script, tuple(replayed))


class _Gaps:
    """Which steps of a script a target has to be spared, so that it stays where the other device was.

    What asks a question, and what got an answer by which nothing changed, can be left out. While the host should refuse
    or the device be paused, and this target's can't, requests that got BUSY are left out, and the notice that is owed
    for them is not looked for. After a step that did change something nothing can be compared any more.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._hindrances: dict[str, str] = {}
        self._owed = ""
        self._lost = ""
        self.why = ""

    def passes_over(self, step: Step) -> bool:
        """Whether a step is not made here; then `why` is the reason."""
        need, _ = action_of(step.call)
        word, lacking = step.call.split()[0], self._target.lacks(need)
        self.why = self._lost or lacking
        if self.why:
            if not self._lost and word in _HINDRANCES:
                self._hinder(word, step.call.endswith("on"))
            elif not self._lost and not _is_idle(step) and word not in _PASSED_OVER:
                self._lost = f"what follows line {step.number}, since {lacking}"
            return True
        if self._hindrances and step.answer.removesuffix(NO_FLAG) == BUSY:
            self.why = self._owed = next(iter(self._hindrances.values()))
        return bool(self.why)

    def _hinder(self, word: str, begins: bool) -> None:
        if begins:
            self._hindrances[word] = self.why
        else:
            self._hindrances.pop(word, None)

    def why_apart(self, step: Step) -> str:
        """Why the answer to a step that was made can't be compared; "" where it can."""
        if step.is_cut:
            return "the end of the answer is missing in the file"
        why = self._owed if step.call == "notices" else ""
        if why and not self._hindrances:
            self._owed = ""
        return why


def shorten(target: Target, lines: Sequence[str], is_over: Callable[[], bool] = lambda: False) -> tuple[str, ...]:
    """A session whose last answer shows a violation, without the looks and refusals that did not matter to it.

    What is left gets the same last answer from a new device. What changes the device, and BUSY, which it owes a notice
    for, is never left out: so what should have been the answer is still what it was. Without `Capability.RESTART` all
    of it matters. Once it `is_over`, what is shortest by then counts.
    """
    script = script_of(lines)
    if not target.lacks(Capability.RESTART):
        idle = [step for step in script.steps[:-1] if _is_idle(step)]
        for chosen in [idle, *([step] for step in idle[:_MOST_TRIED])]:
            fewer = Script(script.wish, tuple(step for step in script.steps if step not in chosen))
            if len(fewer.steps) < len(script.steps) and _ends_alike(target, fewer, is_over):
                script = fewer
                if chosen is idle:
                    break
    return (wish_words(script.wish), *(f"{step.call}{ARROW}{step.answer}" for step in script.steps))


def _is_idle(step: Step) -> bool:
    if step.call.split()[0] in _LOOKS:
        return True
    return set(step.answer.replace(NO_FLAG, "").split(BESIDE)) <= _CHANGES_NOTHING


def _ends_alike(target: Target, script: Script, is_over: Callable[[], bool]) -> bool:
    if is_over():
        return False
    try:
        replayed = replay(target, script, is_over).replayed
    except TargetFailure:
        return False
    if len(replayed) < len(script.steps):
        return False
    before, now = replayed[-1].step.answer, replayed[-1].now
    return before == now or (before.startswith(FAILURE) and now.startswith(FAILURE))


def _essence(step: Step, answer: str) -> str:
    """What two devices have to agree on."""
    for word in ("failure", "refused"):
        if answer.startswith(f"{word}:"):
            return word
    match step.call.split()[0]:
        case "begin" | "prepare":
            return answer.split(maxsplit=1)[0]
        case "look":
            return answer.rpartition(", flags ")[0]
        case "peek" | "boot_memory":
            return "its own"
        case "registers":
            return " ".join(word for word in answer.split() if not word.startswith(_OWN_REGISTERS))
        case "config":
            return " ".join(word for word in answer.split() if not word.startswith(_OWN))
        case "held" if step.answer != "0":
            return "bytes"
    return answer
