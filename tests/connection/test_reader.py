"""Messages out of bytes: whole, byte by byte, several at once; and descriptors, which are closed whatever happens."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhost_user.connection import MessageReader, Received
from vhost_user.errors import PeerError
from vhost_user.message import FrontendRequest, encode_message
from vhost_user.owned_fd import OwnedFd

MESSAGE = encode_message(FrontendRequest.SET_FEATURES, bytes(range(8)), need_reply=True)


def feed(reader: MessageReader, data: bytes) -> Iterator[Received]:
    """Give the reader what it asks for, as a socket would."""
    while data:
        piece, data = data[: reader.wanted], data[reader.wanted :]
        received = reader.feed(piece)
        if received is not None:
            yield received


def an_fd() -> OwnedFd:
    return OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))


def test_it_asks_for_the_header_first_and_then_for_the_payload() -> None:
    reader = MessageReader()
    assert reader.wanted == 12
    assert reader.feed(MESSAGE[:12]) is None
    assert reader.wanted == 8
    received = reader.feed(MESSAGE[12:])
    assert received is not None
    assert received.body == bytes(range(8))
    assert received.header.request == FrontendRequest.SET_FEATURES
    assert received.header.need_reply
    assert reader.wanted == 12


def test_byte_by_byte_is_the_same() -> None:
    reader = MessageReader()
    got = [reader.feed(MESSAGE[at : at + 1]) for at in range(len(MESSAGE))]
    assert [each is None for each in got] == [True] * 19 + [False]
    assert got[-1] is not None
    assert got[-1].body == bytes(range(8))


def test_a_message_without_payload_is_complete_with_its_header() -> None:
    reader = MessageReader()
    received = reader.feed(encode_message(FrontendRequest.GET_FEATURES, b""))
    assert received is not None
    assert received.body == b""
    assert not reader.within_message


@given(st.lists(st.tuples(st.integers(0, 100), st.binary(max_size=50)), max_size=8))
def test_messages_in_a_row_come_out_one_by_one(messages: list[tuple[int, bytes]]) -> None:
    stream = b"".join(encode_message(request, payload) for request, payload in messages)
    assert [(each.header.request, each.body) for each in feed(MessageReader(), stream)] == messages


def test_descriptors_ride_on_the_header() -> None:
    reader = MessageReader()
    assert reader.feed(MESSAGE[:5], [an_fd(), an_fd()]) is None
    received = next(feed(reader, MESSAGE[5:]))
    assert len(received.fds) == 2
    received.close()
    assert all(fd.closed for fd in received.fds)


@pytest.mark.parametrize("at", [1, 11, 12, 15])
def test_descriptors_that_come_late_are_a_violation_and_closed(at: int) -> None:
    reader = MessageReader()
    early, late = an_fd(), an_fd()
    rest = [MESSAGE[at : at + 1]]
    if at <= 12:
        reader.feed(MESSAGE[:at], [early])
    else:
        reader.feed(MESSAGE[:12], [early])
        reader.feed(MESSAGE[12:at])
    with pytest.raises(PeerError, match="first byte"):
        reader.feed(rest[0], [late])
    assert early.closed
    assert late.closed


@pytest.mark.parametrize(
    "header",
    [b"\1\0\0\0\2\0\0\0\0\0\0\0", b"\1\0\0\0\1\0\0\0\xff\xff\xff\xff", b"\1\0\0\0\0\0\0\0\0\0\0\0"],
    ids=["version 2", "size", "version 0"],
)
def test_a_header_that_can_not_be_closes_its_descriptors(header: bytes) -> None:
    fd = an_fd()
    with pytest.raises(PeerError):
        MessageReader().feed(header, [fd])
    assert fd.closed


def test_an_unfinished_message_lets_go_of_its_descriptors() -> None:
    reader = MessageReader()
    fd = an_fd()
    reader.feed(MESSAGE[:3], [fd])
    assert reader.within_message
    reader.close()
    assert fd.closed
