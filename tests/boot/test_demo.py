"""The demo: its pictures, and all of it with a Linux guest, as its film has it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as Terminal

from tests import counts
from tests.cli.rig import ONE_ZONE, Machine
from tests.peers.processes import LATE, listens, wait_until
from tests.picture.player import Player
from vhost_user.units import MIB
from virtio_mem.boot import demo
from virtio_mem.client import Client


class SimpleGuest:
    """A console whose guest knows one thing."""

    @staticmethod
    def run(command: str) -> str:
        assert "MemTotal" in command
        return "MemTotal:   1000 kB\n"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with Machine(ONE_ZONE, tmp_path / "api") as made:
        yield made


@pytest.fixture
def show(machine: Machine, tmp_path: Path) -> demo.Show:
    return demo.Show(SimpleGuest(), Client(tmp_path / "api"))  # type: ignore[arg-type]


def test_what_is_no_terminal_has_one_picture_of_a_resize(
    machine: Machine, show: demo.Show, capsys: pytest.CaptureFixture[str]
) -> None:
    with machine.guest("mem0", blocks_a_second=300):
        show.resize(320 * MIB)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "  virtio-mem resize 320M --wait"
    assert printed.count("mem0 ▕" + "█" * 32 + "·" * 32 + "▏") == printed.count("mem0") == 1
    assert "; the host holds 0 bytes\n  guest: MemTotal: 1000 kB\n  reached after " in printed


def test_a_terminal_has_a_picture_that_moves(machine: Machine, show: demo.Show) -> None:
    written = StringIO()
    show.terminal = Terminal(file=written, force_terminal=True, width=100, soft_wrap=True)
    with machine.guest("mem0", blocks_a_second=300):
        show.resize(320 * MIB)
    printed = written.getvalue()
    assert printed.count("mem0") > 2
    assert "█" * 32 in printed.rpartition("mem0")[2]
    assert printed.rstrip().splitlines()[-1].startswith("  reached after ")


def test_a_guest_that_does_nothing_ends_the_demo(show: demo.Show, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "RESIZE_SECONDS", 0.2)
    with pytest.raises(SystemExit, match="not reach the target in time"):
        show.resize(320 * MIB)


def test_a_guest_that_stalls_for_a_while_is_waited_for(
    machine: Machine, show: demo.Show, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask, verdicts = show.api.operation, iter(["stalled", "refused", "stalled"])

    def judged(number: int) -> dict[str, Any]:
        found = ask(number)
        return found | {"state": next(verdicts, found["state"])}

    monkeypatch.setattr(show.api, "operation", judged)
    with machine.guest("mem0", blocks_a_second=300):
        show.resize(320 * MIB)
    assert "  reached after " in capsys.readouterr().out


@pytest.mark.needs_peers
def test_a_film_that_is_broken_off_ends_the_machine(tmp_path: Path) -> None:
    """No process has its API's socket any more, nor is its directory there."""
    output = tmp_path / "demo.svg"
    command = [sys.executable, "-m", "virtio_mem.boot.demo", "--picture", str(output)]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: list(tmp_path.glob("virtio-mem-demo-*/api")), "the machine's API")
        (api,) = tmp_path.glob("virtio-mem-demo-*/api")
        process.terminate()
        assert process.wait(LATE) != 0
    wait_until(lambda: not listens(api), "the machine ends")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.needs_peers
@pytest.mark.long
def test_the_demo_is_filmed(tmp_path: Path) -> None:
    for number in range(counts.FILMS):
        output = tmp_path / f"{number}.svg"
        command = [sys.executable, "-m", "virtio_mem.boot.demo", "--picture", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        player = Player(output.read_text())
        assert player.screen(None) == done.stdout.rstrip("\n")
        assert player.screen(player.seconds - 0.01) == player.screen(None)
        assert "0 bytes did not go back at once" in done.stdout
