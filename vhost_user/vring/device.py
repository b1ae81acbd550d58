"""The device's side of a ring, split or packed: a thin face of the C core; the package's docstring has the theory.

Three things can be asked of a queue beyond that, all for a vhost-user back end: to mark in a dirty log what it writes
(dirty_log.py), to note in an inflight area what it holds (inflight/), to live with memory behind an IOMMU (iotlb.py).
Then chains are taken and given back one at a time, malformed ones too, so that `_give` is the one place where the used
ring is written. Many chains at a time: batched_device.py.

Behind an IOMMU an address that has no translation is nobody's fault. The chain stays the next one, `miss` says what is
missing, and there is nothing to pop until it is there. What can't be given back, because the ring's own part of memory
is not there, is kept in order and given back by `settle()`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, deque
from typing import TYPE_CHECKING, NamedTuple

from vhost_user import _native
from vhost_user.chain import Chain
from vhost_user.errors import PeerError, UsageError
from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress
from vhost_user.vring.errors import RingBroken
from vhost_user.vring.layout import Layout

if TYPE_CHECKING:
    from vhost_user.dirty_log import DirtyLog
    from vhost_user.inflight import InflightArea

_BROKEN = {
    "head": ("available ring's entry", "the index of a descriptor of the table"),
    "avail_idx": ("avail.idx", "no more chains than the queue has entries"),
    "list_length": ("length of a descriptor list", "ends before descriptors that the device has not yet used"),
    "no_memory": ("ring", "memory that the host can provide"),
    "list_flags": ("descriptor flags", "AVAIL and USED set as in the first descriptor of the list"),
}


class SplitState(NamedTuple):
    """Where a split queue is: `next_avail` and `next_used` (what the used ring's idx says) run from 0 to 65535."""

    next_avail: int
    next_used: int


class PackedState(NamedTuple):
    """Where a packed queue is: the next slot to take and the next slot to use, each with its wrap counter."""

    next_avail: int
    avail_wrap: bool
    next_used: int
    used_wrap: bool


class Miss(NamedTuple):
    """An address without a translation, and what is to be done there: bits of IotlbPermission."""

    address: int
    access: int


class DeviceQueue(ABC):
    """What both formats do. One thread at a time may call a queue; which one may change.

    Every call may raise RingBroken, and then every later one does; and PeerError while a part of the ring is in no
    region of memory, which changes nothing. Behind an IOMMU that is a `miss` instead, and what the call was to tell the
    driver it is told later, or need not be.

    `log` is where writes to guest memory are marked, None while they are not. `log_used` is where the log has the used
    ring (a packed ring's descriptors), None where the ring's own writes are not marked: the guest address that came
    with VHOST_VRING_F_LOG. Both may be set at any time by whoever may call the queue.
    """

    def __init__(
        self,
        memory: GuestMemory,
        layout: Layout,
        *,
        packed: bool,
        event_idx: bool,
        indirect: bool,
        avail: tuple[int, bool],
        used: tuple[int, bool],
        inflight: InflightArea | None,
    ) -> None:
        layout.check(memory)
        if inflight is not None:
            avail, used = inflight.take_over(memory, layout, avail, used)
        self.log_used: GuestAddress | None = None
        self.inflight = inflight
        self.layout = layout
        self.size = layout.size
        self._memory = memory
        self._rejected: Counter[str] = Counter()
        self.miss: Miss | None = None
        """What the last call had no translation for; None after a call that had all that it needed."""
        self.logging: DirtyLog | None = None
        """What `log` says, for chains, which look at every write."""
        # One look for every pop and push.
        self._always_alone = memory.translated or inflight is not None
        self._alone = self._always_alone
        self._owed: deque[tuple[Chain, int]] = deque()
        self._ring = _native.Ring(
            layout.size,
            list(layout.areas.values()),
            packed=packed,
            event_idx=event_idx,
            indirect=indirect,
            avail=avail,
            used=used,
            translated=memory.translated,
        )

    @property
    def log(self) -> DirtyLog | None:
        """Where writes to guest memory are marked; see the class."""
        return self.logging

    @log.setter
    def log(self, log: DirtyLog | None) -> None:
        self.logging = log
        self._alone = self._always_alone or log is not None

    def pop(self) -> Chain | None:
        """The next chain that is well-formed, or None. Malformed ones are given back with length 0 and counted.

        None also comes after a ringful of malformed ones, so that no driver can hold the caller in here; wait for a
        notification only when `enable_notifications()` said that nothing is available.
        """
        if self._alone:
            return self._pop_alone()
        segments = self._ring.pop(self._memory.table)
        if segments < 0:
            raise self._failure(segments)
        return Chain(self, self._memory, self._ring.chain(segments)) if segments else None

    def push(self, chain: Chain, written: int) -> None:
        """Give `chain` back: the first `written` bytes of its writable part are filled. The driver sees it at once.

        Raises UsageError for a chain that is not in flight on this queue, or a length beyond its writable part.
        """
        if chain.owner is not self:
            raise UsageError("chain", chain.id, "has to be popped from this queue, and to be pushed once")
        if not 0 <= written <= chain.writable:
            raise UsageError("written", written, f"has to be 0 to the {chain.writable} bytes of the writable part")
        if self._alone:
            if self.logging is not None:
                chain.mark_views(self.logging)
            result = self._give_in_order(chain, written)
        else:
            result = self._ring.push(self._memory.table, chain.id, chain.slots, written)
        if result:
            raise self._failure(result)
        chain.owner = None

    def _pop_alone(self) -> Chain | None:
        """As `pop()`, where each chain has to be noted or what goes back has to be marked."""
        ring, area, table = self._ring, self.inflight, self._memory.table
        visited, self.miss = 0, None
        if self._owed and not self.settle():
            return None
        # As far as the C core would go.
        while visited < 2 * self.size:
            retake = area.retakes[0] if area is not None and area.retakes else None
            result = ring.take(table) if area is None or retake is None else area.reload(ring, table, retake)
            if result == 0:
                return None
            if result == _native.RING_MISS:
                self._missed()
                return None
            if result in {_native.RING_BROKEN, _native.RING_UNMAPPED}:
                raise self._failure(result)
            chain = Chain(self, self._memory, ring.chain(max(result, 0)))
            if area is not None and retake is not None:
                chain.entry = area.retakes.popleft().entry
            elif area is not None:
                chain.entry = area.taken(ring, chain.id, chain.slots)
            if result > 0:
                return chain
            if result := self._give_in_order(chain, 0):
                raise self._failure(result)
            visited += chain.visited
        return None

    def _missed(self) -> None:
        self.miss = Miss(*self._ring.miss())

    def _give_in_order(self, chain: Chain, written: int) -> int:
        """As `_give`, but a chain that can't be given back yet is owed."""
        if not self._owed:
            result = self._give(self._memory.table, chain, written)
            if result != _native.RING_MISS:
                return result
            self._missed()
        self._owed.append((chain, written))
        return 0

    @property
    def owes(self) -> bool:
        """Whether chains are to be given back by `settle()`."""
        return bool(self._owed)

    def settle(self) -> bool:
        """Give back what is owed to the driver, as far as that is possible now; whether nothing is owed any more."""
        self.miss = None
        while self._owed:
            chain, written = self._owed[0]
            result = self._give(self._memory.table, chain, written)
            if result == _native.RING_MISS:
                self._missed()
                return False
            if result:
                raise self._failure(result)
            self._owed.popleft()
        return True

    def _give(self, table: _native.MemoryTable, chain: Chain, written: int) -> int:
        """Push a chain, note that it is gone, and mark what was written to the ring; what the C core says of it."""
        area, log = self.inflight, self.logging
        (_, (position, _)) = self._ring.positions()
        if area is not None:
            area.giving(chain.entry)
        result = self._ring.push(table, chain.id, chain.slots, written)
        # A ring that broke in here may show the chain or not: the area is left for a new queue to find out.
        if area is not None and result != _native.RING_BROKEN:
            if result == 0:
                area.given(chain.entry)
            else:
                area.kept()
        if log is not None and self.log_used is not None and result not in {_native.RING_UNMAPPED, _native.RING_MISS}:
            self._mark_used(log, self.log_used, position)
        return result

    def reject(self, chain: Chain, reason: str) -> None:
        """Give back with length 0 a chain that its device can't make sense of, and count it in `malformed`."""
        self.push(chain, 0)
        self._rejected[reason] += 1

    def should_notify(self) -> bool:
        """Whether the driver asked to hear of what was given back since the last call. Chains from `pop()` count."""
        return self._checked(self._ring.should_notify(self._memory.table))

    def disable_notifications(self) -> None:
        """Advise the driver that notifications are not needed. Some may come all the same."""
        self._checked(self._ring.disable_notifications(self._memory.table))
        if self.logging is not None and self.log_used is not None:
            self._mark_advice(self.logging, self.log_used, enable=False)

    def enable_notifications(self) -> bool:
        """Ask for a notification of the next chain. True if one is available already: then none may come for it."""
        missed = self.miss is not None
        available = self._checked(self._ring.enable_notifications(self._memory.table))
        if self.logging is not None and self.log_used is not None:
            self._mark_advice(self.logging, self.log_used, enable=True)
        if missed or self.miss is not None:
            return False
        return available or (self.inflight is not None and bool(self.inflight.retakes))

    @property
    def malformed(self) -> Counter[str]:
        """How many chains went back with length 0 for each reason: of the ring's, and of `reject()`."""
        return self._rejected + Counter(self._ring.malformed())

    @property
    def broken(self) -> RingBroken | None:
        """Why the ring is broken, if it is."""
        reason, value = self._ring.broken()
        if reason == "not":
            return None
        field, limit = _BROKEN[reason]
        return RingBroken(field, value, limit, "the driver has to reset the queue or the device")

    def _checked(self, result: int) -> bool:
        if result == _native.RING_MISS:
            self._missed()
            return False
        if result < 0:
            raise self._failure(result)
        return bool(result)

    def _failure(self, result: int) -> PeerError:
        if result == _native.RING_UNMAPPED:
            return PeerError(
                "ring", self.layout, "each part has to lie in one region of guest memory", "share it again"
            )
        assert result == _native.RING_BROKEN and self.broken
        return self.broken

    def mark_ring(self) -> None:
        """Mark all that is written to the ring itself: another process may have died between a write and its mark."""
        if self.logging is not None and self.log_used is not None:
            for position in range(self.size):
                self._mark_used(self.logging, self.log_used, position)
            for enable in (False, True):
                self._mark_advice(self.logging, self.log_used, enable=enable)

    @abstractmethod
    def _mark_used(self, log: DirtyLog, base: GuestAddress, position: int) -> None:
        """Mark what showed a used chain to the driver at `position`, in the used ring that the log has at `base`."""

    @abstractmethod
    def _mark_advice(self, log: DirtyLog, base: GuestAddress, *, enable: bool) -> None:
        """Mark what told the driver whether to notify."""

    @abstractmethod
    def state(self) -> tuple[int, ...]:
        """Where the queue is, as plain data: arguments for the queue that takes its place.

        What is in flight is not in it: push it before, or tell the next queue an earlier position. Nor is a
        notification that is still due: call `should_notify()` before.
        """


def check_in_flight(in_flight: int, size: int) -> None:
    """Raise PeerError where a device would have more of the ring than there is."""
    if in_flight > size:
        raise PeerError(
            "next_avail", f"{in_flight} ahead of next_used", f"has to be at most the {size} entries of the queue"
        )


def slots_between(start: tuple[int, bool], end: tuple[int, bool], size: int) -> int:
    """Slots from one position of a packed ring, a slot and its wrap counter, on to another: less than two laps."""
    laps_apart = 0 if start[1] == end[1] else size
    return (end[0] - start[0] + laps_apart) % (2 * size)
