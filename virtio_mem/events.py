"""What happens to a machine's memory, told to whoever listens, without ever waiting for one who does not read.

Each listener has a queue of its own, of bounded length. One that is too slow loses the oldest of what it has not read,
and is told how many events it lost: what is new tells more than what is old, and the numbers of events show the gap. A
publisher never waits and never fails, so it may hold any lock; the lock here is taken last, after all others.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

QUEUE_LENGTH = 256
"""Events that a listener may have unread. A guest that plugs 2 MiB blocks as fast as it can makes some 5,000 a second,
so this is a twentieth of a second of the worst, and minutes of what is usual."""

HISTORY_LENGTH = 256
"""Past events that one who comes back can still have."""

KINDS = (
    "requested",
    "plugged",
    "unplugged",
    "refused",
    "freed",
    "touched",
    "stalled",
    "reached",
    "superseded",
    "paused",
    "resumed",
    "saved",
    "dumped",
    "system-reset",
    "connected",
    "disconnected",
    "lost",
)
"""Every kind of event; `lost` is made for the one listener that lost some: `count` of them, None where that can't be
known."""


class Event(NamedTuple):
    """Something that happened: `id` grows, `time` is in Unix seconds, `zone` is None for what concerns all of them."""

    id: int
    time: float
    kind: str
    zone: str | None
    details: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The event as plain data."""
        return {"id": self.id, "time": round(self.time, 6), "kind": self.kind, "zone": self.zone, **self.details}


class Events:
    """Publishes events to any number of subscriptions; thread-safe.

    Identifiers begin at the time in microseconds, so that those of a process that comes after this one are higher.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._first = self._next = int(time.time() * 1_000_000)
        self._history: deque[Event] = deque(maxlen=HISTORY_LENGTH)
        self._subscriptions: list[Subscription] = []
        self._condition = threading.Condition(threading.Lock())
        self._closed = False
        self._wakes = 0

    def publish(self, kind: str, zone: str | None = None, **details: Any) -> None:
        """Tell everybody who listens."""
        assert kind in KINDS, kind
        with self._condition:
            event = Event(self._next, time.time(), kind, zone, details)
            self._next += 1
            self._history.append(event)
            for subscription in self._subscriptions:
                self.dropped += subscription.offer(event)
            if self._subscriptions:
                self._condition.notify_all()

    def subscribe(self, *, after: int | None = None) -> Subscription:
        """Listen from now on; with `after`, to what is still known of the events since the one of that number too: of
        all, if it is 0. Of those that are not known any more a `lost` event tells first."""
        with self._condition:
            subscription = Subscription(self, self._condition)
            if after is not None:
                subscription.lose(*self._unknown_since(after))
                for event in self._history:
                    if event.id > after:
                        subscription.offer(event)
            self._subscriptions.append(subscription)
            return subscription

    def _unknown_since(self, number: int) -> tuple[int, bool]:
        """How many events since the one of that number are not known any more; and whether there may be others, of a
        process before this one."""
        oldest = self._history[0].id if self._history else self._next
        if number == 0 or number >= oldest - 1:
            return 0, False
        return oldest - max(number + 1, self._first), number + 1 < self._first

    def forget(self, subscription: Subscription) -> None:
        """Tell `subscription` nothing more."""
        with self._condition:
            if subscription in self._subscriptions:
                self._subscriptions.remove(subscription)

    @property
    def listeners(self) -> int:
        """How many listen."""
        return len(self._subscriptions)

    @property
    def closed(self) -> bool:
        """Whether there will be no more events."""
        return self._closed

    @property
    def wakes(self) -> int:
        """How often everybody was woken."""
        return self._wakes

    def wake(self) -> None:
        """End every `get()` that waits, with None where there is nothing to get."""
        with self._condition:
            self._wakes += 1
            self._condition.notify_all()

    def close(self) -> None:
        """There are no more events: who waits for one waits no longer."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()


class Subscription:
    """One listener's queue. Iterate over it, or `get()`; close it, or use it as a context manager."""

    def __init__(self, events: Events, condition: threading.Condition) -> None:
        self._events = events
        self._condition = condition
        self._queue: deque[Event] = deque()
        self._lost = 0
        self._may_lack = False
        self._closed = False

    def lose(self, count: int, may_lack: bool) -> None:
        """Tell first that it lost so many events, or lacks nobody knows how many."""
        self._lost, self._may_lack = count, may_lack

    def offer(self, event: Event) -> int:
        """Queue `event`, under the lock; how many events had to go for it."""
        self._queue.append(event)
        if len(self._queue) <= QUEUE_LENGTH:
            return 0
        self._queue.popleft()
        self._lost += 1
        return 1

    def get(self, timeout: float | None = None) -> Event | None:
        """The next event; None when none came within `timeout` seconds or before all are woken, and when there will be
        no more."""
        with self._condition:
            wakes = self._events.wakes
            self._condition.wait_for(
                lambda: self._queue or self._lost or self._may_lack or self._over or self._events.wakes != wakes,
                timeout,
            )
            if self._lost or self._may_lack:
                count = None if self._may_lack else self._lost
                self._lost, self._may_lack = 0, False
                return Event(0, time.time(), "lost", None, {"count": count})
            return self._queue.popleft() if self._queue else None

    @property
    def _over(self) -> bool:
        return self._closed or self._events.closed

    def __iter__(self) -> Iterator[Event]:
        while not self._over or self._queue:
            if (event := self.get()) is not None:
                yield event

    def close(self) -> None:
        """Listen no more. Any thread may call it, and it ends a `get()` in another one."""
        self._events.forget(self)
        with self._condition:
            self._closed = True
            self._queue.clear()
            self._condition.notify_all()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
