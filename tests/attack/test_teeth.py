"""Daemons that are broken in one way are caught for it, and the command says so."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attack.broken import WAYS
from vhost_user.attack import Daemon, Result, Runner, Verdict, choose
from vhost_user.attack.__main__ import main
from vhost_user.attack.oracles import listens, wait_until

PASSED, FAILED = Verdict.PASSED, Verdict.FAILED


def judged(path: str, way: str, *names: str, timeout: float = 20) -> dict[str, Result]:
    with (
        Daemon(path, restart=_command(path, way), timeout=timeout) as daemon,
        Runner(daemon, timeout=timeout, settling=0.3, seed=1) as runner,
    ):
        return {result.attack.name: result for result in runner.run(choose(names))}


def _command(path: str, way: str) -> str:
    return f"{sys.executable} -m tests.attack.broken {path} {way}"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "broken.sock")


def test_a_leak_of_descriptors(path: str) -> None:
    results = judged(path, "leaks_descriptors", "framing.version-0", "framing.fds-1", "framing.fds-8")
    assert results["framing.version-0"].verdict is PASSED
    for name, number in (("framing.fds-1", 1), ("framing.fds-8", 8)):
        assert results[name].verdict is FAILED
        assert f"{number} more fd of /memfd:vhost-user-attack" in results[name].symptom


def test_a_leak_of_mappings(path: str) -> None:
    result = judged(path, "leaks_mappings", "order.running.reset-owner")["order.running.reset-owner"]
    assert result.verdict is FAILED
    assert "more mapping of /memfd:vhost-user-attack" in result.symptom


def test_a_crash_and_the_attacks_after_it(path: str) -> None:
    results = judged(path, "crashes", "rings.SET_VRING_NUM.*")
    assert results["rings.SET_VRING_NUM.index-0xc8"].symptom == "killed by SIGSEGV"
    others = [result.verdict for name, result in results.items() if not name.endswith("0xc8")]
    assert others == [PASSED] * 3


def test_an_orderly_end_is_no_crash_where_it_is_started_again(path: str) -> None:
    result = judged(path, "exits", "codec.unknown-0x0")["codec.unknown-0x0"]
    assert (result.verdict, result.note) == (PASSED, "the daemon exited with status 1")


def test_an_end_is_a_failure_where_nobody_starts_it_again(path: str) -> None:
    with subprocess.Popen(_command(path, "exits").split()):
        assert wait_until(lambda: listens(path), 20)
        with Daemon(path, timeout=20) as daemon, Runner(daemon, timeout=20, settling=0.3) as runner:
            results = list(runner.run(choose(["codec.unknown-*"])))
    assert [result.verdict for result in results] == [FAILED] + [Verdict.NOT_MADE] * 4


@pytest.mark.long
def test_a_hang(path: str) -> None:
    results = judged(path, "hangs", "status.0x100", "status.driver-ok-first", timeout=2)
    assert results["status.0x100"].verdict is FAILED
    assert "does not serve the next front end" in results["status.0x100"].symptom
    assert results["status.driver-ok-first"].verdict is PASSED


def test_a_yes_to_everything(path: str) -> None:
    results = judged(path, "says_yes", "memory.add.*")
    believed = {name for name, result in results.items() if result.verdict is Verdict.ACCEPTED}
    assert {"memory.add.size-beyond", "memory.add.overlap-guest", "memory.add.fds-two"} <= believed
    assert results["memory.add.size-unaligned"].verdict is PASSED


def test_a_write_to_what_was_not_shared(path: str) -> None:
    result = judged(path, "writes_elsewhere", "memory.more-fds")["memory.more-fds"]
    assert result.verdict is FAILED
    assert "4 bytes changed, the first outside what was shared" in result.symptom


def test_a_file_that_is_cut(path: str) -> None:
    result = judged(path, "cuts_files", "memory.more-fds")["memory.more-fds"]
    assert (result.verdict, result.symptom) == (FAILED, "wrong memory: the file was cut to 4096 bytes")


def test_an_end_by_a_signal_without_a_name(path: str) -> None:
    result = judged(path, "dies_of_a_nameless_signal", "codec.unknown-0x0")["codec.unknown-0x0"]
    assert (result.verdict, result.symptom) == (FAILED, f"killed by signal {signal.SIGRTMIN + 5}")


@pytest.mark.parametrize(("way", "status"), [("without_faults", 0), ("crashes", 1)])
def test_the_command(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str, status: int) -> None:
    saved = tmp_path / "results.json"
    names = ["rings.SET_VRING_NUM.*", "framing.random-*"]
    arguments = [path, "--restart", _command(path, way), "--only", *names, "--seed", "7", "--json", str(saved)]
    assert main([*arguments, "--timeout", "20", "--patience", "0.05"]) == status
    printed = capsys.readouterr().out
    assert "--seed 7" in printed
    assert ("killed by SIGSEGV" in printed) == bool(status)
    tree = json.loads(saved.read_text())
    assert tree["seed"] == 7
    assert tree["totals"]["failed"] == status
    assert {attack["name"] for attack in tree["attacks"]} == {attack.name for attack in choose(names)}


def test_the_command_where_nobody_listens(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([path]) == 2
    assert "a daemon has to listen there" in capsys.readouterr().err


def test_the_command_looks_first_whether_results_can_be_written(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (f"{path}.d/results.json", str(Path(path).parent)):
        assert main([path, "--json", place]) == 2
        assert capsys.readouterr().err.endswith(
            f"--json={place}: has to be a file that can be written; choose another place\n"
        )


def test_results_that_find_no_room(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = ("--restart", _command(path, "without_faults"), "--timeout", "20")
    assert main([path, *daemon, "--only", "status.0x100", "--json", "/dev/full"]) == 2
    assert "--json=/dev/full: write failed: ENOSPC" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "status", "said"),
    [("| true", 128 + signal.SIGPIPE, ""), (">/dev/full", 2, "standard output: [Errno 28] No space left on device\n")],
)
def test_an_output_that_takes_nothing_is_no_verdict(output: str, status: int, said: str) -> None:
    run = f'"$0" -m vhost_user.attack --list {output}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", run, sys.executable], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr[-len(said) :] if said else done.stderr) == (status, said)
    assert "Traceback" not in done.stderr


def test_ctrl_c_is_no_traceback(path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vhost_user.attack.__main__.Daemon", interrupted)
    assert main([path]) == 128 + signal.SIGINT
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--restart", "daemon 'unended", "can't be cut into words: No closing quotation"),
        ("--restart", " ", "has to name a program"),
        ("--timeout", "nan", "has to be 0 to 86400 seconds"),
        ("--patience", "inf", "has to be 0 to 86400 seconds"),
        ("--patience", "-1", "has to be 0 to 86400 seconds"),
        ("--pid", "0", "--pid=0: has to be a process that is there"),
        ("--pid", "-1", "--pid=-1: has to be a process that is there"),
        ("--pid", str(1 << 30), "has to be a process that is there"),
    ],
)
def test_the_command_refuses_what_can_not_be(
    path: str, option: str, value: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is attacked."""
    arguments = [path, "--restart", "/nonexistent/program", option, value]
    try:
        status: object = main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert told in capsys.readouterr().err


def test_the_command_lists_attacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "status.0x100"]) == 0
    assert capsys.readouterr().out.startswith("status.0x100: SET_STATUS of 0x100. [virtio: the status has eight bits]")


def test_every_way_of_being_broken_is_tested() -> None:
    source = Path(__file__).read_text()
    assert [way for way in WAYS if f'"{way}"' not in source] == []
