"""Devices small enough to see through, for the tests of the back end and of the front end."""

from __future__ import annotations

import struct
from collections import deque

from vhost_user.backend import Device, Vring
from vhost_user.backend.device import DEVICE_SPECIFIC
from vhost_user.chain import Chain
from vhost_user.errors import PeerError
from vhost_user.message import ProtocolFeature
from vhost_user.shared_memory import SharedMemory


class Echo(Device):
    """Writes what it reads, and its configuration space can be written from the eighth byte on."""

    name = "echo"
    queue_count = 2
    max_queue_size = 256
    protocol_features = DEVICE_SPECIFIC & ~ProtocolFeature.PAGEFAULT

    def __init__(self) -> None:
        self.space = bytearray(b"READONLYwritable")
        self.log: list[str] = []
        self.served = 0
        self.status = 0
        self.features_acked = 0
        self.memory: SharedMemory | None = None

    @property
    def config(self) -> bytes:
        return bytes(self.space)

    def connected(self) -> None:
        self.log.append("connected")

    def disconnected(self) -> None:
        self.log.append("disconnected")
        self.memory = None

    def negotiated(self, features: int) -> None:
        self.features_acked = features

    def write_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        if offset + len(data) > len(self.space) or (offset < 8 and not migration):
            raise PeerError("config", f"{offset}+{len(data)}", "from 8 to 16")
        self.space[offset : offset + len(data)] = data

    def on_kick(self, vring: Vring) -> bool:
        return vring.serve(self.echo)

    def echo(self, chain: Chain) -> int:
        data = chain.read(0, min(chain.readable, chain.writable))
        chain.write(data)
        self.served += 1
        return len(data)

    def stopped(self, vring: Vring) -> None:
        self.log.append(f"stopped {vring.index}")

    def memory_changed(self, memory: SharedMemory) -> None:
        self.memory = memory

    def set_status(self, status: int) -> None:
        self.status = status

    def reset(self) -> None:
        self.log.append("reset")
        self.space[8:] = b"writable"

    def send_rarp(self, address: bytes) -> None:
        self.log.append(f"rarp {address.hex()}")

    def set_mtu(self, mtu: int) -> None:
        if mtu > 9000:
            raise PeerError("mtu", mtu, "at most 9000")
        self.log.append(f"mtu {mtu}")

    def save_state(self) -> bytes:
        return struct.pack("<Q", self.served) + self.space

    def load_state(self, data: bytes) -> None:
        if len(data) != 8 + len(self.space):
            raise PeerError("state", len(data), f"{8 + len(self.space)} bytes")
        (self.served,) = struct.unpack_from("<Q", data)
        self.space[:] = data[8:]


class Keeper(Echo):
    """Keeps what it gets until it is drained, or told to `release`."""

    name = "keeper"

    def __init__(self) -> None:
        super().__init__()
        self.kept: deque[Chain] = deque()

    def on_kick(self, vring: Vring) -> bool:
        while (chain := vring.pop()) is not None:
            self.kept.append(chain)
        return False

    def release(self, vring: Vring, count: int) -> None:
        for _ in range(count):
            chain = self.kept.popleft()
            vring.push(chain, self.echo(chain))
        vring.notify()

    def drain(self, vring: Vring) -> None:
        self.release(vring, len(self.kept))


class Forgetful(Keeper):
    """Forgets what it has when it may: the inflight areas know it."""

    name = "forgetful"

    def suspend(self, vring: Vring) -> None:
        self.kept.clear()


class Faulting(Echo):
    """May be held up by page faults."""

    name = "faulting"
    protocol_features = ProtocolFeature.PAGEFAULT


class NoConfig(Device):
    """Has nothing at all."""

    name = "nothing"
