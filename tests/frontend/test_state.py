"""Device state through pipes and sockets of either side, and back ends that make something else of it."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import pytest

from tests.closing import meanwhile, require_closed_here
from tests.frontend.fake import ALL, LATE, SHORT, VERSION_1, Behaviour, FakeBackend, fake
from vhost_user.connection import Received
from vhost_user.errors import HostError, PeerError, Refused, TimedOut, UsageError
from vhost_user.frontend import Frontend
from vhost_user.message import DeviceState, DeviceStateReply, FrontendRequest, ProtocolFeature, TransferDirection
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import MIB

R = FrontendRequest
SET = R.SET_DEVICE_STATE_FD
STATE = os.urandom(3 * MIB + 5)


@contextmanager
def connected(behaviour: Mapping[R, Behaviour]) -> Iterator[Frontend]:
    with (
        fake(behaviour=behaviour) as back,
        Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend,
    ):
        yield frontend


def direction_of(received: Received) -> int:
    return DeviceState.decode(received.body).direction


class ByPipe:
    """Transfers through the front end's pipe, in a thread, as a daemon would."""

    def __init__(self, state: bytes) -> None:
        self.state = state
        self.loaded = b""
        self.thread = threading.Thread()

    def __call__(self, back: FakeBackend, request: R, received: Received) -> None:
        pipe = received.fds[0].take()
        work = self._save if direction_of(received) == TransferDirection.SAVE else self._load
        self.thread = threading.Thread(target=work, args=(pipe,))
        self.thread.start()
        back.reply(request, DeviceStateReply(0, no_fd=True))

    def _save(self, pipe: int) -> None:
        with open(pipe, "wb") as file, suppress(BrokenPipeError):
            file.write(self.state)

    def _load(self, pipe: int) -> None:
        with open(pipe, "rb") as file:
            self.loaded = file.read()


def test_a_state_larger_than_a_pipe() -> None:
    device = ByPipe(STATE)
    with connected({SET: device}) as frontend:
        assert frontend.save_state() == STATE
        device.thread.join()
        frontend.load_state(STATE)
        device.thread.join()
        assert device.loaded == STATE


