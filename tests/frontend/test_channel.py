"""What a back end asks on its own channel, and how little of it a front end grants unasked."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.frontend.fake import ALL, LATE, VERSION_1, FakeBackend, answer, fake
from vhost_user.connection import Connection, Received
from vhost_user.errors import HostError, PeerError, TimedOut
from vhost_user.frontend import Frontend
from vhost_user.message import (
    MAP_READ_WRITE,
    U64,
    BackendRequest,
    Empty,
    FrontendRequest,
    Mmap,
    Payload,
    ProtocolFeature,
    encode_message,
)
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import ByteCount, HostOffset

B = BackendRequest
MAP = Mmap(0, HostOffset(0), HostOffset(0), ByteCount(4096), MAP_READ_WRITE)
WANTED = ALL & ~ProtocolFeature.INBAND_NOTIFICATIONS


class Granting:
    """A handler that keeps the descriptors that it gets, and grants what it is told to."""

    def __init__(self, grants: bool) -> None:
        self.grants = grants
        self.seen: list[Payload] = []
        self.kept: list[OwnedFd] = []

    def __call__(self, payload: Payload, fds: list[OwnedFd]) -> bool:
        self.seen.append(payload)
        self.kept += [OwnedFd(fd.take()) for fd in fds]
        return self.grants


@contextmanager
def connected(
    handler: Granting | None = None, wanted: ProtocolFeature = WANTED
) -> Iterator[tuple[FakeBackend, Frontend, Connection]]:
    """The back end's end of the channel is the last."""
    handlers = {} if handler is None else {B.SHMEM_MAP: handler}
    with (
        fake() as back,
        Frontend(back.connection, features=VERSION_1, protocol_features=wanted, handlers=handlers) as frontend,
    ):
        assert back.channel is not None
        with Connection(back.channel.dup()) as theirs:
            yield back, frontend, theirs


def ask(frontend: Frontend, theirs: Connection, request: int, payload: Payload, fds: list[int] | None = None) -> int:
    """The front end's answer."""
    theirs.send(request, payload.encode(), fds or (), need_reply=True, timeout=LATE)
    frontend.serve_channel()
    with theirs.receive(LATE) as received:
        assert received.reply
        assert received.request == request
        return U64.decode(received.body).value


@contextmanager
def file() -> Iterator[int]:
    with OwnedFd(os.memfd_create("window", os.MFD_CLOEXEC)) as fd:
        yield fd.fileno()


def test_a_change_of_the_configuration_is_counted() -> None:
    with connected() as (_, frontend, theirs):
        theirs.send(B.CONFIG_CHANGE_MSG, timeout=LATE)
        assert ask(frontend, theirs, B.CONFIG_CHANGE_MSG, Empty()) == 0
        assert frontend.channel is not None
        assert (frontend.channel.config_changes, frontend.channel.refused) == (2, 0)


def test_what_nobody_handles_is_refused() -> None:
    with connected() as (_, frontend, theirs), file() as fd:
        assert ask(frontend, theirs, B.SHMEM_MAP, MAP, [fd]) == 1
        assert frontend.channel is not None
        assert frontend.channel.refused == 1


@pytest.mark.parametrize("grants", [True, False])
def test_a_handler_decides_and_keeps_descriptors(grants: bool) -> None:
    handler = Granting(grants)
    with connected(handler) as (_, frontend, theirs), file() as fd:
        assert ask(frontend, theirs, B.SHMEM_MAP, MAP, [fd]) == int(not grants)
        assert handler.seen == [MAP]
        with handler.kept[0] as kept:
            assert os.fstat(kept.fileno()).st_ino == os.fstat(fd).st_ino


@pytest.mark.parametrize("missing", [ProtocolFeature.SHMEM_MAP, ProtocolFeature.BACKEND_SEND_FD])
def test_what_was_not_negotiated_is_refused(missing: ProtocolFeature) -> None:
    handler = Granting(grants=True)
    with connected(handler, WANTED & ~missing) as (_, frontend, theirs), file() as fd:
        assert ask(frontend, theirs, B.SHMEM_MAP, MAP, [fd]) == 1
        assert not handler.seen


