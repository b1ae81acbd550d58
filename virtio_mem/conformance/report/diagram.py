"""A session's lines as a picture: for each step the blocks that are plugged by then, and those that it names.

Blocks that no step tells apart are drawn as one piece, so a region of any size is a few pieces wide. What is plugged is
told by the answers, that is, by what the device said of itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from virtio_mem.conformance.words import ARROW, BESIDE, CUT, LONGEST

MOST_STEPS = 12
"""The last ones. What leads to a violation is mostly shorter."""

_WIDEST = 12
"""Cells of the widest piece."""

_BESIDE_THE_POINT = frozenset({"wish", "begin", "config", "notices", "advance"})
"""Calls that are no steps, unless one is the last."""

_WORDS = {"plug": 0, "unplug": 1, "state": 3, "fill": -1, "same": -1, "held": -1}
_ASKED = re.compile(r"(?:ask|chain) (\d+) b(-?\d+)(?:\+\S+)? (\d+)")
_PLUG, _UNPLUG, _UNPLUG_ALL = 0, 1, 2

Span = tuple[int, int]
"""A first block, and the one behind the last."""


class Step(NamedTuple):
    """A line and its number among all, from 0, the blocks that it names if any, and what is plugged after it."""

    number: int
    line: str
    named: Span | None
    plugged: tuple[Span, ...]


class Piece(NamedTuple):
    """Neighbouring blocks that are drawn as one: `cells` wide."""

    first: int
    end: int
    cells: int


class Diagram(NamedTuple):
    """The steps, and what the rows are cut into."""

    steps: list[Step]
    pieces: list[Piece]


def diagram_of(lines: Sequence[str]) -> Diagram | None:
    """The picture, or None where the lines name no blocks."""
    steps: list[Step] = []
    plugged: tuple[Span, ...] = ()
    for number, line in enumerate(lines):
        call, _, answer = line.partition(ARROW)
        named: Span | None = None
        for each, said in zip(call.removeprefix("batch ").split(BESIDE), answer.split(BESIDE), strict=False):
            type_, blocks = _request(each)
            named = blocks or named
            plugged = _after(plugged, type_, blocks, said.startswith("ACK"))
        if call == "system_reset":
            plugged = ()
        if number == len(lines) - 1 or call.split(" ", 1)[0] not in _BESIDE_THE_POINT:
            steps.append(Step(number, line, named, plugged))
    steps = steps[-MOST_STEPS:]
    spans = [span for step in steps for span in (step.named, *step.plugged) if span]
    return Diagram(steps, _pieces(spans)) if any(step.named for step in steps) else None


def _request(call: str) -> tuple[int, Span | None]:
    """The type of a request, -1 for what is none, and the blocks that it names."""
    words = call.split()
    if words and words[0] in _WORDS and len(words) >= 3:
        return _WORDS[words[0]], (int(words[1]), int(words[1]) + int(words[2]))
    if found := _ASKED.match(call):
        type_, first, nb_blocks = map(int, found.groups())
        return type_, None if type_ == _UNPLUG_ALL else (first, first + nb_blocks)
    return _UNPLUG_ALL if words[:1] == ["unplug_all"] else -1, None


def _after(plugged: tuple[Span, ...], type_: int, blocks: Span | None, granted: bool) -> tuple[Span, ...]:
    if not granted:
        return plugged
    if type_ == _UNPLUG_ALL:
        return ()
    if blocks is None or type_ not in (_PLUG, _UNPLUG):
        return plugged
    rest = [part for span in plugged for part in _without(span, blocks)]
    return _joined([*rest, blocks] if type_ == _PLUG else rest)


def _without(span: Span, taken: Span) -> Iterable[Span]:
    (first, end), (start, stop) = span, taken
    parts = ((first, min(end, start)), (max(first, stop), end))
    return [part for part in parts if part[0] < part[1]]


def _joined(spans: list[Span]) -> tuple[Span, ...]:
    joined: list[Span] = []
    for first, end in sorted(spans):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        elif first < end:
            joined.append((first, end))
    return tuple(joined)


def _pieces(spans: Iterable[Span]) -> list[Piece]:
    edges = sorted({edge for span in spans for edge in span} | {0})
    edges.append(edges[-1] + 1)
    return [Piece(first, end, min(end - first, _WIDEST)) for first, end in pairwise(edges)]


def is_in(piece: Piece, spans: Iterable[Span]) -> bool:
    """Whether a piece lies in one of the spans; it never lies there in part."""
    return any(first <= piece.first and piece.end <= end for first, end in spans)


def as_text(diagram: Diagram) -> list[str]:
    """A line for each step: `#` plugged, `.` not; in brackets what the step names.

    `~` stands for blocks left out, `!` for what is below the region.
    """
    lines = [short(step.line) for step in diagram.steps]
    width = max(map(len, lines))
    rows = (_row(step, diagram.pieces) for step in diagram.steps)
    return [f"{line:<{width}}  {row}" for line, row in zip(lines, rows, strict=True)]


def with_pictures(lines: Sequence[str]) -> list[str]:
    """All of the lines, whole, each with its picture behind it where there is one: `without_picture` takes it off."""
    diagram = diagram_of(lines)
    if diagram is None:
        return list(lines)
    rows = {step.number: _row(step, diagram.pieces) for step in diagram.steps}
    width = max((len(lines[number]) for number in rows if len(lines[number]) <= LONGEST), default=0)
    return [f"{line:<{width}}  {rows[number]}" if number in rows else line for number, line in enumerate(lines)]


def short(line: str) -> str:
    """A line, cut where it would push the picture out of sight."""
    return line if len(line) <= LONGEST else f"{line[: LONGEST - len(CUT)]}{CUT}"


def _row(step: Step, pieces: Sequence[Piece]) -> str:
    letters, named = "", False
    for piece in pieces:
        now = step.named is not None and is_in(piece, [step.named])
        letters += "[" if now and not named else "]" if named and not now else " "
        letters += letter(piece, step) * piece.cells + ("~" if piece.end - piece.first > piece.cells else "")
        named = now
    return f"{letters}]" if named else letters


def letter(piece: Piece, step: Step) -> str:
    """What stands for a block of a piece after a step."""
    return "!" if piece.first < 0 else "#" if is_in(piece, step.plugged) else "."
