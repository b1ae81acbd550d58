"""The clients and `virtio-mem serve`, whose worker may be killed at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cli.rig import command, run, until
from tests.cli.terminal import Terminal
from vhost_user.errors import HostError, PeerError
from virtio_mem.client import Client


@pytest.fixture
def served(tmp_path: Path, api: str) -> Iterator[subprocess.Popen[str]]:
    """`virtio-mem serve` with a zone of up to 2 GiB, to which no VMM has connected."""
    zone = f"id=mem0,socket={tmp_path}/mem0.sock,addr=4G,hotplug_size=2G"
    serve = command("serve", "--zone", zone, "--api-socket", api)
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.terminate()
            process.wait(20)
            watchdog.cancel()
            watchdog.join()


def worker_of(api: str) -> int:
    """The process that answers, once one does."""
    answers: list[int] = []

    def asked() -> list[int]:
        with suppress(PeerError, HostError):  # it died under the question
            answers.append(Client(api).ping()["pid"])
        return answers

    until(asked)
    return answers[0]


@pytest.mark.long
def test_a_worker_killed_while_watched(served: subprocess.Popen[str], api: str) -> None:
    with Terminal("watch", "--api-socket", api, "--interval", "0.05") as terminal:
        terminal.until("no front end")
        for blocks in (1, 2):
            worker = worker_of(api)
            os.kill(worker, signal.SIGKILL)
            until(lambda worker=worker: worker_of(api) != worker)  # type: ignore[misc]
            assert run("resize-zone", "--api-socket", api, "mem0", f"{2 * blocks}M").returncode == 0
            terminal.until(f"target {2 * blocks} MiB")
            terminal.until(f"resize {blocks} to {2 * blocks} MiB: running")
        served.terminate()
        terminal.until("the server has gone")
        assert terminal.end() == 0


def test_a_worker_killed_while_a_resize_is_followed(served: subprocess.Popen[str], api: str) -> None:
    resize = command("resize-zone", "--api-socket", api, "mem0", "1G", "--wait")
    with subprocess.Popen(resize, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout
        assert following.stdout.readline()
        os.kill(worker_of(api), signal.SIGKILL)
        assert run("resize-zone", "--api-socket", api, "mem0", "512M").returncode == 0
        assert "superseded" in following.stdout.read()
    assert following.returncode == 5
