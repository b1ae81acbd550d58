"""What docs/conformance.md shows works as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from virtio_mem.cli import main
from virtio_mem.conformance.calls import FORMS
from virtio_mem.conformance.replay import parse_script
from virtio_mem.conformance.report.diagram import as_text, diagram_of
from virtio_mem.conformance.words import WISH_FORM

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "conformance.md").read_text()


def test_the_property_holds(tmp_path: Path) -> None:
    ((name, program),) = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / name).write_text(program)
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:schemathesis", "-p", "no:cacheprovider", "--rootdir=."]
    done = subprocess.run(
        [*run, name], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_sequence_can_be_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "lines"
    shown = re.search(r"^    wish .*\n(?:    .*\n)+", PAGE, re.MULTILINE)
    assert shown
    file.write_text(shown[0])
    (script,) = parse_script(file.read_text())
    assert len(script.steps) == 4
    assert main(["conformance", "self:anonymous", "--replay", str(file)]) == 1
    assert "plug 0 1 -> NACK; now ERROR" in capsys.readouterr().out


def test_each_call_is_told_of() -> None:
    told = dict(re.findall(r"^\| `((?:\w+).*?)` \| (.*) \|$", PAGE, re.MULTILINE))
    assert {WISH_FORM, *FORMS.values()} <= {form.replace("\\|", "|") for form in told}
    assert all(told.values())


def test_the_picture_is_what_is_drawn() -> None:
    shown = re.findall(r"^    (\w.* -> .*?  .*[#.].*)$", PAGE, re.MULTILINE)
    lines = [re.split("  +", line)[0] for line in shown]
    diagram = diagram_of(lines)
    assert diagram is not None
    assert as_text(diagram) == shown


def test_options_that_are_named_exist(capsys: pytest.CaptureFixture[str]) -> None:
    main(["conformance", "--help"])
    said = capsys.readouterr().out
    named = {word.partition("=")[0] for word in re.findall(r"--[a-z][a-z-]+", PAGE)}
    plugin = (ROOT / "virtio_mem" / "conformance" / "pytest_plugin.py").read_text()
    assert {option for option in named if option not in said and option not in plugin} == set()
    assert shlex.split(re.findall(r"^    (virtio-mem .*)$", PAGE, re.MULTILINE)[0])[:2] == ["virtio-mem", "conformance"]
