"""The end of a front end by itself: what is under way when it comes."""

from __future__ import annotations

import threading

import pytest

from vhost_user.errors import Disconnected
from vhost_user.frontend.ending import Ending


class Interrupting:
    """A lock. An interrupt comes when it is about to be taken, or was released, for the time `left`."""

    def __init__(self, left: int) -> None:
        self._lock = threading.RLock()
        self._left = left

    def _step(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt

    def __enter__(self) -> None:
        self._step()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._step()


@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize("handled", [False, True])
def test_an_interrupt_does_not_leave_a_call_under_way(
    step: int, handled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending, closed = Ending("fake"), []

    def close() -> None:
        ending.come()
        ending.let_go(lambda: closed.append(True))

    monkeypatch.setattr(ending, "_lock", Interrupting(step))
    try:
        with ending.call():
            pass
    except KeyboardInterrupt:
        if not handled:
            close()  # while the traceback has all that was being called
    else:
        pytest.fail("there was no interrupt")
    if handled:
        close()
    assert closed == [True]


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_an_interrupt_behind_the_end_leaves_nothing_open(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ending, closed = Ending("fake"), []

    def interrupted() -> None:
        with ending.call():
            ending.come()
            ending.let_go(lambda: closed.append(True))
            assert not closed
            monkeypatch.setattr(ending, "_lock", Interrupting(step))

    with pytest.raises(KeyboardInterrupt) as told:
        interrupted()
    del told
    assert closed


def test_it_is_let_go_of_by_the_last_call() -> None:
    ending, closed = Ending("fake"), []
    with ending.call():
        with ending.call():
            ending.come()
            ending.let_go(lambda: closed.append(True))
        assert not closed
    assert closed == [True]


def test_who_would_wait_for_an_end_that_has_come_is_told() -> None:
    ending = Ending("fake")
    with ending.call():
        ending.come()
        with pytest.raises(Disconnected, match="was closed"):
            ending.fileno()
