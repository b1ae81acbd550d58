"""Our back end as a daemon: a device that gives each chain back, with what was readable in what is writable."""

from __future__ import annotations

import logging
import signal
import sys

from vhost_user.backend import Device, Server, Vring
from vhost_user.chain import Chain
from vhost_user.errors import PeerError
from vhost_user.message import VIRTIO_F_IOMMU_PLATFORM, ProtocolFeature

STATE = b"echo state"


class Echo(Device):
    """Two queues, 64 bytes of configuration space of which 16 can be written, state that can be moved, an MTU."""

    name = "echo"
    queue_count = 2
    features = VIRTIO_F_IOMMU_PLATFORM
    protocol_features = ProtocolFeature.DEVICE_STATE | ProtocolFeature.MTU | ProtocolFeature.RARP

    def __init__(self) -> None:
        self._config = bytearray(range(64))

    @property
    def config(self) -> bytes:
        return bytes(self._config)

    def write_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        limit = len(self._config) if migration else 16
        if offset + len(data) > limit:
            raise PeerError("config", f"{offset}+{len(data)}", f"within the {limit} bytes that can be written")
        self._config[offset : offset + len(data)] = data

    def on_kick(self, vring: Vring) -> bool:
        return vring.serve(self._echo)

    @staticmethod
    def _echo(chain: Chain) -> int:
        size: int = min(chain.readable, chain.writable, 1 << 16)
        chain.write(chain.read(0, size))
        return size

    def save_state(self) -> bytes:
        return STATE

    def load_state(self, data: bytes) -> None:
        if data != STATE:
            raise PeerError("state", data[:16], "what save_state() gives")

    def send_rarp(self, address: bytes) -> None:
        pass

    def set_mtu(self, mtu: int) -> None:
        if not 68 <= mtu <= 0xFFFF:
            raise PeerError("mtu", mtu, "68 to 65535")


def main() -> None:
    logging.basicConfig(level=logging.DEBUG if "--debug" in sys.argv else logging.WARNING)
    with Server() as server:
        server.listen(sys.argv[1], Echo())
        signal.signal(signal.SIGTERM, lambda *_: server.stop())
        server.run()


if __name__ == "__main__":
    main()
