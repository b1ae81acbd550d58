"""A recording of a terminal as an SVG that plays: in a browser, and where a browser shows it as an image.

Every row of the screen is drawn once for each time that it shows something else, and is visible for as long; what comes
up again, in another row say, is the same drawing used twice. When it is visible is CSS: no script runs in an image.
Without the animation, where there is no CSS or the reader asked for less motion, it is the last frame.

It plays as it went, but for waits: of one in which nothing changes, `MOST_STILL` seconds are shown, and its real length
is in the title bar meanwhile.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

from virtio_mem.picture.recording import Frame, Look, Piece, Recording, Row
from virtio_mem.picture.sizes import human_time

MOST_STILL = 2.0
LAST = 6.0
"""Seconds: of a wait that are shown, and for which the last frame stands before all begins again."""

_SIZE = 20.0
_COLUMN, _LINE = 12.04, 24.4
"""The size of the letters, and of their cells: most monospaced fonts have letters that are 0.602 of their size wide."""

_SIDE, _BAR = 9, 42
_INK, _GROUND, _QUIET = "#c5c8c6", "#292929", "#9a9b99"
_NAMED = {
    "black": "#4b4e55",
    "red": "#cc555a",
    "green": "#98a84b",
    "brown": "#d0b344",
    "blue": "#608ab1",
    "magenta": "#98729f",
    "cyan": "#68a0b3",
    "white": _INK,
    "brightblack": _QUIET,
    "brightred": "#ff2627",
    "brightgreen": "#00823d",
    "brightbrown": "#d08442",
    "brightblue": "#1984e9",
    "brightmagenta": "#ff2c7a",
    "brightcyan": "#398280",
    "brightwhite": "#fdfdc5",
    "default": _INK,
    "ink": _INK,
    "ground": _GROUND,
}
"""The colours that rich gives the terminals in its pictures, under pyte's names."""


class Span(NamedTuple):
    """Seconds of the film: from, to."""

    begin: float
    end: float


class Shown(NamedTuple):
    """A row of the screen, and what it shows."""

    row: int
    content: Row


def film(recording: Recording, title: str) -> str:
    """The SVG. The same recording gives the same text."""
    begins, notes = schedule(recording.frames)
    seconds = begins[-1] + LAST
    notes.append((Span(begins[-1], seconds), f"{human_time(recording.seconds)} in all"))
    height = max(len(frame.rows) for frame in recording.frames)
    shown = _shown(recording.frames, [*begins, seconds])
    return _Film(recording.columns, height, title, seconds).drawn(shown, notes)


def schedule(frames: Sequence[Frame]) -> tuple[list[float], list[tuple[Span, str]]]:
    """When each frame begins in the film, and what is said of the waits that were shortened."""
    begins, notes = [0.0], []
    for before, after in pairwise(frames):
        wait = after.at - before.at
        begins.append(begins[-1] + min(wait, MOST_STILL))
        if wait > MOST_STILL:
            notes.append((Span(*begins[-2:]), f"a wait of {human_time(wait)}, shortened"))
    return begins, notes


def _shown(frames: Sequence[Frame], times: Sequence[float]) -> dict[Span, list[Shown]]:
    """What is visible for the same time: rows that don't change from `times[i]` to `times[j]`."""
    shown = defaultdict(list)
    for row in range(max(len(frame.rows) for frame in frames)):
        contents = [frame.rows[row] if row < len(frame.rows) else () for frame in frames]
        first = 0
        for index in range(1, len(frames) + 1):
            if index == len(frames) or contents[index] != contents[first]:
                if contents[first]:
                    shown[Span(times[first], times[index])].append(Shown(row, contents[first]))
                first = index
    return dict(sorted(shown.items()))


