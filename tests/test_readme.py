"""What the README shows works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(program, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" at ")[0] for line in lines[:-1]] == ["0x0 + 0x10000000", "0x100000000 + 0x40000000"]
    assert lines[-1] == str(256 << 20)


def test_every_file_that_is_named_is_there() -> None:
    named = set(re.findall(r"`([\w./]+?(?:/|\.py|\.toml)|\.ci/run|scripts/\w+)", README))
    assert len(named) > 10
    missing = [name for name in named if not any((top / name).exists() for top in (ROOT, ROOT / "virtio_mem"))]
    assert not missing
