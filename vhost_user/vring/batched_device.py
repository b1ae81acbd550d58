"""The device's side of a ring, many small requests at a time: see batch.py.

The C core takes and gives back the chains of a batch, and notes them in an inflight area; not so where they have to be
looked at one by one, because memory is behind an IOMMU, what is written is logged, or chains are to be taken again.
"""

from __future__ import annotations

from vhost_user import _native
from vhost_user.chain import Chain
from vhost_user.vring.batch import Answerer, Batch
from vhost_user.vring.device import DeviceQueue


class BatchedQueue(DeviceQueue):
    """A DeviceQueue with calls for batches. They raise what its own do."""

    @property
    def _in_batches(self) -> bool:
        """Whether no chain has to be looked at by itself."""
        if self._memory.translated or self.logging is not None:
            return False
        return self.inflight is None or not self.inflight.retakes

    @property
    def _told(self) -> _native.Inflight | None:
        return None if self.inflight is None else self.inflight.told

    def take(self, batch: Batch, most: int) -> int:
        """Take chains into `batch`, `most` at most: how many, 0 where none is available. What was in it has gone back.

        With 0 there may be more to take, as with `pop()`. Each member is in flight until `give()` has it back.
        """
        if not self._in_batches:
            return self._take_alone(batch)
        batch.alone, batch.given = None, 0
        batch.count = count = batch.raw.take(self._ring, self._memory.table, min(most, batch.most), self._told)
        if count < 0:
            batch.count = 0
            raise self._failure(count)
        return count

    def serve(self, batch: Batch, most: int, answerer: Answerer, call: int, patience: int) -> int:
        """Have what can be answered at once answered, given back, and the driver called by the eventfd `call`, or -1.

        That goes on as long as more comes within `patience` nanoseconds, for `most` requests at most. What is in
        `batch` then is to be answered: as for `take()`, but the first `given` members have gone back.
        """
        if not self._in_batches:
            answerer.raw.clear()
            return self._take_alone(batch)
        batch.alone = None
        count = batch.raw.serve(self._ring, self._memory.table, most, self._told, answerer.raw, call, patience)
        batch.count, batch.given = max(count, 0), batch.raw.given
        if count and batch.given:
            self._rejected.update(batch.reasons(0, batch.given))
        if count < 0:
            raise self._failure(count)
        return count

    def _take_alone(self, batch: Batch) -> int:
        chain = self.pop()
        _, (position, wrap) = self._ring.positions()
        return batch.hold(chain, position | wrap << 15)

    def give(self, batch: Batch, end: int) -> None:
        """Give back, in order, the members before `end` that were not yet, each with its answer or empty."""
        given = batch.given
        if batch.alone is not None:
            if given < end:
                self.push(batch.alone, batch.answer_alone())
                batch.given = 1
                self._rejected.update(batch.reasons(0, 1))
            return
        empty = batch.raw.give(self._ring, self._memory.table, end, self._told)
        batch.given = end if empty >= 0 else batch.raw.given
        if empty:
            self._rejected.update(batch.reasons(given, batch.given))
        if empty < 0:
            raise self._failure(empty)

    def chain_of(self, batch: Batch, member: int) -> Chain:
        """The chain of a member that has not gone back, to look at."""
        return batch.alone or Chain(self, self._memory, batch.raw.chain(member))

    def look(self, nanoseconds: int) -> bool:
        """Look for an available chain again and again, for so long at most; whether there is one."""
        return self._checked(_native.queue_await(self._ring, self._memory.table, nanoseconds))
