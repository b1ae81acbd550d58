"""A judgement as one page of HTML, complete in itself: to show to a maintainer, to attach, or to put on a site.

It needs no script and nothing from elsewhere. All that came from the target is escaped.
"""

from __future__ import annotations

from html import escape
from importlib import resources
from string import Template

from virtio_mem.conformance.kit import ClauseVerdict, Evidence, Judgement, Verdict
from virtio_mem.conformance.report.data import Group, command, counts, groups, headline, troubles, violated
from virtio_mem.conformance.report.diagram import Diagram, Piece, Step, diagram_of, is_in, short
from virtio_mem.picture.spans import printable

_CLASSES = {
    Verdict.HOLDS: "holds",
    Verdict.VIOLATED: "violated",
    Verdict.NOT_OFFERED: "none",
    Verdict.NOT_TESTABLE: "none",
}
_CELL = 12
_HEIGHT = 16


def _text(text: str) -> str:
    """Text as a page may have it: escaped, and without letters that are not to be seen."""
    return "\n".join(escape(printable(line)) for line in text.split("\n"))


def as_page(judgement: Judgement) -> str:
    """The page."""
    template = Template(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    broken = list(violated(judgement))
    return template.substitute(
        title=_text(f"{judgement.target}: {headline(judgement)}"),
        target=_text(judgement.target),
        headline=_text(headline(judgement)),
        state=("holds", "violated", "unknown")[judgement.status],
        facts=_facts(judgement),
        tiles=_tiles(judgement),
        troubles=_troubles(judgement),
        violations="".join(_violation(judgement, one, found) for one, found in broken),
        groups="".join(map(_group, groups(judgement))),
        command=_text(command(judgement)),
    )


def _facts(judgement: Judgement) -> str:
    facts = {
        "Judged": judgement.version,
        "By": judgement.kit_version,
        "Profile": f"{judgement.profile.value}, seed {judgement.seed}",
        "Done": f"{judgement.calls:,} calls in {judgement.seconds:.1f} s",
    }
    return "".join(f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())


def _tiles(judgement: Judgement) -> str:
    found = counts(list(judgement.verdicts.values()))
    tiles = "".join(
        f'<div class="tile {_CLASSES[verdict]}{" zero" if not number else ""}"><b>{number}</b>{verdict.value}</div>'
        for verdict, number in found.items()
    )
    parts = "".join(
        f'<i class="{_CLASSES[verdict]}" style="flex:{number}"></i>' for verdict, number in found.items() if number
    )
    return f'<div class="tiles">{tiles}</div><div class="bar" aria-hidden="true">{parts}</div>'


def _troubles(judgement: Judgement) -> str:
    found = troubles(judgement)
    items = "".join(f"<li>{_text(trouble)}</li>" for trouble in found)
    return f'<section class="card unknown"><h2>What could not be judged</h2><ul>{items}</ul></section>' if found else ""


def _violation(judgement: Judgement, one: ClauseVerdict, found: Evidence) -> str:
    clause, lines = one.clause, "\n".join(found.lines)
    diagram = diagram_of(found.lines)
    again = command(judgement, "--replay", "FILE")
    return f"""
<section class="card violated" id="{_text(clause.id)}">
<h3>{_text(clause.id)} {_badge(clause.strength, "plain")}</h3>
<p class="says">{_text(clause.says)}</p>
<table class="facts"><tr><th>Was</th><td>{_text(found.was)}</td></tr>
<tr><th>Should be</th><td>{_text(found.should)}</td></tr></table>
{_drawn(diagram) if diagram else ""}
{f"<p>The sequence is {_text(found.note)}.</p>" if found.note else ""}
<details{"" if diagram else " open"}><summary>The sequence, found by <code>{_text(found.source)}</code></summary>
<pre>{_text(lines)}</pre>
<p>As a file, it is run again with <code>{_text(again)}</code>.</p></details>
</section>"""


def _badge(text: str, kind: str) -> str:
    return f'<span class="badge {kind}">{_text(text)}</span>'


def _group(group: Group) -> str:
    found = counts(group.verdicts)
    badges = "".join(
        _badge(f"{number} {verdict.value}", _CLASSES[verdict]) for verdict, number in found.items() if number
    )
    rows = "".join(map(_row, group.verdicts))
    return f"""
<details class="card" open><summary><h3>{_text(group.title)}</h3> {badges}</summary>
<table class="board">{rows}</table></details>"""


def _row(one: ClauseVerdict) -> str:
    clause, kind = one.clause, _CLASSES[one.verdict]
    id_ = _text(clause.id)
    name = f'<a href="#{id_}">{id_}</a>' if one.verdict is Verdict.VIOLATED else id_
    reason = f'<div class="reason">{_text(one.reason)}</div>' if one.reason else ""
    return (
        f"<tr><td>{name}</td><td>{_badge(one.verdict.value, kind)}</td><td>{_text(clause.strength)}</td>"
        f"<td>{_text(clause.says)}{reason}</td></tr>"
    )


# The picture of a sequence.


def _drawn(diagram: Diagram) -> str:
    rows = "".join(
        f"<tr><td><code>{_text(short(step.line))}</code></td><td>{_bar(step, diagram.pieces)}</td></tr>"
        for step in diagram.steps
    )
    below = any(piece.first < 0 for piece in diagram.pieces)
    cut = any(piece.end - piece.first > piece.cells for piece in diagram.pieces)
    legend = [("plugged", "plugged"), ("", "unplugged"), ("named", "named by the step")]
    legend += [("below", "below the region")] * below + [("left-out", "more blocks than are drawn")] * cut
    words = "".join(f'<i class="cell {kind}"></i> {text} ' for kind, text in legend)
    return f'<div class="diagram"><table>{rows}</table><p class="legend">{words}</p></div>'


def _bar(step: Step, pieces: list[Piece]) -> str:
    shapes, at = "", 1
    for piece in pieces:
        kind = "below" if piece.first < 0 else "plugged" if is_in(piece, step.plugged) else "unplugged"
        if piece.end - piece.first > piece.cells:
            kind += " left-out"
        cells = "".join(
            f'<rect class="{kind}" x="{at + cell * _CELL}" y="3" width="{_CELL - 2}" height="{_HEIGHT - 6}"/>'
            for cell in range(piece.cells)
        )
        width = piece.cells * _CELL
        if step.named is not None and is_in(piece, [step.named]):
            cells += f'<rect class="named" x="{at - 1}" y="1" width="{width}" height="{_HEIGHT - 2}"/>'
        blocks = f"block {piece.first}" if piece.end - piece.first == 1 else f"blocks {piece.first} to {piece.end - 1}"
        shapes += f"<g><title>{blocks}</title>{cells}</g>"
        at += width + 2
    return f'<svg width="{at}" height="{_HEIGHT}" role="img">{shapes}</svg>'
