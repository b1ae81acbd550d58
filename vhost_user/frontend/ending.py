"""The end of a front end, which any thread may bring about while others are in its calls.

The number of a descriptor that is closed is the next one's that anybody opens, and memory that is unmapped is another's
or nobody's. So who ends it only says so, and wakes who waits; what the calls use is let go of when the last of them is
over.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from vhost_user.errors import Disconnected
from vhost_user.event import Event


class Ending:
    """A call of the front end `name` is made `with ending.call()`: Disconnected where the end has come before.

    Calls may be nested, and a signal's handler may end it: who has the lock may take it again. An interrupt may come
    between any two steps. So calls aren't counted: one is under way as long as its object is, which belongs to who is
    in the call, and at the latest goes with the traceback.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.RLock()
        self._calls: set[weakref.ref[_Call]] = set()
        self._came = False
        self._let_go: Callable[[], None] | None = None
        self._wake: Event | None = None

    def call(self) -> _Call:
        """What a call is made with; it begins with the block."""
        return _Call(self)

    def begin(self, call: _Call) -> None:
        """From now on `call` is under way, unless the end has come."""
        with self._lock:
            if self._came:
                raise Disconnected(self.name, "before", "was closed")
            self._calls.add(weakref.ref(call, self._over))

    def finish(self, call: _Call) -> None:
        """`call` is over."""
        self._over(weakref.ref(call))

    def _over(self, reference: weakref.ref[_Call]) -> None:
        # Listed until all is done: where an interrupt comes before that, it is done again when the object goes.
        if self._came:
            self._let_go_if_unused(besides=reference)
        with self._lock:
            self._calls.discard(reference)

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
        """Have `close` called after the end has come: now, or by the last of the calls that are under way. It may be
        called twice, and by two threads at once."""
        with self._lock:
            self._let_go = close
        self._let_go_if_unused()

    def _let_go_if_unused(self, besides: weakref.ref[_Call] | None = None) -> None:
        with self._lock:
            close = self._let_go
            if close is None or any(each() is not None and each != besides for each in tuple(self._calls)):
                return
            if self._wake is not None:
                self._wake.close()
                self._wake = None
        close()
        self._let_go = None


class _Call:
    """One call; see `Ending`."""

    __slots__ = ("__weakref__", "_ending")

    def __init__(self, ending: Ending) -> None:
        self._ending = ending

    def __enter__(self) -> None:
        self._ending.begin(self)

    def __exit__(self, *_: object) -> None:
        self._ending.finish(self)
