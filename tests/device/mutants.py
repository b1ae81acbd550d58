"""What came of the mutants of `scripts/mutate`: a score, and those that nobody noticed.

    python -m tests.device.mutants MUTMUT

Run where that mutmut was. Exit status 1 where the score is below the limit, where a survivor is not explained by
`survivors.toml`, and where an entry of that file explains none.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

LEAST_SCORE = 95.0
"""Percent of all mutants."""

NOTICED = {"killed", "timeout", "segfault", "caught by type check"}
"""What mutmut calls a mutant that made a test fail, hang, or die."""


class Change(NamedTuple):
    """A mutant: `virtio_mem.blocks.BlockMap.count`, and the lines that it takes away and puts in their place."""

    function: str
    was: str
    now: str


def explained(kind: str) -> dict[Change, str]:
    """Why each survivor may survive: a `survivor` of Python's, or a `rules_survivor` of C's."""
    entries = tomllib.loads(Path(__file__).with_name("survivors.toml").read_text()).get(kind, [])
    return {Change(entry["function"], entry["was"], entry["now"]): entry["because"] for entry in entries}


def outcomes(mutmut: str) -> dict[str, str]:
    """What became of each mutant, by mutmut's name for it."""
    lines = _run(mutmut, "results", "--all", "true").splitlines()
    pairs = (line.strip().rpartition(": ") for line in lines if "__mutmut_" in line)
    return {name: outcome for name, _, outcome in pairs}


def change_of(mutmut: str, name: str) -> Change:
    """What a mutant changes."""
    lines = [line for line in _run(mutmut, "show", name).splitlines() if not line.startswith(("---", "+++"))]
    was, now = (" ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    function = name.rpartition("__mutmut_")[0].replace(".xǁ", ".").replace(".x_", ".").replace("ǁ", ".")
    return Change(function, was, now)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def say(text: str) -> None:
    """A line of the report."""
    sys.stdout.write(f"{text}\n")


def report(mutmut: str) -> list[str]:
    """Say all there is to say; what is not as it should be is returned, in words."""
    found = outcomes(mutmut)
    counted = Counter(found.values())
    survivors = {name: change_of(mutmut, name) for name, outcome in found.items() if outcome not in NOTICED}
    score = 100 * (len(found) - len(survivors)) / len(found)
    say(f"{len(found)} mutants: {', '.join(f'{count} {outcome}' for outcome, count in counted.most_common())}")
    say(f"score: {score:.1f} percent")
    reasons = explained("survivor")
    wrong = [] if score >= LEAST_SCORE else [f"the score is below {LEAST_SCORE:g} percent"]
    for name, change in survivors.items():
        reason = reasons.get(change)
        say(f"\n{found[name]}: {name}\n- {change.was}\n+ {change.now}\n  {reason or 'NOT EXPLAINED'}")
        wrong += [] if reason else [f"{name} is not explained"]
    unused = [change for change in reasons if change not in survivors.values()]
    return wrong + [f"explained for nothing: {change.function}: {change.now}" for change in unused]


if __name__ == "__main__":
    problems = report(sys.argv[1])
    say("\n".join(["", *problems]))
    sys.exit(bool(problems))
