"""Daemons that are broken on purpose, each in one way: `python -m tests.attack.broken SOCKET WAY`.

Each is our echo device behind a server with the one thing wrong that WAY names. `without_faults` is our own.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable

from tests.attack.echo import Echo
from vhost_user.attack.canary import GUEST
from vhost_user.backend import Server
from vhost_user.backend.answer import Answer, Deferred
from vhost_user.backend.session import Session
from vhost_user.connection import Received
from vhost_user.message import U64, FrontendRequest, ProtocolFeature
from vhost_user.units import ByteCount, GuestAddress

Handle = Callable[[Session, Received], "Answer | Deferred | None"]

KEPT: list[object] = []
"""What a daemon that leaks holds on to."""


def without_faults(right: Handle) -> Handle:
    return right


def leaks_descriptors(right: Handle) -> Handle:
    """Keeps what comes with GET_FEATURES."""

    def handle(session: Session, received: Received) -> Answer | Deferred | None:
        if received.request == FrontendRequest.GET_FEATURES:
            KEPT.extend(received.fds)
            received.fds.clear()
        return right(session, received)

    return handle


def leaks_mappings(right: Handle) -> Handle:
    """Keeps a view of guest memory at each RESET_OWNER, and what is viewed stays mapped."""

    def handle(session: Session, received: Received) -> Answer | Deferred | None:
        answer = right(session, received)
        if received.request == FrontendRequest.RESET_OWNER:
            KEPT.extend(session.negotiated.memory.guest_memory.views(GuestAddress(GUEST), ByteCount(4096)))
        return answer

    return handle


def crashes(right: Handle) -> Handle:
    """Dies of a ring index that it does not have."""

    def handle(session: Session, received: Received) -> Answer | Deferred | None:
        if received.request == FrontendRequest.SET_VRING_NUM and received.body[:4] == b"\xc8\0\0\0":
            os.kill(os.getpid(), signal.SIGSEGV)
        return right(session, received)

    return handle


def exits(right: Handle) -> Handle:
    """Ends, with status 1, when it gets a request that the protocol doesn't have."""

    def handle(session: Session, received: Received) -> Answer | Deferred | None:
        if received.request == 0:
            os._exit(1)
        return right(session, received)

    return handle


def hangs(right: Handle) -> Handle:
    """Waits for ever when it gets a status that is too large."""

    def handle(session: Session, received: Received) -> Answer | Deferred | None:
        if received.request == FrontendRequest.SET_STATUS and len(received.body) == 8 and received.body[1]:
            time.sleep(1000)
        return right(session, received)

    return handle


def says_yes(right: Handle) -> Handle:
    """Acknowledges with 0 whatever it refuses."""

    def handle(session: Session, received: Received) -> Answer | Deferred | None:
        answer = right(session, received)
        refused = isinstance(answer, Answer) and answer.payload == U64(1).encode()
        acked = session.negotiated.has(ProtocolFeature.REPLY_ACK)
        return Answer(U64(0).encode()) if refused and acked else answer

    return handle


def writes_elsewhere(right: Handle) -> Handle:
    """Writes into a region's file, before what is shared of it."""

    def handle(session: Session, received: Received) -> Answer | Deferred | None:
        if received.request == FrontendRequest.SET_MEM_TABLE:
            for fd in received.fds:
                os.pwrite(fd.fileno(), b"mine", 0)
        return right(session, received)

    return handle


def cuts_files(right: Handle) -> Handle:
    """Makes the files of regions shorter."""

    def handle(session: Session, received: Received) -> Answer | Deferred | None:
        if received.request == FrontendRequest.SET_MEM_TABLE and len(received.fds) > 1:
            for fd in received.fds:
                os.ftruncate(fd.fileno(), 4096)
        return right(session, received)

    return handle


def dies_of_a_nameless_signal(right: Handle) -> Handle:
    """Is ended by a real-time signal when it gets a request that the protocol doesn't have."""

    def handle(session: Session, received: Received) -> Answer | Deferred | None:
        if received.request == 0:
            os.kill(os.getpid(), signal.SIGRTMIN + 5)
        return right(session, received)

    return handle


WAYS = {
    way.__name__: way
    for way in (
        without_faults,
        leaks_descriptors,
        leaks_mappings,
        crashes,
        exits,
        hangs,
        says_yes,
        writes_elsewhere,
        cuts_files,
        dies_of_a_nameless_signal,
    )
}


def main() -> None:
    path, way = sys.argv[1:]
    logging.disable()
    setattr(Session, "handle", WAYS[way](Session.handle))  # noqa: B010 - a method is replaced, which types forbid
    with Server() as server:
        server.listen(path, Echo())
        signal.signal(signal.SIGTERM, lambda *_: server.stop())
        server.run()


if __name__ == "__main__":
    main()
