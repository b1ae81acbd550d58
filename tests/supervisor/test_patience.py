"""What a supervisor waits for, and for how long: a descriptor for a front end, the answer to one that is suspected."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.supervisor.rig import WORKERS, Counter, service
from vhost_user.message import FrontendRequest, encode_message
from vhost_user.supervisor import sessions

WRITTEN = 40
QUESTION = encode_message(FrontendRequest.GET_FEATURES, b"")


def test_one_that_has_no_descriptor_left_accepts_later(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with service(tmp_path, devices=2, level=logging.WARNING) as supervised, supervised.connect(0) as there:
        assert there.get_config(0, 4) == b"conf"
        taken = {int(fd.name) for fd in Path(f"/proc/{supervised.pid}/fd").iterdir()}
        free = min(set(range(len(taken) + 1)) - taken)
        limits = resource.prlimit(supervised.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(supervised.pid, resource.RLIMIT_NOFILE, (free, limits[1]))
        with socket.socket(socket.AF_UNIX) as early:
            early.connect(supervised.paths[1])
            early.sendall(QUESTION)
            early.settimeout(0.5)
            with pytest.raises(TimeoutError):
                early.recv(100)
            resource.prlimit(supervised.pid, resource.RLIMIT_NOFILE, limits)
            early.settimeout(20)
            assert len(early.recv(100)) == 20
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert 1 <= said.count("accept failed") < 10, "once a second, not again and again"


class Suspect(Counter):
    """Is held in its first write until the worker is killed. The second one of device 0 waits for that of device 1."""

    def write_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        mine = WRITTEN + self.number
        self.board[mine] += 1
        while self.board[mine] == 1 or (self.number == 0 and self.board[WRITTEN + 1] < 2):
            time.sleep(0.01)


def test_one_suspect_keeps_the_next_one_waiting_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "PATIENCE", 0.2)
    with (
        service(tmp_path, Suspect, devices=2, threads=True) as supervised,
        ThreadPoolExecutor() as pool,
        supervised.connect(0) as slow,
        supervised.connect(1) as quick,
    ):
        written = [pool.submit(each.set_config, 0, b"x") for each in (slow, quick)]
        for number in range(2):
            supervised.wait_for(WRITTEN + number, 1)
        supervised.kill_worker()
        for each in written:
            each.result()
        assert slow.get_config(0, 4) == quick.get_config(0, 4) == b"conf"


@pytest.mark.parametrize("devices", [0, 1, 2])
def test_nobody_waits_for_the_end_of_a_worker_that_is_asked_to_leave(
    devices: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One without a device, such as of a machine whose memory is all there at boot, as little as others."""
    with service(tmp_path, devices=devices, threads=True, level=logging.WARNING) as supervised:
        supervised.wait_for(WORKERS, 1)
        os.kill(supervised.pid, signal.SIGHUP)
        supervised.wait_for(WORKERS, 2)
    assert "killed" not in capfd.readouterr().err
