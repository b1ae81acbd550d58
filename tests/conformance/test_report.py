"""Reports of a judgement: each has what was found, none can be made to lie or break by what a target says."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.conformance.bare import Bare
from vhost_user.errors import HostError, UsageError
from virtio_mem.conformance.clauses import device_clauses
from virtio_mem.conformance.kit import Evidence, Judgement, Profile, Run, Verdict, judgement_of
from virtio_mem.conformance.replay import parse_script
from virtio_mem.conformance.report import WRITERS, check_path, write
from virtio_mem.conformance.report.data import as_data, not_testable, troubles
from virtio_mem.conformance.report.diagram import as_text, diagram_of, with_pictures
from virtio_mem.conformance.report.junit import as_junit
from virtio_mem.conformance.report.markdown import as_markdown
from virtio_mem.conformance.report.page import as_page
from virtio_mem.conformance.report.terminal import lines_of
from virtio_mem.conformance.target import Capability
from virtio_mem.picture.spans import plain

HOSTILE = "</pre><script>alert(1)</script> | \x1b[2J \x00 `x` & \"q\" 'r'"
LINES = (
    "wish region_size=1073741824 block_size=2097152 requested_size=67108864 node_id=none",
    "begin -> agreed 0x100000006",
    "plug 0 4 -> ACK",
    "ask 1 b2 1 -> ACK",
    "state 0 4 -> ACK PLUGGED",
)


def judgement(*evidence: Evidence, expected: tuple[str, ...] = (), failures: tuple[str, ...] = ()) -> Judgement:
    with Bare("exec", Capability(0)) as target:
        run = Run(list(evidence), list(failures), calls=1234)
        return judgement_of(target, run, Profile.QUICK, 7, 1.25, expected=expected)


def violation(clause: str = "MEM-STATE-9", was: str = "ACK PLUGGED", lines: tuple[str, ...] = LINES) -> Evidence:
    return Evidence(clause, "ranges.mixed", Verdict.VIOLATED, was, "ACK MIXED", lines)


HOLDS = Evidence("MEM-PLUG-3", "ranges.askew", Verdict.HOLDS)
UNABLE = Evidence("MEM-CONF-18", "notices.target", Verdict.NOT_TESTABLE, reason="exec can't: SET_TARGET")
NOT_OFFERED = Evidence("MEM-FEAT-1", "features.node", Verdict.NOT_OFFERED, reason="ACPI_PXM is not offered")
ALL = (HOLDS, violation(), UNABLE, NOT_OFFERED)


class Text(HTMLParser):
    """What a browser would show, and the elements that it would see."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.shown, self.tags, self.open = "", set[str](), list[str]()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.shown += data


