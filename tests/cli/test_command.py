"""The command itself: its help, its errors, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import vhost_user
import virtio_mem
from tests.cli.rig import Machine, command, run, until
from virtio_mem.cli import SUBCOMMANDS, main

CLIENTS = ("info", "resize", "resize-zone", "spread", "map", "watch")
ARGUMENTS = {"resize": ["1G"], "spread": ["1G"], "resize-zone": ["mem0", "1G"]}


def test_help_lists_every_subcommand() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name, subcommand in SUBCOMMANDS.items():
        assert f"  {name} " in done.stdout
        assert subcommand.summary in done.stdout
    assert "exit status:" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("name", CLIENTS)
def test_every_subcommand_teaches(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert f"virtio-mem {name} --api-socket " in out
    assert "example" in out
    assert "exit status:\n  0" in out
    assert max(map(len, out.splitlines())) <= 80
    assert err == ""


@pytest.mark.parametrize("name", CLIENTS)
def test_the_example_in_the_help_works(name: str, machine: Machine, tmp_path: Path) -> None:
    """Each as it stands there, but for the names of files."""
    lines = [line for line in run(name, "--help").stdout.splitlines() if line.startswith(f"  virtio-mem {name} ")]
    for line in lines:
        words = line.split("|")[0].replace("api.sock", str(tmp_path / "api.sock")).split()[1:]
        words = [str(tmp_path / word) if word == "map.svg" else word for word in words]
        if name == "watch":
            with subprocess.Popen(command(*words), stdout=subprocess.PIPE) as watching:
                assert watching.stdout
                assert watching.stdout.readline()
                watching.send_signal(signal.SIGINT)
            assert watching.returncode == 128 + signal.SIGINT
        elif name == "resize":
            assert "resize one of its zones" in run(*words).stderr
        else:
            with machine.guest("mem0"), machine.guest("mem1"):
                done = run(*words)
                assert (done.returncode, done.stderr) == (0, "")
            if name == "map" and "--output" in words:
                assert done.stdout == f"{tmp_path}/map.svg: {(tmp_path / 'map.svg').stat().st_size:,} bytes\n"


def test_no_subcommand_is_a_mistake() -> None:
    assert run().returncode == 2
    assert run("explode").stderr == (
        "virtio-mem: SUBCOMMAND=explode: has to be one of serve, boot, info, resize, resize-zone, spread, map, "
        "watch, doctor, conformance; see virtio-mem --help\n"
    )


def test_the_version() -> None:
    assert run("--version").stdout.startswith("virtio-mem 0.")
    assert "virtio-mem --version\n" in run("--help").stdout


def test_a_tree_that_was_not_installed_has_no_version(tmp_path: Path) -> None:
    """Nobody else's business: not that of a trace, a report or vmm.ping either."""
    (tmp_path / "virtio_mem").symlink_to(Path(virtio_mem.__file__).parent)
    (tmp_path / "vhost_user").symlink_to(Path(vhost_user.__file__).parent)
    asked = "import sys; sys.path = sys.argv[1:]; from virtio_mem.cli import main; sys.exit(main(['--version']))"
    standard = [
        path for path in sys.path if path and "site-packages" not in path and not (Path(path) / "virtio_mem").exists()
    ]
    done = subprocess.run(
        [sys.executable, "-S", "-c", asked, str(tmp_path), *standard], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "virtio-mem unknown\n", "")