def test_a_channel_that_turns_out_not_to_be_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else who has the same end was faster."""
    calls = {name: getattr(os, name) for name in ("read", "write")}
    late = set()

    def at_second_attempt(name: str) -> Callable[..., object]:
        def call(fd: int, *rest: object) -> object:
            if threading.current_thread() is threading.main_thread() and name not in late:
                late.add(name)
                raise BlockingIOError(11, "not now")
            return calls[name](fd, *rest)

        return call

    device = ByPipe(STATE)
    with connected({SET: device}) as frontend:
        for name in calls:
            monkeypatch.setattr(os, name, at_second_attempt(name))
        assert frontend.save_state() == STATE
        frontend.load_state(STATE)
        monkeypatch.undo()
        device.thread.join()
        assert device.loaded == STATE
    assert late == {"read", "write"}


class ByOwnSocket(ByPipe):
    """Answers with an end of a socket pair of its own."""

    def __call__(self, back: FakeBackend, request: R, received: Received) -> None:
        ours, theirs = socket.socketpair()
        work = self._save if direction_of(received) == TransferDirection.SAVE else self._load
        self.thread = threading.Thread(target=work, args=(ours.detach(),))
        self.thread.start()
        with theirs:
            back.reply(request, DeviceStateReply(0, no_fd=False), [theirs.fileno()])


class ByOwnPipe(ByPipe):
    """Answers with an end of a pipe of its own."""

    def __call__(self, back: FakeBackend, request: R, received: Received) -> None:
        reading, writing = os.pipe()
        saves = direction_of(received) == TransferDirection.SAVE
        ours, theirs = (writing, reading) if saves else (reading, writing)
        self.thread = threading.Thread(target=self._save if saves else self._load, args=(ours,))
        self.thread.start()
        with OwnedFd(theirs) as sent:
            back.reply(request, DeviceStateReply(0, no_fd=False), [sent.fileno()])


@pytest.mark.parametrize("kind", [ByOwnSocket, ByOwnPipe])
def test_a_channel_of_the_back_end(kind: type[ByPipe]) -> None:
    device = kind(STATE)
    with connected({SET: device}) as frontend:
        assert frontend.save_state() == STATE
        device.thread.join()
        frontend.load_state(STATE)
        device.thread.join()
        assert device.loaded == STATE


@pytest.mark.parametrize("what", ["file", "datagrams", "directory"])
def test_a_channel_that_is_none(what: str) -> None:
    def give(back: FakeBackend, request: R, _received: Received) -> None:
        reply = DeviceStateReply(0, no_fd=False)
        if what == "file":
            with OwnedFd(os.memfd_create("no channel")) as fd:
                back.reply(request, reply, [fd.fileno()])
        elif what == "datagrams":
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                back.reply(request, reply, [sock.fileno()])
        else:
            with OwnedFd(os.open("/", os.O_RDONLY)) as fd:
                back.reply(request, reply, [fd.fileno()])

    with connected({SET: give}) as frontend, pytest.raises(PeerError, match="descriptor"):
        frontend.load_state(STATE)


def answer_error(back: FakeBackend, request: R, _received: Received) -> None:
    back.reply(request, DeviceStateReply(5, no_fd=True))


def test_a_back_end_that_can_not() -> None:
    with connected({SET: answer_error}) as frontend:
        with pytest.raises(Refused, match=r"SAVE.*error 5"):
            frontend.save_state()
        with pytest.raises(Refused, match=r"LOAD.*error 5"):
            frontend.load_state(b"")
        assert frontend.connected


class Holding:
    """Keeps the channel, and neither reads nor writes."""

    def __init__(self) -> None:
        self.kept: list[OwnedFd] = []

    def __call__(self, back: FakeBackend, request: R, received: Received) -> None:
        self.kept.append(OwnedFd(received.fds[0].take()))
        back.reply(request, DeviceStateReply(0, no_fd=True))


def test_a_back_end_that_neither_writes_nor_reads() -> None:
    with connected({SET: Holding()}) as frontend:
        with pytest.raises(TimedOut, match="0 bytes"):
            frontend.save_state(timeout=SHORT)
        with pytest.raises(TimedOut, match="bytes left"):
            frontend.load_state(STATE, timeout=SHORT)
        with pytest.raises(TimedOut, match="bytes left"):
            frontend.load_state(STATE, timeout=0)


def test_what_can_always_be_read_has_a_time_limit_too() -> None:
    holding = Holding()

    def write(back: FakeBackend, request: R, received: Received) -> None:
        os.write(received.fds[0].fileno(), b"state")
        holding(back, request, received)

    with connected({SET: write}) as frontend, pytest.raises(TimedOut, match="=0 bytes"):
        frontend.save_state(timeout=0)


@pytest.mark.parametrize("direction", TransferDirection)
def test_a_close_ends_a_transfer(direction: TransferDirection) -> None:
    with connected({SET: Holding()}) as frontend:
        saves = direction == TransferDirection.SAVE
        with meanwhile(frontend.save_state if saves else lambda: frontend.load_state(STATE)) as ended:
            frontend.close()
        require_closed_here(ended, "fake")


def test_a_state_without_end() -> None:
    device = ByPipe(STATE)
    with connected({SET: device}) as frontend:
        with pytest.raises(PeerError, match=r"more than 1048576 bytes.*a higher one"):
            frontend.save_state(limit=MIB)
        device.thread.join()


def test_a_back_end_that_stops_reading_is_asked_why() -> None:
    def close_at_once(back: FakeBackend, request: R, received: Received) -> None:
        received.close()
        back.reply(request, DeviceStateReply(0, no_fd=True))

    def complain(back: FakeBackend, request: R, _received: Received) -> None:
        back.own.send(request, struct.pack("=Q", 3), reply=True, timeout=LATE)

    with connected({SET: close_at_once, R.CHECK_DEVICE_STATE: complain}) as frontend:
        with pytest.raises(Refused, match="CHECK_DEVICE_STATE=3"):
            frontend.load_state(STATE)
        assert frontend.connected


def test_a_reset_is_no_end() -> None:
    """A socket that is closed with bytes unread: what came may not be all."""

    def reset(back: FakeBackend, request: R, _received: Received) -> None:
        ours, theirs = socket.socketpair()
        theirs.send(b"unread")
        ours.send(b"some")
        with theirs:
            back.reply(request, DeviceStateReply(0, no_fd=False), [theirs.fileno()])
        ours.close()

    with connected({SET: reset}) as frontend, pytest.raises(PeerError, match="not by a reset"):
        frontend.save_state()


def test_without_the_feature() -> None:
    with (
        fake(offered=ALL & ~ProtocolFeature.DEVICE_STATE) as back,
        Frontend(back.connection, features=VERSION_1) as frontend,
        pytest.raises(Refused, match="DEVICE_STATE"),
    ):
        frontend.save_state()


def test_while_a_ring_is_started() -> None:
    with connected({}) as frontend:
        frontend.vring(1).started = True
        for call in (frontend.save_state, lambda: frontend.load_state(b"")):
            with pytest.raises(UsageError, match=r"rings=\[1\]"):
                call()


def test_no_descriptor_left_for_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise OSError(24, os.strerror(24))

    with connected({}) as frontend:
        monkeypatch.setattr(os, "pipe2", none_left)
        with pytest.raises(HostError, match="EMFILE"):
            frontend.save_state()


def test_no_descriptor_left_for_a_channel_of_the_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise OSError(24, os.strerror(24))

    device = ByOwnPipe(b"")
    with connected({SET: device}) as frontend:
        monkeypatch.setattr(os, "open", none_left)
        with pytest.raises(HostError, match="EMFILE"):
            frontend.save_state()
        monkeypatch.undo()
        device.thread.join()
