"""UNPLUGs that nobody asked for: those that leave a driver with less than the target.

The standard lets a driver give back any block at any time. An honest one hardly ever does so unasked: Linux, where it
could not add to its system what it had just plugged. But it is also a way for a guest to choose which of its pages go
back to the host, and so which ones the host's kernel gets next. Who has found memory cells that flip (rowhammer) wants
the host's page tables, of its own second stage or of an IOMMU, to come to lie there.

So what is given back unasked is counted, and may be refused: by BUSY, as an UNPLUG that can't be served for the moment.
It can be served once the target is lower. UNPLUG ALL is never refused for this: every driver begins with it, and it
takes all that a guest had.
"""

from __future__ import annotations

from vhost_user.errors import HostError
from vhost_user.units import ByteCount, format_size
from virtio_mem.device import Effect, EffectType, VirtioMemDevice


def unrequested(device: VirtioMemDevice, effect: Effect) -> ByteCount:
    """How many of the bytes that `effect`, not committed yet, takes from `device` nobody asked for."""
    if effect.type is not EffectType.UNPLUG:
        return ByteCount(0)
    missing = device.requested_size - (device.plugged_size - effect.size)
    return ByteCount(max(0, min(missing, effect.size)))


def refusal(device: VirtioMemDevice, effect: Effect) -> HostError | None:
    """Why `effect` is to be refused where only what somebody asked for is taken; None where it is not."""
    if not unrequested(device, effect):
        return None
    left = format_size(device.plugged_size - effect.size)
    limit = f"leaves {left} plugged, of {format_size(device.requested_size)} that are requested"
    return HostError("UNPLUG", format_size(effect.size), limit, "lower the target, or turn unrequested_unplug on")
