"""A lock that a thread can't keep for itself by taking it again at once."""

from __future__ import annotations

import threading
import time

from virtio_mem.turn_lock import TurnLock

ASKED = 50


def test_who_asks_waits_for_one_turn_of_who_asks_all_the_time() -> None:
    lock, over, turns = TurnLock(), threading.Event(), 0

    def take_again_and_again() -> None:
        nonlocal turns
        while not over.is_set():
            with lock:
                turns += 1
                time.sleep(0.0005)

    other = threading.Thread(target=take_again_and_again)
    other.start()
    waited = 0
    for _ in range(ASKED):
        time.sleep(0.001)
        before = turns
        with lock:
            waited += turns - before
    over.set()
    other.join()
    # None, unless this thread is held up between its look and its asking. A threading.RLock has it wait for hundreds.
    assert waited <= ASKED


def test_its_holder_may_take_it_again() -> None:
    lock, heard = TurnLock(), []

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
