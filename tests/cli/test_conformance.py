"""`virtio-mem conformance` as its users run it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests import counts
from tests.cli.rig import command, until
from tests.cli.terminal import Terminal
from virtio_mem.cli import main

ROOT = Path(__file__).resolve().parents[2]

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

LINES = """\
# A block that is plugged can't be plugged again.
wish region_size=4194304 block_size=65536 requested_size=1048576 node_id=none
begin -> agreed 0x0
plug 0 1 -> ACK
plug 0 1 -> {answer}
"""


def test_one_clause(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    reports = [tmp_path / f"report{form}" for form in (".html", ".md", ".json", ".xml")]
    options = [word for path in reports for word in ("--report", str(path))]
    assert main(["conformance", "self:anonymous", "--only", "MEM-PLUG-3", "--seed", "7", *options]) == 0
    out, err = capsys.readouterr()
    assert "What could be tested holds: " in out
    assert "again: virtio-mem conformance self:anonymous --profile quick --seed 7" in out
    assert err == ""
    assert "MEM-PLUG-3" in reports[0].read_text()
    assert "MEM-PLUG-3" in reports[1].read_text()
    assert json.loads(reports[2].read_text())["seed"] == 7
    assert ET.parse(reports[3]).getroot().tag == "testsuites"


@pytest.mark.parametrize(("answer", "status", "said"), [("ERROR", 0, "0 other answers"), ("ACK", 1, "now ERROR")])
def test_a_replay_compares(
    answer: str, status: int, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "lines"
    file.write_text(LINES.format(answer=answer))
    assert main(["conformance", "ring", "--replay", str(file)]) == status
    out, err = capsys.readouterr()
    assert said in out
    assert "3 steps of 1 sequences" in out
    assert err == ""


def test_lines_without_an_answer_get_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What is printed is the file with its answers. Nothing is compared."""
    file = tmp_path / "lines"
    file.write_text("\n".join(line.partition(" -> ")[0] for line in LINES.splitlines()))
    assert main(["conformance", "self:anonymous", "--replay", str(file)]) == 2
    *lines, summary = capsys.readouterr().out.splitlines()
    assert lines == LINES.format(answer="ERROR").replace("0x0", "0x100000006").splitlines()[1:]
    assert summary == "# 3 steps of 1 sequences, 0 other answers, 3 without one to compare"


BY_HAND = f"""\
{LINES.format(answer="ACK")}chain 0 b1 1 readable=12,12 -> ACK
kick
{LINES.splitlines()[1]}
begin
plug 0 4 -> NACK
plug 0 1 -> ERROR
state 0 4
"""

ANSWERED = f"""\
{LINES.splitlines()[1]}
begin -> agreed 0x100000006
plug 0 1 -> ACK
# line 5: plug 0 1 -> ACK; now ERROR
plug 0 1 -> ERROR
# line 6: chain 0 b1 1 readable=12,12; not compared: self can't: CHAINS
chain 0 b1 1 readable=12,12 -> ACK
# line 7: kick; not compared: what follows line 6, since self can't: CHAINS
kick
{LINES.splitlines()[1]}
begin -> agreed 0x100000006
# line 10: plug 0 4 -> NACK; now ACK
plug 0 4 -> ACK
plug 0 1 -> ERROR
state 0 4 -> ACK PLUGGED
# 9 steps of 2 sequences, 2 other answers, 2 without one to compare, 2 not compared
"""


def test_what_is_printed_of_lines_written_by_hand_is_the_file_that_has_the_answers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "lines"
    file.write_text(BY_HAND)
    assert main(["conformance", "self:anonymous", "--replay", str(file)]) == 1
    answered = capsys.readouterr().out
    assert answered == ANSWERED
    file.write_text(answered)
    assert main(["conformance", "self:anonymous", "--replay", str(file)]) == 0
    assert "9 steps of 2 sequences, 0 other answers, 2 not compared" in capsys.readouterr().out


