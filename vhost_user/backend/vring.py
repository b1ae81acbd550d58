"""One ring of a back end: what the front end has said about it, and the queue while it runs.

A ring is stopped or started, and it is disabled or enabled; the two are independent. SET_VRING_KICK starts it and
GET_VRING_BASE stops it; a stopped ring is not touched, but remembers being enabled. A device sees a ring only while it
is started and enabled. A started ring that is disabled is left alone: for a device in general, to process a request
without any effect is not to process it.

Starting builds a `DeviceQueue` from what was set before: size, addresses, base. The addresses are the front end's own;
they are translated then, and looked up by guest address afterwards, so the memory table can change under the ring.

Behind an IOMMU the addresses are IOVAs, and for some of them there may be no translation yet: a ring that was started
then waits, with no queue, until `build()` finds them all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from vhost_user.backend.negotiated import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, Negotiated
from vhost_user.backend.places import layout_of, missing
from vhost_user.backend.position import base_of, packed_base, split_base
from vhost_user.chain import Chain
from vhost_user.errors import PeerError
from vhost_user.event import Event
from vhost_user.inflight import InflightBuffer, PackedInflight, SplitInflight
from vhost_user.message import VHOST_VRING_F_LOG, PackedBase, VringAddr
from vhost_user.units import GuestAddress, is_power_of_two
from vhost_user.vring import BatchedQueue, PackedLayout, PackedQueue, SplitLayout, SplitQueue
from vhost_user.vring.device import Miss

log = logging.getLogger(__name__)


class Vring:
    """Ring `index`. For devices: `pop`, `push`, `notify` and `serve`, while `active`; the rest is the session's."""

    def __init__(self, index: int, negotiated: Negotiated, max_size: int) -> None:
        self.index = index
        self.max_size = max_size
        self.size = 0
        self.address: VringAddr | None = None
        self.base: int | None = None
        self.enabled = False
        self.queue: BatchedQueue | None = None
        self.kick: Event | None = None
        self.call: Event | None = None
        self.err: Event | None = None
        self.polled = False
        self.serve_pending = False
        self.broken: Exception | None = None
        """What keeps it from being served: a PeerError, or a mistake of its device."""
        self.in_flight = 0
        self.waiting = False
        """Whether it was started, and parts of it have no translation yet."""
        self.asked: Miss | None = None
        """What the front end was asked for and has not given."""
        self.others_wait: Callable[[], bool] = lambda: True
        """Whether who serves the ring has something else to do."""
        self.on_miss: Callable[[Vring], None] = lambda _: None
        self.on_break: Callable[[], None] = lambda: None
        self.open_area: Callable[[Vring], InflightBuffer] | None = None
        """Where the ring is to note what it has in flight, for a front end that shares no buffer for that."""
        self._private: InflightBuffer | None = None
        self._area_miss: Miss | None = None
        self._negotiated = negotiated

    def __str__(self) -> str:
        return f"ring {self.index}"

    # For devices.

    @property
    def started(self) -> bool:
        """Whether the ring may be touched at all."""
        return self.queue is not None or self.waiting

    @property
    def active(self) -> bool:
        """Whether the device is to process what is available."""
        return self.queue is not None and self.enabled and self.broken is None

    def pop(self) -> Chain | None:
        """The next chain, or None. PeerError where the ring is broken, and of a ring that is not active."""
        chain = self.running().pop()
        self.in_flight += chain is not None
        return chain

    def push(self, chain: Chain, written: int) -> None:
        """Give a chain back, the first `written` bytes of its writable part filled. Then `notify()`."""
        self.running().push(chain, written)
        self.in_flight -= 1

    def notify(self) -> None:
        """Call the driver, if it asked to hear of what was pushed since the last call."""
        queue = self.running()
        if queue.should_notify() and self.call is not None:
            self.call.signal()
        if queue.miss is not None:
            self.on_miss(self)

    def serve(self, handle: Callable[[Chain], int | None]) -> bool:
        """Give each available chain to `handle`, which returns how many bytes it wrote, and push it.

        Where `handle` returns None it keeps the chain, for the device to `push` later, and then to `notify`.

        One ringful at most, so that no driver can keep the back end to itself: True where more may wait, and then the
        ring is to be served again without a kick. A chain that `handle` refuses with a PeerError goes back with length
        0 and is counted.
        """
        queue = self.running()
        queue.disable_notifications()
        for _ in range(queue.size):
            chain = self.pop()
            if chain is None:
                if not queue.enable_notifications():
                    self.notify()
                    return False
                queue.disable_notifications()
                continue
            try:
                written = handle(chain)
            except PeerError as error:
                log.debug("%s: %s", self, error)
                queue.reject(chain, error.field)
                self.in_flight -= 1
                continue
            if written is not None:
                self.push(chain, written)
        self.notify()
        return True

    def running(self) -> BatchedQueue:
        """The queue. PeerError of a ring that is stopped."""
        if self.queue is None:
            raise PeerError(str(self), "stopped", "has to be started before it is used")
        return self.queue

    # For the session.

    def take_kick(self) -> None:
        """Take the kicks that have come. EOFError and OSError where there will be no more of them."""
        self.asked = None  # the driver may have mapped it by now
        if self.kick is not None:
            self.kick.take()

    @property
    def packed(self) -> bool:
        """Whether it is, by what was negotiated."""
        return self._negotiated.packed

    def set_size(self, size: int) -> None:
        """SET_VRING_NUM."""
        self._require_stopped("size", size)
        if not 1 <= size <= self.max_size:
            raise PeerError(f"{self} size", size, f"has to be 1 to {self.max_size} entries")
        if self._is_split and not is_power_of_two(size):
            raise PeerError(f"{self} size", size, "has to be a power of two, as the ring is a split one")
        self.size = size

    def set_address(self, address: VringAddr) -> None:
        """SET_VRING_ADDR. While the ring runs, only whether and where its used ring is logged may change."""
        if self.started and self.address is not None:
            places = (address.desc, address.used, address.avail)
            if places != (self.address.desc, self.address.used, self.address.avail):
                raise PeerError(f"{self} addresses", address, "have to stay as they are while it runs", "stop it first")
        elif self.size:
            self._layout(address)
        self.address = address
        self.update_log()

    def set_base(self, num: int) -> None:
        """SET_VRING_BASE: where a split ring, or the two positions where a packed one, goes on."""
        self._require_stopped("base", num)
        if self._is_split and num >= 1 << 16:
            raise PeerError(f"{self} base", num, "has to be a 16-bit index, as the ring is a split one")
        self.base = num

    @property
    def _is_split(self) -> bool:
        """Whether that is known: before SET_FEATURES a ring may become either."""
        return self._negotiated.features_set and not self._negotiated.packed

    def _require_stopped(self, what: str, value: object) -> None:
        if self.started:
            raise PeerError(
                f"{self} {what}", value, "may be set while the ring is stopped only", "send GET_VRING_BASE first"
            )

    def start(self) -> None:
        """Build the queue. PeerError, and the ring stays stopped, for what can't be one."""
        assert not self.started
        if not self.size or self.address is None:
            missing = "SET_VRING_ADDR" if self.size else "SET_VRING_NUM"
            raise PeerError(str(self), "started", f"has to come after {missing}")
        self.broken, self.in_flight = None, 0
        layout = self._layout(self.address)
        if self._negotiated.inflight is None and self.open_area is not None:
            self._private = self.open_area(self)
        try:
            if self._negotiated.translated:
                self._inflight()  # the one thing that may be refused and does not wait for translations
                self.waiting = True
                return
            self.queue = self._make_queue(layout)
        except BaseException:
            self._close_private()
            raise
        self.update_log()

    def build(self) -> None:
        """Make the queue of a ring that waits, unless something is missing still. PeerError where it can't be one."""
        assert self.waiting and self.address is not None
        layout = self._layout(self.address)
        self._area_miss = missing(layout, self._negotiated.iotlb)
        if self._area_miss is None:
            self.queue = self._make_queue(layout)
            self.waiting = False
            self.update_log()

    @property
    def miss(self) -> Miss | None:
        """What the ring has no translation for, and can't go on without."""
        return self._area_miss if self.queue is None else self.queue.miss

    def _layout(self, address: VringAddr) -> SplitLayout | PackedLayout:
        return layout_of(address, self.size, self._negotiated)

    def _make_queue(self, layout: SplitLayout | PackedLayout) -> BatchedQueue:
        negotiated, memory = self._negotiated, self._negotiated.ring_memory
        inflight = self._inflight()
        event_idx = bool(negotiated.features & VIRTIO_F_EVENT_IDX)
        indirect = bool(negotiated.features & VIRTIO_F_INDIRECT_DESC)
        if isinstance(layout, PackedLayout):
            assert not isinstance(inflight, SplitInflight)
            base = packed_base(self._first_base if self.base is None else self.base)
            return PackedQueue(
                memory,
                **vars(layout),
                event_idx=event_idx,
                indirect=indirect,
                next_avail=base.next_avail,
                avail_wrap=base.avail_wrap,
                next_used=base.next_used,
                used_wrap=base.used_wrap,
                inflight=inflight,
            )
        assert not isinstance(inflight, PackedInflight)
        next_used = memory.load16(GuestAddress(layout.used + 2))
        return SplitQueue(
            memory,
            **vars(layout),
            event_idx=event_idx,
            indirect=indirect,
            next_avail=split_base(self.base or 0, next_used, self.size),
            next_used=next_used,
            inflight=inflight,
        )

    @property
    def _first_base(self) -> int:
        """Where a ring begins that was never told where to."""
        return PackedBase(0, True, 0, True).to_num() if self._negotiated.packed else 0

    def _inflight(self) -> SplitInflight | PackedInflight | None:
        if self._private is not None:
            return self._private.queue(0)
        buffer = self._negotiated.inflight
        if buffer is None:
            return None
        if buffer.packed != self._negotiated.packed:
            kind = "packed" if buffer.packed else "split"
            raise PeerError(
                "inflight areas", f"of {kind} rings", "have to be of the kind that was negotiated", "set them anew"
            )
        if self.index >= buffer.num_queues:
            raise PeerError("inflight areas", buffer.num_queues, f"have to have one of {self} as well", "set them anew")
        return buffer.queue(self.index)

    def update_log(self) -> None:
        """Have the queue log, or not, as was agreed."""
        if self.queue is None or self.address is None:
            return
        self.queue.log = self._negotiated.active_log
        logged = self.address.flags & VHOST_VRING_F_LOG
        self.queue.log_used = GuestAddress(self.address.log) if logged else None

    def stop(self) -> int:
        """Forget the queue; where it was, as GET_VRING_BASE tells and SET_VRING_BASE takes it."""
        if self.queue is not None:
            self.base = base_of(self.queue.state())
            self.queue = None
        if self.kick is not None:
            self.kick.close()
            self.kick = None
        self.broken, self.polled, self.in_flight = None, False, 0
        self._close_private()
        self.waiting, self.asked, self._area_miss = False, None, None
        return self._first_base if self.base is None else self.base

    def _close_private(self) -> None:
        if self._private is not None:
            self._private.close()
            self._private = None

    def call_again(self) -> None:
        """Call the driver without a reason: of what was pushed before, it may not have heard.

        A back end that is killed between a used element and its call leaves the driver asleep with the element in front
        of it, and no queue can tell. A call while the descriptor is replaced goes to the old one.
        """
        if self.call is not None:
            self.call.signal()

    def moved(self) -> bool:
        """Whether the front end's memory no longer has the running ring where it was."""
        if self.queue is None or self.address is None or self._negotiated.translated:
            return False
        try:
            return self._layout(self.address) != self.queue.layout
        except PeerError:
            return True

    def fail(self, error: PeerError) -> None:
        """Nothing more can be read from the ring: tell the front end, and leave it alone until it is started anew."""
        log.warning("%s: %s", self, error)
        self._break(error)

    def fail_by_device(self, name: str, error: Exception) -> None:
        """The same where its device `name` made a mistake: nobody knows what became of the chain that it had."""
        log.error("%s of %s: its device failed", self, name, exc_info=error)
        self._break(error)

    def _break(self, error: Exception) -> None:
        self.broken = error
        if self.err is not None:
            self.err.signal()
        self.on_break()

    def close(self) -> None:
        """Stop, and close the descriptors."""
        self.stop()
        for event in (self.call, self.err):
            if event is not None:
                event.close()
        self.call = self.err = None
