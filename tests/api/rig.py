"""A machine with the API in front of it, a guest that plugs when told, and a client that sends what it is told."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vhost_user.units import GIB, MIB, GuestAddress
from virtio_mem.api.server import ApiServer
from virtio_mem.config import VmMemoryConfig
from virtio_mem.control import Control
from virtio_mem.manager import MemoryManager
from virtio_mem.protocol import Request, RequestType, ResponseType
from virtio_mem.service import DeviceService

ONE_ZONE = "--memory size=64M,shared=on,hotplug_method=virtio-mem,hotplug_size=1G,hotplugged_size=256M"
TWO_ZONES = (
    "--memory size=0,hotplug_method=virtio-mem --memory-zone id=a,size=64M,shared=on,hotplug_size=512M "
    "id=b,size=64M,shared=on,hotplug_size=1G,hotplugged_size=128M "
    "--numa guest_numa_id=0,memory_zones=a guest_numa_id=3,memory_zones=b"
)
BOOT = 64 * MIB
REGION = GIB
BLOCK = 2 * MIB
ACK, NACK, BUSY, ERROR = ResponseType


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout: float = 20) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Client:
    """Asks the server at a socket; each time with a new connection."""

    path: str

    def connect(self, timeout: float = 20) -> UnixConnection:
        return UnixConnection(self.path, timeout)

    def raw(self) -> socket.socket:
        """A client that has to speak HTTP by itself."""
        deadline = time.monotonic() + 20
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(20)
            try:
                sock.connect(self.path)
            except BlockingIOError:  # the backlog is full
                sock.close()
                assert time.monotonic() < deadline
                time.sleep(0.001)
                continue
            except BaseException:
                sock.close()
                raise
            return sock

    def ask(self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> Answer:
        """One request with a connection of its own; a body that is not bytes is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = self.connect()
        try:
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.ask("GET", path)

    def operation(self, number: int) -> dict[str, Any]:
        answer = self.get(f"/api/v1/operations/{number}")
        assert answer.status == 200
        return dict(answer.json)


@dataclass(frozen=True)
class Rig(Client):
    """The machine; `request()` plugs and unplugs as a guest's driver would."""

    manager: MemoryManager
    control: Control
    server: ApiServer
    notices: list[str]

    def service(self, zone: str = "mem0") -> DeviceService:
        service = self.manager.zones[zone].service
        assert service is not None
        return service

    def request(self, type_: RequestType, block: int = 0, nb_blocks: int = 1, zone: str = "mem0") -> ResponseType:
        addr = self.service(zone).device.geometry.addr
        return self.service(zone).request(Request(type_, GuestAddress(addr + block * BLOCK), nb_blocks)).type

    def follow(self, zone: str = "mem0") -> None:
        """The guest plugs from the bottom, or unplugs from the top, until the target is reached."""
        device = self.service(zone).device
        wanted, plugged = device.requested_size // BLOCK, device.plugged_size // BLOCK
        if wanted > plugged:
            assert self.request(RequestType.PLUG, plugged, wanted - plugged, zone) is ACK
        elif wanted < plugged:
            assert self.request(RequestType.UNPLUG, wanted, plugged - wanted, zone) is ACK

    def wait_until_idle(self) -> None:
        """Until the server has closed all that it had open for clients."""
        deadline = time.monotonic() + 20
        while self.server.connections or self.server._refused:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def resize(self, size: int, zone: str = "mem0") -> int:
        """Resize a zone over the socket; the operation's number."""
        if self.control.user_zones:
            answer = self.ask("PUT", "/api/v1/vm.resize-zone", {"id": zone, "desired_ram": size})
        else:
            answer = self.ask("PUT", "/api/v1/vm.resize", {"desired_ram": size})
        assert (answer.status, answer.body) == (204, b""), answer
        return int(answer.headers["Operation-Id"])


@contextmanager
def machine(directory: Path, line: str = ONE_ZONE, **options: Any) -> Iterator[Rig]:
    """A machine in service; `options` are those of Control."""
    notices: list[str] = []
    path = str(directory / "api.sock")
    with (
        MemoryManager(VmMemoryConfig.parse(line)) as manager,
        Control.from_manager(manager, notify=notices.append, **options) as control,
        ApiServer(control, path) as server,
    ):
        yield Rig(path, manager, control, server, notices)


def read_all(sock: socket.socket) -> bytes:
    """All that the server sends until it closes."""
    received = bytearray()
    try:
        while data := sock.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return bytes(received)


MakeMachine = Callable[..., Rig]
