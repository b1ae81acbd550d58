"""A judgement as lines for a terminal or a file of plain text: the score, what is wrong, and the sum of it."""

from __future__ import annotations

from collections.abc import Sequence

from virtio_mem.conformance.kit import Judgement, Verdict
from virtio_mem.conformance.report.data import command, counts, groups, headline, not_testable, troubles, violated
from virtio_mem.conformance.report.diagram import with_pictures
from virtio_mem.picture.spans import Line, Role, Span

_ROLES = {
    Verdict.VIOLATED: Role.BAD,
    Verdict.HOLDS: Role.GOOD,
    Verdict.NOT_OFFERED: Role.QUIET,
    Verdict.NOT_TESTABLE: Role.QUIET,
}
_STATUS = (Role.GOOD, Role.BAD, Role.TARGET)


def lines_of(judgement: Judgement, only: Sequence[str] = ()) -> list[Line]:
    """The lines; of the clauses that `only` asks for why there is no verdict on one, else the sum of that."""
    lines = [*_scores(judgement), []]
    for one, found in violated(judgement):
        lines += [
            [Span(one.clause.id, Role.BAD), Span(f"  {one.clause.strength}  {one.clause.says}")],
            [Span(f"    was: {found.was}")],
            [Span(f"    should be: {found.should}")],
        ]
        lines += [[Span(f"    {found.note}", Role.QUIET)]] if found.note else []
        lines += [[Span(f"      {line}", Role.QUIET)] for line in with_pictures(found.lines)]
        lines.append([])
    lines += _reasons(judgement, only)
    lines += [[Span("not judged: ", Role.TARGET), Span(trouble)] for trouble in troubles(judgement)]
    lines.append([Span(headline(judgement), _STATUS[judgement.status])])
    done = f"{judgement.version}: {judgement.calls:,} calls in {judgement.seconds:.1f} s; again: "
    lines.append([Span(done, Role.QUIET), Span(command(judgement))])
    return lines


def _reasons(judgement: Judgement, only: Sequence[str]) -> list[Line]:
    if not only:
        words = not_testable(judgement)
        return [[Span(f"not testable here: {words}; --report FILE has each", Role.QUIET)]] if words else []
    asked = [one for one in map(judgement.verdicts.get, dict.fromkeys(only)) if one is not None]
    return [[Span(f"{one.clause.id}: {one.verdict.value}: {one.reason}")] for one in asked if one.reason]


def _scores(judgement: Judgement) -> list[Line]:
    names = [verdict.value for verdict in counts([])]
    margin = max(len(group.title) for group in groups(judgement))
    lines: list[Line] = [[Span(" " * margin), *(Span(f"  {name}", Role.QUIET) for name in names)]]
    for group in groups(judgement):
        line = [Span(f"{group.title:<{margin}}", Role.NAME)]
        for name, (verdict, number) in zip(names, counts(group.verdicts).items(), strict=True):
            line.append(Span(f"  {number:>{len(name)}}", _ROLES[verdict] if number else Role.QUIET))
        lines.append(line)
    return lines
