"""A split ring whose driver lies: each word of it is written as the attack wants it.

It is written byte by byte through the file, with no care for what the device sees meanwhile. A device has to bear that.
"""

from __future__ import annotations

import os
import struct

from vhost_user.attack.canary import Canary
from vhost_user.message import VringAddr
from vhost_user.units import KIB, GuestAddress, UserAddress

NEXT, WRITE, INDIRECT = 1, 2, 4
"""The flags of a descriptor."""

SIZE = 64
"""Entries, unless an attack says otherwise."""

AREA = 64 * KIB
"""Bytes of the window for one ring and its buffers."""

AVAIL, USED, BUFFERS = 4 * KIB, 8 * KIB, 16 * KIB
"""Where in its area the rings and the buffers lie; the descriptors are at its start."""

DESCRIPTOR = struct.Struct("<QIHH")


class HostileRing:
    """Ring `index` of a device, `at` bytes into the window of `canary`.

    Most devices take a request and answer in the same chain. The rings of a network device are `one_way`: the even ones
    are for the device to write, the odd ones to read.
    """

    def __init__(self, canary: Canary, index: int, at: int, *, one_way: bool = False, size: int = SIZE) -> None:
        self.one_way = one_way
        self.canary = canary
        self.index = index
        self.at = at
        self.size = size
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._offered = 0
        canary.write(at, bytes(BUFFERS))
        canary.allow(at + USED, 6 + 8 * size)

    def addresses(self, *, desc: int = 0, avail: int = AVAIL, used: int = USED, log: int | None = None) -> VringAddr:
        """SET_VRING_ADDR's payload, with the parts that many bytes into the area."""
        start = self.canary.user + self.at
        return VringAddr(
            self.index,
            0 if log is None else 1,
            UserAddress(start + desc),
            UserAddress(start + used),
            UserAddress(start + avail),
            GuestAddress(log or 0),
        )

    def guest(self, at: int = BUFFERS) -> int:
        """The guest address `at` bytes into the area: of its first buffer, unless told otherwise."""
        return self.canary.guest + self.at + at

    def describe(self, slot: int, address: int, size: int, flags: int = 0, following: int = 0) -> None:
        """Write a descriptor. What it lets the device write in the window is allowed to change."""
        self.canary.write(self.at + slot * DESCRIPTOR.size, DESCRIPTOR.pack(address, size, flags, following))
        self._allow(address, size, flags)

    def request(self, slot: int = 0) -> None:
        """Describe a chain as a device may expect it, of the descriptors `slot` and the next: zeros, room to answer.

        For attacks on something else than what stands in chains.
        """
        for at, each in enumerate(self.request_parts(slot)):
            self.describe(slot + at, *each)
        self.canary.write(self.at + BUFFERS, bytes(64))

    def request_parts(self, slot: int = 0) -> list[tuple[int, int, int, int]]:
        """The descriptors of such a chain: address, size, flags, and what follows."""
        to_read, to_write = (self.guest(), 64), (self.guest(BUFFERS + 4096), 4096)
        if self.one_way:
            return [(*to_read, 0, 0)] if self.index % 2 else [(*to_write, WRITE, 0)]
        return [(*to_read, NEXT, slot + 1), (*to_write, WRITE, 0)]

    def describe_in_table(self, at: int, *descriptors: tuple[int, int, int, int]) -> None:
        """Write an indirect table, `at` bytes into the area."""
        self.canary.write(self.at + at, b"".join(DESCRIPTOR.pack(*each) for each in descriptors))
        for address, size, flags, _ in descriptors:
            self._allow(address, size, flags)

    def _allow(self, address: int, size: int, flags: int) -> None:
        begin, end = address - self.canary.guest, address - self.canary.guest + size
        if flags & WRITE and begin >= 0 and end <= self.canary.window:
            self.canary.allow(begin, size)

    def offer(self, *heads: int, index: int | None = None) -> None:
        """Put heads into the available ring, and move its index behind them, or to `index`."""
        for head in heads:
            entry = 4 + 2 * (self._offered % self.size)
            self.canary.write(self.at + AVAIL + entry, struct.pack("<H", head & 0xFFFF))
            self._offered += 1
        published = self._offered if index is None else index
        self.canary.write(self.at + AVAIL + 2, struct.pack("<H", published & 0xFFFF))

    def used(self) -> int:
        """The used ring's index: chains that came back. 0 where the memory is gone."""
        return int.from_bytes(self.canary.read(self.at + USED + 2, 2), "little")

    def signal(self) -> None:
        """Ring the kick."""
        os.eventfd_write(self.kick, 1)

    def close(self) -> None:
        """Close the two eventfds."""
        os.close(self.kick)
        os.close(self.call)
