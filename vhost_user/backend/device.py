"""What a device is to the back end that serves it: a few methods, called by one thread.

A device that completes each request at once needs `on_kick`, and mostly one line in it: `vring.serve(self.handle)`. One
that keeps chains, by a handler that returns None, and pushes them later, from the loop's thread, has to complete them
all when `drain` is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhost_user.errors import PeerError
from vhost_user.message import ProtocolFeature

if TYPE_CHECKING:
    from vhost_user.backend.vring import Vring
    from vhost_user.message import MemoryRegion
    from vhost_user.shared_memory import SharedMemory


DEVICE_SPECIFIC = (
    ProtocolFeature.DEVICE_STATE
    | ProtocolFeature.GET_VRING_BASE_INFLIGHT
    | ProtocolFeature.RARP
    | ProtocolFeature.MTU
    | ProtocolFeature.PAGEFAULT
)
"""What the back end can do for a device that has `save_state` and `load_state`, `suspend`, `send_rarp`, `set_mtu`; and
for one that may be held up by page faults, see postcopy.py."""


class Device:
    """A device with no queue's worth of behaviour: override what it has. Each method may raise PeerError.

    Any other error is a mistake of the device's. One of `on_kick` is logged, and its ring fails: the front end is told,
    and nothing of it is served before it is started anew. One in a message ends the session.

    `features` are the device's own virtio feature bits; those of rings and of vhost-user itself are the back end's.
    `protocol_features` are those of DEVICE_SPECIFIC that it has the methods for. `config` is its configuration space as
    bytes. `state_size_limit` is the most bytes of state that a front end may load. `name` is for logs.
    """

    name = "device"
    queue_count = 1
    max_queue_size = 1024
    features = 0
    protocol_features = ProtocolFeature.NONE
    state_size_limit = 1 << 20

    @property
    def config(self) -> bytes:
        """The configuration space as it is now; empty where the device has none."""
        return b""

    def connected(self) -> None:
        """A front end came: what the last one negotiated is forgotten."""

    def resumed(self) -> None:
        """The front end was another process's, which is gone: its session is rebuilt, rings and all, and each ring is
        served next. What the driver was to be told may be lost, such as a change of the configuration space."""

    def disconnected(self) -> None:
        """The front end is gone, after each ring was stopped. What the driver set up goes with it."""

    def negotiated(self, features: int) -> None:
        """The driver acked `features`, a subset of what was offered. PeerError refuses them."""

    def read_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of the configuration space. PeerError where they are not all in it."""
        config = self.config
        if offset + size > len(config):
            raise PeerError(
                "config", f"{offset}+{size}", f"has to lie within the {len(config)} bytes of configuration space"
            )
        return config[offset : offset + size]

    def write_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        """Take `data` into the configuration space. With `migration` also what a driver may only read.

        The document's rule: read-only fields are refused. Here all are.
        """
        del migration
        raise PeerError(
            "config", f"{offset}+{len(data)}", "has to be a field that the driver may write", "only read it"
        )

    def on_kick(self, vring: Vring) -> bool:
        """The driver made chains available in `vring`, or may have: it is called more often than needed.

        True asks to be called again without a kick, since not all of them were looked at.
        """
        del vring
        return False

    def drain(self, vring: Vring) -> None:
        """`vring` is about to stop: complete and push each chain that the device has of it."""

    def suspend(self, vring: Vring) -> None:
        """As `drain`, where GET_VRING_BASE_INFLIGHT was negotiated and the requests in flight are on record in memory
        that outlives us: chains may be forgotten instead, and come again when the ring is started."""
        self.drain(vring)

    def stopped(self, vring: Vring) -> None:
        """`vring` has stopped: forget what belongs to it."""

    def keeps_file(self, region: MemoryRegion) -> bool:
        """Whether the device needs the file of a region that the front end is about to share: see `Region.file`."""
        del region
        return False

    def memory_changed(self, memory: SharedMemory) -> None:
        """The front end shares other memory than before. Let go of views of what is gone: while one lives it is mapped,
        although the front end is told that it is not. `Chain.read` and `write` leave none."""

    def set_status(self, status: int) -> None:
        """The virtio device status that the driver wrote; 0 is a device reset."""

    def reset(self) -> None:
        """RESET_DEVICE: be as before the driver came. Every ring was stopped."""

    def save_state(self) -> bytes:
        """The state that another device of this kind can load; DEVICE_STATE. Every ring is stopped."""
        raise NotImplementedError

    def load_state(self, data: bytes) -> None:
        """Take over the state that another one saved. PeerError, and nothing changed, for what can't be one."""
        raise NotImplementedError

    def send_rarp(self, address: bytes) -> None:
        """SEND_RARP: tell the network that the guest with the MAC `address`, six bytes, is here now."""
        raise NotImplementedError

    def set_mtu(self, mtu: int) -> None:
        """NET_SET_MTU: the most bytes of a frame's payload. PeerError for what the device can't do."""
        raise NotImplementedError
