"""`virtio-mem resize` and `resize-zone`: each end has its words and its exit status."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from tests.cli.rig import ONE_ZONE, Machine, command, run, until
from tests.cli.terminal import Terminal
from vhost_user.errors import TimedOut
from vhost_user.units import MIB
from virtio_mem import operation
from virtio_mem.api import server as api_server
from virtio_mem.api.server import listen
from virtio_mem.cli import follow, main
from virtio_mem.client import Client, NotNow

ZONE = ("resize-zone", "--api-socket")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resize counts as stalled after half a second."""
    monkeypatch.setattr(operation, "STALL_SECONDS", 0.5)


def test_a_size_is_taken(machine: Machine, api: str) -> None:
    done = run(*ZONE, api, "mem0", "128M")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "operation 1: mem0 to 128 MiB: running for 0 s, 64 MiB now\n"
    assert machine.service("mem0").device.requested_size == 64 * MIB


class Silenced(Client):
    """Has the device busy until the server was silent so many times, first when it is asked for the size."""

    def __init__(self, api: str, machine: Machine, silences: int) -> None:
        super().__init__(api, timeout=0.05)
        self.silences, self.machine = silences, machine
        self._held = threading.Semaphore(0)
        self._heard = threading.Semaphore(0)

    def hold(self) -> None:
        """In a thread that has nothing else to do."""
        with self.machine.service("mem0").lock:
            self._held.release()
            assert self._heard.acquire(timeout=20)

    @contextmanager
    def holding(self) -> Iterator[None]:
        thread = threading.Thread(target=self.hold)
        thread.start()
        assert self._held.acquire(timeout=20)
        try:
            yield
        finally:
            self._heard.release()
            thread.join()

    @contextmanager
    def _exchange(self, *arguments: Any, **options: Any) -> Iterator[HTTPResponse]:
        try:
            with super()._exchange(*arguments, **options) as response:
                yield response
        except TimedOut:
            self.silences -= 1
            if not self.silences:
                self._heard.release()
            raise


def test_a_server_whose_device_is_busy_is_waited_for(
    machine: Machine, api: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "OUTAGE", 0.0)
    monkeypatch.setattr(follow, "STEP", 0.01)
    for wait, size in (("for ever", 128 * MIB), ("600", 192 * MIB)):
        client = Silenced(api, machine, 3)
        with machine.guest("mem0"), client.holding():
            assert follow.ask(client, partial(client.resize_zone, "mem0", size), wait) == 0
        assert client.silences <= 0
        assert ": reached" in capsys.readouterr().out


def test_a_server_that_has_no_room_for_one_more_who_waits_goes_on_telling(
    machine: Machine, api: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_server, "MAX_LONG", 0)
    monkeypatch.setattr(follow, "OUTAGE", 0.0)
    monkeypatch.setattr(follow, "STEP", 0.01)
    client = Client(api)
    assert follow.ask(client, partial(client.resize_zone, "mem0", 128 * MIB), "0.5") == 3
    with machine.guest("mem0"):
        assert follow.ask(client, partial(client.resize_zone, "mem0", 128 * MIB), "for ever") == 0
    assert ": reached" in capsys.readouterr().out


