"""The rules that the whole tree keeps: what may import what, and the size and head of each module."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import virtio_mem

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path.relative_to(ROOT) for top in ("vhost_user", "virtio_mem") for path in (ROOT / top).rglob("*.py"))
TEST_MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))

# Most modules have 100 to 300 lines; past this one holds two things. A table of cases may be longer.
MOST_LINES = 350
MOST_LINES_OF_TESTS = 500

# What an embedder of the device should not pay for, in start-up time or in dependencies.
NOT_AT_IMPORT = {
    "asyncio",
    "h11",
    "hypothesis",
    "multiprocessing",
    "prometheus_client",
    "pytest",
    "rich",
    "tkinter",
    "unittest",
}


@cache
def imported_by(module: Path) -> frozenset[str]:
    """The full names that a module imports, also inside functions: `a.b` and `a.b.c` for `from a.b import c`."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(module.parts[: -node.level]) if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return frozenset(names)


def importers_of(package: str) -> set[Path]:
    return {
        module
        for module in MODULES
        if any(name == package or name.startswith(f"{package}.") for name in imported_by(module))
    }


def test_imports_are_seen() -> None:
    assert Path("virtio_mem/device.py") in importers_of("vhost_user")


def test_one_package_speaks_to_each_c_core() -> None:
    assert {module.parent for module in importers_of("vhost_user._core")} == {Path("vhost_user/_native")}
    assert set(importers_of("virtio_mem._core")) == {Path("virtio_mem/_native.py")}


def test_vhost_user_knows_no_device() -> None:
    assert {module for module in importers_of("virtio_mem") if module.parts[0] == "vhost_user"} == set()


# All of a tree's modules in one test: a thousand tests of a line each took ten seconds of a run.


def test_every_module_says_what_it_is() -> None:
    assert len(MODULES) > 200
    assert not [module for module in MODULES if not ast.get_docstring(ast.parse((ROOT / module).read_text()))]


@pytest.mark.parametrize(("modules", "most"), [(MODULES, MOST_LINES), (TEST_MODULES, MOST_LINES_OF_TESTS)])
def test_no_module_is_too_long(modules: list[Path], most: int) -> None:
    lines = {module: len((ROOT / module).read_text().splitlines()) for module in modules}
    assert lines
    assert not {module: count for module, count in lines.items() if count > most}


@pytest.mark.parametrize("package", ["vhost_user.frontend", "vhost_user.backend", "virtio_mem"])
def test_import_is_light(package: str) -> None:
    program = f"import sys; before = set(sys.modules); from {package} import *; print(*(set(sys.modules) - before))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert package in loaded.split()
    assert NOT_AT_IMPORT & set(loaded.split()) == set()


def test_names_that_are_imported_late_are_found_where_they_are_said_to_be() -> None:
    """The lists of virtio_mem/__init__.py: what type checkers read, what `import *` gives, and where each name is."""
    (for_types,) = (
        node for node in ast.parse((ROOT / "virtio_mem/__init__.py").read_text()).body if isinstance(node, ast.If)
    )
    read = {
        alias.name: node.module for node in for_types.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert read == virtio_mem._HOME
    assert sorted(read) == virtio_mem.__all__
    for name in virtio_mem.__all__:
        assert getattr(virtio_mem, name) is getattr(importlib.import_module(read[name] or ""), name)
    with pytest.raises(AttributeError, match="nothing"):
        virtio_mem.nothing  # noqa: B018
    assert set(virtio_mem.__all__) <= set(dir(virtio_mem))


def test_headers_are_plain_declarations() -> None:
    """cffi reads the same text as the C compiler, and knows no preprocessor."""
    for header in ROOT.glob("*/csrc/*_api.h"):
        assert not [line for line in header.read_text().splitlines() if line.lstrip().startswith("#")]
