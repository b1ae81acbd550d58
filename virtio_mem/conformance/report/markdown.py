"""A judgement as Markdown: to paste into an issue, or to keep beside a peer's notes."""

from __future__ import annotations

import re

from virtio_mem.conformance.kit import ClauseVerdict, Judgement, Verdict
from virtio_mem.conformance.report.data import command, counts, groups, headline, troubles, violated
from virtio_mem.conformance.report.diagram import as_text, diagram_of

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")


def as_markdown(judgement: Judgement) -> str:
    """The document."""
    parts = [f"# {_plain(judgement.target)}: {headline(judgement)}", *_facts(judgement), *_scores(judgement)]
    if found := troubles(judgement):
        parts += ["## What could not be judged", "\n".join(f"- {_plain(trouble)}" for trouble in found)]
    if judgement.of(Verdict.VIOLATED):
        parts += ["## Violations", *_violations(judgement)]
    parts.append("## Every clause")
    for group in groups(judgement):
        head = ["| clause | strength | verdict | |", "| --- | --- | --- | --- |"]
        parts += [f"### {group.title}", "\n".join([*head, *map(_row, group.verdicts)])]
    return "\n\n".join(parts) + "\n"


def _row(one: ClauseVerdict) -> str:
    words = _plain(one.reason or one.clause.says)
    return f"| {one.clause.id} | {one.clause.strength} | {one.verdict.value} | {words} |"


def _facts(judgement: Judgement) -> list[str]:
    done = f"profile {judgement.profile.value}, seed {judgement.seed}, {judgement.calls:,} calls"
    judged = f"Judged: {_plain(judgement.version)}. By {judgement.kit_version}, {done} in {judgement.seconds:.1f} s."
    return [judged, f"Again:\n\n{_code(command(judgement))}"]


def _scores(judgement: Judgement) -> list[str]:
    names = [verdict.value for verdict in counts([])]
    rows = [
        f"| {group.title} | {' | '.join(str(number) for number in counts(group.verdicts).values())} |"
        for group in groups(judgement)
    ]
    return ["\n".join([f"| | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names), *rows])]


def _violations(judgement: Judgement) -> list[str]:
    parts: list[str] = []
    for one, found in violated(judgement):
        parts.append(f"### {one.clause.id} ({one.clause.strength})")
        parts.append(f"{_plain(one.clause.says)}\n\nWas: {_plain(found.was)}. Should be: {_plain(found.should)}.")
        note = f" It is {_plain(found.note)}." if found.note else ""
        parts.append(f"Found by `{found.source}`.{note} As a file for `{command(judgement, '--replay', 'FILE')}`:")
        parts.append(_code("\n".join(found.lines)))
        if (diagram := diagram_of(found.lines)) is not None:
            parts.append(_code("\n".join(as_text(diagram))))
    return parts


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Indented, so that nothing in it can end the block."""
    return "\n".join(f"    {line}" for line in text.splitlines())