@pytest.mark.parametrize("name", CLIENTS)
def test_a_server_that_is_not_there(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--api-socket", str(tmp_path / "none"), *ARGUMENTS.get(name, [])]) == 1
    assert capsys.readouterr().err == (
        f"virtio-mem {name}: --api-socket={tmp_path}/none: connect failed: ENOENT (No such file or directory); "
        "start virtio-mem serve or boot with this --api-socket\n"
    )


@pytest.mark.parametrize(
    ("arguments", "status", "error"),
    [
        (["info", "--api-socket", "x" * 108], 2, ": has to be 1 to 107 bytes, as the path of a unix socket"),
        (["info", "--api-socket", ""], 2, ": has to be 1 to 107 bytes, as the path of a unix socket"),
        (["info", "--api-socket", "/dev/null"], 1, "ECONNREFUSED"),
        (["info"], 2, "required: --api-socket; see virtio-mem info --help"),
        (["info", "--json", "more", "--api-socket", "a"], 2, "unrecognized arguments: more"),
        (["resize", "--api-socket", "a", "1g"], 2, "SIZE=1g: a size is a whole number with at most one suffix"),
        (["resize", "--api-socket", "a", "-1G"], 2, "SIZE=-1G: a size is a whole number with at most one suffix"),
        (["resize", "--api-socket", "a", "99999999999999999999T"], 2, "a size is at most 2**64 - 1 bytes"),
        (["resize", "--api-socket", "a", "1G", "--wait", "soon"], 2, "--wait=soon: has to be a number of seconds"),
        (["resize", "--api-socket", "a", "1G", "--wait", "nan"], 2, "--wait=nan: has to be a number of seconds"),
        (["map", "--api-socket", "a", "--width", "20"], 2, "--width=20: has to be a number of columns from 21 to 1000"),
        (["map", "--api-socket", "a", "--width", "²"], 2, "--width=²: has to be a number of columns"),
        (
            ["map", "--api-socket", "a", "--width", "00000010000000"],
            2,
            "--width=00000010000000: has to be a number of columns",
        ),
        (["map", "--api-socket", "a", "--output", "map.gif"], 2, "ends in .svg or .png; name it map.svg"),
        (["serve", "--zone", "id=a\udcff,socket=s,addr=4G,hotplug_size=2M"], 2, r"='a\udcff': has to be UTF-8 without"),
        (
            ["watch", "--api-socket", "a", "--interval", "0"],
            2,
            "--interval=0: has to be a number of seconds from 0.05 to 3600",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    arguments: list[str], status: int, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == status
    out, err = capsys.readouterr()
    assert error in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_reader_that_goes_away(machine: Machine, api: str) -> None:
    for arguments in (["--help"], ["info", "--help"], ["info", "--api-socket", api, "--json"]):
        with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
            assert done.stdout
            assert done.stderr
            done.stdout.close()
            assert done.stderr.read() == b""
        assert done.returncode == 128 + signal.SIGPIPE


def test_a_watch_whose_reader_goes_away(machine: Machine, api: str) -> None:
    watch = command("watch", "--api-socket", api, "--interval", "0.05")
    with subprocess.Popen(watch, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        assert done.stdout
        assert done.stderr
        assert done.stdout.readline()
        done.stdout.close()
        assert done.stderr.read() == b""
    assert done.returncode == 128 + signal.SIGPIPE


FULL = "standard output=/dev/full: write failed: ENOSPC (No space left on device); write to where there is room"


def test_an_output_that_is_full(machine: Machine, api: str) -> None:
    for arguments in (["info", "--api-socket", api], ["info", "--help"]):
        done = subprocess.run(
            ["sh", "-c", 'exec "$@" >/dev/full', "sh", *command(*arguments)],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (1, f"virtio-mem info: {FULL}\n")


def test_a_verdict_that_can_not_be_written_is_none(tmp_path: Path) -> None:
    """But the report is there, for which it may have been judged for hours."""
    report = tmp_path / "report.json"
    judge = command("conformance", "self:anonymous", "--only", "MEM-PLUG-1", "--report", str(report))
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >/dev/full', "sh", *judge], stderr=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, f"virtio-mem conformance: {FULL}\n")
    assert json.loads(report.read_text())["counts"]["holds"]


@pytest.mark.parametrize("arguments", [["info"], ["resize", "--api-socket", "a", "1g"], ["conformance", "nothing"]])
def test_a_mistake_that_nobody_can_be_told_of_is_still_one(arguments: list[str]) -> None:
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>/dev/full', "sh", *command(*arguments)], check=False)
    assert done.returncode == 2


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str) -> None:
    """What nobody wants to read is not written; what is opened later does not get the number."""
    program = (
        "import os, sys; from virtio_mem.cli import main\n"
        "status = main(['--version']) or main(['--zone'])\n"
        "sys.stderr.write('still there'); assert min(os.open('/', 0), 3) == 3\n"
        "os.spawnv(os.P_WAIT, sys.executable, [sys.executable, '-c', 'import os; [os.fstat(n) for n in range(3)]'])\n"
        "sys.exit(status)"
    )
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ("" if ">&-" in closed.replace("2>&-", "") else run("--version").stdout)
    assert "Traceback" not in done.stderr
    assert ("still there" in done.stderr) is ("2>&-" not in closed)


def test_ctrl_c_while_the_server_says_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen()
        asked = command("info", "--api-socket", str(tmp_path / "s"))
        with subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
            connection, _ = silent.accept()
            with connection:
                until(lambda: connection.recv(1 << 16))
                done.send_signal(signal.SIGINT)
                assert done.communicate() == (b"", b"")
        assert done.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize("module", ["virtio_mem.cli", "virtio_mem.cli.info", "virtio_mem.client"])
def test_ctrl_c_while_modules_are_read(module: str) -> None:
    program = (
        "import runpy, sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "sys.argv = ['virtio-mem', 'info', '--api-socket', 'a']\n"
        "runpy.run_module('virtio_mem', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "")


@pytest.mark.parametrize("name", CLIENTS)
def test_a_subcommand_imports_what_it_needs(name: str) -> None:
    """Start-up time is what one waits for each time."""
    program = (
        "import sys; from virtio_mem.cli import main\n"
        f"main([{name!r}, '--api-socket', '/nowhere', *{ARGUMENTS.get(name, [])!r}])\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert f"virtio_mem.cli.{SUBCOMMANDS[name].module}" in loaded
    heavy = {"rich", "matplotlib", "numpy", "h11", "asyncio", "virtio_mem.manager", "virtio_mem.device", "cffi"}
    assert heavy & loaded == set()
