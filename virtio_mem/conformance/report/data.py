"""A judgement as plain data, and what the reports have in common: groups of clauses, and how to repeat it."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from virtio_mem.conformance.clauses import DeviceClause
from virtio_mem.conformance.kit import NO_CHECK, ClauseVerdict, Evidence, Judgement, Verdict
from virtio_mem.picture.sizes import counted

FORMAT = 1
"""The version of the form of `as_data`: raised when a field changes its meaning or goes."""

_MOST_NAMED = 3
"""Clauses without a verdict that are named: a target that is not there has none for any."""

_TITLES = {"MEM": "The memory device", "DEP": "What drivers depend on", "RING": "Rings"}
_BASICS = "Features, reset and configuration"


class Group(NamedTuple):
    """Clauses that a reader looks at together."""

    title: str
    verdicts: list[ClauseVerdict]


def title_of(clause: DeviceClause) -> str:
    """The group that a clause belongs to."""
    return _TITLES.get(clause.id.partition("-")[0], _BASICS)


def groups(judgement: Judgement) -> list[Group]:
    """All clauses, in the order of the notes."""
    by_title: dict[str, list[ClauseVerdict]] = {}
    for one in judgement.verdicts.values():
        by_title.setdefault(title_of(one.clause), []).append(one)
    return [Group(title, verdicts) for title, verdicts in by_title.items()]


def counts(verdicts: list[ClauseVerdict]) -> dict[Verdict, int]:
    """How many there are of each verdict, the gravest first; those of which there is none are 0."""
    order = (Verdict.VIOLATED, Verdict.HOLDS, Verdict.NOT_OFFERED, Verdict.NOT_TESTABLE)
    return {verdict: sum(one.verdict is verdict for one in verdicts) for verdict in order}


def command(judgement: Judgement, *more: str) -> str:
    """What makes the same judgement again."""
    words = ["virtio-mem", "conformance", judgement.target]
    options = ["--profile", judgement.profile.value, "--seed", str(judgement.seed)]
    return shlex.join([*words, *(more or options)])


def headline(judgement: Judgement) -> str:
    """The judgement in a sentence."""
    found = counts(list(judgement.verdicts.values()))
    if found[Verdict.VIOLATED]:
        return f"Violated: {counted(found[Verdict.VIOLATED], 'clause')}"
    if judgement.status:
        return "It could not be judged"
    return f"What could be tested holds: {counted(found[Verdict.HOLDS], 'clause')}"


def troubles(judgement: Judgement) -> list[str]:
    """What kept the kit from judging all that it should have."""
    ids, found = judgement.missing, list(judgement.failures)
    if len(ids) > _MOST_NAMED:
        first = ", ".join(ids[:_MOST_NAMED])
        found.append(f"{len(ids)} clauses have to get a verdict with a target of this kind, and got none: {first}...")
    else:
        found += [f"{clause} has to get a verdict with a target of this kind, and got none" for clause in ids]
    return ["no clause got a verdict"] if judgement.status == 2 and not found else found


def not_testable(judgement: Judgement) -> str:
    """Why clauses could not be tested here, in a line, the reasons of most of them first; "" where all could be."""
    needs: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for one in judgement.of(Verdict.NOT_TESTABLE):
        lacking = sorted((names for names in map(_lacking, one.reason.split("; ")) if names), key=len)
        if one.clause.beyond:
            others["no check can show them"] += 1
        elif lacking:
            needs["+".join(lacking[0])] += 1
        else:
            others[one.reason if one.reason == NO_CHECK else "another reason"] += 1
    parts = [", ".join(f"{names} {number}" for names, number in needs.most_common())]
    parts = [f"needs {part}" for part in parts if part]
    return "; ".join([*parts, *(f"{reason} {number}" for reason, number in others.most_common())])


def _lacking(reason: str) -> list[str]:
    """The capabilities whose lack a reason is, if it is one: see `Target.lacks`."""
    _, mark, names = reason.partition(" can't: ")
    return names.split(", ") if mark else []


def as_data(judgement: Judgement) -> dict[str, Any]:
    """All of it, for programs."""
    return {
        "format": FORMAT,
        "target": judgement.target,
        "kind": judgement.kind,
        "version": judgement.version,
        "kit_version": judgement.kit_version,
        "profile": judgement.profile.value,
        "seed": judgement.seed,
        "seconds": round(judgement.seconds, 3),
        "calls": judgement.calls,
        "status": judgement.status,
        "counts": {verdict.value: n for verdict, n in counts(list(judgement.verdicts.values())).items()},
        "missing": list(judgement.missing),
        "failures": list(judgement.failures),
        "clauses": [_clause(one) for one in judgement.verdicts.values()],
    }


def _clause(one: ClauseVerdict) -> dict[str, Any]:
    clause = one.clause
    return {
        "id": clause.id,
        "strength": clause.strength,
        "section": clause.section,
        "says": clause.says,
        "verdict": one.verdict.value,
        "reason": one.reason,
        "sources": list(dict.fromkeys(evidence.source for evidence in one.evidence)),
        "violations": [
            {name: getattr(each, name) for name in ("source", "was", "should", "note")} | {"lines": list(each.lines)}
            for each in one.violations
        ],
    }


def as_json(judgement: Judgement) -> str:
    """The same as text."""
    return json.dumps(as_data(judgement), indent=2, ensure_ascii=False) + "\n"


def violated(judgement: Judgement) -> Iterator[tuple[ClauseVerdict, Evidence]]:
    """Each clause that is violated, with the shortest way to it."""
    for one in judgement.of(Verdict.VIOLATED):
        yield one, one.violations[0]
