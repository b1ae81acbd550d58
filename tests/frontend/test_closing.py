"""A front end that is closed while another thread, or the same one, is in a call of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

import pytest

from tests.closing import meanwhile, require_closed_here
from tests.frontend.fake import LATE, VERSION_1, FakeBackend, fake
from tests.leaks import open_files
from vhost_user.connection import Connection, Received
from vhost_user.errors import Disconnected, UsageError
from vhost_user.event import Event
from vhost_user.frontend import Frontend, SharedRegion
from vhost_user.frontend.log import DirtyLogging, SharedLog
from vhost_user.frontend.requests import Requests
from vhost_user.message import FrontendRequest
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import GIB, MIB, ByteCount, GuestAddress
from vhost_user.vring import SplitLayout

R = FrontendRequest
SPLIT = SplitLayout.place(16, GuestAddress(0x1000))

LONG = 10.0
"""Seconds that a call waits which nothing ends: the test has failed."""


@pytest.fixture
def memory() -> Iterator[SharedRegion]:
    with OwnedFd(os.memfd_create("ram", os.MFD_CLOEXEC)) as fd:
        os.ftruncate(fd.fileno(), MIB)
        yield SharedRegion(GuestAddress(0), ByteCount(MIB), fd.fileno())


@pytest.fixture
def frontend() -> Iterator[Frontend]:
    with fake() as back, Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend:
        yield frontend


@contextmanager
def strangers_up_to(number: int) -> Iterator[list[Event]]:
    """Events that others open, until all descriptors up to `number` are taken. Each was rung once."""
    with ExitStack() as opened:
        events = [opened.enter_context(Event.create())]
        while events[-1].fileno() < number:
            events.append(opened.enter_context(Event.create()))
        for event in events:
            event.signal()
        yield events


def test_who_waits_for_a_call_is_told(frontend: Frontend) -> None:
    vring = frontend.vring(0)
    began = time.monotonic()
    with meanwhile(lambda: vring.wait(LONG)) as ended:
        frontend.close()
    require_closed_here(ended, "fake")
    assert time.monotonic() - began < LONG


def test_the_numbers_are_not_the_next_ones_while_they_are_waited_for(frontend: Frontend) -> None:
    vring, other = frontend.vring(0), frontend.vring(1)
    called = vring.call.fileno()
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        bell.take()
        entered.set()
        assert go_on.wait(LONG)

    with Event.create() as bell:
        frontend.requests.watched[bell.fileno()] = hold
        with meanwhile(lambda: vring.wait(LONG)) as ended, meanwhile(lambda: other.wait(LONG)) as other_ended:
            bell.signal()
            assert entered.wait(LONG)
            frontend.close()
            with strangers_up_to(called) as strangers:
                go_on.set()
                while not ended:
                    time.sleep(0.001)
                assert called not in [each.fileno() for each in strangers]
                assert all(each.take() for each in strangers)
        require_closed_here(ended, "fake")
        require_closed_here(other_ended, "fake")
        assert vring.call._fd.closed


def test_what_is_called_while_one_waits_may_close(frontend: Frontend) -> None:
    with Event.create() as bell:
        frontend.requests.watched[bell.fileno()] = frontend.close
        bell.signal()
        with pytest.raises(Disconnected, match="was closed"):
            frontend.vring(0).wait(LONG)


def test_the_handler_of_a_signal_may_close(frontend: Frontend) -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: frontend.close())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(Disconnected, match="was closed"):
            frontend.vring(0).wait(LONG)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def all_time_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits that were taken are not looked through: a thread that takes all the time is in the C core then."""
    monkeypatch.setattr("vhost_user.frontend.log._pages", lambda _: ())


def take_until_the_end(frontend: Frontend) -> None:
    while True:
        frontend.take_dirty_pages()


def test_a_log_is_not_unmapped_under_who_takes_from_it(all_time_in_c: None) -> None:
    for _ in range(10):
        with fake() as back, Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend:
            frontend.start_logging(GuestAddress(128 * GIB - 1))
            with meanwhile(lambda frontend=frontend: take_until_the_end(frontend)) as ended:  # type: ignore[misc]
                frontend.close()
            require_closed_here(ended, "fake")


def test_a_log_is_not_replaced_under_who_takes_from_it(all_time_in_c: None, frontend: Frontend) -> None:
    frontend.start_logging(GuestAddress(128 * GIB - 1))
    with meanwhile(lambda: take_until_the_end(frontend)) as ended:
        for size in range(129, 149):
            frontend.start_logging(GuestAddress(size * GIB - 1))
        frontend.close()
    require_closed_here(ended, "fake")


@contextmanager
def threads() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Has another thread do something: as much as it can for now, and the rest by the end of the block."""
    begun: list[threading.Thread] = []

    def begin(call: Callable[[], object]) -> None:
        begun.append(threading.Thread(target=call))
        begun[-1].start()
        begun[-1].join(0.05)

    yield begin
    for thread in begun:
        thread.join()


@contextmanager
def handlers() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Does something here and now, as the handler of a signal does."""

    def begin(call: Callable[[], object]) -> None:
        call()

    yield begin


