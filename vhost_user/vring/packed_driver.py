"""The driver's side of a packed virtqueue."""

from __future__ import annotations

import struct

from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress
from vhost_user.vring.driver import DESCRIPTOR, NEXT, WRITE, DriverQueue, Element
from vhost_user.vring.layout import PackedLayout

_AVAIL = 1 << 7  # VIRTQ_DESC_F_AVAIL
_USED = 1 << 15  # VIRTQ_DESC_F_USED

# RING_EVENT_FLAGS_*, in bits 16 and 17 of an event suppression structure; below are a slot and its wrap counter.
_ENABLE, _DISABLE, _DESC = 0, 1, 2

_BUT_FLAGS = struct.Struct("<QIH")  # a descriptor up to its flags: address, length, buffer id
_LENGTH_AND_ID = struct.Struct("<IH")
_LENGTH_AT, _FLAGS_AT = 8, 14


class PackedDriver(DriverQueue):
    """The driver of the packed ring at `layout`."""

    def __init__(self, memory: GuestMemory, layout: PackedLayout, *, event_idx: bool = False) -> None:
        super().__init__(memory, layout, event_idx=event_idx)
        self._desc = layout.desc
        self._driver_event = layout.driver
        self._device_event = layout.device
        self._ids = list(range(layout.size))  # those that no chain has
        # Positions count slots from the beginning of time: see _slot and _wrap.
        self._next_avail = self._next_used = 0

    def _slot(self, position: int) -> int:
        """The address of the slot at a position."""
        return self._desc + DESCRIPTOR.size * (position % self.size)

    def _wrap(self, position: int) -> int:
        """The wrap counter at a position: 1 in the first lap, 0 in the second."""
        return 1 - position // self.size % 2

    def _indirect(self, elements: list[Element]) -> bytes:
        return b"".join(DESCRIPTOR.pack(address, length, 0, flags) for address, length, flags in elements)

    def _make_available(self, elements: list[Element]) -> int:
        buffer_id = self._ids[-1]
        # Backwards: the flags of the first descriptor show all of them to the device.
        for at in reversed(range(len(elements))):
            address, length, flags = elements[at]
            position = self._next_avail + at
            slot = self._slot(position)
            flags |= _AVAIL if self._wrap(position) else _USED
            flags |= NEXT if at + 1 < len(elements) else 0
            self._memory.write(GuestAddress(slot), _BUT_FLAGS.pack(address, length, buffer_id))
            self._memory.store16(GuestAddress(slot + _FLAGS_AT), flags)
        self._ids.pop()
        self._next_avail += len(elements)
        self._unkicked += len(elements)
        return buffer_id

    def _peek_used(self) -> tuple[int, int] | None:
        slot, wrap = self._slot(self._next_used), self._wrap(self._next_used)
        flags = self._memory.load16(GuestAddress(slot + _FLAGS_AT))
        if bool(flags & _AVAIL) != wrap or bool(flags & _USED) != wrap:
            return None
        raw = self._memory.read(GuestAddress(slot + _LENGTH_AT), _LENGTH_AND_ID.size)
        written, token = _LENGTH_AND_ID.unpack(raw)
        return token, written if flags & WRITE else 0

    def _take_back(self, token: int) -> None:
        self._ids.append(token)
        self._next_used += self._posted[token].descriptors

    def _wants_kick(self, moved: int) -> bool:
        event = self._memory.load32(self._device_event)
        flags = event >> 16 & 3
        if flags != _DESC or not self._event_idx:
            return flags != _DISABLE
        # How many slots were filled after the one that the device named, on a circle of two laps.
        named = (event & 0x7FFF) + (0 if event >> 15 & 1 else self.size)
        return (self._next_avail - named - 1) % (2 * self.size) < moved

    def _advise(self, *, enable: bool) -> None:
        event = (_ENABLE if enable else _DISABLE) << 16
        if enable and self._event_idx:
            event = _DESC << 16 | self._wrap(self._next_used) << 15 | self._next_used % self.size
        self._memory.store32(self._driver_event, event)
