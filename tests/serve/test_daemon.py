"""The program: `ready`, signals, the service manager, the state directory, and what it refuses before it serves."""

from __future__ import annotations

import os
import random
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import counts
from tests.attack.run import stands
from tests.peers.processes import children_of, children_with, wait_until, worker_of
from tests.serve.rig import BLOCK_SIZE, guest
from vhost_user.attack import ATTACKS, Verdict
from vhost_user.frontend import Frontend
from virtio_mem.client import Client
from virtio_mem.protocol import RequestType, ResponseType

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "virtio_mem", "serve")
PLUG = RequestType.PLUG
ACK = ResponseType.ACK


def zone_text(directory: Path, name: str = "mem0", more: str = "", addr: str = "4G") -> str:
    return f"id={name},socket={directory / name}.sock,addr={addr},hotplug_size=32M,hotplugged_size=32M{more}"


@contextmanager
def running(*arguments: str, status: int = 0, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The program, when it has printed `ready`; ended by SIGTERM."""
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.terminate()
            ended = process.wait(20)
        assert ended == status


def refused(arguments: Sequence[str]) -> tuple[int, str]:
    """Exit status and what it said, of a program that doesn't serve."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_two_zones_are_served_and_the_service_manager_is_told(tmp_path: Path) -> None:
    api = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        zones = ("--zone", zone_text(tmp_path), zone_text(tmp_path, "mem1", addr="8G"))
        with (
            guest() as machine,
            running(*zones, "--api-socket", str(api), NOTIFY_SOCKET=str(tmp_path / "notify")) as process,
        ):
            assert manager.recv(64) == b"READY=1"
            assert stat.S_IMODE(api.stat().st_mode) == 0o600
            with Frontend.connect(str(tmp_path / "mem0.sock"), features=machine.features) as frontend:
                machine.start(frontend)
                assert machine.ask(frontend, PLUG, 0, 4) is ACK
                first, second = Client(api).info()["zones"]
                assert (first["plugged_size"], second["plugged_size"]) == (4 * BLOCK_SIZE, 0)
                assert (first["connected"], second["connected"]) == (True, False)
                os.kill(process.pid, signal.SIGHUP)
                assert machine.ask(frontend, PLUG, 4, 4) is ACK
                machine.check(frontend, prefault=False)
        assert manager.recv(64) == b"STOPPING=1"
    assert [path.name for path in tmp_path.iterdir()] == ["notify"], "the sockets are removed"


def test_the_service_manager_is_told_though_nobody_reads_the_line(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        with subprocess.Popen(
            [*COMMAND, "--zone", zone_text(tmp_path)],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": str(tmp_path / "notify")},
        ) as process:
            os.close(writer)
            try:
                assert manager.recv(64) == b"READY=1"
            finally:
                process.terminate()
            _, said = process.communicate(timeout=20)
    assert "standard output: Broken pipe" in said
    assert "worker" not in said


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_the_service_with_a_closed_stream(closed: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        with subprocess.Popen(
            ["sh", "-c", f'exec "$@" {closed}', "sh", *COMMAND, "--zone", zone_text(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": str(tmp_path / "notify")},
        ) as process:
            try:
                assert manager.recv(64) == b"READY=1"
                worker = worker_of(process.pid)
                fds = [
                    [Path(f"/proc/{pid}/fd/{number}").stat().st_ino for number in range(3)]
                    for pid in (process.pid, worker)
                ]
                assert fds[0] == fds[1]
                assert fds[0][1 if closed == ">&-" else 2] == Path("/dev/null").stat().st_ino
            finally:
                process.terminate()
            said = process.communicate(timeout=20)
    assert said == ("ready\n" if closed == "2>&-" else "", "")
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_every_process_is_the_supervisors(number: int, tmp_path: Path) -> None:
    """A terminal's Ctrl-C, and how systemd ends a unit. One that comes before the worker is ready waits."""
    with subprocess.Popen(
        [*COMMAND, "--zone", zone_text(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        wait_until(lambda: children_of(process.pid), "there is a worker")
        (worker,) = children_of(process.pid)
        os.kill(worker, number)
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, number)
        if number == signal.SIGHUP:
            process.terminate()
        assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 0
    assert not list(tmp_path.iterdir())


def test_the_code_that_serves_after_sighup_is_what_is_installed_then(tmp_path: Path) -> None:
    """The first worker is a fork of the supervisor, and so of the same code; one that takes its place is not."""
    with running("--zone", zone_text(tmp_path)) as process:

        def has_module_of_its_own() -> bool:
            return bool(children_with("virtio_mem.serve.worker", process.pid))

        assert children_of(process.pid)
        assert not has_module_of_its_own()
        process.send_signal(signal.SIGHUP)
        wait_until(has_module_of_its_own, "there is another worker")


def test_a_worker_is_ready_without_what_sessions_need() -> None:
    program = "import sys, virtio_mem.serve.worker, vhost_user.supervisor.worker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "virtio_mem.device" in loaded
    payloads = {f"vhost_user.message.{name}payloads" for name in ("", "memory_", "vring_")}
    later = {
        "vhost_user.backend.vring",
        "vhost_user.backend.batches",
        "vhost_user.memory",
        "vhost_user.vring",
        *payloads,
    }
    assert later & loaded == set()


def test_what_sessions_and_rings_need_is_loaded_behind_ready() -> None:
    """Not by the first request, and never from another version's files."""
    program = (
        "import sys; from types import SimpleNamespace; from importlib import import_module\n"
        "from virtio_mem.serve import worker\n"
        "worker._ready(SimpleNamespace(ready=lambda: import_module('vhost_user.supervisor.handed')))\n"
        "before = set(sys.modules)\n"
        "from vhost_user.backend.batches import RingBatches; from vhost_user.vring import Batch\n"
        "print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_state_directory_outlives_the_service(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    arguments = ("--zone", zone_text(tmp_path), "--state-dir", str(tmp_path / "state"))
    with guest() as machine:
        with running(*arguments), Frontend.connect(str(tmp_path / "mem0.sock"), features=machine.features) as frontend:
            machine.start(frontend)
            assert machine.ask(frontend, PLUG, 3, 4) is ACK
            status, said = refused(["--zone", zone_text(tmp_path, "mem1"), *arguments[2:]])
            assert (status, "another service" in said) == (1, True)
        with (
            guest() as another,
            running(*arguments),
            Frontend.connect(str(tmp_path / "mem0.sock"), features=another.features) as frontend,
        ):
            another.start(frontend)
            assert another.config(frontend).plugged_size == 4 * BLOCK_SIZE
            assert another.ask(frontend, PLUG, 3) is ResponseType.ERROR
            assert another.ask(frontend, RequestType.UNPLUG_ALL) is ACK
    other = zone_text(tmp_path, more=",guest_numa_id=1")
    status, said = refused(["--zone", other, *arguments[2:]])
    assert status == 2
    state = tmp_path / "state" / "mem0.state"
    assert f"{state} state node_id=none: has to be that of the zone, 1; remove the state, or change --zone" in said
    state.write_bytes(b"not a state")
    status, said = refused(arguments)
    assert status == 2
    assert f"{state} state size=11: has to be 8192, that of a device of this geometry; remove the state: it is" in said


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "--zone"),
        (["--zone", "id=mem0"], 2, "is mandatory"),
        (["--zone", "GOOD", "--colour", "red"], 2, "--colour"),
        (["--zone", "GOOD", "--state-dir", "/nonexistent"], 1, "ENOENT"),
        (["--zone", "GOOD", "--state-dir", ""], 2, "--state-dir=: has to be a path, and is empty; give one, or leave"),
        (["--zone", "GOOD", "--restore", ""], 2, "--restore=: has to be a path"),
        (["--zone", "GOOD", "--trace", ""], 2, "--trace=: has to be a path"),
        (["--zone", "GOOD", "--api-socket", "/nonexistent/api.sock"], 1, "ENOENT"),
        (["--zone", "id=mem0,socket=/nonexistent/a.sock,addr=4G,hotplug_size=1G"], 1, "ENOENT"),
    ],
)
def test_what_can_not_be_served_is_one_line(arguments: list[str], status: int, said: str, tmp_path: Path) -> None:
    ended, line = refused([zone_text(tmp_path) if word == "GOOD" else word for word in arguments])
    assert ended == status, line
    assert said in line
    assert line.count("\n") == 1
    assert "Traceback" not in line


def test_help_has_the_command_that_attaches() -> None:
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True, timeout=30)
    assert "vhost-user-test-device-pci,chardev=c0,virtio-id=24,num_vqs=1,vq_size=128,config_size=56" in done.stdout
    assert "mem=2G memhp_default_state=online_movable" in done.stdout


def test_attacks(
    tmp_path: Path, request: pytest.FixtureRequest, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    chosen = rng.sample(ATTACKS, min(counts.ATTACKS_ON_SERVE, len(ATTACKS)))
    path = tmp_path / "mem0.sock"
    command = " ".join([*COMMAND, "--zone", zone_text(tmp_path)])
    seed = int(request.config.option.hypothesis_seed)
    results = stands(str(path), command, chosen, seed)
    figure("attacks that virtio-mem serve passes", sum(result.verdict is Verdict.PASSED for result in results))
