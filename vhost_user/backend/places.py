"""Where a ring lies: what SET_VRING_ADDR tells, as addresses of its memory."""

from __future__ import annotations

from vhost_user.backend.negotiated import Negotiated
from vhost_user.iotlb import Iotlb
from vhost_user.message import VringAddr
from vhost_user.message.numbers import IotlbPermission
from vhost_user.units import GuestAddress, UserAddress
from vhost_user.vring import PackedLayout, SplitLayout
from vhost_user.vring.device import Miss


def layout_of(address: VringAddr, size: int, negotiated: Negotiated) -> SplitLayout | PackedLayout:
    """A ring of `size` entries at the front end's own addresses, or at IOVAs. PeerError where there can't be one."""
    kind = PackedLayout if negotiated.packed else SplitLayout
    fields = list(kind.parts)  # descriptors, the driver's area, the device's area
    sought = dict(zip(fields, (address.desc, address.avail, address.used), strict=True))
    places = {}
    for field, user_address in sought.items():
        part = kind.parts[field]
        if negotiated.translated:
            places[field] = GuestAddress(user_address)  # an IOVA
        else:
            places[field] = negotiated.memory.to_guest(UserAddress(user_address), part.fixed + part.each * size)
    layout = kind(size, **places)
    if negotiated.translated:
        layout.check_alignment()
    else:
        layout.check(negotiated.memory.guest_memory)
    return layout


def missing(layout: SplitLayout | PackedLayout, iotlb: Iotlb) -> Miss | None:
    """What of a ring has no translation, or not one for what we do there; the C core asks for the same."""
    read, both = IotlbPermission.READ, IotlbPermission.READ_WRITE
    needs = both if isinstance(layout, PackedLayout) else read, read, both
    for area, access in zip(layout.areas.values(), needs, strict=True):
        address = iotlb.lacks(area.address, area.size, access)
        if address is not None:
            return Miss(address, access)
    return None
