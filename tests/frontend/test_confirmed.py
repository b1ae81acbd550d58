"""Memory that comes and goes: the question that proves the last acknowledgement is sent right behind its message."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest

from tests.frontend import fake as backs
from tests.frontend.fake import LATE, SHORT, VERSION_1, Behaviour, FakeBackend, answer, fake, refuse
from vhost_user.connection import Received
from vhost_user.errors import Disconnected, PeerError, Refused, TimedOut
from vhost_user.frontend import Frontend, SharedRegion
from vhost_user.message import HEADER, U64, FrontendRequest, ProtocolFeature, encode_message
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import MIB, ByteCount, GuestAddress, HostOffset

R = FrontendRequest

SIZE = ByteCount(1 * MIB)
CONFIRMATION = encode_message(R.GET_FEATURES, b"")


@pytest.fixture
def regions() -> Iterator[list[SharedRegion]]:
    with OwnedFd(os.memfd_create("ram", os.MFD_CLOEXEC)) as fd:
        os.ftruncate(fd.fileno(), 3 * SIZE)
        yield [SharedRegion(GuestAddress(n * SIZE), SIZE, fd.fileno(), HostOffset(n * SIZE)) for n in range(3)]


class Waiting:
    """Of so many messages the last is answered when something has come behind it, and the others at once."""

    def __init__(self, last: int, then: Behaviour = answer) -> None:
        self.behind: list[bytes] = []
        self._last = last
        self._then = then

    def __call__(self, back: FakeBackend, request: R, received: Received) -> None:
        patience = LATE if len(self.behind) + 1 == self._last else 0
        there, _, _ = select.select([back.socket], [], [], patience)
        self.behind.append(back.socket.recv(4096, socket.MSG_PEEK) if there else b"")
        self._then(back, request, received)


def test_it_stands_behind_the_last_message_only(regions: list[SharedRegion]) -> None:
    added, removed = Waiting(3), Waiting(2)
    with (
        fake(behaviour={R.ADD_MEM_REG: added, R.REM_MEM_REG: removed}) as back,
        Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend,
    ):
        frontend.regions.share(regions)
        frontend.regions.unshare(regions[:2])
        assert added.behind == [b"", b"", CONFIRMATION]
        assert removed.behind == [b"", CONFIRMATION]
        assert list(frontend.regions) == regions[2:]
        assert frontend.status == 15


@pytest.mark.parametrize("acks", [True, False])
def test_it_stands_behind_a_whole_table(regions: list[SharedRegion], acks: bool) -> None:
    without = ProtocolFeature.CONFIGURE_MEM_SLOTS if acks else ~ProtocolFeature.MQ
    table = Waiting(1)
    with (
        fake(offered=backs.ALL & ~without, behaviour={R.SET_MEM_TABLE: table}) as back,
        Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend,
    ):
        frontend.regions.share(regions)
        assert table.behind == [CONFIRMATION]
        frontend.requests.confirm()


def test_a_refusal_costs_nothing_else(regions: list[SharedRegion]) -> None:
    refused = Waiting(1, refuse)
    with (
        fake(behaviour={R.ADD_MEM_REG: refused}) as back,
        Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend,
    ):
        with pytest.raises(Refused, match="failure 1"):
            frontend.regions.add(regions[0])
        assert refused.behind == [CONFIRMATION]
        assert not len(frontend.regions)
        assert frontend.status == 15  # no answer was left behind


def refuse_and_leave(back: FakeBackend, request: R, received: Received) -> None:
    refuse(back, request, received)
    back.own.close()


def test_of_a_refusal_and_an_end_the_refusal_is_told(regions: list[SharedRegion]) -> None:
    with (
        fake(behaviour={R.REM_MEM_REG: refuse_and_leave}) as back,
        Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend,
    ):
        frontend.regions.add(regions[0])
        with pytest.raises(Refused):
            frontend.regions.remove(regions[0])
        assert regions[0] in frontend.regions
        assert not frontend.connected


def stay_silent_behind(back: FakeBackend, request: R, received: Received) -> None:
    answer(back, request, received)
    with back.own.receive(LATE) as question:
        assert question.header.request == R.GET_FEATURES


def answer_in_the_wrong_order(back: FakeBackend, request: R, _received: Received) -> None:
    with back.own.receive(LATE) as question:
        back.reply(question.header.request, U64(1))
    back.reply(request, U64(0))


def answer_twice(back: FakeBackend, request: R, _received: Received) -> None:
    back.reply(request, U64(0))
    back.reply(request, U64(0))


def bring_a_descriptor_behind(back: FakeBackend, request: R, received: Received) -> None:
    answer(back, request, received)
    with back.own.receive(LATE), OwnedFd(os.memfd_create("unwanted", os.MFD_CLOEXEC)) as fd:
        back.reply(R.GET_FEATURES, U64(1), [fd.fileno()])


def answer_both_in_one_piece(back: FakeBackend, request: R, _received: Received) -> None:
    with back.own.receive(LATE):
        answers = [HEADER.pack(each, 5, 8) + bytes(8) for each in (request, R.GET_FEATURES)]
        back.socket.sendall(b"".join(answers))


@pytest.mark.parametrize(
    ("behaviour", "error", "told", "timeout"),
    [
        (backs.acknowledge_and_leave, Disconnected, "fake", LATE),
        (stay_silent_behind, TimedOut, "answers within", SHORT),
        (answer_in_the_wrong_order, PeerError, "the reply to ADD_MEM_REG", LATE),
        (answer_twice, PeerError, "the reply to GET_FEATURES", LATE),
        (bring_a_descriptor_behind, PeerError, "descriptors", LATE),
    ],
)
def test_an_acknowledgement_that_is_not_confirmed_is_none(
    regions: list[SharedRegion], behaviour: Behaviour, error: type[PeerError], told: str, timeout: float
) -> None:
    with (
        fake(behaviour={R.ADD_MEM_REG: behaviour}) as back,
        Frontend(back.connection, features=VERSION_1, timeout=timeout) as frontend,
    ):
        with pytest.raises(error, match=told):
            frontend.regions.add(regions[0])
        assert not len(frontend.regions)
        assert not frontend.connected


def test_both_answers_may_come_in_one_piece(regions: list[SharedRegion]) -> None:
    with (
        fake(behaviour={R.ADD_MEM_REG: answer_both_in_one_piece}) as back,
        Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend,
    ):
        frontend.regions.add(regions[0])
        assert list(frontend.regions) == regions[:1]
