"""A lock that a thread which takes it again and again shares with those that wait for it."""

from __future__ import annotations

import threading
from threading import get_ident


class TurnLock:
    """A reentrant lock, for `with`. Who lets go of it and wants it back queues behind whoever waits.

    A `threading.RLock` that is free goes to whoever runs, and that is mostly the thread that has just let go of it: a
    ring that is served without a pause would keep everybody else from its device. Here who waits stands at a gate.
    """

    __slots__ = ("_depth", "_gate", "_lock", "_owner")

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        me = get_ident()
        if self._owner != me:
            with self._gate:
                self._lock.acquire()
            self._owner = me
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()