by_others = pytest.mark.parametrize("others", [threads, handlers])
Others = Callable[[], AbstractContextManager[Callable[[Callable[[], object]], None]]]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], object]]]:
    """What is done, once, at the moment when the back end has taken a log."""
    calls: list[Callable[[], object]] = []
    send = DirtyLogging._send

    def send_then_call(logging: DirtyLogging, log: SharedLog, *, switch: bool) -> None:
        send(logging, log, switch=switch)
        if calls:
            calls.pop()()

    monkeypatch.setattr(DirtyLogging, "_send", send_then_call)
    yield calls
    assert not calls


def require_no_log() -> None:
    assert not [name for name in open_files() if "dirty-log" in name]


@by_others
def test_a_close_while_memory_has_the_log_replaced(
    others: Others, taken: list[Callable[[], object]], frontend: Frontend
) -> None:
    frontend.start_logging(GuestAddress(MIB - 1))
    with OwnedFd(os.memfd_create("ram", os.MFD_CLOEXEC)) as fd, others() as begin:
        os.ftruncate(fd.fileno(), MIB)
        taken.append(lambda: begin(frontend.close))
        with pytest.raises(Disconnected):
            frontend.regions.share([SharedRegion(GuestAddress(200 * GIB), ByteCount(MIB), fd.fileno())])
    require_no_log()


@by_others
def test_a_close_while_logging_starts(others: Others, taken: list[Callable[[], object]], frontend: Frontend) -> None:
    with others() as begin:
        taken.append(lambda: begin(frontend.close))
        frontend.start_logging(GuestAddress(MIB - 1))
    require_no_log()


@by_others
def test_a_stop_while_the_log_is_replaced(
    others: Others, taken: list[Callable[[], object]], frontend: Frontend, memory: SharedRegion
) -> None:
    frontend.start_logging(GuestAddress(MIB - 1))
    with others() as begin:
        taken.append(lambda: begin(frontend.stop_logging))
        frontend.start_logging(GuestAddress(200 * GIB - 1))
    frontend.regions.share([memory])
    require_no_log()
    with pytest.raises(UsageError):
        frontend.take_dirty_pages()


