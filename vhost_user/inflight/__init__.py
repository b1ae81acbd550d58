"""Inflight I/O: what a back end notes in memory that outlives it, so that no request is lost with it.

A back end may be killed at any moment, with chains in its hands that the ring no longer shows: an available ring's
entry, and a packed ring's descriptors, are written anew as soon as other chains were used. So the queue notes each
chain that it takes, and each that it gives back, in an area of a buffer that the front end holds for it:
GET_INFLIGHT_FD, SET_INFLIGHT_FD, and the document's section "Inflight I/O tracking", whose layouts and orders these
are. A queue that is made with such an area (`SplitQueue(..., inflight=area)`) first takes again what was in flight, in
the old order, and then goes on in the ring.

What holds for the driver: every request comes back exactly once, whenever the back end is killed, and however often.
What holds for the device: it may see a request again whose answer had not come back. It never sees one again whose used
entry the driver could see. So what a device does twice in a row must amount to what it does once: to write the same
bytes does, to append them does not.

split.py and packed.py say in which order each format stores what, and why it may be stopped between any two of them.
"""

from vhost_user.inflight.area import InflightArea, Retake
from vhost_user.inflight.buffer import MAX_QUEUES, InflightBuffer, NewBuffer, area_size
from vhost_user.inflight.packed import PackedInflight
from vhost_user.inflight.split import SplitInflight

__all__ = [
    "MAX_QUEUES",
    "InflightArea",
    "InflightBuffer",
    "NewBuffer",
    "PackedInflight",
    "Retake",
    "SplitInflight",
    "area_size",
]
