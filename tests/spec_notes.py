"""The clauses of `spec-notes/` and the tests that are marked with them, for `test_spec_notes.py` and `scripts/clauses`.

Marks are found by reading the test files, not by running them: `pytest.mark.clause("MEM-PLUG-1", ...)` as a decorator
of a test or of a class of tests, in `pytestmark` of a module or a class, in `pytest.param(..., marks=...)`, and in a
name of the module that a decorator refers to. A mark that belongs to no test, or whose arguments are no string
literals, is an error: it would count for something that is never run.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOTES = ROOT / "spec-notes"
TESTS = ROOT / "tests"

CLAUSE_ID = re.compile(r"\b(?:MEM|DEP|RING|STATUS|FEAT|RESET|CFG|START|MMIO)(?:-[A-Z]+)*-\d+\b")
"""What an id looks like; also finds ids in running text."""

STRENGTHS = frozenset({"MUST", "MUST NOT", "SHOULD", "SHOULD NOT", "MAY", "STATES", "DEPENDED"})

_REQUIRED = {"id", "strength", "party", "section", "says"}
_OPTIONAL = {"features", "untestable"}


class NotesError(Exception):
    """A file of notes, or a mark in a test, is not as `spec-notes/README.md` says."""


@dataclass(frozen=True, slots=True)
class Clause:
    """One demand; the fields are explained in `spec-notes/README.md`."""

    id: str
    strength: str
    party: str
    section: str
    says: str
    features: tuple[str, ...] = ()
    untestable: str | None = None


# The notes.


def load_clauses(folder: Path = NOTES) -> dict[str, Clause]:
    """All clauses by id, in the order of file names and entries. NotesError where an entry is not valid."""
    clauses: dict[str, Clause] = {}
    for path in sorted(folder.glob("*.toml")):
        for entry in tomllib.loads(path.read_text()).get("clause", []):
            clause = parse_clause(entry)
            if clause.id in clauses:
                raise NotesError(f"{path.name}: the id {clause.id} is taken already")
            clauses[clause.id] = clause
    return clauses


def load_sources(folder: Path = NOTES) -> dict[str, dict[str, Any]]:
    """The `[source]` table of each file by the file's name."""
    return {path.name: tomllib.loads(path.read_text())["source"] for path in sorted(folder.glob("*.toml"))}


def parse_clause(entry: Mapping[str, Any]) -> Clause:
    """One `[[clause]]` table, checked. NotesError with its id and what is wrong."""
    name = entry.get("id", "a clause without id")
    if problem := _problem(entry):
        raise NotesError(f"{name}: {problem}")
    return Clause(
        entry["id"],
        entry["strength"],
        entry["party"],
        entry["section"],
        " ".join(entry["says"].split()),
        tuple(entry.get("features", ())),
        entry.get("untestable"),
    )


def _problem(entry: Mapping[str, Any]) -> str | None:
    if missing := _REQUIRED - entry.keys():
        return f"needs {', '.join(sorted(missing))}"
    if unknown := entry.keys() - _REQUIRED - _OPTIONAL:
        return f"has no use for {', '.join(sorted(unknown))}"
    texts = [value for field, value in entry.items() if field != "features"] + entry.get("features", [])
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return "every value is a text that is not empty, and features a list of such"
    if not CLAUSE_ID.fullmatch(entry["id"]):
        return f"the id is not of the form {CLAUSE_ID.pattern}"
    if entry["strength"] not in STRENGTHS:
        return f"strength {entry['strength']!r} is none of {', '.join(sorted(STRENGTHS))}"
    if entry["party"] != ("driver" if "-DRV-" in entry["id"] else "device"):
        return f"party {entry['party']!r} does not go with the id"
    return None


# The marks.


@cache
def collect_marks(folder: Path = TESTS) -> Mapping[str, list[str]]:
    """For each clause id that is marked: its tests, as pytest names them. NotesError for a mark that is void."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted(folder.rglob("test_*.py")):
        for test, ids in marked_tests(path.read_text(), path.relative_to(folder.parent).as_posix()):
            for clause in ids:
                found[clause].append(test)
    return dict(found)


def marked_tests(source: str, name: str) -> list[tuple[str, tuple[str, ...]]]:
    """The tests of one file that are run, each with the ids that it is marked with. `name` is the file's."""
    if "pytest.mark.clause" not in source:
        return []  # as most files, each of which takes long to parse
    module = ast.parse(source, name)
    void = {id(call): call for call in _calls(module)}
    named = {target: value for target, value in _assignments(module.body) if target != "pytestmark"}
    tests = []
    for test, own in _functions(module.body, name, []):
        decorators = own + _referenced(own, named)
        calls = [call for decorator in decorators for call in _calls(decorator)]
        for call in calls:
            void.pop(id(call), None)
        ids = sorted({clause for call in calls for clause in _ids(call, name)})
        if ids and not any(_never_passes(decorator) for decorator in decorators):
            tests.append((test, tuple(ids)))
    if void:
        lines = sorted(call.lineno for call in void.values())
        raise NotesError(f"{name}: the clause mark in line {lines[0]} belongs to no test")
    return tests


def _functions(
    body: Iterable[ast.stmt], prefix: str, inherited: list[ast.expr]
) -> Iterator[tuple[str, list[ast.expr]]]:
    """Each test with the expressions that may mark it: its own decorators and those of what it is in."""
    body = list(body)
    inherited = inherited + [value for target, value in _assignments(body) if target == "pytestmark"]
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield from _functions(node.body, f"{prefix}::{node.name}", inherited + node.decorator_list)
        elif isinstance(node, ast.ClassDef) and (machine := _state_machine(node, body)):
            yield f"{prefix}::{machine}", inherited + node.decorator_list
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            yield f"{prefix}::{node.name}", inherited + node.decorator_list


def _state_machine(node: ast.ClassDef, body: Iterable[ast.stmt]) -> str | None:
    """The name under which Hypothesis runs `node`, in `TestName = Machine.TestCase`, if that is what it is."""
    for target, value in _assignments(body):
        if isinstance(value, ast.Attribute) and value.attr == "TestCase" and _name(value.value) == node.name:
            return target
    return None


def _assignments(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for node in body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            yield node.target.id, node.value


def _referenced(decorators: Iterable[ast.expr], named: Mapping[str, ast.expr]) -> list[ast.expr]:
    """What the module's names that occur in `decorators` stand for."""
    names = {node.id for decorator in decorators for node in ast.walk(decorator) if isinstance(node, ast.Name)}
    return [value for name, value in named.items() if name in names]


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    """The `pytest.mark.clause(...)` calls in `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func) == "pytest.mark.clause":
            yield node


def _ids(call: ast.Call, name: str) -> Iterator[str]:
    for argument in call.args or [call]:
        if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
            raise NotesError(f"{name}: the clause mark in line {call.lineno} needs ids as string literals")
        yield argument.value


def _never_passes(decorator: ast.expr) -> bool:
    """Whether `decorator` keeps its test from ever passing: `skip`, or an `xfail` without condition."""
    call = decorator.func if isinstance(decorator, ast.Call) else decorator
    if isinstance(decorator, ast.List | ast.Tuple):
        return any(_never_passes(element) for element in decorator.elts)
    unconditional = not (isinstance(decorator, ast.Call) and decorator.args)
    return _name(call) == "pytest.mark.skip" or (_name(call) == "pytest.mark.xfail" and unconditional)


def _name(node: ast.expr) -> str:
    """`a.b.c` for such an expression, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (prefix := _name(node.value)):
        return f"{prefix}.{node.attr}"
    return ""