def test_a_device_that_fails_by_lines_written_by_hand(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "lines"
    wish = LINES.splitlines()[1]
    file.write_text(f"{wish}\nbegin -> agreed 0x0\nplug 0 1\nstate 0 1\n")
    hello = '{"virtio-mem-conformance":1,"version":"x","capabilities":["RESTART"]}'
    config = (1 << 16).to_bytes(8, "little") + bytes(48)
    answers = ['{"offered_features":0}', f'{{"config":"{config.hex()}"}}', '{"accepted":true}']
    script = 'echo "$0"; for answer in "$@"; do read line; echo "$answer"; done; read line'
    target = shlex.join(["sh", "-c", script, hello, *answers])
    assert main(["conformance", f"exec:{target}", "--replay", str(file)]) == 2
    assert capsys.readouterr().out.splitlines() == [
        wish,
        "begin -> agreed 0x0",
        "plug 0 1 -> failure: sh ended with status 0",
        "# line 3: the device failed",
        "# 2 steps of 1 sequences, 0 other answers, 1 without one to compare",
    ]


def test_a_replay_that_the_target_can_do_in_part(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "lines"
    for answer, status in (("ERROR", 0), ("ACK", 1)):
        file.write_text(LINES.format(answer=answer) + "chain 0 b1 1 readable=12,12 -> ACK\nplug 0 1 -> NACK\n")
        assert main(["conformance", "self:anonymous", "--replay", str(file)]) == status
        out = capsys.readouterr().out
        assert "line 6: chain 0 b1 1 readable=12,12; not compared: self can't: CHAINS" in out
        assert "line 7: plug 0 1; not compared: what follows line 6, since self can't: CHAINS" in out
        assert "5 steps of 1 sequences" in out
        assert "2 not compared" in out


def test_a_replay_of_which_the_target_can_do_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_text(LINES.splitlines()[1] + "\nkick\nplug 0 1 -> ACK\n")
    assert main(["conformance", "self:anonymous", "--replay", str(file)]) == 2
    assert "2 steps of 1 sequences, 0 other answers, 2 not compared" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nothing"], "virtio-mem conformance: target=nothing: its kind is one of self, ring"),
        (["vhost-user:/nowhere/at/all"], "nowhere"),
        (["exec:/nowhere/at/all"], "nowhere"),
        (["self", "--only", "MEM-PLUG-99"], "clause=MEM-PLUG-99"),
        (["self", "--report", "report.txt"], "report=report.txt"),
        (
            ["self", "--only", "MEM-OP-1", "--report", "/nowhere/x.md"],
            "/nowhere/x.md: has to be in a directory that is",
        ),
        (
            ["self", "--only", "MEM-OP-1", "--report", "/proc/version/x.md"],
            "x.md: has to be in a directory that is there",
        ),
        (["self", "--replay", "/nowhere/at/all"], "replay=/nowhere/at/all"),
        (["self", "--seed", "x"], "invalid int value"),
        (["self", "--workers", "2"], "workers=2: there is one at least, and more of them with the profile soak only"),
        (["self", "--profile", "soak", "--workers", "0"], "workers=0"),
        (["self", "--profile", "slow"], "invalid choice"),
        ([], "TARGET"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_can_not_be_judged_is_two_and_one_line(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["conformance", *arguments]) == 2
    out, err = capsys.readouterr()
    assert error in err
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize("text", ["", "# nothing\n", f"{LINES.splitlines()[0]}\n"])
def test_a_file_of_nothing_compares_nothing(text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_text(text)
    assert main(["conformance", "self", "--replay", str(file)]) == 2
    assert "there is none in it" in capsys.readouterr().err


def test_nothing_judged_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "self:anonymous", "--only", "MEM-OP-1"]) == 2
    assert "not judged: no clause got a verdict" in capsys.readouterr().out


def test_a_clause_that_was_asked_for_has_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "self:anonymous", "--only", "MEM-ID-1", "--only", "MEM-PLUG-4"]) == 0
    assert "\nMEM-ID-1: not testable here: self can't: REGISTERS\n" in capsys.readouterr().out


def test_a_program_that_never_starts_a_device_has_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    hello = '{"virtio-mem-conformance":1,"version":"x","capabilities":["RESTART"]}'
    assert main(["conformance", shlex.join(["exec:sh", "-c", 'echo "$0"', hello])]) == 2
    out = capsys.readouterr().out
    assert "the target does not start: sh ended with status 0" in out
    assert out.count("not judged: ") == 2
    assert len(out.splitlines()) < 15


def test_lines_that_can_not_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_text("plug 0 1 -> ACK\n")
    assert main(["conformance", "self", "--replay", str(file)]) == 2
    assert "line 1" in capsys.readouterr().err


def test_its_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "--help"]) == 0
    out, _ = capsys.readouterr()
    assert "  virtio-mem conformance self\n" in out
    assert "exit status:\n  0" in out
    assert max(map(len, out.splitlines())) <= 82


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"][: counts.SOAK_CROWDS])
def test_nothing_is_left_in_the_current_directory(workers: str, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "here").mkdir()
    soak = command("conformance", "self:anonymous", "--profile", "soak", "--workers", workers)
    inherited = {key: value for key, value in os.environ.items() if key != "HYPOTHESIS_STORAGE_DIRECTORY"}
    environment = inherited | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen(soak, cwd=tmp_path / "here", env=environment, stdout=subprocess.PIPE) as soaking:
        until(lambda: list(tmp_path.rglob("constants/*")), 60)
        soaking.send_signal(signal.SIGTERM)
        assert soaking.wait(60) in (0, 2)  # as much as was judged by then
    assert [path for where in ("here", "tmp") for path in (tmp_path / where).iterdir()] == []


@pytest.mark.parametrize("number", ENDING[: counts.ENDING_SIGNALS])
def test_progress_is_live_on_a_terminal(number: signal.Signals) -> None:
    with Terminal("conformance", "self:anonymous") as terminal:
        terminal.until("0 violated", 60)
        terminal.process.send_signal(number)
        assert terminal.end(60) == 128 + number
        assert not terminal.screen.cursor.hidden


def test_ctrl_c_ends_a_soak_with_what_was_found_by_then(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with Terminal("conformance", "self:anonymous", "--profile", "soak", "--report", str(report)) as terminal:
        terminal.until("0 violated", 60)
        terminal.process.send_signal(signal.SIGINT)
        terminal.until("It could not be judged", 60)
        assert terminal.end(60) == 2
    data = json.loads(report.read_text())
    assert data["missing"]
    assert data["counts"]["violated"] == 0
