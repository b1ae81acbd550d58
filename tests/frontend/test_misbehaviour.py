"""A back end that does something wrong at one request, whichever that is: an error that says so, and nothing left over.

Descriptors and mappings are counted around each test by the fixture `no_leaks`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import pytest

from tests.frontend import fake as backs
from tests.frontend.fake import LATE, SHORT, VERSION_1, Behaviour, fake
from vhost_user.errors import Disconnected, PeerError, Refused, TimedOut
from vhost_user.frontend import Frontend, SharedRegion
from vhost_user.message import FrontendRequest, ProtocolFeature
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import MIB, ByteCount, GuestAddress, HostOffset
from vhost_user.vring import SplitLayout

R = FrontendRequest

SIZE = ByteCount(1 * MIB)


@contextmanager
def memory() -> Iterator[SharedRegion]:
    with OwnedFd(os.memfd_create("ram", os.MFD_CLOEXEC)) as fd:
        os.ftruncate(fd.fileno(), 2 * SIZE)
        yield SharedRegion(GuestAddress(0), SIZE, fd.fileno())


def second(region: SharedRegion) -> SharedRegion:
    return SharedRegion(GuestAddress(region.end), SIZE, region.fd, HostOffset(SIZE))


def everything(frontend: Frontend, region: SharedRegion) -> None:
    """Each request that a front end makes, at least once."""
    frontend.regions.share([region, second(region)])
    if frontend.has(ProtocolFeature.INFLIGHT_SHMFD):
        frontend.track_inflight(1, 16)
    vring = frontend.vring(0)
    vring.start(SplitLayout.place(16, GuestAddress(0)))
    frontend.get_config(0, 8)
    frontend.set_config(0, b"12345678")
    frontend.status = frontend.status | 128
    frontend.start_logging(GuestAddress(2 * SIZE - 1))
    assert frontend.stop_logging() == set()
    assert vring.stop() == 7
    assert frontend.save_state() == b"the state"
    frontend.load_state(b"another state")
    frontend.reset_device()
    frontend.regions.remove(region)


BY_TABLE = backs.ALL & ~ProtocolFeature.CONFIGURE_MEM_SLOTS


def requests_of(offered: ProtocolFeature) -> list[R]:
    """What `everything` asks of a back end that offers these, without repetitions, in order."""
    with fake(offered=offered) as back, memory() as region:
        with Frontend(back.connection, features=VERSION_1) as frontend:
            everything(frontend, region)
        return list(dict.fromkeys(back.requests))


SLOTS, TABLES = requests_of(backs.ALL), requests_of(BY_TABLE)
CASES = [(request, backs.ALL) for request in SLOTS] + [(R.SET_MEM_TABLE, BY_TABLE)]

UNANSWERED = {R.SET_PROTOCOL_FEATURES}
"""Sent before anything is acknowledged."""

WITHOUT_FAILURE = {R.GET_FEATURES, R.GET_PROTOCOL_FEATURES, R.GET_QUEUE_NUM, R.GET_MAX_MEM_SLOTS, R.GET_STATUS}
"""Answered by a number, each of which is a good one."""

OTHERWISE = {R.SET_LOG_BASE, R.GET_CONFIG, R.GET_VRING_BASE, R.GET_INFLIGHT_FD, R.SET_DEVICE_STATE_FD}
"""Answered by payloads of their own, in which a failure looks different, if it can be told at all."""


def cases(*, but: Collection[R] = ()) -> pytest.MarkDecorator:
    chosen = [case for case in CASES if case[0] not in but]
    return pytest.mark.parametrize(("asked", "offered"), chosen, ids=[request.name for request, _ in chosen])


def test_everything_is_asked() -> None:
    assert {request for request, _ in CASES} == {*SLOTS, *TABLES}
    assert len(CASES) > 25


def attempt(behaviour: Behaviour, request: R, offered: ProtocolFeature, timeout: float = LATE) -> Exception:
    """What comes of it, which must be one of the documented errors."""
    with (
        fake(offered=offered, behaviour={request: behaviour}) as back,
        memory() as region,
        pytest.raises(PeerError) as caught,
        Frontend(back.connection, features=VERSION_1, timeout=timeout) as frontend,
    ):
        everything(frontend, region)
    return caught.value


@cases()
def test_the_back_end_leaves(asked: R, offered: ProtocolFeature) -> None:
    assert isinstance(attempt(backs.leave, asked, offered), Disconnected)


@cases(but={SLOTS[-1]})  # nothing is asked after that one
def test_the_back_end_acknowledges_and_leaves(asked: R, offered: ProtocolFeature) -> None:
    assert isinstance(attempt(backs.acknowledge_and_leave, asked, offered), Disconnected)


@cases(but=UNANSWERED)
def test_the_back_end_is_silent(asked: R, offered: ProtocolFeature) -> None:
    assert isinstance(attempt(backs.stay_silent, asked, offered, SHORT), TimedOut)


@cases()
def test_the_answer_is_cut(asked: R, offered: ProtocolFeature) -> None:
    assert isinstance(attempt(backs.answer_half, asked, offered, SHORT), PeerError)


@cases()
@pytest.mark.parametrize(
    "behaviour",
    [
        backs.answer_another,
        backs.ask_back,
        backs.answer_too_much,
        backs.answer_with_descriptors,
        backs.announce_four_gigabytes,
    ],
)
def test_the_answer_is_wrong(asked: R, offered: ProtocolFeature, behaviour: Behaviour) -> None:
    assert not isinstance(attempt(behaviour, asked, offered), Refused | TimedOut | Disconnected)


@cases(but=UNANSWERED | WITHOUT_FAILURE | OTHERWISE)
def test_the_back_end_refuses(asked: R, offered: ProtocolFeature) -> None:
    assert isinstance(attempt(backs.refuse, asked, offered), Refused)
