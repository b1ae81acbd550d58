"""Serving a ring of small requests many at a time, and staying awake for the next ones.

To be woken by an eventfd takes tens of microseconds, many times what a small request does. A driver that asks again as
soon as it has its answer is met awake: the ring is looked at for a bounded time, and neither side needs the other's
notification. One that takes longer than that is not waited for again until it was as quick once more, so that looking
costs nothing where it gains nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from vhost_user.awake import LONGEST_LOOK, looking
from vhost_user.backend.vring import Vring
from vhost_user.chain import Chain
from vhost_user.vring import Answerer, Batch, BatchedQueue

LONGEST_TURN = 1_000_000
"""Nanoseconds after which whatever else the event loop has to do comes first: a driver that asks again just before the
end of each look would hold up everybody for a ringful of looks."""

LONGEST_STAY = 100_000_000
"""Nanoseconds for which turn follows turn while the event loop has nothing else to do."""


class RingBatches:
    """Serves `vring`, which runs. `batch` is room for its requests, and `handle` answers those of its members that have
    not gone back; it may give some back itself. What `answerer` can answer at once it does not get to see."""

    def __init__(
        self, vring: Vring, batch: Batch, handle: Callable[[RingBatches], None], answerer: Answerer | None = None
    ) -> None:
        self._vring = vring
        self._size = vring.size
        self.batch = batch
        self._handle = handle
        self._answerer = answerer
        self._idle_since = 0

    def fits(self, vring: Vring) -> bool:
        """Whether these are still those of `vring`, of the size that it has."""
        return self._vring is vring and self._size == vring.size

    def serve(self) -> bool:
        """Serve what is available and what comes while it is looked for, a ringful and LONGEST_TURN at most, and again
        for LONGEST_STAY while nobody else waits: True if more may wait, and the ring is to be served again without a
        kick. RingBroken and PeerError as `DeviceQueue`."""
        quick = time.monotonic_ns() - self._idle_since < LONGEST_LOOK
        if not (quick and looking.acquire(blocking=False)):
            return self._turn(0)
        try:
            end = time.monotonic_ns() + LONGEST_STAY
            while more := self._turn(LONGEST_LOOK):
                if time.monotonic_ns() >= end or self._others_wait():
                    break
            return more
        finally:
            looking.release()

    def _others_wait(self) -> bool:
        """Whether it is somebody else's turn. A kick of this ring's is not: it is taken, and the ring looked at."""
        try:
            self._vring.take_kick()
        except (EOFError, OSError):
            return True
        return self._vring.others_wait()

    def _turn(self, patience: int) -> bool:
        vring, batch, queue = self._vring, self.batch, self._vring.running()
        queue.disable_notifications()
        left, end = queue.size, time.monotonic_ns() + LONGEST_TURN
        while True:
            count, answered, idle = self._next(queue, left, patience)
            left -= max(answered + count, 1)
            if count:
                vring.in_flight += count - batch.given
                self._handle(self)
                if batch.given < count:
                    self.give(count)
                vring.notify()
            elif idle:
                self._idle_since = time.monotonic_ns() - patience
                if not queue.enable_notifications():
                    vring.notify()  # of chains that the queue gave back by itself
                    return False
                queue.disable_notifications()
            if left <= 0 or time.monotonic_ns() >= end:
                break
        self._idle_since = time.monotonic_ns()
        vring.notify()
        return True

    def give(self, end: int) -> bool:
        """Give back the members before `end` that have not gone back. Whether the driver has them: behind an IOMMU the
        queue may owe them."""
        batch, queue, given = self.batch, self._vring.running(), self.batch.given
        try:
            queue.give(batch, end)
        finally:
            self._vring.in_flight -= batch.given - given
        return not queue.owes

    def call(self) -> None:
        """Call the driver now, if it asked to hear of what went back. For handlers that have more to do after that."""
        self._vring.notify()

    def chain(self, member: int) -> Chain:
        """The chain of a member that has not gone back, to look at."""
        return self._vring.running().chain_of(self.batch, member)

    def _next(self, queue: BatchedQueue, most: int, patience: int) -> tuple[int, int, bool]:
        """How many members there are to handle, how many requests were answered at once before them, and whether that
        is all."""
        batch, answerer, call = self.batch, self._answerer, self._vring.call
        ready = None if answerer is None or (call is not None and call.is_pipe) else answerer.ready()
        if answerer is None or ready is None:
            count = queue.take(batch, most)
            if not count and patience and queue.look(patience):
                count = queue.take(batch, most)
            return count, 0, not count
        with ready:
            count = queue.serve(batch, most, answerer, -1 if call is None else call.fileno(), patience)
        return count, answerer.raw.answered, answerer.raw.idle
