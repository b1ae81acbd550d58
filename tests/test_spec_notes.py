"""Every clause of the device has a test, every mark names a clause, and the notes are as their README says."""

import datetime
from pathlib import Path

import pytest

from tests import clause_table
from tests.spec_notes import (
    CLAUSE_ID,
    NOTES,
    NotesError,
    collect_marks,
    load_clauses,
    load_sources,
    marked_tests,
    parse_clause,
)

ENTRY = {"id": "MEM-PLUG-1", "strength": "MUST", "party": "device", "section": "PLUG request", "says": "This."}


def test_notes_are_valid_and_ids_unique() -> None:
    assert len(load_clauses()) > 200


def test_all_notes_are_on_one_version_of_the_standard() -> None:
    sources = load_sources()
    assert {(source["commit"], source["date"]) for source in sources.values()} == {
        ("15f488c162107f7b52fb2e4d0f36a2349fe9d3a9", datetime.date(2026, 4, 8))
    }
    assert all(source["files"] for source in sources.values())


def test_every_mark_names_a_clause() -> None:
    clauses = load_clauses()
    unknown = {clause: tests for clause, tests in collect_marks().items() if clause not in clauses}
    assert not unknown, unknown


def test_every_device_clause_has_a_test() -> None:
    tests = collect_marks()
    untested = [
        clause.id
        for clause in load_clauses().values()
        if clause.party == "device" and clause.untestable is None and clause.id not in tests
    ]
    assert not untested, f"{len(untested)} clauses without a test: {' '.join(untested)}"


def test_no_clause_is_called_untestable_and_tested() -> None:
    tests = collect_marks()
    assert not [clause.id for clause in load_clauses().values() if clause.untestable and clause.id in tests]


def test_what_the_device_may_do_is_accounted_for() -> None:
    named = set(CLAUSE_ID.findall((NOTES / "freedoms.md").read_text()))
    freedoms = [
        clause.id
        for clause in load_clauses().values()
        if clause.party == "device" and clause.strength == "MAY" and not clause.untestable
    ]
    assert not [clause for clause in freedoms if clause not in named]


@pytest.mark.parametrize("path", sorted(NOTES.glob("*.md")), ids=lambda path: path.name)
def test_texts_name_only_ids_that_exist(path: Path) -> None:
    assert set(CLAUSE_ID.findall(path.read_text())) <= load_clauses().keys()


def test_clause_is_read_with_its_options() -> None:
    clause = parse_clause(ENTRY | {"says": "This\nand that.", "features": ["A", "B"], "untestable": "no such machine"})
    assert (clause.says, clause.features, clause.untestable) == ("This and that.", ("A", "B"), "no such machine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "PLUG-1"}, "PLUG-1: the id is not of the form"),
        ({"id": "MEM-PLUG-1 "}, "the id is not of the form"),
        ({"strength": "must"}, "MEM-PLUG-1: strength 'must' is none of"),
        ({"party": "driver"}, "MEM-PLUG-1: party 'driver' does not go with the id"),
        ({"id": "MEM-DRV-PLUG-1"}, "party 'device' does not go with the id"),
        ({"says": " "}, "every value is a text"),
        ({"untestable": 1}, "every value is a text"),
        ({"features": [1]}, "features a list of such"),
        ({"tests": "x"}, "has no use for tests"),
    ],
)
def test_wrong_clause_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(NotesError, match=message):
        parse_clause(ENTRY | change)


@pytest.mark.parametrize("field", sorted(ENTRY))
def test_clause_without_a_required_field_is_refused(field: str) -> None:
    with pytest.raises(NotesError, match=f"needs {field}"):
        parse_clause({key: value for key, value in ENTRY.items() if key != field})


def test_an_id_given_twice_is_refused(tmp_path: Path) -> None:
    entry = "[[clause]]\n" + "".join(f'{key} = "{value}"\n' for key, value in ENTRY.items())
    (tmp_path / "a.toml").write_text(entry)
    (tmp_path / "b.toml").write_text(entry)
    with pytest.raises(NotesError, match=r"b.toml: the id MEM-PLUG-1 is taken already"):
        load_clauses(tmp_path)


