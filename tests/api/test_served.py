"""The API of `virtio-mem serve`, and what a client sees when the process behind it is killed."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import counts
from tests.api.rig import Answer, Client, UnixConnection
from vhost_user.units import MIB

ROOT = Path(__file__).parents[2]


def again(client: Client, method: str, path: str, body: object = None) -> Answer:
    """Ask until there is an answer: a server that is being replaced breaks connections off."""
    deadline = time.monotonic() + 20
    while True:
        assert time.monotonic() < deadline
        with suppress(ConnectionError, http.client.HTTPException):
            return client.ask(method, path, body)
        time.sleep(0.01)


def worker_of(client: Client) -> int:
    return int(again(client, "GET", "/api/v1/vmm.ping").json["pid"])


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """The API of a service of one zone of 64M, of which 32M are asked for."""
    api = tmp_path / "api.sock"
    zone = f"id=mem0,socket={tmp_path / 'mem0.sock'},addr=4G,hotplug_size=64M,hotplugged_size=32M"
    with subprocess.Popen(
        [sys.executable, "-m", "virtio_mem", "serve", "--zone", zone, "--api-socket", str(api)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield Client(str(api))
        finally:
            process.terminate()
            assert process.wait(20) == 0
    assert not api.exists()


def test_operations_and_a_pause_outlive_the_process(client: Client) -> None:
    info = client.get("/api/v1/vm.info").json
    assert info["state"] == "Created"
    assert (info["zones"][0]["boot_size"], info["zones"][0]["connected"]) == (0, False)
    first = client.ask("PUT", "/api/v1/vm.resize-zone", {"id": "mem0", "desired_ram": 48 * MIB})
    assert (first.status, first.headers["Operation-Id"]) == (204, "1")
    assert client.ask("PUT", "/api/v1/vm.pause").status == 204

    stream = UnixConnection(client.path)
    stream.request("GET", "/api/v1/events")
    events = stream.getresponse()
    before = worker_of(client)
    os.kill(before, signal.SIGKILL)
    with suppress(ConnectionError, http.client.HTTPException):
        while events.readline():
            pass
    stream.close()

    after = worker_of(client)
    assert after != before
    operation = client.operation(1)
    assert (operation["state"], operation["target"]) == ("running", 48 * MIB)
    info = client.get("/api/v1/vm.info").json
    assert (info["state"], info["zones"][0]["requested_size"]) == ("Paused", 48 * MIB)
    same = client.ask("PUT", "/api/v1/vm.resize-zone", {"id": "mem0", "desired_ram": 48 * MIB})
    assert same.headers["Operation-Id"] == "1"
    other = client.ask("PUT", "/api/v1/vm.resize-zone", {"id": "mem0", "desired_ram": 0})
    assert other.headers["Operation-Id"] == "2"
    os.kill(after, signal.SIGKILL)
    last = again(client, "GET", "/api/v1/operations").json
    assert [(entry["id"], entry["state"]) for entry in last] == [(1, "superseded"), (2, "reached")]


def test_a_resize_that_got_no_answer_may_just_be_asked_for_again(client: Client) -> None:
    """Killed at moments around the request; whichever it was, the target is what was asked for last."""
    numbers = []
    for step in range(counts.API_KILLS):
        size = (step % 2 + 1) * 16 * MIB
        worker = worker_of(client)
        killer = subprocess.Popen(["/bin/sh", "-c", f"sleep 0.00{step % 10}; kill -9 {worker}"])
        answer = again(client, "PUT", "/api/v1/vm.resize-zone", {"id": "mem0", "desired_ram": size})
        killer.wait(20)
        assert answer.status == 204
        numbers.append(int(answer.headers["Operation-Id"]))
        info = again(client, "GET", "/api/v1/vm.info").json["zones"][0]
        assert (info["requested_size"], info["operation"]["target"]) == (size, size)
        assert info["operation"]["id"] == numbers[-1]
    assert numbers == sorted(set(numbers)), "no number is given twice"


def test_a_core_dump_is_for_the_vmm_to_make(client: Client, tmp_path: Path) -> None:
    """A service has neither the machine's boot memory nor its CPUs."""
    answer = client.ask("PUT", "/api/v1/vm.coredump", {"destination_url": f"file://{tmp_path}/core"})
    assert answer.status == 400
    assert "boot memory and CPUs, which its VMM has" in answer.json["limit"]
    assert client.get("/api/v1/vm.info").json["state"] == "Created"
    assert not (tmp_path / "core").exists()
