"""The dirty log from the front end's side: bits are taken out, and no page is lost while the log is replaced."""

from __future__ import annotations

import fcntl
import os
import random

import pytest

from tests.frontend.fake import ALL, FEATURES, VERSION_1, FakeBackend, answer, fake, leave, refuse
from vhost_user.connection import Received
from vhost_user.dirty_log import DirtyLog
from vhost_user.errors import Disconnected, HostError, Refused, UsageError
from vhost_user.frontend import Frontend, SharedRegion
from vhost_user.frontend.log import SharedLog
from vhost_user.message import F_LOG_ALL, LOG_PAGE, U64, FrontendRequest, ProtocolFeature
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import GIB, ByteCount, GuestAddress

R = FrontendRequest
HIGHEST = GuestAddress(1 * GIB - 1)


def address(page: int) -> int:
    return page * LOG_PAGE


def test_what_was_marked_is_taken_once(rng: random.Random) -> None:
    log = SharedLog(HIGHEST)
    theirs = DirtyLog(log.fileno(), log.size)
    for _ in range(10):
        pages = {rng.randrange(1 * GIB // LOG_PAGE) for _ in range(100)} | {0, 1 * GIB // LOG_PAGE - 1}
        for page in pages:
            theirs.mark(address(page), 1)
        assert log.take() == pages
        assert log.take() == set()
    theirs.close()
    log.close()


@pytest.mark.parametrize(("highest", "covered"), [(0, 8 * 4096), (32768 * LOG_PAGE - 1, 32768), (32768 << 12, 65536)])
def test_a_log_covers_whole_pages_of_bits(highest: int, covered: int) -> None:
    log = SharedLog(GuestAddress(highest))
    assert log.size * 8 == covered
    assert log.covers(GuestAddress(covered * LOG_PAGE - 1))
    assert not log.covers(GuestAddress(covered * LOG_PAGE))
    log.close()


def test_nobody_can_shorten_it() -> None:
    log = SharedLog(HIGHEST)
    with pytest.raises(PermissionError):
        os.ftruncate(log.fileno(), 0)
    assert fcntl.fcntl(log.fileno(), fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    log.close()


@pytest.mark.parametrize("call", ["memfd_create", "ftruncate"])
def test_a_host_without_room(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(HostError, match=f"{call} failed: ENOSPC"):
        SharedLog(HIGHEST)


def test_a_log_that_can_not_be_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise HostError("mapping", 0, "no room")

    monkeypatch.setattr("vhost_user.frontend.log.Mapping", full)
    with pytest.raises(HostError, match="no room"):
        SharedLog(HIGHEST)


class Keeping:
    """Keeps the logs that it is given, and refuses those from number `good` on."""

    def __init__(self, good: int = 99) -> None:
        self.logs: list[OwnedFd] = []
        self.good = good

    def __call__(self, back: FakeBackend, request: R, received: Received) -> None:
        if len(self.logs) == self.good:
            leave(back, request, received)
            return
        self.logs.append(OwnedFd(received.fds[0].take()))
        answer(back, request, received)

    def mark(self, page: int, log: int = -1) -> None:
        size = os.fstat(self.logs[log].fileno()).st_size
        theirs = DirtyLog(self.logs[log], size)
        theirs.mark(address(page), 1)
        theirs.close()


class RefuseWithoutLog:
    """Features are refused that end a log which was begun."""

    def __init__(self) -> None:
        self._logs = False

    def __call__(self, back: FakeBackend, request: R, received: Received) -> None:
        logs = bool(U64.decode(received.body).value & F_LOG_ALL)
        (refuse if self._logs and not logs else answer)(back, request, received)
        self._logs = logs


def test_a_log_grows_with_memory_and_loses_nothing() -> None:
    keeping = Keeping()
    with fake(behaviour={R.SET_LOG_BASE: keeping}) as back, Frontend(back.connection, features=VERSION_1) as frontend:
        frontend.start_logging(GuestAddress(0))
        keeping.mark(5)
        frontend.start_logging(GuestAddress(4096))  # covered already
        assert len(keeping.logs) == 1
        frontend.start_logging(HIGHEST)
        keeping.mark(6)
        assert frontend.take_dirty_pages() == {5, 6}
        assert frontend.take_dirty_pages() == set()
        keeping.mark(7)
        assert frontend.stop_logging() == {7}
        sent = [U64.decode(body).value for body in back.payloads_of(R.SET_FEATURES)]
        assert [bool(features & F_LOG_ALL) for features in sent] == [False, True, False]
        with pytest.raises(UsageError, match="start_logging"):
            frontend.take_dirty_pages()


def test_memory_that_is_shared_while_logging_is_logged() -> None:
    keeping = Keeping()
    with (
        OwnedFd(os.memfd_create("ram", os.MFD_CLOEXEC)) as fd,
        fake(behaviour={R.SET_LOG_BASE: keeping}) as back,
        Frontend(back.connection, features=VERSION_1) as frontend,
    ):
        os.ftruncate(fd.fileno(), 4096)
        frontend.start_logging(GuestAddress(0))
        region = SharedRegion(GuestAddress(1 * GIB), ByteCount(4096), fd.fileno())
        frontend.regions.add(region)
        assert back.requests.index(R.ADD_MEM_REG) > len(back.requests) - back.requests[::-1].index(R.SET_LOG_BASE) - 1
        page = 1 * GIB // LOG_PAGE
        keeping.mark(page)
        assert frontend.stop_logging() == {page}
        frontend.regions.add(SharedRegion(GuestAddress(2 * GIB), ByteCount(4096), fd.fileno()))
        assert len(keeping.logs) == 2


@pytest.mark.parametrize("refused", [False, True])
def test_memory_that_came_while_nobody_was_there_is_logged(refused: bool) -> None:
    first, second, third = Keeping(), Keeping(good=0 if refused else 99), Keeping()
    with (
        OwnedFd(os.memfd_create("ram", os.MFD_CLOEXEC)) as fd,
        fake(behaviour={R.SET_LOG_BASE: first}) as back,
        Frontend(back.connection, features=VERSION_1) as frontend,
        fake(behaviour={R.SET_LOG_BASE: second}) as next_back,
        fake(behaviour={R.SET_LOG_BASE: third}) as last_back,
    ):
        os.ftruncate(fd.fileno(), 4096)
        frontend.start_logging(GuestAddress(0))
        first.mark(5)
        frontend.requests.close()
        frontend.regions.keep([SharedRegion(GuestAddress(1 * GIB), ByteCount(4096), fd.fileno())])
        if refused:
            with pytest.raises(Disconnected):
                frontend.reconnect(next_back.connection)
        else:
            frontend.reconnect(next_back.connection)
            second.mark(6)
        frontend.reconnect(last_back.connection)
        page = 1 * GIB // LOG_PAGE
        third.mark(page)
        assert frontend.stop_logging() == {5, page} | (set() if refused else {6})


def test_a_larger_log_that_is_not_taken_leaves_the_old_one() -> None:
    keeping = Keeping(good=1)
    with (
        fake(behaviour={R.SET_LOG_BASE: keeping}) as back,
        Frontend(back.connection, features=VERSION_1) as frontend,
    ):
        frontend.start_logging(GuestAddress(0))
        keeping.mark(5)
        with pytest.raises(Disconnected):
            frontend.start_logging(HIGHEST)
        assert frontend.take_dirty_pages() == {5}


def test_a_stop_that_is_refused_loses_no_page() -> None:
    keeping = Keeping()
    with (
        fake(behaviour={R.SET_LOG_BASE: keeping, R.SET_FEATURES: RefuseWithoutLog()}) as back,
        Frontend(back.connection, features=VERSION_1) as frontend,
    ):
        frontend.start_logging(HIGHEST)
        keeping.mark(7)
        with pytest.raises(Refused, match="failure 1"):
            frontend.stop_logging()
        assert frontend.take_dirty_pages() == {7}


@pytest.mark.parametrize(
    ("offered", "features", "what"),
    [(ALL & ~ProtocolFeature.LOG_SHMFD, FEATURES, "LOG_SHMFD"), (ALL, FEATURES & ~F_LOG_ALL, "LOG_ALL")],
)
def test_a_back_end_that_can_not_log(offered: ProtocolFeature, features: int, what: str) -> None:
    with (
        fake(offered=offered, features=features) as back,
        Frontend(back.connection, features=VERSION_1) as frontend,
        pytest.raises(Refused, match=what),
    ):
        frontend.start_logging(HIGHEST)
