"""Memory that comes is confirmed by one more question once it is acknowledged; memory that goes only without that."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from tests.frontend import fake as backs
from tests.frontend.fake import LATE, SHORT, VERSION_1, Behaviour, FakeBackend, answer, fake, refuse
from vhost_user.connection import Received
from vhost_user.errors import Disconnected, PeerError, Refused, TimedOut
from vhost_user.frontend import Frontend, SharedRegion
from vhost_user.message import U64, FrontendRequest, ProtocolFeature
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import MIB, ByteCount, GuestAddress, HostOffset

R = FrontendRequest

SIZE = ByteCount(1 * MIB)
BY_TABLE = backs.ALL & ~ProtocolFeature.CONFIGURE_MEM_SLOTS


@pytest.fixture
def regions() -> Iterator[list[SharedRegion]]:
    with OwnedFd(os.memfd_create("ram", os.MFD_CLOEXEC)) as fd:
        os.ftruncate(fd.fileno(), 3 * SIZE)
        yield [SharedRegion(GuestAddress(n * SIZE), SIZE, fd.fileno(), HostOffset(n * SIZE)) for n in range(3)]


def test_the_last_region_that_comes_is_confirmed_and_none_that_goes(regions: list[SharedRegion]) -> None:
    with fake() as back, Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend:
        before = len(back.requests)
        frontend.regions.share(regions)
        frontend.regions.unshare(regions[:2])
        added, removed = [R.ADD_MEM_REG] * 3, [R.REM_MEM_REG] * 2
        assert back.requests[before:] == [*added, R.GET_FEATURES, *removed]
        assert list(frontend.regions) == regions[2:]


def test_what_goes_is_confirmed_where_nothing_is_acknowledged(regions: list[SharedRegion]) -> None:
    with (
        fake(offered=backs.ALL & ~ProtocolFeature.REPLY_ACK) as back,
        Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend,
    ):
        frontend.regions.share(regions)
        frontend.regions.unshare(regions[:2])
        assert back.requests[-3:] == [R.REM_MEM_REG, R.REM_MEM_REG, R.GET_FEATURES]


@pytest.mark.parametrize(
    ("behaviour", "error", "listed", "timeout"),
    [(backs.leave, Disconnected, False, LATE), (backs.stay_silent, TimedOut, True, SHORT)],
)
def test_nothing_is_taken_for_gone_that_is_not_acknowledged(
    regions: list[SharedRegion], behaviour: Behaviour, error: type[PeerError], listed: bool, timeout: float
) -> None:
    with (
        fake(offered=backs.ALL & ~ProtocolFeature.REPLY_ACK, behaviour={R.REM_MEM_REG: behaviour}) as back,
        Frontend(back.connection, features=VERSION_1, timeout=timeout) as frontend,
    ):
        frontend.regions.share(regions)
        with pytest.raises(error):
            frontend.regions.remove(regions[0])
        assert (regions[0] in frontend.regions) is listed


@pytest.mark.parametrize("offered", [BY_TABLE, BY_TABLE & ~ProtocolFeature.REPLY_ACK])
def test_a_whole_table_is_confirmed(regions: list[SharedRegion], offered: ProtocolFeature) -> None:
    with (
        fake(offered=offered) as back,
        Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend,
    ):
        frontend.regions.share(regions)
        assert back.requests[-2:] == [R.SET_MEM_TABLE, R.GET_FEATURES]


def test_a_region_that_goes_is_gone_with_a_back_end_that_ends_then(regions: list[SharedRegion]) -> None:
    with (
        fake(behaviour={R.REM_MEM_REG: backs.acknowledge_and_leave}) as back,
        Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend,
    ):
        frontend.regions.share(regions)
        frontend.regions.remove(regions[0])
        with pytest.raises(Disconnected):
            frontend.requests.confirm()
        assert list(frontend.regions) == regions[1:]


class RefuseAndWait:
    """Once, and then nothing is read or answered until `again`."""

    def __init__(self) -> None:
        self.again = threading.Event()

    def __call__(self, back: FakeBackend, request: R, received: Received) -> None:
        if self.again.is_set():
            answer(back, request, received)
            return
        refuse(back, request, received)
        self.again.wait(LATE)


@pytest.mark.parametrize(("refused", "offered"), [(R.ADD_MEM_REG, backs.ALL), (R.SET_MEM_TABLE, BY_TABLE)])
def test_memory_is_refused_by_a_back_end_that_is_silent_then(
    regions: list[SharedRegion], refused: R, offered: ProtocolFeature
) -> None:
    silent = RefuseAndWait()
    with (
        fake(offered=offered, behaviour={refused: silent}) as back,
        Frontend(back.connection, features=VERSION_1) as frontend,
    ):
        with pytest.raises(Refused, match="failure 1"):
            frontend.regions.add(regions[0])
        assert frontend.connected
        assert not len(frontend.regions)
        silent.again.set()
        frontend.regions.add(regions[0])
        assert back.requests[-3:] == [refused, refused, R.GET_FEATURES]


def test_memory_is_kept_by_a_back_end_that_is_silent_then(regions: list[SharedRegion]) -> None:
    silent = RefuseAndWait()
    with (
        fake(behaviour={R.REM_MEM_REG: silent}) as back,
        Frontend(back.connection, features=VERSION_1) as frontend,
    ):
        frontend.regions.add(regions[0])
        with pytest.raises(Refused, match="failure 1"):
            frontend.regions.remove(regions[0])
        assert frontend.connected
        assert not frontend.requests.lingering
        assert regions[0] in frontend.regions
        silent.again.set()
        frontend.regions.remove(regions[0])
        assert not len(frontend.regions)


def stay_silent_behind(back: FakeBackend, request: R, received: Received) -> None:
    answer(back, request, received)
    with back.own.receive(LATE) as question:
        assert question.request == R.GET_FEATURES


def answer_twice(back: FakeBackend, request: R, _received: Received) -> None:
    back.reply(request, U64(0))
    back.reply(request, U64(0))


def bring_a_descriptor_behind(back: FakeBackend, request: R, received: Received) -> None:
    answer(back, request, received)
    with back.own.receive(LATE), OwnedFd(os.memfd_create("unwanted", os.MFD_CLOEXEC)) as fd:
        back.reply(R.GET_FEATURES, U64(1), [fd.fileno()])


@pytest.mark.parametrize(
    ("behaviour", "error", "told", "timeout"),
    [
        (backs.acknowledge_and_leave, Disconnected, "fake", LATE),
        (stay_silent_behind, TimedOut, "has to answer within", SHORT),
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
