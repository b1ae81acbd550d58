"""Our front end and passt, a network interface: vhost-user code of its own."""

from __future__ import annotations

import socket
import struct

import pytest

from tests.peers.daemons import GATEWAY, GUEST_ADDRESS
from tests.peers.drivers.machine import VERSION_1, Queue, machine
from tests.peers.drivers.net import RX, TX, Nic
from tests.peers.processes import LATE, Peer
from vhost_user.frontend import Frontend

pytestmark = pytest.mark.needs_peers

MAC = bytes.fromhex("52540012 3456".replace(" ", ""))
BROADCAST = b"\xff" * 6

_ARP = struct.Struct("!HHBBH6s4s6s4s")
REQUEST, REPLY = 1, 2


def arp_request(sender: str, wanted: str) -> bytes:
    """An Ethernet frame that asks for the hardware address of `wanted`."""
    body = _ARP.pack(1, 0x0800, 6, 4, REQUEST, MAC, socket.inet_aton(sender), bytes(6), socket.inet_aton(wanted))
    return BROADCAST + MAC + struct.pack("!H", 0x0806) + body


def test_an_arp_request_is_answered(passt_daemon: Peer) -> None:
    with machine() as guest, Frontend.connect(str(passt_daemon.socket), features=VERSION_1, timeout=LATE) as frontend:
        frontend.regions.share(guest.boot())
        (block,) = guest.plug(4)
        frontend.regions.add(block)
        rings = [Queue(frontend, guest, index, 0x10000 * (index + 1)) for index in (RX, TX)]
        nic = Nic(rings[RX], rings[TX], (block.guest_address, 0x100000))
        nic.send(arp_request(GUEST_ADDRESS, GATEWAY))
        frame = nic.receive()
        while frame[12:14] != b"\x08\x06":  # it may have things of its own to say
            frame = nic.receive()
        assert frame[:6] == MAC
        hardware, protocol, *_, operation, sender, address, target, answered = _ARP.unpack_from(frame, 14)
        assert (hardware, protocol, operation) == (1, 0x0800, REPLY)
        assert (socket.inet_ntoa(address), socket.inet_ntoa(answered)) == (GATEWAY, GUEST_ADDRESS)
        assert target == MAC
        assert sender == frame[6:12] != MAC
