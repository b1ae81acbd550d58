"""What was found, for people and for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import TextIO

from vhost_user.attack.runner import Result, Runner, Verdict
from vhost_user.attack.theme import Attack

_SHOWN = (Verdict.FAILED, Verdict.ACCEPTED, Verdict.NOT_MADE)
"""Verdicts whose attacks are listed one by one in any case."""

_STYLES = {Verdict.FAILED: "bold red", Verdict.ACCEPTED: "yellow", Verdict.NOT_MADE: "red", Verdict.PASSED: "green"}


def explain(result: Result) -> str:
    """One line: what the daemon did, what broke, and why a yes is in order."""
    if result.verdict is Verdict.NOT_OFFERED:
        return ""
    parts = [result.symptom, str(result.outcome), result.note]
    if result.verdict is Verdict.PASSED and result.outcome.reaction.value == "accepted":
        parts.append(f"may be: {result.attack.lawful}")
    return "; ".join(filter(None, parts))


def as_json(runner: Runner, results: Sequence[Result]) -> str:
    """All of it."""
    offer = runner.offer
    tree = {
        "socket": runner.daemon.path,
        "seed": runner.seed,
        "features": f"{offer.features:#x}",
        "protocol_features": f"{int(offer.protocol):#x}",
        "one_shot": runner.one_shot,
        "restarts": runner.daemon.restarts,
        "totals": {verdict.name.lower(): count for verdict, count in totals(results).items()},
        "attacks": [
            {
                "name": result.attack.name,
                "says": result.attack.says,
                "source": result.attack.source,
                "verdict": result.verdict.name.lower(),
                "reaction": result.outcome.reaction.name.lower(),
                "detail": result.outcome.detail,
                "symptom": result.symptom,
                "note": result.note,
                "lawful": result.attack.lawful,
            }
            for result in results
        ],
    }
    return json.dumps(tree, indent=1)


def totals(results: Iterable[Result]) -> dict[Verdict, int]:
    """How many attacks have each verdict."""
    counted = Counter(result.verdict for result in results)
    return {verdict: counted[verdict] for verdict in Verdict}


def theme_of(attack: Attack) -> str:
    """The first part of its name."""
    return attack.name.split(".", 1)[0]


def table(results: Sequence[Result]) -> Iterator[str]:
    """A line for each theme, with the number of its attacks of each verdict."""
    themes = dict.fromkeys(theme_of(result.attack) for result in results)
    width = max((len(theme) for theme in themes), default=0)
    yield " " * width + "".join(f"{verdict.value:>13}" for verdict in Verdict)
    for theme in themes:
        counted = totals(result for result in results if theme_of(result.attack) == theme)
        yield f"{theme:<{width}}" + "".join(f"{count or '.':>13}" for count in counted.values())


class Report:
    """Writes to `file` as results come in: those that matter, or with `verbose` all."""

    def __init__(self, file: TextIO, *, verbose: bool = False) -> None:
        self._file = file
        self._verbose = verbose
        self._console = None
        if find_spec("rich") is not None and file.isatty():
            from rich.console import Console  # noqa: PLC0415 - an extra, and slow to import

            self._console = Console(file=file, highlight=False, soft_wrap=True)

    def line(self, text: str, style: str = "") -> None:
        """One line."""
        if self._console is not None:
            self._console.print(text, style=style or None, markup=False)
        else:
            self._file.write(text + "\n")
            self._file.flush()

    def result(self, result: Result) -> None:
        """The line for one attack, if it is to be shown, and for what matters what the attack is."""
        matters = result.verdict in _SHOWN
        if not matters and not self._verbose:
            return
        text = f"{result.verdict.value:<11}  {result.attack.name}: {explain(result)}".rstrip(": ")
        self.line(text, _STYLES.get(result.verdict, "dim"))
        if matters:
            self.line(f"{'':<13}{result.attack.says} [{result.attack.source}]", "dim")

    def close(self, results: Sequence[Result]) -> None:
        """The table, and the sum."""
        self.line("")
        for line in table(results):
            self.line(line)
        counted = totals(results)
        self.line("")
        sums = [f"{counted[verdict]} {verdict.value}" for verdict in Verdict if counted[verdict]]
        self.line(f"{len(results)} attacks: {', '.join(sums)}")
