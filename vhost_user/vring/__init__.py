"""Virtqueues over shared guest memory: split and packed, the device's side and the driver's side.

A ring is shared by two parties that trust neither each other's values nor each other's timing.

Order. Whoever publishes first writes what there is to see, then stores the word that shows it (an index in the split
ring, a descriptor's flags in the packed ring) with release order; whoever looks loads that word with acquire order, and
only then the rest. Such a word must never be seen half: `struct.pack_into` stores byte by byte, after it has cleared
all of them, and was seen to show another process indices that nobody ever stored. So every such word is loaded and
stored by the C core. Notifications need more: one side stores its index and then looks whether the other one sleeps,
the other one says that it will sleep and then looks at the index. If both looks could overtake the stores, both would
miss, and the ring stand still; a full barrier lies between store and look on either side.

Trust. A device copies a descriptor once and checks its copy, and a chain holds guest addresses that are looked up again
at each copy. A fault inside a chain whose head is valid costs the driver that chain: it goes back with length 0, is
counted, and the queue goes on. Where there is no chain to give back, because the available index, the head or a packed
list's end can't be right, the ring is broken until it is made anew. A pop reads no more than about three ringfuls of
descriptors, and a device never has more chains in flight than the ring has entries.

A device that sleeps between notifications runs this loop whenever it wakes up:

    queue.disable_notifications()
    while True:
        while (chain := queue.pop()) is not None:
            queue.push(chain, serve(chain))
        if queue.should_notify():
            notify_the_driver()
        if not queue.enable_notifications():
            break

The parts: `DeviceQueue`, for many chains at a time `BatchedQueue`, with `SplitQueue` and `PackedQueue` (device.py and
its neighbours), `DriverQueue` with `SplitDriver` and `PackedDriver` (driver.py and its neighbours), `SplitLayout` and
`PackedLayout` (layout.py).
"""

from vhost_user.vring.batch import Answerer, Batch
from vhost_user.vring.batched_device import BatchedQueue
from vhost_user.vring.device import DeviceQueue, PackedState, SplitState
from vhost_user.vring.driver import DriverQueue
from vhost_user.vring.errors import QueueFull, RingBroken
from vhost_user.vring.layout import MAX_QUEUE_SIZE, PackedLayout, SplitLayout
from vhost_user.vring.packed_device import PackedQueue
from vhost_user.vring.packed_driver import PackedDriver
from vhost_user.vring.split_device import SplitQueue
from vhost_user.vring.split_driver import SplitDriver

__all__ = [
    "MAX_QUEUE_SIZE",
    "Answerer",
    "Batch",
    "BatchedQueue",
    "DeviceQueue",
    "DriverQueue",
    "PackedDriver",
    "PackedLayout",
    "PackedQueue",
    "PackedState",
    "QueueFull",
    "RingBroken",
    "SplitDriver",
    "SplitLayout",
    "SplitQueue",
    "SplitState",
]