MARKED = """
import pytest
pytestmark = [pytest.mark.slow, pytest.mark.clause("A")]
CASES: list[object] = [1, pytest.param(2, marks=pytest.mark.clause("B"))]
busy = pytest.mark.clause("C")

@pytest.mark.clause("D", "E")
def test_decorated(): ...

@pytest.mark.parametrize("case", [pytest.param(1, marks=[pytest.mark.clause("F")])])
def test_case(case): ...

@busy
@pytest.mark.parametrize("case", CASES)
async def test_by_name(case): ...

@pytest.mark.clause("G")
class TestGroup:
    pytestmark = pytest.mark.clause("H")
    @pytest.mark.clause("I")
    def test_in_class(self): ...
    def helper(self): ...

@pytest.mark.clause("J")
class Machine(RuleBasedStateMachine):
    def test_unreachable(self): ...

TestMachine = Machine.TestCase
"""


def test_marks_are_found_wherever_pytest_finds_them() -> None:
    assert marked_tests(MARKED, "t.py") == [
        ("t.py::test_decorated", ("A", "D", "E")),
        ("t.py::test_case", ("A", "F")),
        ("t.py::test_by_name", ("A", "B", "C")),
        ("t.py::TestGroup::test_in_class", ("A", "G", "H", "I")),
        ("t.py::TestMachine", ("A", "J")),
    ]


@pytest.mark.parametrize(
    "decorator",
    ["@pytest.mark.skip", '@pytest.mark.skip(reason="later")', "@pytest.mark.xfail", "@pytest.mark.xfail(strict=True)"],
)
def test_marks_on_tests_that_never_pass_do_not_count(decorator: str) -> None:
    assert marked_tests(f'{decorator}\n@pytest.mark.clause("A")\ndef test_it(): ...', "t.py") == []


def test_marks_in_a_module_that_is_always_skipped_do_not_count() -> None:
    source = 'pytestmark = [pytest.mark.skip, pytest.mark.clause("A")]\ndef test_it(): ...'
    assert marked_tests(source, "t.py") == []


@pytest.mark.parametrize("decorator", ['@pytest.mark.skipif(x, reason="y")', '@pytest.mark.xfail(x, reason="y")'])
def test_marks_on_tests_that_run_somewhere_count(decorator: str) -> None:
    source = f'{decorator}\n@pytest.mark.clause("A")\ndef test_it(): ...'
    assert marked_tests(source, "t.py") == [("t.py::test_it", ("A",))]


@pytest.mark.parametrize(
    "source",
    [
        '@pytest.mark.clause("A")\ndef helper(): ...',
        'unused = pytest.mark.clause("A")\ndef test_it(): ...',
        'pytestmark = pytest.mark.clause("A")',
        'def test_it():\n    pytest.mark.clause("A")',
        '@pytest.mark.clause("A")\nclass Machine: ...',
    ],
)
def test_mark_without_a_test_is_an_error(source: str) -> None:
    with pytest.raises(NotesError, match=r"t.py: the clause mark in line \d belongs to no test"):
        marked_tests(source, "t.py")


@pytest.mark.parametrize("arguments", ["", "A", "*IDS", "1", 'id="A"', 'f"A{1}"'])
def test_mark_without_literal_ids_is_an_error(arguments: str) -> None:
    with pytest.raises(NotesError, match="needs ids as string literals"):
        marked_tests(f"@pytest.mark.clause({arguments})\ndef test_it(): ...", "t.py")


def test_tests_are_named_from_the_root_and_gathered_by_clause(tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "device"
    folder.mkdir(parents=True)
    (folder / "test_a.py").write_text('@pytest.mark.clause("A", "B")\ndef test_it(): ...')
    (folder / "helper.py").write_text('@pytest.mark.clause("C")\ndef helper(): ...')
    assert collect_marks(tmp_path / "tests") == {
        "A": ["tests/device/test_a.py::test_it"],
        "B": ["tests/device/test_a.py::test_it"],
    }


def test_table_shows_clauses_with_their_tests(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["clauses", "MEM-DRV-OP-2", "MEM-PLUG-3"])
    clause_table.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["MEM-DRV-OP-2", "MUST", "NOT"]
    assert lines[1].strip().startswith("untestable: ")
    assert lines[2].split()[:3] == ["MEM-PLUG-3", "MUST", "device"]
    assert [line.strip() for line in lines[3:-1]] == (collect_marks().get("MEM-PLUG-3") or ["no test"])
    assert lines[-1].startswith("2 clauses; 1 need a test, ")
