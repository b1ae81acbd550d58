"""What the README shows works."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.conformance.wrong import FAULTS
from vhost_user.backend import Device, Server

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    program, _ = PROGRAMS
    exec(compile(program, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" at ")[0] for line in lines[:-1]] == ["0x0 + 0x10000000", "0x100000000 + 0x40000000"]
    assert lines[-1] == str(256 << 20)


def test_the_example_with_a_daemon_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, program = PROGRAMS
    path = str(tmp_path / "s")
    assert "/tmp/virtiofsd.sock" in program
    with Server() as server:
        server.listen(path, Device())
        with server.in_thread():
            exec(compile(program.replace("/tmp/virtiofsd.sock", path), "README.md", "exec"), {})
    plan, unplugged = capsys.readouterr().out.splitlines()
    comment = re.search(r"share\.plan\)  # (.*)", program)
    assert comment is not None
    assert plan == comment[1]
    assert unplugged == "0"


def test_the_extras_are_those_that_there_are() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = README.partition("| extra | for |")[2].partition("\n\n")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.partition(" | ")[0])}
    assert named == set(extras) - {"test", "mutation", "lint"}


def test_the_kit_is_judged_by_as_many_devices_as_it_says() -> None:
    (count,) = re.findall(r"judged by (\d+) devices that are wrong", README)
    assert int(count) == len(FAULTS)


def test_every_file_that_is_named_is_there() -> None:
    named = set(re.findall(r"`([\w./]+?(?:/|\.py|\.toml)|\.ci/run|scripts/\w+)", README))
    assert len(named) > 10
    missing = [
        name
        for name in named
        if not any((top / name).exists() for top in (ROOT, ROOT / "virtio_mem", ROOT / "vhost_user"))
    ]
    assert not missing
