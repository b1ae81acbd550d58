"""A virtio-net device of ours for DPDK as the front end: counts the frames that it is sent, and may send them back.

One pair of queues: 0 is what the driver receives from, 1 is what it transmits to. A frame has a header of 12 bytes in
front of it (virtio 1.2, 5.1.6), whose last two are the number of buffers that a received one is spread over: here 1.
"""

from __future__ import annotations

import struct

from vhost_user.backend import Device, Vring
from vhost_user.chain import Chain
from vhost_user.errors import PeerError

# Virtio 1.2, 5.1.3.
MAC = 1 << 5
HEADER = struct.Struct("<BBHHHHH")
RECEIVE_HEADER = HEADER.pack(0, 0, 0, 0, 0, 0, 1)
FRAME_AT_MOST = 65_550 - HEADER.size
RECEIVE, TRANSMIT = 0, 1


class NetDevice(Device):
    """Takes each frame; with `echo`, sends it back where the driver has a buffer that is large enough."""

    name = "net"
    queue_count = 2
    max_queue_size = 1024
    features = MAC
    config = struct.pack("<6sHHH4x", b"\x52\x54\x00\xaa\xbb\xcc", 1, 1, 1500)  # mac, status, max_virtqueue_pairs, mtu

    def __init__(self, *, echo: bool = False) -> None:
        self.echo = echo
        self.acked = 0
        self.sessions = self.frames = self.octets = self.echoed = 0
        self._receive: Vring | None = None

    def connected(self) -> None:
        self.sessions += 1

    def negotiated(self, features: int) -> None:
        self.acked = features

    def on_kick(self, vring: Vring) -> bool:
        if vring.index == RECEIVE:
            self._receive = vring
            return False  # its buffers are taken when there is a frame
        more = vring.serve(self._transmit)
        if self._receive is not None:
            self._receive.notify()
        return more

    def stopped(self, vring: Vring) -> None:
        if vring is self._receive:
            self._receive = None

    def _transmit(self, chain: Chain) -> int:
        size = chain.readable - HEADER.size
        if chain.writable or not 0 < size <= FRAME_AT_MOST:
            raise PeerError("frame", chain, f"a header and 1 to {FRAME_AT_MOST} bytes, to be read")
        self.frames += 1
        self.octets += size
        if self.echo and self._receive is not None and self._receive.active:
            self._send(self._receive, chain.read(HEADER.size))
        return 0

    def _send(self, vring: Vring, frame: bytes) -> None:
        chain = vring.pop()
        if chain is None:
            return  # a network may drop what nobody has room for
        data = RECEIVE_HEADER + frame
        if len(data) > chain.writable:
            vring.push(chain, 0)
            return
        chain.write(data)
        vring.push(chain, len(data))
        self.echoed += 1
