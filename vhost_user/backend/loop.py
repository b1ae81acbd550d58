"""The event loop of a back end: descriptors to wait for, calls to make soon or later, all in one thread.

It is small because its needs are few: rings are woken by descriptors, front ends talk through sockets, and a few things
have a time limit. asyncio would serve as well, and cost its import and a task for each ring.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import selectors
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from vhost_user.errors import HostError
from vhost_user.owned_fd import OwnedFd

log = logging.getLogger(__name__)

LONGEST_WAIT = 1.0
"""Seconds. Python runs a signal's handler when a wait is over, also where the signal came just before it began."""


class HasFileno(Protocol):
    """Anything that a selector can wait for."""

    def fileno(self) -> int:
        """The descriptor."""


class Call:
    """A call to come; `cancel()` keeps it from being made."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        """Don't make the call, if it was not made yet."""
        self.callback = None


class EventLoop:
    """Runs callbacks in the thread that calls `run()`. Only `call_soon` and `stop` may be called from other threads.

    A callback that raises is a mistake of ours: it is logged, and the loop goes on.
    """

    def __init__(self) -> None:
        self._selector = selectors.EpollSelector()
        self._wake = _new_eventfd()
        self._soon: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[float, int, Call]] = []
        self._order = itertools.count()
        self._stopped = False
        self.watch(self._wake, lambda: os.eventfd_read(self._wake.fileno()))

    def fileno(self) -> int:
        """What can be read while something waits that is watched: for who looks for something else meanwhile."""
        return self._selector.fileno()

    def watch(self, file: HasFileno, callback: Callable[[], object], *, write: bool = False) -> None:
        """Have `callback` called whenever `file` can be read, or written. OSError for what can't be waited for."""
        self._selector.register(file, selectors.EVENT_WRITE if write else selectors.EVENT_READ, Call(callback))

    def forget(self, file: HasFileno) -> None:
        """Wait for `file` no more. To be called before it is closed; what was never watched is fine."""
        with suppress(KeyError, ValueError):
            self._selector.unregister(file).data.cancel()

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Have `callback` called once, in the loop's thread. Any thread may ask for it."""
        self._soon.append(callback)
        os.eventfd_write(self._wake.fileno(), 1)

    def call_next(self, callback: Callable[[], object]) -> None:
        """The same, for a callback of this loop's own: there is nobody to be woken."""
        self._soon.append(callback)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Call:
        """Have `callback` called once, after `seconds`."""
        timer = Call(callback)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def due(self) -> bool:
        """Whether there is something to do now, or `stop()` was called. For a callback that would rather go on."""
        if self._soon or self._stopped or (self._timers and self._timers[0][0] <= time.monotonic()):
            return True
        return bool(self._selector.select(0))

    def ready_besides(self, file: HasFileno) -> bool:
        """Whether anything else that is watched is ready, for a callback of `file`'s that would rather go on."""
        return any(key.fileobj is not file for key, _ in self._selector.select(0))

    def run_once(self, timeout: float | None = None) -> None:
        """Wait for something to do, for `timeout` seconds at most, and do it."""
        for key, _ in self._selector.select(self._patience(timeout)):
            self._call(key.data)  # unless a callback before it had the file forgotten
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, _, timer = heapq.heappop(self._timers)
            self._call(timer)
        for _ in range(len(self._soon)):
            self._call(Call(self._soon.popleft()))

    def _patience(self, timeout: float | None) -> float | None:
        if self._soon:
            return 0
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if self._timers:
            left = max(0.0, self._timers[0][0] - time.monotonic())
            return left if timeout is None else min(left, timeout)
        return timeout

    @staticmethod
    def _call(call: Call) -> None:
        try:
            if call.callback is not None:
                call.callback()
        except Exception:
            log.exception("a callback of the loop failed")

    def run(self) -> None:
        """Run until `stop()` is called. A loop that was stopped before runs not at all."""
        while not self._stopped:
            self.run_once(LONGEST_WAIT)

    def stop(self) -> None:
        """End `run()`, now or when it is called. Any thread, and a signal handler, may ask for it."""
        self._stopped = True
        os.eventfd_write(self._wake.fileno(), 1)

    def close(self) -> None:
        """Close what is the loop's own."""
        self._selector.close()
        self._wake.close()


def _new_eventfd() -> OwnedFd:
    """Not an `Event`: it is nobody's but ours, and the C core need not be loaded for it."""
    try:
        return OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    except OSError as error:
        raise HostError.from_os_error("eventfd", "new", "eventfd", error, "raise the limit on open files") from error
