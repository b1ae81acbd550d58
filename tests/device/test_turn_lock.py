"""A lock that a thread can't keep for itself by taking it again at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from virtio_mem.turn_lock import TurnLock

ASKED = 20
INTERRUPTED = 200


class InterruptError(Exception):
    """What a signal's handler raises."""


@pytest.fixture
def interrupts() -> Iterator[None]:
    """One after the other, at any place."""

    def interrupt(*_: object) -> None:
        raise InterruptError

    before = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_who_waits_is_next() -> None:
    lock, order = TurnLock(), list[str]()

    def wait() -> None:
        with lock:
            order.append("who waited")

    for _ in range(ASKED):
        other = threading.Thread(target=wait)
        with lock:
            other.start()
            while not lock._gate.locked():
                time.sleep(0.0001)
        with lock:
            order.append("who had it")
        other.join()
    assert order == ["who waited", "who had it"] * ASKED


def test_its_holder_may_take_it_again() -> None:
    lock, heard = TurnLock(), list[str]()

    def take() -> None:
        with lock:
            heard.append("taken")

    other = threading.Thread(target=take)
    with lock:
        with lock:
            other.start()
        other.join(0.05)
        assert heard == []
    other.join()
    assert heard == ["taken"]


def test_each_time_that_it_is_taken_counts() -> None:
    lock = TurnLock()
    with lock, lock:
        assert lock.turns == 2
    assert taken_by_another(lock)
    with lock:
        assert lock.turns == 3


def test_a_stack_of_contexts_takes_it() -> None:
    lock = TurnLock()
    with ExitStack() as stack:
        stack.enter_context(lock)
        assert not taken_by_another(lock, seconds=0.05)
    assert taken_by_another(lock)


def test_nobody_else_lets_go_of_it() -> None:
    lock, refused = TurnLock(), list[RuntimeError]()

    def let_go() -> None:
        try:
            lock.__exit__(None, None, None)
        except RuntimeError as error:
            refused.append(error)

    with lock:
        other = threading.Thread(target=let_go)
        other.start()
        other.join()
    assert len(refused) == 1


def test_a_handler_that_raises_leaves_it_free(interrupts: None) -> None:
    lock = TurnLock()
    for number in range(INTERRUPTED):
        with pytest.raises(InterruptError):
            take_until_interrupted(lock, 0.0002 + number % 17 * 0.00001)
        assert taken_by_another(lock), f"after {number} interrupts it is free"


def take_until_interrupted(lock: TurnLock, seconds: float) -> None:
    """Take it and let go of it, again and again."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    while True:
        with lock, lock:
            pass


def taken_by_another(lock: TurnLock, seconds: float = 5) -> bool:
    """Whether another thread gets it in this time."""
    got: list[bool] = []

    def take() -> None:
        if lock._lock.acquire(timeout=seconds):
            lock._lock.release()
            got.append(True)

    other = threading.Thread(target=take)
    other.start()
    other.join()
    return bool(got)