def test_the_log_is_replaced_while_it_is_stopped(frontend: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    frontend.start_logging(GuestAddress(MIB - 1))
    close = DirtyLogging.close
    with threads() as begin:

        def others_first(logging: DirtyLogging) -> None:
            begin(lambda: frontend.start_logging(GuestAddress(200 * GIB - 1)))
            close(logging)

        with monkeypatch.context() as patch:
            patch.setattr(DirtyLogging, "close", others_first)
            frontend.stop_logging()
    assert frontend.take_dirty_pages() == set()


def test_a_log_is_not_let_go_of_under_who_takes_from_it(frontend: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    frontend.start_logging(GuestAddress(MIB - 1))
    take = SharedLog.take
    closed: list[bool] = []

    def close_first(log: SharedLog) -> set[int]:
        begin(frontend._logging.close)
        closed.append(log._fd.closed)
        return take(log)

    with threads() as begin:
        monkeypatch.setattr(SharedLog, "take", close_first)
        assert frontend.take_dirty_pages() == set()
    assert closed == [False]


def test_nothing_is_asked_of_one_that_is_closed(frontend: Frontend) -> None:
    vring = frontend.vring(0)
    frontend.close()
    frontend.close()
    for call in (
        frontend.take_dirty_pages,
        frontend.stop_logging,
        lambda: frontend.start_logging(GuestAddress(0)),
        lambda: frontend.track_inflight(1, 16),
        lambda: frontend.vring(1),
        lambda: vring.wait(0),
        lambda: vring.failed,
        lambda: vring.start(SPLIT),
    ):
        with pytest.raises(Disconnected, match="was closed"):
            call()


class Held:
    """A behaviour: the request is not answered before the front end is gone."""

    def __init__(self) -> None:
        self.came = threading.Event()

    def __call__(self, back: FakeBackend, _request: R, _received: Received) -> None:
        self.came.set()
        with back.own.receive(LATE):
            raise AssertionError("the front end goes on")


@pytest.mark.parametrize("asked", [R.GET_FEATURES, R.GET_QUEUE_NUM, R.ADD_MEM_REG, R.SET_LOG_BASE, R.SET_VRING_KICK])
def test_a_close_ends_a_reconnect(frontend: Frontend, memory: SharedRegion, asked: R) -> None:
    frontend.regions.share([memory])
    frontend.start_logging(GuestAddress(MIB - 1))
    vring = frontend.vring(0)
    vring.start(SPLIT)
    held = Held()
    with fake(behaviour={asked: held}) as second:
        with meanwhile(lambda: frontend.reconnect(second.connection)) as ended:
            assert held.came.wait(LONG)
            frontend.close()
        require_closed_here(ended, "fake")
        assert second.connection.fileno() == -1
    assert not frontend.connected
    assert frontend.channel is None
    assert frontend.vrings == {}
    assert vring.call._fd.closed


def test_a_close_in_the_moment_before_the_other_connection(frontend: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    renew = Requests.renew

    def close_first(requests: Requests, connection: Connection) -> None:
        frontend.close()
        renew(requests, connection)

    monkeypatch.setattr(Requests, "renew", close_first)
    with fake() as second:
        with pytest.raises(Disconnected, match="was closed"):
            frontend.reconnect(second.connection)
        assert second.connection.fileno() == -1
    assert not frontend.connected


def test_one_that_is_closed_does_not_reconnect(frontend: Frontend) -> None:
    frontend.close()
    with fake() as second:
        with pytest.raises(Disconnected, match="was closed"):
            frontend.reconnect(second.connection)
        assert second.connection.fileno() == -1


def test_it_is_closed_at_whatever_moment_of_a_reconnect(memory: SharedRegion) -> None:
    for step in range(40):
        with fake() as first, Frontend(first.connection, features=VERSION_1, timeout=LATE) as frontend:
            frontend.regions.share([memory])
            frontend.vring(0).start(SPLIT)
            with fake() as second:
                thread = threading.Timer(step * 0.0001, frontend.close)
                thread.start()
                try:
                    frontend.reconnect(second.connection)
                except Disconnected as error:
                    assert error.limit == "was closed"  # noqa: PT017 -- there is one, or none
                thread.join()
                assert second.connection.fileno() == -1
            assert not frontend.connected


def at_use(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: Callable[[], object], use: int = 1
) -> Callable[[], bool]:
    """Have `call` done right after attribute `name` of `owner` is looked at, or set, time `use`; whether that was."""
    uses = 0

    def used(by: object) -> None:
        nonlocal uses
        uses += by is owner
        if by is owner and uses == use:
            call()

    def look(self: object) -> object:
        value = vars(self)[name]
        used(self)
        return value

    def put(self: object, value: object) -> None:
        vars(self)[name] = value
        used(self)

    monkeypatch.setattr(type(owner), name, property(look, put), raising=False)
    return lambda: uses >= use


def test_a_close_between_two_looks_at_what_it_takes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: tuple[tuple[Callable[[Frontend], object], str, Callable[[Frontend], object]], ...] = (
        (lambda frontend: frontend.requests, "_connection", lambda frontend: frontend.requests.notice_end()),
        (lambda frontend: frontend.requests, "_given_up", lambda frontend: frontend.requests.lingering),
        (lambda frontend: frontend, "channel", Frontend.serve_channel),
    )
    for owner, name, call in looks:
        with fake() as back, Frontend(back.connection, features=VERSION_1, timeout=LATE) as frontend:
            if name == "_given_up":
                frontend.requests.give_up()
            with monkeypatch.context() as patch:
                used = at_use(patch, owner(frontend), name, frontend.close)
                call(frontend)
                assert used()


@pytest.mark.parametrize("call", [Frontend.reset_device, Frontend.save_state])
def test_a_close_while_all_rings_are_gone_through(
    call: Callable[[Frontend], object], frontend: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring, _ = frontend.vring(0), frontend.vring(1)
    with monkeypatch.context() as patch:
        used = at_use(patch, ring, "started", frontend.close)
        with suppress(Disconnected):
            call(frontend)
        assert used()


@by_others
@pytest.mark.parametrize(("moment", "use"), [("_connection", 1), ("_connection", 2), ("_given_up", 1), ("end", 1)])
def test_a_close_while_the_back_end_is_given_up(
    moment: str, use: int, others: Others, frontend: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = frontend.requests._connection
    assert connection is not None
    end = connection.end
    with others() as begin, monkeypatch.context() as patch:
        if moment == "end":
            patch.setattr(connection, "end", lambda: (begin(frontend.close), end()))
        else:
            at_use(patch, frontend.requests, moment, lambda: begin(frontend.close), use)
        frontend.requests.give_up()
    assert connection.fileno() == -1
    assert not frontend.connected
    assert not frontend.requests.lingering


def test_another_connection_that_comes_within_a_close_is_not_forgotten(
    frontend: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = frontend.requests
    with fake() as second:

        def renew() -> None:
            patch.setattr(requests, "close", lambda: None)  # as if that one had closed the old one a moment before
            begin(lambda: requests.renew(second.connection))

        with threads() as begin, monkeypatch.context() as patch:
            at_use(patch, requests, "_given_up", renew)
            requests.close()
        assert requests.fileno() == second.connection.fileno() != -1


def test_the_connection_is_closed_before_what_a_request_may_send(
    frontend: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    vring, close = frontend.vring(0), Requests.close
    closed: list[bool] = []

    def look_and_close(requests: Requests) -> None:
        closed.append(vring.call._fd.closed)
        close(requests)

    monkeypatch.setattr(Requests, "close", look_and_close)
    frontend.close()
    assert closed == [False]
    assert vring.call._fd.closed