def test_one_that_is_busy_for_longer_than_that(machine: Machine, api: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A resize is running still, by its last word; whether it was taken is not known where there was none."""
    client = Silenced(api, machine, 0)
    number = client.resize_zone("mem0", 128 * MIB)
    with client.holding():
        assert follow.ask(client, lambda: number, "0.2") == 3
        for wait in (None, "0.2"):
            with pytest.raises(TimedOut):
                follow.ask(client, partial(client.resize_zone, "mem0", 192 * MIB), wait)
    assert "operation 1: mem0 to 128 MiB: running" in capsys.readouterr().out


def test_the_whole_machine(api: str) -> None:
    with Machine(ONE_ZONE, Path(api)) as machine, machine.guest("mem0"):
        done = run("resize", "--api-socket", api, str(128 * MIB), "--wait")
        assert done.returncode == 0
        assert "operation 1: mem0 to 128 MiB: reached 128 MiB in " in done.stdout.splitlines()[-1]
        assert machine.service("mem0").device.plugged_size == 64 * MIB


def test_up_and_down_again(machine: Machine, api: str) -> None:
    with machine.guest("mem0"):
        for size, blocks in (("1G", 480), ("64M", 0), ("64M", 0)):
            assert run(*ZONE, api, "mem0", size, "--wait", "10").returncode == 0
            assert machine.service("mem0").device.blocks.plugged == blocks


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["mem0", "65M"], "=68157440: has to be its boot size, 67108864, and whole blocks of 2M; the nearest are"),
        (["mem0", "3G"], "desired_ram=3221225472: has to be from its boot size, 67108864, to 2214592512 bytes"),
        (["mem0", "0"], "desired_ram=0: has to be from its boot size"),
        (["mem2", "1G"], "id=mem2: has to be one of mem0, mem1; name a zone that there is"),
    ],
)
def test_a_size_that_cannot_be(machine: Machine, api: str, arguments: list[str], error: str) -> None:
    before = machine.control.info()
    done = run(*ZONE, api, *arguments, "--wait")
    assert (done.returncode, done.stdout) == (2, "")
    assert error in done.stderr
    assert done.stderr.count("\n") == 1
    assert machine.control.info() == before


def test_a_machine_with_zones_has_no_size(machine: Machine, api: str) -> None:
    done = run("resize", "--api-socket", api, "1G")
    assert done.returncode == 2
    assert "a machine with memory zones has no size of its own to set" in done.stderr


def test_a_guest_that_stalls(machine: Machine, api: str, impatient: None) -> None:
    machine.control.resize_zone("mem0", 128 * MIB)
    machine.plug("mem0", 0, 29)
    done = run(*ZONE, api, "mem0", "128M", "--wait")
    assert done.returncode == 3
    last = done.stdout.splitlines()[-1]
    assert last == "operation 1: mem0 to 128 MiB: stalled for 1 s: the guest refuses 3 blocks, 122 MiB now"


@pytest.mark.parametrize("wait", [["--wait"], ["--wait", "0.2"]], ids=["stalled", "out of time"])
def test_a_guest_that_does_not_come_so_far_is_to_keep_what_it_has(
    machine: Machine, api: str, impatient: None, wait: list[str]
) -> None:
    machine.control.resize_zone("mem0", 128 * MIB)
    machine.plug("mem0", 0, 29)
    done = run(*ZONE, api, "mem0", "128M", *wait, "--keep")
    assert done.returncode == 3
    assert "operation 2: mem0 to 122 MiB: reached 122 MiB in " in done.stdout.splitlines()[-1]
    device = machine.service("mem0").device
    assert device.requested_size == device.plugged_size == 58 * MIB


def test_what_there_is_when_it_is_to_be_kept_is_looked_at_anew(
    machine: Machine, api: str, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest got on since the last look, and the server is being replaced just now."""
    really, looks = Client.operation, 0

    def operation(client: Client, number: int, *args: float, **options: float) -> dict[str, Any]:
        nonlocal looks
        looks += 1
        answer = really(client, number, *args, **options)
        if looks == 2:
            machine.plug("mem0", 0, 4)
            raise NotNow("operations/1", api, "is being replaced", "try again")
        return answer

    monkeypatch.setattr(Client, "operation", operation)
    assert main([*ZONE, api, "mem0", "128M", "--wait", "0", "--keep"]) == 3
    device = machine.service("mem0").device
    assert device.requested_size == device.plugged_size == 8 * MIB


def test_who_keeps_a_size_that_is_reached_keeps_that(api: str) -> None:
    with Machine(ONE_ZONE, Path(api)) as machine, machine.guest("mem0"):
        done = run("resize", "--api-socket", api, "128M", "--wait", "--keep")
        assert (done.returncode, done.stdout.count("operation 2")) == (0, 0)
        assert run("resize", "--api-socket", api, "256M", "--keep").stderr == (
            "virtio-mem resize: --keep=on: goes with --wait, at whose end it is done; add --wait SECONDS\n"
        )
        assert machine.service("mem0").device.requested_size == 64 * MIB


def test_time_that_runs_out(machine: Machine, api: str) -> None:
    done = run(*ZONE, api, "mem0", "128M", "--wait", "0.2")
    assert done.returncode == 3
    assert "running for" in done.stdout.splitlines()[-1]


def test_all_of_the_time_is_given_to_a_guest_that_stalls(machine: Machine, api: str, impatient: None) -> None:
    with subprocess.Popen(command(*ZONE, api, "mem0", "128M", "--wait", "30"), stdout=subprocess.PIPE) as waiting:
        until(lambda: (machine.control.wait(1, 0) or {}).get("state") == "stalled")
        assert waiting.poll() is None
        with machine.guest("mem0"):
            assert waiting.wait(10) == 0


def test_a_host_that_refuses(machine: Machine, api: str, impatient: None) -> None:
    machine.control.pause()
    done = run(*ZONE, api, "mem0", "128M", "--wait")
    assert done.returncode == 4
    assert "refused for 1 s: the device is paused" in done.stdout.splitlines()[-1]


def test_another_size_meanwhile(machine: Machine, api: str) -> None:
    waiting = subprocess.Popen(command(*ZONE, api, "mem0", "128M", "--wait"), stdout=subprocess.PIPE, text=True)
    with waiting:
        assert waiting.stdout
        assert waiting.stdout.readline()
        machine.control.resize_zone("mem0", 192 * MIB)
        assert "superseded" in waiting.stdout.read()
    assert waiting.returncode == 5


def test_ctrl_c_leaves_the_resize_alone(machine: Machine, api: str) -> None:
    waiting = subprocess.Popen(command(*ZONE, api, "mem0", "128M", "--wait"), stdout=subprocess.PIPE, text=True)
    with waiting:
        assert waiting.stdout
        assert waiting.stdout.readline()
        waiting.send_signal(signal.SIGINT)
    assert waiting.returncode == 128 + signal.SIGINT
    assert machine.service("mem0").device.requested_size == 64 * MIB


def test_progress_on_a_terminal(machine: Machine, api: str) -> None:
    with Terminal(*ZONE, api, "mem0", "128M", "--wait") as terminal, machine.guest("mem0", blocks_a_second=40):
        terminal.until("MiB of 128 MiB, ")
        assert terminal.end() == 0
        first, last, *rest = terminal.text.splitlines()
        assert first.startswith("operation 1: mem0 to 128 MiB: running for 0 s, ")
        assert last.startswith("operation 1: mem0 to 128 MiB: reached 128 MiB in ")
        assert "".join(rest) == ""


def test_a_terminal_that_is_dumb_has_no_progress(machine: Machine, api: str) -> None:
    dumb = Terminal(*ZONE, api, "mem0", "128M", "--wait", environment={"TERM": "dumb"})
    with dumb as terminal, machine.guest("mem0", blocks_a_second=40):
        assert terminal.end() == 0
        assert b"\x1b" not in terminal.written
        assert b": reached" in terminal.written


def test_a_server_that_is_replaced_meanwhile(api: str) -> None:
    """The next one knows the operation, since it was saved."""
    first = Machine(ONE_ZONE, Path(api))
    resize = command("resize", "--api-socket", api, "128M", "--wait")
    with subprocess.Popen(resize, stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout
        assert waiting.stdout.readline()
        first.close()
        with Machine(ONE_ZONE, Path(api), before=first) as second, second.guest("mem0"):
            assert "reached 128 MiB in" in waiting.stdout.read()
    assert waiting.returncode == 0


@pytest.mark.parametrize("options", [(), ("--wait",)])
def test_a_server_that_is_replaced_once_it_has_taken_the_size(
    options: tuple[str, ...], api: str, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"id": 7, "zone": "mem0", "target": 1 << 30, "plugged": 1 << 30, "rate": 0, "seconds": 1}
    body = json.dumps(facts | {"state": "reached", "verdict": "reached 1 GiB in 1.0 s"})
    shown = f"200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    answers = ["204 No Content\r\nOperation-Id: 7\r\n\r\n", None, shown]
    with listen(api) as listener:

        def serve() -> None:
            for answer in answers:
                with listener.accept()[0] as client:
                    if answer is not None:
                        client.recv(1 << 16)
                        client.sendall(f"HTTP/1.1 {answer}".encode())
                        client.shutdown(socket.SHUT_WR)
                        while client.recv(1 << 16):  # all that was asked: what is unread breaks the connection
                            pass

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        assert main(["resize", "--api-socket", api, "1G", *options]) == 0
        server.join(10)
    assert capsys.readouterr().out == "operation 7: mem0 to 1 GiB: reached 1 GiB in 1.0 s\n"
