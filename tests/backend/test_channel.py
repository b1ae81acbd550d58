"""The back end's side of its channel: requests that are answered, refused, or lost, and never waited for."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.peers.processes import wait_until
from vhost_user.backend.channel import BackendChannel
from vhost_user.connection import Connection
from vhost_user.errors import Disconnected, PeerError
from vhost_user.message import U64, BackendRequest, Mmap, ProtocolFeature
from vhost_user.units import ByteCount, HostOffset

ACKED = (
    ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.SHMEM_MAP
    | ProtocolFeature.BACKEND_SEND_FD
)
MAP = Mmap(1, HostOffset(0), HostOffset(0), ByteCount(4096)).encode()


@pytest.fixture
def ends() -> Iterator[tuple[BackendChannel, Connection]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with Connection(theirs, "front end") as other:
        channel = BackendChannel(Connection(ours), ACKED)
        yield channel, other
        channel.close()


@pytest.mark.parametrize(("code", "granted"), [(0, True), (1, False), (2**63, False)])
def test_an_answer_says_whether_it_was_granted(
    ends: tuple[BackendChannel, Connection], code: int, granted: bool
) -> None:
    channel, other = ends
    heard: list[bool] = []
    with open("/dev/null", "rb") as file:
        assert channel.send(BackendRequest.SHMEM_MAP, MAP, [file.fileno()], on_reply=heard.append)
    with other.receive(1) as received:
        assert received.need_reply
        assert (received.request, received.body, len(received.fds)) == (BackendRequest.SHMEM_MAP, MAP, 1)
    channel.answer()
    assert heard == []
    other.send(BackendRequest.SHMEM_MAP, U64(code).encode(), reply=True, timeout=1)
    channel.answer()
    assert heard == [granted]


def test_a_notice_wants_no_answer(ends: tuple[BackendChannel, Connection]) -> None:
    channel, other = ends
    assert channel.send(BackendRequest.CONFIG_CHANGE_MSG)
    with other.receive(1) as received:
        assert not received.need_reply


def test_what_was_not_negotiated_is_not_sent(ends: tuple[BackendChannel, Connection]) -> None:
    channel, other = ends
    with pytest.raises(PeerError, match="negotiated"):
        channel.send(BackendRequest.VRING_CALL)
    assert other.receive_now() is None


def test_without_reply_ack_there_is_no_answer_to_want() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with Connection(theirs):
        channel = BackendChannel(Connection(ours), ACKED & ~ProtocolFeature.REPLY_ACK)
        with pytest.raises(PeerError, match="REPLY_ACK"):
            channel.send(BackendRequest.SHMEM_UNMAP, MAP, on_reply=lambda _: None)
        channel.close()


def test_a_front_end_that_answers_nothing_is_asked_no_more(ends: tuple[BackendChannel, Connection]) -> None:
    channel, _ = ends
    heard: list[bool] = []
    asked = [channel.send(BackendRequest.SHMEM_UNMAP, MAP, on_reply=heard.append) for _ in range(70)]
    assert asked == [True] * 64 + [False] * 6
    channel.close()
    assert heard == [False] * 64


def test_a_front_end_that_reads_nothing_loses_notices(ends: tuple[BackendChannel, Connection]) -> None:
    channel, _ = ends
    while channel.send(BackendRequest.CONFIG_CHANGE_MSG):
        pass
    assert not channel.send(BackendRequest.CONFIG_CHANGE_MSG)


@pytest.mark.parametrize(
    ("request_", "reply"),
    [(BackendRequest.SHMEM_MAP, True), (BackendRequest.SHMEM_UNMAP, False)],
    ids=["another request's", "no answer at all"],
)
def test_a_wrong_answer_is_a_violation(
    ends: tuple[BackendChannel, Connection], request_: BackendRequest, reply: bool
) -> None:
    channel, other = ends
    assert channel.send(BackendRequest.SHMEM_UNMAP, MAP, on_reply=lambda _: None)
    other.send(request_, U64(0).encode(), reply=reply, timeout=1)
    with pytest.raises(PeerError, match="the answer to"):
        channel.answer()


def test_the_end_of_the_front_end_is_the_end(ends: tuple[BackendChannel, Connection]) -> None:
    channel, other = ends
    other.close()

    def ended() -> bool:
        try:
            channel.answer()
        except Disconnected:
            return True
        return False

    wait_until(ended, "its end is seen")  # a thread closes it, and is not waited for on a busy machine
    with pytest.raises(Disconnected):
        channel.send(BackendRequest.CONFIG_CHANGE_MSG)
