"""What a zone may be resized to: from its boot size, in whole blocks, to all that its device can plug."""

from __future__ import annotations

from vhost_user.errors import UsageError
from vhost_user.units import ByteCount, format_size
from virtio_mem.geometry import require_whole


def hotplugged_part(field: str, size: int, *, boot_size: int, hotplug_size: int, block_size: int | None) -> ByteCount:
    """What of `size`, a zone's bytes in all, its device has to have plugged.

    `block_size` is None for a zone without a device, whose size is its boot size for good. UsageError, which names
    `field`, for a size that the zone can't have.
    """
    require_whole(field, size)
    if block_size is None:
        if size != boot_size:
            limit = f"stays {boot_size} bytes: the zone has no virtio-mem device, and resizing by ACPI is not there yet"
            raise UsageError(field, size, limit, "such a device needs hotplug_method=virtio-mem and a hotplug_size")
        return ByteCount(0)
    if not boot_size <= size <= boot_size + hotplug_size:
        limit = f"has to be from its boot size, {boot_size}, to {boot_size + hotplug_size} bytes"
        raise UsageError(field, size, limit, "hotplug_size is what can be added to the boot size")
    over = (size - boot_size) % block_size
    if over:
        limit = f"has to be its boot size, {boot_size}, and whole blocks of {format_size(block_size)}"
        raise UsageError(field, size, limit, f"the nearest are {size - over} and {size - over + block_size}")
    return ByteCount(size - boot_size)
