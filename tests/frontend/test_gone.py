"""A back end that goes while a front end waits for a ring of it: what it did before comes first, and then its end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.closing import meanwhile
from tests.frontend.fake import LATE, VERSION_1, FakeBackend, answer, fake
from vhost_user.connection import Connection, Received
from vhost_user.errors import Disconnected
from vhost_user.event import Event
from vhost_user.frontend import Frontend
from vhost_user.message import BackendRequest, FrontendRequest

LONG = 10.0
"""Seconds that a call waits which nothing ends: the test has failed."""

NOTICE = BackendRequest.CONFIG_CHANGE_MSG

MUTE = """
import sys
from vhost_user.backend import Device, Server

with Server() as server:
    server.listen(sys.argv[1], Device())
    print("ready", flush=True)
    server.run()
"""


@contextmanager
def connected(timeout: float = LATE) -> Iterator[tuple[FakeBackend, Frontend]]:
    with fake() as back, Frontend(back.connection, features=VERSION_1, timeout=timeout) as frontend:
        yield back, frontend


@contextmanager
def channel_of(back: FakeBackend) -> Iterator[Connection]:
    """The back end's end of its channel, which is closed with the block."""
    assert back.channel is not None
    with Connection(back.channel.dup()) as theirs:
        back.channel.close()
        yield theirs


def require_gone(frontend: Frontend, timeout: float = LONG) -> None:
    began = time.monotonic()
    with pytest.raises(Disconnected, match="was closed by the peer; connect again"):
        frontend.vring(0).wait(timeout)
    assert time.monotonic() - began < LONG
    assert not frontend.connected


def test_a_daemon_that_is_killed(tmp_path: Path) -> None:
    path = str(tmp_path / "mute.sock")
    daemon = subprocess.Popen([sys.executable, "-c", MUTE, path], stdout=subprocess.PIPE)
    assert daemon.stdout is not None
    try:
        assert daemon.stdout.readline() == b"ready\n"
        with Frontend.connect(path, features=VERSION_1) as frontend:
            assert not frontend.vring(0).wait(0.01)
            daemon.send_signal(signal.SIGKILL)
            require_gone(frontend)
    finally:
        daemon.kill()
        daemon.wait()
        daemon.stdout.close()


def test_who_waits_already_is_told() -> None:
    with connected() as (back, frontend):
        with meanwhile(lambda: frontend.vring(0).wait(LONG)) as ended:
            back.own.close()
        (error,) = ended
        assert isinstance(error, Disconnected), error


def test_who_only_looks_is_told() -> None:
    with connected() as (back, frontend):
        back.own.close()
        require_gone(frontend, 0)


def test_a_call_that_is_there_comes_first() -> None:
    with connected() as (back, frontend):
        frontend.vring(0).call.signal()
        back.own.close()
        assert frontend.vring(0).wait(LONG)
        require_gone(frontend)


def test_a_call_that_comes_between_two_looks_of_one_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end is seen, and the call just before it is not: it was looked for earlier."""
    with connected() as (back, frontend):
        vring, look = frontend.vring(0), frontend.requests._look_after

        def call_behind(others: Mapping[int, int], seconds: float, end: int = -1) -> object:
            ready = look(others, seconds, end)
            monkeypatch.undo()
            vring.call.signal()
            return ready

        back.own.close()
        monkeypatch.setattr(frontend.requests, "_look_after", call_behind)
        assert vring.wait(LONG)
        require_gone(frontend)


def test_what_it_sent_on_its_channel_comes_first() -> None:
    with connected() as (back, frontend):
        channel = frontend.channel
        assert channel is not None
        with channel_of(back) as theirs:
            for _ in range(200):
                theirs.send(NOTICE, timeout=LATE)
        back.own.close()
        require_gone(frontend)
        assert channel.config_changes == 200


@pytest.mark.parametrize("heard", [True, False])
def test_an_answer_that_it_did_not_hear_takes_nothing_away(heard: bool) -> None:
    with connected() as (back, frontend):
        channel = frontend.channel
        assert channel is not None
        with channel_of(back) as theirs:
            theirs.send(NOTICE, need_reply=True, timeout=LATE)
            if heard:
                frontend.serve_channel()  # and the answer is not read
            theirs.send(NOTICE, need_reply=True, timeout=LATE)
            theirs.send(NOTICE, timeout=LATE)
        back.own.close()
        require_gone(frontend)
        assert channel.config_changes == 3


def test_a_channel_without_end_does_not_keep_the_end_from_being_told() -> None:
    with connected() as (back, frontend), Event.create() as bell:
        bell.signal()
        frontend.requests.watched[bell.fileno()] = lambda: None
        back.own.close()
        require_gone(frontend, 0.05)


def test_an_answer_that_another_thread_waits_for_comes_first() -> None:
    def answer_and_leave(back: FakeBackend, request: FrontendRequest, received: Received) -> None:
        answer(back, request, received)
        back.own.close()

    for _ in range(20):
        with (
            fake(behaviour={FrontendRequest.GET_STATUS: answer_and_leave}) as back,
            Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend,
            meanwhile(lambda frontend=frontend: frontend.vring(0).wait(LONG)) as ended,  # type: ignore[misc]
        ):
            assert frontend.status == 15
        (error,) = ended
        assert isinstance(error, Disconnected), error


def test_a_connection_that_was_given_up_is_not_waited_on() -> None:
    with connected() as (back, frontend), back.socket.dup():  # it does not close, for whom that end is open
        vring = frontend.vring(0)
        frontend.requests.give_up()
        vring.call.signal()
        assert vring.wait(0)
        with pytest.raises(Disconnected, match="was closed"):
            vring.wait(LONG)
        assert frontend.requests.lingering


@pytest.mark.parametrize("dies", [True, False])
def test_who_waits_while_another_thread_reconnects_waits_on(dies: bool) -> None:
    with connected() as (first, frontend), fake() as second:
        vring = frontend.vring(0)
        with meanwhile(lambda: vring.wait(LONG)) as ended:
            with frontend.requests.lock:  # as reconnect does, who is quicker to see the end
                if dies:
                    first.own.close()
                    time.sleep(0.05)
                frontend.reconnect(second.connection)
            assert ended == []
            vring.call.signal()
        assert ended == [True]
        assert frontend.connected
