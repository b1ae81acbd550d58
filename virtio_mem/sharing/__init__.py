"""Sharing a machine's memory with vhost-user daemons, by the protocol's front end.

Boot memory is shared from the beginning to the end. A hotplug region can be shared whole, as other VMMs do: the daemon
maps all of it, and a guest's driver can have it read and write memory that is unplugged, so that the host allocates it
again. Or only what is plugged: the region is cut into slots, a daemon has a slot as long as one of its blocks is
plugged, and where a slot is one block it can reach nothing else. How large slots are is planned by the number of
regions that the daemon takes (vhost_user/frontend/plan.py), for each daemon by itself.

What is promised, for daemons at our front end: before an UNPLUG discards memory and is answered, each daemon has
confirmed that it unmapped the slots that became empty, or closed its end of the connection. One that refuses, or does
not answer in time, makes the UNPLUG BUSY, and stays in its way until it has closed its end. A daemon that refuses a
slot makes the PLUG BUSY. One that is gone is in nobody's way, and gets what is plugged when it comes back.

What can't be promised: a daemon has the file descriptor of the memory that it maps, so one that lies can map what it
likes; the protection is against guests that use an honest daemon. And of daemons that a VMM attaches itself nothing is
known here: that VMM shares with them what it likes, mostly the whole region.
"""

from virtio_mem.sharing.check import require_shareable
from virtio_mem.sharing.share import HotplugSharing, MemoryShare

__all__ = ["HotplugSharing", "MemoryShare", "require_shareable"]
