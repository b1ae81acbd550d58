"""The driver's side of a ring, as far as both formats agree: for guests made of Python, and for tests.

What the device can see is stored whole by the C core, in the order that the standard asks for. What the device wrote is
not trusted: an id that is not in flight, or more bytes than there was room for, is RingBroken.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

from vhost_user import _native
from vhost_user.errors import UsageError
from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress
from vhost_user.vring.errors import QueueFull, RingBroken
from vhost_user.vring.layout import Layout

NEXT = 1
"""VIRTQ_DESC_F_NEXT: the chain goes on with another descriptor."""

WRITE = 2
"""VIRTQ_DESC_F_WRITE: the buffer is the device's to write, not to read."""

INDIRECT = 4
"""VIRTQ_DESC_F_INDIRECT: the buffer holds a table of descriptors."""

DESCRIPTOR = struct.Struct("<QIHH")
"""A descriptor: address, length; then flags and next (split), or buffer id and flags (packed)."""

Buffers = Iterable[tuple[int, int]]
"""Guest address and size of each."""


class Element(NamedTuple):
    """A descriptor to be: what it refers to, and its flags but for NEXT."""

    address: int
    length: int
    flags: int


class _Posted(NamedTuple):
    """A chain that the device has: how many of the ring's descriptors it takes, how many bytes may be written."""

    descriptors: int
    writable: int


class DriverQueue(ABC):
    """A driver's queue at `layout`, whose memory it clears. One thread at a time may call it.

    `event_idx`: whether VIRTIO_F_EVENT_IDX was negotiated. Raises PeerError where the layout does not fit `memory`.
    """

    def __init__(self, memory: GuestMemory, layout: Layout, *, event_idx: bool = False) -> None:
        layout.check(memory)
        for area in layout.areas.values():
            memory.write(area.address, bytes(area.size))
        self.size = layout.size
        self.free = layout.size
        """Descriptors of the ring that no chain takes."""
        self._memory = memory
        self._event_idx = event_idx
        self._posted: dict[int, _Posted] = {}
        self._unkicked = 0  # how far the ring moved since the last decision to kick or not

    def add(self, readable: Buffers = (), writable: Buffers = (), *, indirect_table: GuestAddress | None = None) -> int:
        """Make a chain available at once; returns its token, which `get_used()` gives back.

        With `indirect_table` the descriptors go to that address, 16 bytes for each, and take one of the ring's. Raises
        QueueFull where the ring has no room; then nothing changed.
        """
        elements = [Element(*buffer, 0) for buffer in readable]
        readables = len(elements)
        elements += [Element(*buffer, WRITE) for buffer in writable]
        room = sum(element.length for element in elements[readables:])
        if not elements:
            raise UsageError("buffers", "none", "a chain has to have at least one")
        if indirect_table is not None:
            table = self._indirect(elements)
            elements = [Element(indirect_table, len(table), INDIRECT)]
        if len(elements) > self.free:
            limit = f"have to be at most the {self.free} of {self.size} that are free"
            raise QueueFull("descriptors", len(elements), limit, "wait for get_used()")
        if indirect_table is not None:
            self._memory.write(indirect_table, table)
        token = self._make_available(elements)
        self._posted[token] = _Posted(len(elements), room)
        self.free -= len(elements)
        return token

    def get_used(self) -> tuple[int, int] | None:
        """Take back the next chain that the device used: its token and the number of bytes written, or None.

        Raises RingBroken for a chain that the device does not have, or a number that is too large.
        """
        used = self._peek_used()
        if used is None:
            return None
        token, written = used
        posted = self._posted.get(token)
        if posted is None:
            raise RingBroken("used id", token, "a chain that the device has", "reset the device")
        if written > posted.writable:
            raise RingBroken("used length", written, f"the chain has room for {posted.writable}", "reset the device")
        self._take_back(token)
        self.free += posted.descriptors
        del self._posted[token]
        return token, written

    def needs_kick(self) -> bool:
        """Whether the device asked to hear of what was added since the last call."""
        moved, self._unkicked = self._unkicked, 0
        # The device asks for notifications, then looks for chains; here it is the other way round.
        _native.fence()
        return moved > 0 and self._wants_kick(moved)

    def enable_interrupts(self) -> bool:
        """Ask for a notification of the next used chain. True if there is one already: then none may come for it."""
        self._advise(enable=True)
        _native.fence()
        return self._peek_used() is not None

    def disable_interrupts(self) -> None:
        """Advise the device that notifications are not needed. Some may come all the same."""
        self._advise(enable=False)

    @abstractmethod
    def _indirect(self, elements: list[Element]) -> bytes:
        """The indirect table of a chain."""

    @abstractmethod
    def _make_available(self, elements: list[Element]) -> int:
        """Write descriptors, show them to the device, and return the chain's token."""

    @abstractmethod
    def _peek_used(self) -> tuple[int, int] | None:
        """Token and length of the next used chain, if there is one."""

    @abstractmethod
    def _take_back(self, token: int) -> None:
        """Move past the next used chain, which is still posted, and free what it took."""

    @abstractmethod
    def _wants_kick(self, moved: int) -> bool:
        """What the device's area says to the last `moved` steps of the ring."""

    @abstractmethod
    def _advise(self, *, enable: bool) -> None:
        """Write to the driver's area whether the next used chain is worth a notification."""
