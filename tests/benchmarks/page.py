"""docs/performance.md: what stands between its markers comes from docs/performance/table.json and curves.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import Row

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
FIGURES = ROOT / "docs" / "performance"

_MET = {True: "met", False: "missed", None: ""}


def write_page() -> None:
    """Put the figures on the page."""
    PAGE.write_text(filled(PAGE.read_text(), figures()))


def figures() -> dict[str, str]:
    """What belongs between the markers, by name."""
    table = json.loads((FIGURES / "table.json").read_text())
    curves = json.loads((FIGURES / "curves.json").read_text())
    rows = [Row(**row) for row in table["rows"]]
    met = [row.met for row in rows if row.met is not None]
    summary = f"Of {len(met)} goals {sum(met)} are met. Measured on {_machine(table)}."
    return {
        "table": f"{summary}\n\n{markdown(rows)}",
        "curves": f"Measured on {_machine(curves)}.\n\n{growth(curves['curves'])}",
    }


def _machine(found: Mapping[str, Any]) -> str:
    return f"{found['machine']}{', with the fewer pairs of --quick' if found.get('quick') else ''}"


def filled(page: str, parts: Mapping[str, str]) -> str:
    """The page with each part where it belongs, between `<!-- NAME -->` and `<!-- end of NAME -->`. ValueError where it
    has no such place."""
    for name, text in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, found, rest = page.partition(begin)
        _, ended, after = rest.partition(end)
        if not found or not ended:
            raise ValueError(f"the page has no place for {name}: {begin.strip()} and {end}")
        page = f"{before}{begin}\n{text}\n\n{end}{after}"
    return page


def markdown(rows: list[Row]) -> str:
    """The table."""
    lines = ["| what | ours | against | theirs | ratio | quartiles | pairs | goal | |", "| --- " * 9 + "|"]
    for row in rows:
        theirs = ratio = quartiles = ""
        against, goal = row.against, row.goal
        if row.theirs is None:
            against, quartiles = "", row.against
            goal = row.goal if row.met is None else f"{row.goal} {row.unit}"
        else:
            theirs = f"{row.theirs:.4g} {row.unit}"
            ratio, quartiles = f"{row.ratio:.2f}", row.spread
        cells = (
            row.what,
            f"{row.ours:.4g} {row.unit}",
            against,
            theirs,
            ratio,
            quartiles,
            row.pairs,
            goal,
            _MET[row.met],
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def growth(curves: list[Mapping[str, Any]]) -> str:
    """What each curve begins and ends with, and how it should grow."""
    lines = ["| plot | curve | first | last | grows |", "| --- " * 5 + "|"]
    for curve in curves:
        for series in curve["series"]:
            first, last = (
                f"{series['y'][at]:.3g} {curve['unit']} at {curve['x'][at]:g} {curve['x_label'].split(', ')[-1]}"
                for at in (0, -1)
            )
            lines.append(f"| {curve['title']} | {series['name']} | {first} | {last} | {series['growth']} |")
    return "\n".join(lines)