class _Film:
    """One SVG: its size, and the styles and rows that it has so far."""

    def __init__(self, columns: int, rows: int, title: str, seconds: float) -> None:
        self._width, self._height = columns * _COLUMN + 2 * _SIDE, rows * _LINE + _BAR + _SIDE
        self._title, self._seconds = title, seconds
        self._looks: dict[Look, str] = {}
        self._spans: dict[Span, str] = {}

    def drawn(self, shown: dict[Span, list[Shown]], notes: list[tuple[Span, str]]) -> str:
        uses = Counter(each.content for group in shown.values() for each in group)
        often = {content: f"r{number}" for number, content in enumerate(uses) if uses[content] > 1}
        groups = [self._during(span, [self._row(each, often) for each in group]) for span, group in shown.items()]
        right = f'class="n" x="{_number(self._width - 2 * _SIDE)}" y="26" text-anchor="end"'
        said = [self._during(span, [f"<text {right}>{escape(text)}</text>"]) for span, text in notes]
        known = [f'<g id="{name}">{self._letters(content)}</g>' for content, name in often.items()]
        size = f"{_number(self._width)} {_number(self._height)}"
        label = f'xml:space="preserve" role="img" aria-label={quoteattr(self._title)}'
        lines = [
            f'<svg viewBox="0 0 {size}" xmlns="http://www.w3.org/2000/svg" {label}>',
            "<style>",
            *self._styles(),
            "</style>",
            *(["<defs>", *known, "</defs>"] if known else []),
            *self._window(),
            *said,
            f'<g class="t" transform="translate({_SIDE} {_BAR})">',
            *groups,
            "</g>",
            "</svg>",
        ]
        return "\n".join(lines) + "\n"

    def _window(self) -> list[str]:
        frame = f'width="{_number(self._width - 2)}" height="{_number(self._height - 2)}" rx="8"'
        dots = zip((26, 48, 70), ("#ff5f57", "#febc2e", "#28c840"), strict=True)
        return [
            f'<rect x="1" y="1" {frame} fill="{_GROUND}" stroke="#fff" stroke-opacity=".35"/>',
            *(f'<circle cx="{x}" cy="21" r="7" fill="{colour}"/>' for x, colour in dots),
            f'<text class="h" x="{_number(self._width / 2)}" y="27" text-anchor="middle">{escape(self._title)}</text>',
        ]

    def _during(self, span: Span, drawn: list[str]) -> str:
        """What is visible for a time, and, if nothing moves, for good if it is there at the end."""
        inner = "".join(drawn)
        if span == (0.0, self._seconds):
            return f"<g>{inner}</g>"
        name = self._spans.setdefault(span, f"k{len(self._spans)}")
        hidden = "" if span.end == self._seconds else ' visibility="hidden"'
        return f'<g class="k {name}"{hidden}>{inner}</g>'

    def _row(self, shown: Shown, often: dict[Row, str]) -> str:
        place = f"translate(0 {_number(shown.row * _LINE)})"
        if shown.content in often:
            return f'<use href="#{often[shown.content]}" transform="{place}"/>'
        return f'<g transform="{place}">{self._letters(shown.content)}</g>'

    def _letters(self, row: Row) -> str:
        return "".join(self._ground(piece) + self._text(piece) for piece in row)

    @staticmethod
    def _ground(piece: Piece) -> str:
        if piece.look.ground == "default":
            return ""
        place = f'x="{_number(piece.column * _COLUMN)}" width="{_number(piece.columns * _COLUMN)}"'
        return f'<rect {place} height="{_LINE}" fill="{_colour(piece.look.ground)}"/>'

    def _text(self, piece: Piece) -> str:
        name = self._looks.setdefault(piece.look, f"l{len(self._looks)}")
        width = f'textLength="{_number(piece.columns * _COLUMN)}" lengthAdjust="spacingAndGlyphs"'
        place = f'x="{_number(piece.column * _COLUMN)}" y="{_number(0.77 * _LINE)}"'
        return f'<text class="{name}" {place} {width}>{escape(piece.text)}</text>'

    def _styles(self) -> list[str]:
        seconds = _number(self._seconds)
        return [
            "text{white-space:pre}",
            f".t{{font:{_number(_SIZE)}px monospace}}",
            f".h{{font:bold 18px sans-serif;fill:{_INK}}}",
            f".n{{font:15px sans-serif;fill:{_QUIET}}}",
            *(f".{name}{{{_declared(look)}}}" for look, name in self._looks.items()),
            "@media (prefers-reduced-motion:no-preference){",
            f".k{{animation:{seconds}s step-end infinite}}",
            *(f".{name}{{animation-name:{name}}}" for name in self._spans.values()),
            "}",
            *(self._keyframes(name, span) for span, name in self._spans.items()),
        ]

    def _keyframes(self, name: str, span: Span) -> str:
        steps = [(0.0, "hidden")] if span.begin > 0 else []
        steps.append((span.begin, "visible"))
        if span.end < self._seconds:
            steps.append((span.end, "hidden"))
        steps.append((self._seconds, steps[-1][1]))
        text = "".join(f"{_number(100 * at / self._seconds)}%{{visibility:{value}}}" for at, value in steps)
        return f"@keyframes {name}{{{text}}}"


def _declared(look: Look) -> str:
    parts = [f"fill:{_colour(look.colour)}"]
    parts += ["font-weight:bold"] * look.bold + ["font-style:italic"] * look.italic
    return ";".join(parts + ["text-decoration:underline"] * look.underlined)


def _colour(name: str) -> str:
    return _NAMED.get(name) or f"#{name}"


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")
