"""The programs in docs/vhost-user.md are run as they stand, against each other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "vhost-user.md"
MOST_LINES = 30


def programs() -> dict[str, str]:
    """Name and text of each program of the page."""
    return dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL))


def test_each_program_fits_thirty_lines() -> None:
    assert {name: text.count("\n") for name, text in programs().items() if text.count("\n") > MOST_LINES} == {}
    assert set(programs()) == {"rng.py", "ask.py"}


def test_the_daemon_serves_the_front_end(tmp_path: Path) -> None:
    for name, text in programs().items():
        (tmp_path / name).write_text(text)
    socket = str(tmp_path / "s")
    environment = {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "rng.py"), socket], stdout=subprocess.PIPE, text=True, env=environment
    ) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == "ready\n"
        asked = [
            subprocess.run(
                [sys.executable, str(tmp_path / "ask.py"), socket],
                capture_output=True,
                text=True,
                check=True,
                env=environment,
                timeout=30,
            ).stdout
            for _ in range(2)
        ]
        daemon.terminate()
        assert daemon.wait(10) == 0
    assert all(re.fullmatch(r"[0-9a-f]{64}\n", line) for line in asked)
    assert asked[0] != asked[1]
    assert not Path(socket).exists()


def test_files_that_the_page_names_exist() -> None:
    names = re.findall(r"`((?:vhost_user|tests|scripts)/[\w/.]+)`", PAGE.read_text())
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []
