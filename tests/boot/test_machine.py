"""The program around QEMU, with a shell script in QEMU's place: what it inherits, how it ends, what is refused."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.api.rig import Client
from tests.peers.processes import children_with, wait_until
from virtio_mem.boot.machine import WORKER
from virtio_mem.cli import main

ZONES = (
    *("--memory", "size=0,hotplug_method=virtio-mem"),
    *("--memory-zone", "id=a,size=64M,shared=on,hotplug_size=256M", "id=b,size=64M,shared=on"),
)
HEAD = """#!/bin/sh
[ "$1" = --help ] && { echo 'QEMU emulator version 10.2.0'; exit; }
"""


@pytest.fixture
def qemu(tmp_path: Path) -> Path:
    """A script that is run as QEMU; the kernel is beside it."""
    (tmp_path / "vmlinuz").touch()
    return tmp_path / "qemu"


def write(path: Path, script: str) -> None:
    path.write_text(HEAD + script)
    path.chmod(0o755)


def command(qemu: Path, options: Sequence[str] = ZONES) -> list[str]:
    words = ["--qemu", str(qemu), "--accel", "tcg", "--kernel", str(qemu.parent / "vmlinuz")]
    return [sys.executable, "-m", "virtio_mem", "boot", *options, *words]


def boot(qemu: Path, options: Sequence[str] = ZONES) -> subprocess.CompletedProcess[str]:
    """The program, to its end."""
    return subprocess.run(
        command(qemu, options),
        env=os.environ | {"TMPDIR": str(qemu.parent)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def leftovers(qemu: Path) -> list[Path]:
    return list(qemu.parent.glob("virtio-mem-*"))


@pytest.mark.parametrize(("end", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137), ("kill -11 $$", 139)])
def test_qemus_status_is_the_programs(qemu: Path, end: str, status: int) -> None:
    write(qemu, f"echo it printed this; echo it warned of that >&2; {end}")
    done = boot(qemu)
    assert done.returncode == status
    assert done.stdout == "it printed this\n"
    assert done.stderr == "it warned of that\n"
    assert leftovers(qemu) == []


def test_what_qemu_inherits(qemu: Path) -> None:
    write(qemu, 'ls -l /proc/$$/fd | sed "s/.* -> //"; [ -S $(echo "$*" | sed "s/.*path=//; s/ .*//") ] && echo socket')
    done = boot(qemu)
    files = [line for line in done.stdout.splitlines() if "memfd" in line]
    assert sorted(files) == [
        "/memfd:virtio-mem:a:boot (deleted)",
        "/memfd:virtio-mem:a:hotplug (deleted)",
        "/memfd:virtio-mem:b:boot (deleted)",
    ]
    assert len([line for line in done.stdout.splitlines() if line.startswith("socket:")]) == 1  # the monitor
    assert done.stdout.endswith("\nsocket\n")


def test_what_need_not_be_said_is_not(qemu: Path) -> None:
    write(
        qemu,
        "for n in 1 2 15 3 11; do echo terminating on signal $n >&2; done\n"
        "echo terminating on signal 15 from pid 7 >&2\n"
        "printf 'half a' >&2; sleep 0.2; printf ' line\\nram is more then twice the size of max-ram-below-4g' >&2",
    )
    assert boot(qemu).stderr == "terminating on signal 3\nterminating on signal 11\nhalf a line\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_qemu_first(qemu: Path, number: signal.Signals) -> None:
    write(qemu, "trap 'echo told to end; exit 0' TERM; echo begun; while :; do sleep 0.02; done")
    with subprocess.Popen(
        command(qemu), env=os.environ | {"TMPDIR": str(qemu.parent)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"begun\n"
        wait_until(lambda: has_worker(process.pid), "the worker runs")
        process.send_signal(number)
        assert process.stdout.read() == b"told to end\n"
        assert process.wait(10) == 0
        assert process.stderr.read() == b""
    assert leftovers(qemu) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_before_anything_runs(qemu: Path, number: signal.Signals) -> None:
    """What was made until then goes, too: a directory is the first thing, and the kernel is looked for after it."""
    write(qemu, "echo begun")
    script = f"""
import os, sys
from virtio_mem.boot import machine
from virtio_mem.cli import main
machine._payload = lambda options, directory: os.kill(os.getpid(), {number.value})
sys.exit(main(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *command(qemu)[3:]],
        env=os.environ | {"TMPDIR": str(qemu.parent)},
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, b"", b"")
    assert leftovers(qemu) == []


@pytest.mark.parametrize(
    "options",
    [
        ZONES,
        ("--memory", "size=64M,shared=on"),
        (*ZONES[:3], "id=a,size=64M,shared=on", "id=b,size=0,shared=on,hotplug_size=256M"),
    ],
)
def test_a_machine_is_not_saved_in_part(qemu: Path, options: tuple[str, ...]) -> None:
    """Its processors and boot memory are QEMU's, whatever zones there are."""
    write(qemu, "trap 'exit 0' TERM; while :; do sleep 0.02; done")
    socket_, saved = qemu.parent / "api", qemu.parent / "snapshot"
    with subprocess.Popen(command(qemu, [*options, "--api-socket", str(socket_)])) as process:
        try:
            wait_until(lambda: has_worker(process.pid), "the worker runs")
            answer = Client(str(socket_)).ask("PUT", "/api/v1/vm.snapshot", {"destination_url": f"file://{saved}"})
        finally:
            process.terminate()
        assert process.wait(10) == 0
    assert answer.status == 400
    assert b"can't be taken of this machine" in answer.body
    assert not saved.exists()


@pytest.mark.parametrize("switch", ["on", "off", None])
def test_unplugs_that_nobody_asked_for_are_a_matter_of_an_option(qemu: Path, switch: str | None) -> None:
    write(qemu, "trap 'exit 0' TERM; while :; do sleep 0.02; done")
    socket_, options = qemu.parent / "api", [] if switch is None else ["--unrequested-unplug", switch]
    with subprocess.Popen(command(qemu, [*ZONES, *options, "--api-socket", str(socket_)])) as process:
        try:
            wait_until(lambda: has_worker(process.pid), "the worker runs")
            info = Client(str(socket_)).get("/api/v1/vm.info").json
        finally:
            process.terminate()
        assert process.wait(10) == 0
    granted = {zone["id"]: zone["unrequested_unplug"] for zone in info["zones"]}
    assert granted == {"a": switch != "off", "b": None}, "zone b has no device"


def has_worker(pid: int) -> bool:
    """Whether the program's loop has begun, which starts the worker."""
    return bool(children_with(WORKER[-1], pid))


def test_an_old_qemu(qemu: Path, capfd: pytest.CaptureFixture[str]) -> None:
    qemu.write_text("#!/bin/sh\necho QEMU emulator version 7.2.9\n")
    qemu.chmod(0o755)
    assert main(command(qemu)[3:]) == 1
    assert "is QEMU 7.2; 10.2 is the first that has vhost-user-test-device; scripts/peers" in capfd.readouterr().err


def test_the_help_names_the_keys_that_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that tests/boot/test_layout.py shows to be refused."""
    assert main(["boot", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Of the keys of --cpus there are boot and max" in text
    (refused,) = re.findall(r"; ([^;]*) are refused", text)
    assert set(re.findall(r"\w+_\w+", refused)) == {"device_id", "sgx_epc_sections", "pci_segments"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--memory", "size=64M"], "--memory shared=off: is private memory"),
        (["--memory", "size=64M,shared=on,hotplug_size=1G"], "--memory hotplug_size=1G: can be plugged by virtio-mem"),
        (["--memory", "size=64M,shared=on", "--kernel", "/nonsense"], "--kernel=/nonsense: is not a file"),
        (
            ["--memory", "size=64M,shared=on", "--cpus", "boot=0"],
            "--cpus boot=0: must be a whole number from 1 to 4096",
        ),
        (
            ["--memory", "size=64M,shared=on", "--memory", "size=96M,shared=on"],
            "--memory=size=64M,shared=on size=96M,shared=on: may be given only once; describe parts by --memory-zone",
        ),
        (["--cpus", "boot=1", "--cpus", "boot=2"], "--cpus=boot=1 boot=2: may be given only once"),
        (["--memory", "size=64M,shared=on", "--numa", "guest_numa_id=0,cpus=[1]"], "--cpus boot=1 makes 0 to 0"),
        (
            ["--memory", "size=64M,shared=on,hotplug_method=virtio-mem,hotplug_size=3M,hotplugged_size=1M"],
            "zone mem0 hotplug_size=3145728: must be a multiple of the block size, 2097152; use 2097152 or 4194304",
        ),
        ([*ZONES, "--trace", "/proc"], "--trace=/proc: can't be opened to be written to: Is a directory"),
    ],
)
def test_what_is_refused(qemu: Path, capfd: pytest.CaptureFixture[str], options: list[str], says: str) -> None:
    write(qemu, "echo started")
    words = command(qemu, [])[3:]
    assert main([*words, *options]) == 2
    said = capfd.readouterr()
    assert says in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_an_api_socket_that_is_anothers(qemu: Path) -> None:
    write(qemu, "echo started")
    path = qemu.parent / "api"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        done = boot(qemu, [*ZONES, "--api-socket", str(path)])
    assert done.returncode == 1
    assert "another server listens there" in done.stderr
    assert done.stdout == ""
    assert leftovers(qemu) == []
