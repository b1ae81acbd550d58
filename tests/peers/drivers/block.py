"""A driver of virtio-blk."""

from __future__ import annotations

import struct

from tests.peers.drivers.machine import Queue
from vhost_user.units import GuestAddress

SECTOR = 512

IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8

_HEADER = struct.Struct("<IIQ")
_SLOT = 32
"""Of a request's header and, behind it, its status."""


class Disk:
    """A device whose requests go through `queue`; their headers lie at `headers`, one for each in flight."""

    def __init__(self, queue: Queue, headers: int) -> None:
        self.queue = queue
        self._headers = headers
        self._free = list(range(queue.layout.size))
        self._slots: dict[int, int] = {}

    def submit(self, kind: int, sector: int, buffer: int = 0, size: int = 0) -> int:
        """Have the device read (`OUT`) or write (`IN`, `GET_ID`) the guest's buffer; the request's token."""
        slot = self._free.pop()
        header = self._headers + slot * _SLOT
        status = (header + _HEADER.size, 1)
        self.queue.memory.write(GuestAddress(header), _HEADER.pack(kind, 0, sector) + b"\xff")
        data = [(buffer, size)] if size else []
        if kind == OUT:
            token = self.queue.submit([(header, _HEADER.size), *data], [status])
        else:
            token = self.queue.submit([(header, _HEADER.size)], [*data, status])
        self._slots[token] = slot
        return token

    def complete(self) -> int:
        """The token of the next request that is done, and done well."""
        token, _ = self.queue.wait()
        slot = self._slots.pop(token)
        self._free.append(slot)
        status = self.queue.memory.read(GuestAddress(self._headers + slot * _SLOT + _HEADER.size), 1)
        assert status == b"\0", status
        return token

    def request(self, kind: int, sector: int, buffer: int = 0, size: int = 0) -> None:
        """One request there and back."""
        token = self.submit(kind, sector, buffer, size)
        assert self.complete() == token

    def read(self, sector: int, buffer: int, size: int) -> bytes:
        """`size` bytes of the disk, through the guest's buffer."""
        self.request(IN, sector, buffer, size)
        return self.queue.memory.read(GuestAddress(buffer), size)

    def write(self, sector: int, buffer: int, data: bytes) -> None:
        """The data to the disk, through the guest's buffer."""
        self.queue.memory.write(GuestAddress(buffer), data)
        self.request(OUT, sector, buffer, len(data))

    def flush(self) -> None:
        self.request(FLUSH, 0)

    def serial(self, buffer: int) -> bytes:
        """What the device calls itself, 20 bytes."""
        self.request(GET_ID, 0, buffer, 20)
        return self.queue.memory.read(GuestAddress(buffer), 20)
