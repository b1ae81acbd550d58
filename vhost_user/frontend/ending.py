"""The end of a front end, which any thread may bring about while others are in its calls.

The number of a descriptor that is closed is the next one's that anybody opens, and memory that is unmapped is another's
or nobody's. So who ends it only says so, and wakes who waits; what the calls use is let go of when the last of them is
over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from vhost_user.errors import Disconnected
from vhost_user.event import Event


class Ending:
    """A call of the front end `name` is made `with` it: Disconnected where the end has come before.

    Calls may be nested, and a signal's handler may end it: who has the lock may take it again.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.RLock()
        self._calls = 0
        self._came = False
        self._let_go: Callable[[], None] | None = None
        self._wake: Event | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._came:
                raise Disconnected(self.name, "before", "was closed")
            self._calls += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._calls -= 1
        if self._came:
            self._let_go_if_unused()

    def check(self) -> None:
        """For a call under way: raises Disconnected if the end has come."""
        if self._came:
            raise Disconnected(self.name, "meanwhile", "was closed")

    def fileno(self) -> int:
        """For a call under way: what can be read once the end has come. HostError where no descriptor is left."""
        with self._lock:
            self.check()
            if self._wake is None:
                self._wake = Event.create()
            return self._wake.fileno()

    def come(self) -> None:
        """No call begins any more, and those that wait are woken."""
        with self._lock:
            self._came = True
            if self._wake is not None:
                self._wake.signal()

    def let_go(self, close: Callable[[], None]) -> None:
        """Have `close` called after the end has come: now, or by the last of the calls that are under way."""
        with self._lock:
            self._let_go = close
        self._let_go_if_unused()

    def _let_go_if_unused(self) -> None:
        with self._lock:
            if self._calls or self._let_go is None:
                return
            close, self._let_go = self._let_go, None
            if self._wake is not None:
                self._wake.close()
                self._wake = None
        close()
