"""A judgement in the XML that JUnit introduced and that every CI system reads: a test case for each clause."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from virtio_mem.conformance.kit import ClauseVerdict, Judgement, Verdict
from virtio_mem.conformance.report.data import command, groups, troubles

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 can't hold, not even as an entity."""


def as_junit(judgement: Judgement) -> str:
    """The document. Clauses without a verdict are skipped cases; what the kit could not do is a case with an error."""
    root = ET.Element("testsuites", name=_clean(f"virtio-mem conformance {judgement.target}"))
    for group in groups(judgement):
        suite = ET.SubElement(root, "testsuite", name=group.title)
        properties = ET.SubElement(suite, "properties")
        for name, value in _facts(judgement).items():
            ET.SubElement(properties, "property", name=name, value=_clean(value))
        for one in group.verdicts:
            _case(suite, group.title, one)
        _count(suite)
    if found := troubles(judgement):
        suite = ET.SubElement(root, "testsuite", name="The kit")
        for trouble in found:
            case = ET.SubElement(suite, "testcase", classname="The kit", name="judgement")
            ET.SubElement(case, "error", message=_clean(trouble))
        _count(suite)
    root.set("time", f"{judgement.seconds:.3f}")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _facts(judgement: Judgement) -> dict[str, str]:
    return {
        "target": judgement.target,
        "version": judgement.version,
        "kit": judgement.kit_version,
        "seed": str(judgement.seed),
        "command": command(judgement),
    }


def _case(suite: ET.Element, group: str, one: ClauseVerdict) -> None:
    case = ET.SubElement(suite, "testcase", classname=group, name=one.clause.id)
    if one.verdict is Verdict.VIOLATED:
        found = one.violations[0]
        message = f"{one.clause.says} Was: {found.was}. Should be: {found.should}."
        failure = ET.SubElement(case, "failure", message=_clean(message), type=one.clause.strength)
        note = [f"# {found.note}"] if found.note else []  # a comment in the file that the lines are
        failure.text = _clean("\n".join([*note, *found.lines]))
    elif one.verdict is not Verdict.HOLDS:
        ET.SubElement(case, "skipped", message=_clean(f"{one.verdict.value}: {one.reason}"))


def _count(suite: ET.Element) -> None:
    suite.set("tests", str(len(suite.findall("testcase"))))
    for name, child in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(name, str(len(suite.findall(f"testcase/{child}"))))


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
