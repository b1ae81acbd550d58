"""Pairs of measurements taken in turn, and the table that they make."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

Found = TypeVar("Found")

FEWEST_WITH_QUARTILES = 4
"""Of three values the quartiles would be halfway from the middle one to the others, where none is."""

SETTLE_SECONDS = 0.005
"""More than it takes to look at 60 answers and to put 60 requests into a ring: 1.5 ms."""


@dataclass(frozen=True)
class Row:
    """A line of the table. `ratio` is ours to theirs, the median over pairs; `low` and `high` are the pairs' quartiles,
    or, where they are too few for that, the least and the greatest.

    `ours` and `theirs` are medians in `unit`; `theirs` and the ratio are None where a limit is a plain number. `met` is
    None where there is no goal.
    """

    what: str
    against: str
    unit: str
    ours: float
    theirs: float | None
    ratio: float | None
    low: float | None
    high: float | None
    pairs: int
    goal: str
    met: bool | None

    @property
    def spread(self) -> str:
        """Of the ratios: what the table says beneath "quartiles"."""
        return "" if self.low is None or self.high is None else _spread(self.low, self.high, self.pairs, ".2f")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def in_turn(
    pairs: int, ours: Callable[[], Found], theirs: Callable[[], Found], *, first: int = 0
) -> list[tuple[Found, Found]]:
    """`pairs` of both; who goes first alternates, so that neither always finds the machine warm. `first` is the number
    of pairs before these."""
    found = []
    for number in range(first, first + pairs):
        if number % 2:
            other = theirs()
            found.append((ours(), other))
        else:
            mine = ours()
            found.append((mine, theirs()))
    return found


def settle(since: float) -> None:
    """Keep this processor busy until what is timed may begin: so long after `since`, a time of `perf_counter`, when the
    device had answered last.

    Who has slept for longer wakes up slower, by 15 microseconds for 1.5 ms more, where 60 requests take 7. To look at
    60 answers and to put 60 requests into a ring takes so much longer than with one. So it is the device's sleep that
    has to be as long, and not this.
    """
    end = since + SETTLE_SECONDS
    while time.perf_counter() < end:
        pass


def ratio_row(what: str, against: str, unit: str, pairs: Sequence[tuple[float, float]], most: float) -> Row:
    """The goal is a ratio of at most `most`."""
    row = _row(what, against, unit, pairs, f"at most {most:g} x")
    return replace(row, met=row.ratio is not None and row.ratio <= most)


def speed_row(what: str, against: str, unit: str, pairs: Sequence[tuple[float, float]], least: float) -> Row:
    """The goal is a ratio of at least `least`, of values that are the better the higher they are."""
    row = _row(what, against, unit, pairs, f"at least {least:g} x")
    return replace(row, met=row.ratio is not None and row.ratio >= least)


def plain_row(what: str, against: str, unit: str, pairs: Sequence[tuple[float, float]]) -> Row:
    """There is no goal."""
    return replace(_row(what, against, unit, pairs, "none"), met=None)


def _row(what: str, against: str, unit: str, pairs: Sequence[tuple[float, float]], goal: str) -> Row:
    ratios = sorted(mine / other for mine, other in pairs)
    low, high = _quartiles(ratios)
    ours, theirs = (statistics.median(values) for values in zip(*pairs, strict=True))
    return Row(what, against, unit, ours, theirs, statistics.median(ratios), low, high, len(pairs), goal, met=False)


def limit_row(what: str, unit: str, values: Iterable[float], most: float) -> Row:
    """The goal is at most `most`, in `unit`."""
    found = sorted(values)
    median, (low, high) = statistics.median(found), _quartiles(found)
    return Row(
        what,
        _spread(low, high, len(found), ".4g"),
        unit,
        median,
        None,
        None,
        low,
        high,
        len(found),
        f"at most {most:g}",
        median <= most,
    )


def number_row(what: str, unit: str, values: Iterable[float]) -> Row:
    """A plain number without a goal."""
    return replace(limit_row(what, unit, values, 0), goal="none", met=None)


def quantile(values: Sequence[float], part: float) -> float:
    """The value that this part of them doesn't exceed."""
    return sorted(values)[int(part * (len(values) - 1))]


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Of values in order; the ends where they are too few."""
    if len(values) < FEWEST_WITH_QUARTILES:
        return values[0], values[-1]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _spread(low: float, high: float, count: int, form: str) -> str:
    """What `_quartiles` found of so many values, in words."""
    found = f"{low:{form}} to {high:{form}}"
    return found if count >= FEWEST_WITH_QUARTILES else f"all {found}" if count > 1 else ""


def table(rows: Iterable[Row]) -> str:
    """The rows as text."""
    lines = [("what", "against", "ours", "theirs", "ratio", "quartiles", "pairs", "goal", "")]
    for row in rows:
        ratio = quartiles = theirs = ""
        if row.theirs is not None:
            theirs = f"{row.theirs:.4g} {row.unit}"
            ratio, quartiles = f"{row.ratio:.2f}", row.spread
        goal = row.goal if row.theirs is not None or row.met is None else f"{row.goal} {row.unit}"
        ours = f"{row.ours:.4g} {row.unit}"
        lines.append(
            (
                row.what,
                row.against,
                ours,
                theirs,
                ratio,
                quartiles,
                str(row.pairs),
                goal,
                {True: "met", False: "MISSED", None: ""}[row.met],
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
