"""A driver of virtio-net: frames, with buffers for those that come in posted ahead."""

from __future__ import annotations

from tests.peers.drivers.machine import Queue
from vhost_user.units import GuestAddress

RX, TX = 0, 1
"""Which ring is which: the device writes to the first."""

HEADER = 12
"""Bytes of struct virtio_net_hdr with num_buffers, as under VIRTIO_F_VERSION_1."""

_ROOM = 2048
"""Of each buffer: a frame and its header."""


class Nic:
    """The interface behind the rings `receiver` and `sender`; buffers lie from `buffers` on, two areas of them."""

    def __init__(self, receiver: Queue, sender: Queue, buffers: tuple[int, int]) -> None:
        self.receiver = receiver
        self.sender = sender
        self._rx, self._tx = buffers
        self._posted: dict[int, int] = {}
        self._free = list(range(sender.layout.size))
        self._sent: dict[int, int] = {}
        for slot in range(receiver.layout.size):
            self._post(slot)
        receiver.kick()

    def _post(self, slot: int) -> None:
        self._posted[self.receiver.driver.add(writable=[(self._rx + slot * _ROOM, _ROOM)])] = slot

    def send(self, frame: bytes) -> None:
        """Have a frame sent; waits for room in the ring if need be."""
        while (used := self.sender.driver.get_used()) is not None or not self._free:
            token, _ = used or self.sender.wait()
            self._free.append(self._sent.pop(token))
        slot = self._free.pop()
        address = self._tx + slot * _ROOM
        self.sender.memory.write(GuestAddress(address), bytes(HEADER) + frame)
        self._sent[self.sender.submit([(address, HEADER + len(frame))])] = slot

    def receive(self) -> bytes:
        """The next frame that comes in, without its header. AssertionError if none comes."""
        token, written = self.receiver.wait()
        slot = self._posted.pop(token)
        raw = self.receiver.memory.read(GuestAddress(self._rx + slot * _ROOM), written)
        self._post(slot)
        self.receiver.kick()
        return raw[HEADER:]
