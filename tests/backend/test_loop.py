"""The event loop: order, timers, calls from other threads, callbacks that fail or forget others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest

from vhost_user import _native
from vhost_user.backend.loop import EventLoop
from vhost_user.event import Event


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


def note(heard: list[str], event: Event) -> None:
    heard.append("event")
    event.take()


def test_what_can_be_read_is_called(loop: EventLoop) -> None:
    heard: list[str] = []
    with Event.create() as event:
        loop.watch(event, partial(note, heard, event))
        loop.run_once(0)
        assert heard == []
        event.signal()
        loop.run_once(0)
        loop.run_once(0)
        assert heard == ["event"]
        loop.forget(event)
        loop.forget(event)
        event.signal()
        loop.run_once(0)
        assert heard == ["event"]


def test_what_is_due_is_known_before_it_is_called(loop: EventLoop) -> None:
    def call_and_look() -> bool:
        loop.run_once(0)
        return loop.due()

    assert not call_and_look()
    with Event.create() as event:
        loop.watch(event, event.take)
        event.signal()
        assert loop.due()
        assert not call_and_look()
        loop.forget(event)
    timer = loop.call_later(3600, lambda: None)
    assert not loop.due()
    timer.cancel()
    loop.call_later(0, lambda: None)
    assert loop.due()
    assert not call_and_look()
    loop.call_soon(lambda: None)
    assert loop.due()
    loop.run_once(0)
    assert not call_and_look()  # the loop was woken for it besides
    loop.stop()
    assert loop.due()


def test_a_file_that_was_forgotten_in_the_same_round_is_not_called(loop: EventLoop) -> None:
    heard: list[Event] = []
    events = [Event.create() for _ in range(2)]

    def forget_the_other(mine: Event, other: Event) -> None:
        heard.append(mine)
        loop.forget(other)
        other.close()

    for mine, other in (events, events[::-1]):
        loop.watch(mine, partial(forget_the_other, mine, other))
        mine.signal()
    loop.run_once(0)
    assert len(heard) == 1
    for event in events:
        loop.forget(event)
        event.close()


def test_timers_are_called_in_order_unless_cancelled(loop: EventLoop) -> None:
    heard: list[int] = []
    loop.call_later(0.002, lambda: heard.append(2))
    loop.call_later(0.001, lambda: heard.append(1))
    loop.call_later(0.0015, lambda: heard.append(0)).cancel()
    while len(heard) < 2:
        loop.run_once(1)
    assert heard == [1, 2]


def test_a_cancelled_timer_wakes_nobody(loop: EventLoop) -> None:
    loop.call_later(0, lambda: None).cancel()
    loop.run_once(0)
    assert loop._timers == []


def test_another_thread_can_call_and_stop(loop: EventLoop) -> None:
    heard: list[int] = []
    thread = threading.Thread(target=loop.run)
    thread.start()
    loop.call_soon(lambda: heard.append(threading.get_ident()))
    while not heard:
        pass
    assert heard == [thread.ident]
    loop.stop()
    thread.join()
    loop.run()  # was stopped: does nothing


def test_what_a_callback_calls_next_is_called_in_the_same_turn_and_wakes_nobody(loop: EventLoop) -> None:
    heard: list[str] = []

    def taken(event: Event) -> None:
        event.take()
        loop.call_next(partial(heard.append, "next"))
        heard.append("due" if loop.due() else "not due")
        heard.append(str(_native.can_be_read(loop.fileno())))

    with Event.create() as event:
        loop.watch(event, partial(taken, event))
        event.signal()
        loop.run_once(1)
        loop.forget(event)
    assert heard == ["due", "False", "next"]


def test_what_is_called_next_later_is_not_slept_over(loop: EventLoop) -> None:
    heard: list[str] = []
    loop.call_soon(lambda: loop.call_next(partial(heard.append, "next")))
    loop.run_once(1)
    assert heard == []
    loop.run_once()
    assert heard == ["next"]


def test_calls_that_call_again_do_not_hold_the_loop(loop: EventLoop) -> None:
    heard: list[str] = []

    def again() -> None:
        heard.append("again")
        loop.call_soon(again)

    with Event.create() as event:
        loop.watch(event, partial(note, heard, event))
        loop.call_soon(again)
        event.signal()
        for _ in range(3):
            loop.run_once()
        loop.forget(event)
    assert heard.count("event") == 1
    assert heard.count("again") == 3


def test_a_callback_that_fails_is_logged(loop: EventLoop, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []

    def fail() -> None:
        raise ZeroDivisionError

    loop.call_soon(fail)
    loop.call_soon(lambda: heard.append("next"))
    loop.run_once(0)
    assert heard == ["next"]
    assert "ZeroDivisionError" in caplog.text
