"""The device's side of a ring, split or packed: a thin face of the C core; the package's docstring has the theory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from typing import NamedTuple

from vhost_user import _native
from vhost_user.chain import Chain
from vhost_user.errors import PeerError, UsageError
from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress
from vhost_user.vring.errors import RingBroken
from vhost_user.vring.layout import Layout, PackedLayout, SplitLayout

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


class DeviceQueue(ABC):
    """What both formats do. One thread at a time may call a queue; which one may change.

    Every call may raise RingBroken, and then every later one does; and PeerError while a part of the ring is in no
    region of memory, which changes nothing.
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
    ) -> None:
        layout.check(memory)
        self.layout = layout
        self.size = layout.size
        self._memory = memory
        self._rejected: Counter[str] = Counter()
        self._ring = _native.Ring(
            layout.size,
            list(layout.areas.values()),
            packed=packed,
            event_idx=event_idx,
            indirect=indirect,
            avail=avail,
            used=used,
        )

    def pop(self) -> Chain | None:
        """The next chain that is well-formed, or None. Malformed ones are given back with length 0 and counted.

        None also comes after a ringful of malformed ones, so that no driver can hold the caller in here; wait for a
        notification only when `enable_notifications()` said that nothing is available.
        """
        segments = self._ring.pop(self._memory.table)
        if segments < 0:
            raise self._failure(segments)
        return Chain(self, self._memory, self._ring.chain(segments)) if segments else None

    def push(self, chain: Chain, written: int) -> None:
        """Give `chain` back: the first `written` bytes of its writable part are filled. The driver sees it at once.

        Raises UsageError for a chain that is not in flight on this queue, or a length beyond its writable part.
        """
        if chain.owner is not self:
            raise UsageError("chain", chain.id, "was popped from this queue, and is pushed once")
        if not 0 <= written <= chain.writable:
            raise UsageError("written", written, f"0 to the {chain.writable} bytes of the writable part")
        result = self._ring.push(self._memory.table, chain.id, chain.slots, written)
        if result:
            raise self._failure(result)
        chain.owner = None

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

    def enable_notifications(self) -> bool:
        """Ask for a notification of the next chain. True if one is available already: then none may come for it."""
        return self._checked(self._ring.enable_notifications(self._memory.table))

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
        if result < 0:
            raise self._failure(result)
        return bool(result)

    def _failure(self, result: int) -> PeerError:
        if result == _native.RING_UNMAPPED:
            return PeerError("ring", self.layout, "each part lies in one region of guest memory", "share it again")
        assert result == _native.RING_BROKEN and self.broken
        return self.broken

    @abstractmethod
    def state(self) -> tuple[int, ...]:
        """Where the queue is, as plain data: arguments for the queue that takes its place.

        What is in flight is not in it: push it before, or tell the next queue an earlier position. Nor is a
        notification that is still due: call `should_notify()` before.
        """


class SplitQueue(DeviceQueue):
    """The device's side of a split virtqueue at `desc`, `avail` and `used`.

    `event_idx` and `indirect`: whether VIRTIO_F_EVENT_IDX and VIRTIO_F_INDIRECT_DESC were negotiated. `next_avail` and
    `next_used` are those of a queue before, see `state()`. Raises PeerError for what can't be a queue.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        *,
        desc: GuestAddress,
        avail: GuestAddress,
        used: GuestAddress,
        event_idx: bool = False,
        indirect: bool = False,
        next_avail: int = 0,
        next_used: int = 0,
    ) -> None:
        layout = SplitLayout(size, desc, avail, used)
        for field, value in (("next_avail", next_avail), ("next_used", next_used)):
            if not 0 <= value < 2**16:
                raise PeerError(field, value, "a 16-bit index")
        _check_in_flight((next_avail - next_used) % 2**16, size)
        super().__init__(
            memory,
            layout,
            packed=False,
            event_idx=event_idx,
            indirect=indirect,
            avail=(next_avail, False),
            used=(next_used, False),
        )

    def state(self) -> SplitState:  # noqa: D102
        (next_avail, _), (next_used, _) = self._ring.positions()
        return SplitState(next_avail, next_used)


class PackedQueue(DeviceQueue):
    """The device's side of a packed virtqueue at `desc`, `driver` and `device`; arguments as for `SplitQueue`."""

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        *,
        desc: GuestAddress,
        driver: GuestAddress,
        device: GuestAddress,
        event_idx: bool = False,
        indirect: bool = False,
        next_avail: int = 0,
        avail_wrap: bool = True,
        next_used: int = 0,
        used_wrap: bool = True,
    ) -> None:
        layout = PackedLayout(size, desc, driver, device)
        for field, value in (("next_avail", next_avail), ("next_used", next_used)):
            if not 0 <= value < size:
                raise PeerError(field, value, f"a slot of the ring, 0 to {size - 1}")
        laps_apart = 0 if avail_wrap == used_wrap else size
        _check_in_flight((next_avail - next_used + laps_apart) % (2 * size), size)
        super().__init__(
            memory,
            layout,
            packed=True,
            event_idx=event_idx,
            indirect=indirect,
            avail=(next_avail, avail_wrap),
            used=(next_used, used_wrap),
        )

    def state(self) -> PackedState:  # noqa: D102
        (next_avail, avail_wrap), (next_used, used_wrap) = self._ring.positions()
        return PackedState(next_avail, avail_wrap, next_used, used_wrap)


def _check_in_flight(in_flight: int, size: int) -> None:
    if in_flight > size:
        raise PeerError("next_avail", f"{in_flight} ahead of next_used", f"at most the {size} entries of the queue")
