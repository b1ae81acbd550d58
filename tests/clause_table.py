"""The table that `scripts/clauses` prints: each clause of spec-notes/ with its tests."""

from __future__ import annotations

import argparse
import sys
import textwrap

from tests.spec_notes import Clause, collect_marks, load_clauses

COLUMNS = (21, 12, 8)  # id, strength, party; the words take what is left
WORDS = 72


def main() -> None:
    """Print the table, then a line of totals."""
    parser = argparse.ArgumentParser(prog="scripts/clauses", description=__doc__)
    parser.add_argument("prefix", nargs="*", help="beginning of the ids to print, such as MEM-PLUG")
    parser.add_argument("--untested", action="store_true", help="only clauses that need a test and lack it")
    options = parser.parse_args()
    tests = collect_marks()
    clauses = [clause for clause in load_clauses().values() if clause.id.startswith(tuple(options.prefix) or "")]
    lacking = [clause for clause in clauses if needs_test(clause) and clause.id not in tests]
    rows = [row(clause, tests.get(clause.id, [])) for clause in (lacking if options.untested else clauses)]
    needed = sum(map(needs_test, clauses))
    totals = f"{len(clauses)} clauses; {needed} need a test, {len(lacking)} of them lack it"
    sys.stdout.write("\n".join([*rows, totals]) + "\n")


def needs_test(clause: Clause) -> bool:
    """Whether the clause must have a test: the device's, unless untestable."""
    return clause.party == "device" and clause.untestable is None


def row(clause: Clause, tests: list[str]) -> str:
    """The lines of one clause: what it says beside its id, its tests below."""
    fields = (clause.id, clause.strength, clause.party)
    cells = "".join(field.ljust(width) for field, width in zip(fields, COLUMNS, strict=True))
    below = tests or [f"untestable: {clause.untestable}" if clause.untestable else "no test"]
    lines = textwrap.wrap(clause.says, WORDS) + [f"  {line}" for line in below]
    return cells + ("\n" + " " * len(cells)).join(lines)


if __name__ == "__main__":
    main()
