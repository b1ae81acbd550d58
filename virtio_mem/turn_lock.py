"""A lock that a thread which takes it again and again shares with those that wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable


class _Leaving:
    """The `__exit__` of a TurnLock is that of its RLock; of the class, as an ExitStack asks for it, a function."""

    def __get__(self, lock: TurnLock | None, _: type) -> Callable[..., None]:
        return _leave if lock is None else lock._leave


def _leave(lock: TurnLock, *details: object) -> None:
    del details
    lock._leave(None, None, None)


class TurnLock:
    """A reentrant lock, for `with`. Who lets go of it and wants it back comes behind the first one that waits.

    A `threading.RLock` that is free goes to whoever runs, and that is mostly the thread that has just let go of it: a
    ring that is served without a pause would keep everybody else from its device. Here the first who waits stands in a
    gate, and nobody passes. Those behind it are not in order: while they wake up they may be passed.

    A signal's handler that raises (Ctrl-C) finds it taken or not, never half: to let go of it is one call of C, as that
    of an RLock is.
    """

    __slots__ = ("_gate", "_is_mine", "_leave", "_lock", "turns")

    def __init__(self) -> None:
        self.turns = 0
        """How often it was taken. Who takes it and finds one more than before knows that nobody else did in between."""
        self._gate = threading.Lock()
        self._lock = threading.RLock()
        self._leave = self._lock.__exit__
        self._is_mine = self._lock._is_owned  # type: ignore[attr-defined] # as threading.Condition asks

    def __enter__(self) -> None:
        mine = self._is_mine()
        try:
            if mine:
                self._lock.acquire()
            else:
                with self._gate:
                    self._lock.acquire()
            self.turns += 1
        except BaseException:  # also one that a handler raised when the lock had been taken
            if mine or self._is_mine():
                self._lock.release()
            raise

    __exit__ = _Leaving()