def test_a_descriptor_too_many_is_refused() -> None:
    with connected(Granting(grants=True)) as (_, frontend, theirs), file() as fd:
        assert ask(frontend, theirs, B.SHMEM_MAP, MAP, [fd, fd]) == 1


@pytest.mark.parametrize("number", [0, 11, 0xFFFFFFFF])
def test_a_request_that_there_is_not_ends_the_channel_alone(number: int) -> None:
    with connected() as (_, frontend, theirs):
        theirs.send(number, timeout=LATE)
        with pytest.raises(PeerError, match="a request that the protocol has"):
            frontend.serve_channel()
        assert frontend.channel is None
        frontend.requests.confirm()


def test_a_reply_on_the_channel_ends_it() -> None:
    with connected() as (_, frontend, theirs):
        theirs.send(B.CONFIG_CHANGE_MSG, reply=True, timeout=LATE)
        with pytest.raises(PeerError, match="has to be a request, and no reply"):
            frontend.serve_channel()


def test_the_end_of_the_channel_is_no_error() -> None:
    with connected() as (back, frontend, theirs):
        theirs.close()
        assert back.channel is not None
        back.channel.close()
        frontend.requests.confirm()  # looked after while it waits
        frontend.serve_channel()
        assert frontend.channel is None
        frontend.serve_channel()


def test_one_that_never_reads_its_answers_does_not_hold_us_up() -> None:
    def ask_on_and_on() -> None:
        while True:
            theirs.send(B.CONFIG_CHANGE_MSG, need_reply=True, timeout=LATE)
            frontend.serve_channel()

    with connected() as (_, frontend, theirs), pytest.raises(TimedOut):
        ask_on_and_on()


def test_the_channel_is_served_while_an_answer_is_awaited() -> None:
    """A back end that waits for ours before it gives its own."""

    def ask_first(back: FakeBackend, request: FrontendRequest, received: Received) -> None:
        assert back.channel is not None
        with Connection(back.channel.dup()) as theirs:
            theirs.send(B.CONFIG_CHANGE_MSG, need_reply=True, timeout=LATE)
            theirs.receive(LATE)
        answer(back, request, received)

    with (
        fake(behaviour={FrontendRequest.RESET_DEVICE: ask_first}) as back,
        Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend,
    ):
        frontend.reset_device()
        assert frontend.channel is not None
        assert frontend.channel.config_changes == 1


def test_a_channel_that_is_never_silent_does_not_make_up_for_an_answer() -> None:
    """It has 64 messages served at a time; the time limit counts all the same."""

    def flood(back: FakeBackend, _request: FrontendRequest, _received: Received) -> None:
        assert back.channel is not None
        back.channel.settimeout(LATE)
        message = encode_message(B.CONFIG_CHANGE_MSG, b"") * 100
        try:
            while True:
                back.channel.sendall(message)
        except OSError:
            pass  # closed by a front end that has had enough

    with (
        fake(behaviour={FrontendRequest.RESET_DEVICE: flood}) as back,
        Frontend(back.connection, features=VERSION_1, timeout=0.3) as frontend,
    ):
        with pytest.raises(TimedOut):
            frontend.reset_device()
        assert not frontend.connected


def test_without_the_feature_there_is_no_channel() -> None:
    without = ALL & ~ProtocolFeature.BACKEND_REQ
    with fake(offered=without) as back, Frontend(back.connection, features=VERSION_1) as frontend:
        assert frontend.channel is None
        assert FrontendRequest.SET_BACKEND_REQ_FD not in back.requests
        frontend.serve_channel()


def test_no_descriptor_left_for_a_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise OSError(24, os.strerror(24))

    with fake() as back:
        monkeypatch.setattr(socket, "socketpair", none_left)
        with pytest.raises(HostError, match="EMFILE"):
            Frontend(back.connection, features=VERSION_1)
        monkeypatch.undo()