@pytest.mark.parametrize("form", [".html", ".md", ".json", ".xml"])
def test_a_report_has_what_was_found(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"report{form}"
    write(judgement(*ALL), path)
    text = path.read_text()
    for words in ("MEM-STATE-9", "MEM-PLUG-3", "ACK MIXED", "ask 1 b2 1 ", "exec can", "virtio-mem conformance exec"):
        if form != ".json" or "conformance" not in words:
            assert words in text, words


def test_the_page_is_complete_in_itself() -> None:
    page = as_page(judgement(*ALL))
    text = Text(page)
    assert text.open == []
    assert {"svg", "details", "table"} <= text.tags
    assert not {"script", "link", "img", "iframe"} & text.tags
    assert "http" not in page
    assert "Violated: 1 clause" in text.shown
    assert 'id="MEM-STATE-9"' in page
    assert 'href="#MEM-STATE-9"' in page


@pytest.mark.parametrize("writer", WRITERS.values())
def test_what_a_target_says_is_shown_and_not_obeyed(writer: object) -> None:
    assert callable(writer)
    hostile = replace(judgement(violation(was=HOSTILE, lines=(*LINES, f"config -> {HOSTILE}"))), version=HOSTILE)
    text = writer(hostile)
    if writer is as_page:
        assert "script" not in Text(text).tags
        assert "alert(1)" in Text(text).shown
        assert not {"\x00", "\x1b"} & set(text)
    elif writer is as_junit:
        failure = ET.fromstring(text).find(".//failure")
        assert failure is not None
        assert "<script>alert(1)</script>" in (failure.text or "")
        assert "\x1b" not in text
    elif writer is as_markdown:
        assert "\\<script\\>" in text
        assert not [line for line in text.splitlines() if "<script>" in line and not line.startswith("    ")]
    else:
        assert json.loads(text)["version"] == HOSTILE
    assert "\x1b" not in "\n".join(map(plain, lines_of(hostile)))


def test_data_for_programs() -> None:
    data = as_data(judgement(*ALL, expected=("MEM-CONF-18",), failures=("the check x failed",)))
    assert data["counts"] == {
        "violated": 1,
        "holds": 1,
        "not offered": 1,
        "not testable here": len(data["clauses"]) - 3,
    }
    assert (data["status"], data["seed"], data["profile"], data["calls"]) == (1, 7, "quick", 1234)
    assert (data["missing"], data["failures"]) == (["MEM-CONF-18"], ["the check x failed"])
    (one,) = [clause for clause in data["clauses"] if clause["id"] == "MEM-STATE-9"]
    assert one["violations"] == [
        {"source": "ranges.mixed", "was": "ACK PLUGGED", "should": "ACK MIXED", "note": "", "lines": list(LINES)}
    ]


def test_junit_has_a_case_for_each_clause() -> None:
    found = judgement(*ALL, expected=("MEM-CONF-18",), failures=("the check x failed",))
    root = ET.fromstring(as_junit(found))
    assert len(root.findall(".//testcase")) == len(found.verdicts) + 2
    assert [case.get("name") for case in root.findall(".//testcase[failure]")] == ["MEM-STATE-9"]
    assert len(root.findall(".//testcase[error]")) == 2
    for suite in root.findall("testsuite"):
        cases = suite.findall("testcase")
        assert int(suite.get("tests", "")) == len(cases)
        assert int(suite.get("skipped", "")) == sum(case.find("skipped") is not None for case in cases)


def test_text_ends_with_the_sum() -> None:
    lines = list(map(plain, lines_of(judgement(*ALL))))
    assert lines[0].split() == ["violated", "holds", "not", "offered", "not", "testable", "here"]
    assert "MEM-STATE-9  MUST  The state is MIXED where the range has blocks of both kinds." in lines
    assert lines[-2] == "Violated: 1 clause"
    assert "1,234 calls" in lines[-1]
    assert plain(lines_of(judgement(HOLDS))[-2]) == "What could be tested holds: 1 clause"
    unjudged = list(map(plain, lines_of(judgement(expected=("MEM-PLUG-3",)))))
    assert unjudged[-2] == "It could not be judged"
    assert unjudged[-3].startswith("not judged: MEM-PLUG-3 has to get a verdict")


CONFIG = "config -> " + " ".join(f"{name}=1073741824" for name in ("block_size", "region_size", "plugged_size"))
LONG = (*LINES, "system_reset -> done", "begin -> agreed 0x1", *LINES[2:], "notices -> 1", "advance 2 -> done", CONFIG)


@pytest.mark.parametrize("lines", [LINES, LONG, LONG * 2, LONG[:2], (LINES[0], "unplug_all -> failure: gone. . .")])
def test_what_a_terminal_shows_can_be_replayed(lines: tuple[str, ...]) -> None:
    shown = [plain(line) for line in lines_of(judgement(violation(lines=lines)))]
    copied = [line for line in shown if line.startswith("      ") and "not testable" not in line]
    assert len(copied) == len(lines)
    scripts = parse_script("\n".join(copied))
    assert [f"{step.call} -> {step.answer}" for script in scripts for step in script.steps] == [
        line for line in lines if not line.startswith("wish")
    ]


def test_a_long_line_pushes_no_other_picture_aside() -> None:
    assert with_pictures([*LINES, CONFIG])[2:] == [
        "plug 0 4 -> ACK           [## # #].",
        "ask 1 b2 1 -> ACK          ##[.]# .",
        "state 0 4 -> ACK PLUGGED  [## . #].",
        f"{CONFIG}   ## . # .",
    ]


@pytest.mark.parametrize("form", [".html", ".md", ".json", ".xml", "text"])
def test_a_sequence_that_may_be_longer_than_it_need_be_is_marked(form: str) -> None:
    note = "not shortened: vhost-user can't: RESTART"
    one = judgement(violation()._replace(note=note))
    text = WRITERS[form](one) if form in WRITERS else "\n".join(map(plain, lines_of(one)))
    assert note in text.replace("&#x27;", "'")


def test_text_says_why_clauses_were_not_tested() -> None:
    def unable(clause: str, reason: str) -> Evidence:
        return Evidence(clause, "x", Verdict.NOT_TESTABLE, reason=reason)

    reasons = [
        *(unable(clause, "exec can't: CHAINS, RING") for clause in ("RING-SPLIT-1", "RING-SPLIT-2", "MEM-STATE-9")),
        unable("MEM-STATE-9", "exec can't: TIME"),
        unable("MEM-STATE-8", "too small"),
    ]
    found = judgement(*ALL[:1], *reasons)
    beyond = sum(bool(one.clause.beyond) for one in found.verdicts.values())
    rest = len(found.of(Verdict.NOT_TESTABLE)) - beyond - 4
    assert not_testable(found) == (
        f"needs CHAINS+RING 2, TIME 1; no check was run {rest}; no check can show them {beyond}; another reason 1"
    )
    shown = list(map(plain, lines_of(found)))
    assert f"not testable here: {not_testable(found)}; --report FILE has each" in shown
    for words in ("MEM-STATE-8: not testable here: too small", "MEM-ID-1: not testable here: no check was run"):
        assert words not in shown
        assert words in map(plain, lines_of(found, ["MEM-PLUG-3", "MEM-STATE-8", "MEM-ID-1"]))


def test_many_clauses_without_a_verdict_are_one_line() -> None:
    ids = tuple(device_clauses())[:40]
    (trouble,) = troubles(judgement(expected=ids, failures=("the target does not start",)))[1:]
    assert trouble.startswith("40 clauses have to get a verdict with a target of this kind, and got none: MEM-")
    assert len(trouble) < 140
    assert as_data(judgement(expected=ids))["missing"] == list(ids)


@pytest.mark.parametrize("name", ["report", "report.txt", "html"])
def test_a_file_of_no_kind(name: str) -> None:
    with pytest.raises(UsageError, match=r"ends in \.html, \.md, \.json, \.xml"):
        check_path(Path(name))


def test_a_place_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "directory.md").mkdir()
    (tmp_path / "file.md").touch()
    for name, limit in (("none/report.md", "in a directory that is there"), ("directory.md", "a file: it is a dir")):
        with pytest.raises(UsageError, match=f"has to be {limit}"):
            check_path(tmp_path / name)
    for name in ("file.md", "new.md"):
        check_path(tmp_path / name)
    monkeypatch.setattr("os.access", lambda *_: False)
    for name in ("file.md", "new.md"):
        with pytest.raises(UsageError, match="has to be a file that may be written to; choose another place"):
            check_path(tmp_path / name)


