"""Where a ring goes on: what SET_VRING_BASE tells, and what GET_VRING_BASE answers."""

from __future__ import annotations

from vhost_user.message import PackedBase, SplitBase
from vhost_user.vring.device import PackedState, SplitState


def split_base(base: int, next_used: int, size: int) -> int:
    """Where a split ring goes on whose used ring's idx is `next_used`: at the base, or there if the base can't be true.

    DPDK's virtio_user (24.11) tells 0 of a ring in the middle of its life when its back end comes back.
    """
    in_flight = (base - next_used) % (1 << 16)
    return base if in_flight <= size else next_used


def packed_base(num: int) -> PackedBase:
    """What SET_VRING_BASE told of a packed ring, where nothing is in flight but what an inflight area tells of.

    DPDK's virtio_user (24.11) tells the 16 bits of the next available descriptor and leaves the used one's at 0. Read
    as they are, they would say that a new ring has all of its descriptors in flight.
    """
    base = PackedBase.from_num(num)
    if num < 1 << 16:
        return PackedBase(base.next_avail, base.avail_wrap, base.next_avail, base.avail_wrap)
    return base


def base_of(state: tuple[int, ...]) -> int:
    """Where a queue was, as a number on the wire."""
    if isinstance(state, PackedState):
        return PackedBase(*state).to_num()
    assert isinstance(state, SplitState)
    return SplitBase(state.next_avail).to_num()
