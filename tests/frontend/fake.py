"""A back end that keeps to the protocol, but for the requests that a test gives another behaviour.

    with fake(behaviour={FrontendRequest.SET_VRING_NUM: refuse}) as back:
        with Frontend(back.connection, features=..., timeout=SHORT) as frontend:
            ...

It has no device. It runs in a thread of its own, and takes whatever it is sent.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from vhost_user.connection import Connection, Received
from vhost_user.errors import PeerError
from vhost_user.message import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    HEADER,
    U64,
    DeviceState,
    DeviceStateReply,
    Empty,
    FrontendRequest,
    Inflight,
    Payload,
    ProtocolFeature,
    Reply,
    TransferDirection,
    VringState,
    encode_message,
    spec_of,
)
from vhost_user.owned_fd import OwnedFd

LATE = 30.0
"""Seconds after which the back end ends by itself: a test hangs."""

SHORT = 0.05
"""Seconds that a front end waits for an answer that never comes."""

VERSION_1 = 1 << 32
FEATURES = VERSION_1 | F_LOG_ALL | F_PROTOCOL_FEATURES

ALL = ProtocolFeature((1 << 23) - 1) & ~ProtocolFeature.XEN_MMAP
"""The protocol features that it offers, where a test asks for no others."""

R = FrontendRequest


class FakeBackend:
    """What the thread knows, and the front end's end of the connection."""

    def __init__(self, offered: ProtocolFeature, features: int, behaviour: Mapping[R, Behaviour]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.connection = Connection(theirs, "fake")
        self.own = Connection(ours, "front end")
        self.socket = ours
        self.offered = offered
        self.features = features
        self.acked = ProtocolFeature.NONE
        self.slots = 509
        self.state = b"the state"
        self.loaded: bytes | None = None
        self.channel: socket.socket | None = None
        self.requests: list[R] = []
        """What came, in order."""
        self.payloads: list[bytes] = []
        self.postcopy = False
        self._behaviour = behaviour
        self._inflight = OwnedFd(os.memfd_create("inflight", os.MFD_CLOEXEC))
        os.ftruncate(self._inflight.fileno(), 4096)

    def run(self) -> None:
        with self.own, suppress(PeerError, BrokenPipeError):  # the front end may be gone
            while True:
                with self.own.receive(LATE) as received:
                    request = R(received.request)
                    self.requests.append(request)
                    self.payloads.append(received.body)
                    self._behaviour.get(request, answer)(self, request, received)

    def payloads_of(self, request: R) -> list[bytes]:
        """What came with each request of this kind."""
        return [body for each, body in zip(self.requests, self.payloads, strict=True) if each is request]

    def close(self) -> None:
        self.connection.close()
        self._inflight.close()
        if self.channel is not None:
            self.channel.close()

    def reply(self, request: int, payload: Payload, fds: list[int] | None = None) -> None:
        self.own.send(request, payload.encode(), fds or (), reply=True, timeout=LATE)

    def right_answer(self, request: R, received: Received) -> tuple[Payload, list[int]] | None:
        """What the document has it answer, if anything."""
        body, always = received.body, spec_of(request, self.acked, postcopy=self.postcopy).reply is Reply.ALWAYS
        if request is R.SET_PROTOCOL_FEATURES:
            self.acked = ProtocolFeature(U64.decode(body).value)
        elif request is R.SET_BACKEND_REQ_FD:
            self.channel = socket.socket(fileno=received.fds[0].take())
        elif request is R.POSTCOPY_LISTEN:
            self.postcopy = True
        if not always:
            acked = received.need_reply and ProtocolFeature.REPLY_ACK in self.acked
            return (U64(0), []) if acked else None
        match request:
            case R.GET_VRING_BASE:
                return VringState(VringState.decode(body).index, 7), []
            case R.GET_INFLIGHT_FD:
                asked = Inflight.decode(body)
                area = Inflight(type(asked.mmap_size)(4096), asked.mmap_offset, asked.num_queues, asked.queue_size)
                return area, [self._inflight.fileno()]
            case R.SET_DEVICE_STATE_FD:
                self._transfer(DeviceState.decode(body), received.fds[0])
                return DeviceStateReply(0, no_fd=True), []
            case R.POSTCOPY_ADVISE:
                return Empty(), []
            case R.GET_CONFIG | R.SET_MEM_TABLE | R.ADD_MEM_REG:
                return spec_of(request, self.acked).payload.decode(body), []
        numbers = {
            R.GET_FEATURES: self.features,
            R.GET_PROTOCOL_FEATURES: int(self.offered),
            R.GET_QUEUE_NUM: 2,
            R.GET_MAX_MEM_SLOTS: self.slots,
            R.GET_STATUS: 15,
        }
        return U64(numbers.get(request, 0)), []

    def _transfer(self, what: DeviceState, fd: OwnedFd) -> None:
        with open(fd.take(), "r+b" if what.direction == TransferDirection.LOAD else "wb", buffering=0) as pipe:
            if what.direction == TransferDirection.SAVE:
                pipe.write(self.state)


Behaviour = Callable[[FakeBackend, R, Received], None]


def answer(back: FakeBackend, request: R, received: Received) -> None:
    """As the document has it."""
    right = back.right_answer(request, received)
    if right is not None:
        back.reply(request, *right)


def refuse(back: FakeBackend, request: R, received: Received) -> None:
    """An acknowledgement of failure."""
    if back.right_answer(request, received) is not None:
        back.reply(request, U64(1))


def acknowledge_and_leave(back: FakeBackend, request: R, received: Received) -> None:
    """A success that is none: some back ends do this for all that they refuse."""
    answer(back, request, received)
    back.own.close()


def leave(back: FakeBackend, _request: R, _received: Received) -> None:
    back.own.close()


def stay_silent(back: FakeBackend, _request: R, _received: Received) -> None:
    """To this and to all that comes after it."""
    while True:
        back.own.receive(LATE).close()


def answer_another(back: FakeBackend, request: R, received: Received) -> None:
    payload, fds = back.right_answer(request, received) or (U64(0), [])
    back.reply(request + 1, payload, fds)


def ask_back(back: FakeBackend, request: R, received: Received) -> None:
    """A right answer but for the flag that makes it a reply."""
    payload, fds = back.right_answer(request, received) or (U64(0), [])
    back.own.send(request, payload.encode(), fds, timeout=LATE)


def answer_too_much(back: FakeBackend, request: R, received: Received) -> None:
    payload, fds = back.right_answer(request, received) or (U64(0), [])
    body = payload.encode() + bytes(4097)
    socket.send_fds(back.socket, [HEADER.pack(request, 5, len(body)) + body], fds)


def answer_with_descriptors(back: FakeBackend, request: R, received: Received) -> None:
    """Three more than belong to it."""
    payload, fds = back.right_answer(request, received) or (U64(0), [])
    back.reply(request, payload, [*fds, 0, 0, 0])


def answer_half(back: FakeBackend, request: R, received: Received) -> None:
    payload, fds = back.right_answer(request, received) or (U64(0), [])
    message = encode_message(request, payload.encode(), reply=True)
    socket.send_fds(back.socket, [message[: HEADER.size // 2]], [*fds, 0])


def announce_four_gigabytes(back: FakeBackend, request: R, _received: Received) -> None:
    back.socket.send(HEADER.pack(request, 5, 0xFFFFFFFF))


@contextmanager
def fake(
    *,
    offered: ProtocolFeature = ALL,
    features: int = FEATURES,
    behaviour: Mapping[R, Behaviour] | None = None,
) -> Iterator[FakeBackend]:
    back = FakeBackend(offered, features, behaviour or {})
    thread = threading.Thread(target=back.run)
    thread.start()
    try:
        yield back
    finally:
        back.connection.close()
        thread.join()
        back.close()
