"""What the pictures are made of: lines of spans, each a text and the part that it plays.

Pictures are drawn once, as spans. `plain` makes text of them for files and pipes; `terminal.coloured` makes what rich
prints. So a picture's colours are in one table, and what has no colour still has its letters.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Role(Enum):
    """What a span is, for its colour."""

    PLUGGED = "plugged"
    PARTLY = "partly plugged"
    UNPLUGGED = "unplugged"
    UNUSABLE = "not usable"
    TARGET = "requested"
    BORDER = "usable border"
    FRAME = "frame"
    TEXT = "text"
    QUIET = "quiet text"
    NAME = "name"
    GOOD = "good news"
    BAD = "bad news"


class Span(NamedTuple):
    """A piece of a line."""

    text: str
    role: Role = Role.TEXT


Line = list[Span]


def printable(text: str) -> str:
    """The text with escapes for what a terminal would obey rather than show: names and reasons come from elsewhere."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def plain(line: Line) -> str:
    """The line as text, without blanks at its end."""
    return "".join(printable(span.text) for span in line).rstrip()


def width_of(line: Line) -> int:
    """Columns that the line takes: every glyph that we use takes one."""
    return sum(len(span.text) for span in line)


class Glyphs(NamedTuple):
    """The letters of a picture. `levels` are for cells that are partly plugged, from few blocks to most."""

    plugged: str
    levels: str
    unplugged: str
    unusable: str
    left: str
    right: str
    target: str
    border: str

    def level(self, plugged: int, nb_blocks: int) -> str:
        """The letter for `plugged` of `nb_blocks` blocks, neither none nor all of them."""
        steps = len(self.levels) + 1
        return self.levels[max(1, plugged * steps // nb_blocks) - 1]


UNICODE = Glyphs("█", "░▒▓", "·", " ", "▕", "▏", "▲", "┊")
ASCII = Glyphs("#", "123456789", ".", " ", "[", "]", "^", "|")
"""For what is no terminal: a digit tells how many tenths of its blocks a cell has plugged, at least 1 and at most 9."""
