"""QEMU's monitor, played by the test: what is said, in which order, and what is left in the socket."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from vhost_user.backend.loop import EventLoop
from vhost_user.errors import HostError
from virtio_mem.boot.qmp import LONGEST_LINE, Qmp

RESET = b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESET", "data": {"guest": true}}\r\n'
GREETING = b'{"QMP": {"version": {}, "capabilities": ["oob"]}}\r\n'


class Monitor:
    """A loop with a Qmp in it, and QEMU's end of the socket."""

    def __init__(self) -> None:
        self.loop = EventLoop()
        self.kept, self.qemu = socket.socketpair()
        self.events: list[str] = []
        self.ended = False
        self.qmp = self.worker()

    def worker(self) -> Qmp:
        """Another worker, with a duplicate of the same socket."""
        return Qmp(self.loop, self.kept.dup(), self.event, self.end)

    def event(self, event: dict[str, Any]) -> None:
        self.events.append(event["event"])
        self.act()

    def act(self) -> None:
        """What else is done about an event."""

    def end(self) -> None:
        self.ended = True

    def turn(self, times: int = 8) -> None:
        for _ in range(times):
            self.loop.run_once(0.02)

    def heard(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.qemu.recv(1 << 16).splitlines()]

    def unread(self) -> bytes:
        try:
            return self.kept.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""

    def execute(self, command: str, answer: bytes) -> Any:
        """What a thread gets for `answer`, in which NAME is the command's id."""
        got: list[Any] = []

        def ask() -> None:
            try:
                got.append(self.qmp.execute(command, timeout=5.0))
            except HostError as error:
                got.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        message = self.heard()[-1]
        self.qemu.sendall(answer.replace(b"NAME", message["id"].encode()))
        self.turn()
        thread.join()
        return got[0]


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    made = Monitor()
    assert made.heard() == [{"execute": "qmp_capabilities", "id": "hello"}]
    yield made
    made.qmp.close()
    made.kept.close()
    made.qemu.close()
    made.loop.close()


def test_events_are_told_and_taken_away(monitor: Monitor) -> None:
    monitor.qemu.sendall(GREETING + b'{"return": {}, "id": "hello"}\r\n' + RESET + RESET)
    monitor.turn()
    assert monitor.events == ["RESET", "RESET"]
    assert monitor.unread() == b""


def test_a_line_is_there_until_it_was_acted_on(monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[bytes] = []
    monkeypatch.setattr(monitor, "act", lambda: left.append(monitor.unread()))
    monitor.qemu.sendall(RESET)
    monitor.turn()
    assert left == [RESET]
    assert monitor.unread() == b""


def test_a_worker_that_comes_later_finds_what_nobody_acted_on(monitor: Monitor) -> None:
    monitor.qmp.close()  # as if it were killed
    monitor.qemu.sendall(b'{"return": {}, "id": "17-1"}\r\n' + RESET)
    monitor.qmp = monitor.worker()
    monitor.turn()
    assert monitor.events == ["RESET"]


def test_an_action_that_fails_does_not_come_back(monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "act", lambda: 1 // 0)
    monitor.qemu.sendall(RESET)
    monitor.turn()
    assert monitor.events == ["RESET"]
    assert monitor.unread() == b""


def test_a_line_in_pieces(monitor: Monitor) -> None:
    monitor.qemu.sendall(RESET[:20])
    monitor.turn()
    assert monitor.events == []
    monitor.qemu.sendall(RESET[20:])
    monitor.turn()
    assert monitor.events == ["RESET"]


@pytest.mark.parametrize("line", [b"\n", b"nonsense\n", b"[]\n", b'{"event": 5}\n', b"[" * 5000 + b"\n", b"\xff\xfe\n"])
def test_nonsense_is_passed_over(monitor: Monitor, line: bytes) -> None:
    monitor.qemu.sendall(line + RESET)
    monitor.turn()
    assert monitor.events == ["RESET"]


def test_a_line_without_end(monitor: Monitor) -> None:
    writer = threading.Thread(target=monitor.qemu.sendall, args=(b"x" * (LONGEST_LINE + 10) + b"\n" + RESET,))
    writer.start()
    for _ in range(2000):
        monitor.turn(1)
        if monitor.events:
            break
    writer.join()
    assert monitor.events == ["RESET"]


def test_commands(monitor: Monitor) -> None:
    assert monitor.execute("stop", RESET + b'{"return": {"a": 1}, "id": "NAME"}\r\n') == {"a": 1}
    assert monitor.events == ["RESET"]
    error = monitor.execute("cont", b'{"error": {"class": "x", "desc": "not now"}, "id": "NAME"}\r\n')
    assert str(error) == "qemu=cont: QEMU refused: not now"
    assert "QEMU answered" in str(monitor.execute("cont", b'{"id": "NAME"}\r\n'))


def test_descriptors_go_with_a_command(monitor: Monitor) -> None:
    with pytest.raises(HostError, match="no answer within 0 s"):
        monitor.qmp.execute("getfd", {"fdname": "x"}, timeout=0.0, fds=[monitor.kept.fileno()])
    line, (fd,), _, _ = socket.recv_fds(monitor.qemu, 1 << 16, 2)
    with socket.socket(fileno=fd) as passed:
        assert passed.getpeername() == monitor.kept.getpeername()
    assert json.loads(line)["execute"] == "getfd"


def test_no_answer(monitor: Monitor) -> None:
    with pytest.raises(HostError, match=r"qemu=stop: no answer within 0\.01 s"):
        monitor.qmp.execute("stop", timeout=0.01)


def test_qemu_ends(monitor: Monitor) -> None:
    waiting = threading.Thread(target=monitor.qemu.close)
    waiting.start()
    waiting.join()
    monitor.turn()
    assert monitor.ended
    with pytest.raises(HostError, match="QEMU has ended"):
        monitor.qmp.execute("stop")


def test_qemu_ends_while_somebody_waits(monitor: Monitor) -> None:
    got: list[HostError] = []

    def ask() -> None:
        with pytest.raises(HostError) as caught:
            monitor.qmp.execute("stop", timeout=5.0)
        got.append(caught.value)

    thread = threading.Thread(target=ask)
    thread.start()
    monitor.heard()
    monitor.qemu.close()
    monitor.turn()
    thread.join()
    assert got[0].limit == "QEMU has ended"