def test_a_file_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file or directory"):
        write(judgement(), tmp_path / "none" / "report.md")


def test_the_diagram_shows_what_is_plugged_and_what_is_named() -> None:
    diagram = diagram_of(LINES)
    assert diagram is not None
    assert as_text(diagram) == [
        "plug 0 4 -> ACK           [## # #].",
        "ask 1 b2 1 -> ACK          ##[.]# .",
        "state 0 4 -> ACK PLUGGED  [## . #].",
    ]


def test_the_diagram_of_many_blocks_is_narrow() -> None:
    diagram = diagram_of(["plug 100000 60000 -> ACK", "ask 0 b-3+0x1000 2 -> ERROR", "unplug_all -> ACK"])
    assert diagram is not None
    rows = as_text(diagram)
    assert max(map(len, rows)) < 80
    assert [row.count("#") for row in rows] == [12, 12, 0]
    assert "[!!]" in rows[1]
    assert [piece.first for piece in diagram.pieces] == [-3, -1, 0, 100000, 160000]


def test_the_diagram_follows_batches_and_resets() -> None:
    diagram = diagram_of(
        ["batch plug 0 2 | plug 4 1 -> ACK | ACK", "unplug 0 1 -> BUSY", "plug 2 2 -> ACK", "system_reset -> done"]
    )
    assert diagram is not None
    assert [step.plugged for step in diagram.steps] == [((0, 2), (4, 5)), ((0, 2), (4, 5)), ((0, 5),), ()]


def test_the_diagram_shows_the_last_line_whatever_it_is() -> None:
    diagram = diagram_of(["plug 0 1 -> BUSY", "notices -> 0", "pause off -> done", f"notices -> {'0' * 99}"])
    assert diagram is not None
    rows = as_text(diagram)
    assert [row.split(" ")[0] for row in rows] == ["plug", "pause", "notices"]
    assert rows[-1].startswith(f"notices -> {'0' * 46}...  ")


def test_without_blocks_there_is_no_diagram() -> None:
    assert diagram_of(["begin -> agreed 0x1", "config -> failure: gone", "target 0 -> done"]) is None
    assert diagram_of([]) is None
    assert "<svg" not in as_page(judgement(violation(lines=("begin -> agreed 0x1",))))
