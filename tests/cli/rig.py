"""A real API server on real memory, a guest that plugs and unplugs, and the commands as their users run them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from socket import socket

from vhost_user.units import GuestAddress
from virtio_mem import MemoryManager, VmMemoryConfig
from virtio_mem.api.server import ApiServer
from virtio_mem.control import Control
from virtio_mem.protocol import Request, RequestType, ResponseType
from virtio_mem.service import DeviceService

ONE_ZONE = "--memory size=64M,shared=on,hotplug_method=virtio-mem,hotplug_size=512M"
TWO_ZONES = (
    "--memory size=0,hotplug_method=virtio-mem "
    "--memory-zone id=mem0,size=64M,shared=on,hotplug_size=2G,hotplugged_size=256M "
    "--memory-zone id=mem1,size=64M,shared=on,hotplug_size=256M "
    "--numa guest_numa_id=0,memory_zones=mem0 --numa guest_numa_id=1,memory_zones=mem1"
)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "virtio_mem", *arguments]


def run(*arguments: str, timeout: float = 20, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `virtio-mem` to its end."""
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        command(*arguments), capture_output=True, text=True, check=False, timeout=timeout, **options
    )


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait for something that must come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


class Machine:
    """A machine's memory and its API, in this process.

    With `before` it takes that machine's place: it has its operations and its targets, and none of its memory.
    """

    def __init__(self, options: str, api_socket: Path | socket, *, before: Machine | None = None) -> None:
        self._undo = ExitStack()
        with ExitStack() as undo:
            self.manager = undo.enter_context(MemoryManager(VmMemoryConfig.parse(options)))
            self.control = undo.enter_context(Control.from_manager(self.manager))
            if before is not None:
                self.control.load(before.saved())
                for zone in self.manager.zones:
                    self.service(zone).resize(before.service(zone).device.requested_size)
            undo.enter_context(ApiServer(self.control, api_socket))
            self._undo = undo.pop_all()

    def saved(self) -> bytes:
        """What a control saves for the next process."""
        return json.dumps({"paused": False, "operations": self.control.operations.dump()}).encode()

    def service(self, zone: str) -> DeviceService:
        service = self.manager.zones[zone].service
        assert service is not None
        return service

    def plug(self, zone: str, first: int, nb_blocks: int = 1, type_: RequestType = RequestType.PLUG) -> ResponseType:
        """What the guest asks for, a request."""
        service = self.service(zone)
        geometry = service.device.geometry
        addr = GuestAddress(geometry.addr + first * geometry.block_size)
        return service.request(Request(type_, addr, nb_blocks)).type

    def unplug(self, zone: str, first: int, nb_blocks: int = 1) -> ResponseType:
        return self.plug(zone, first, nb_blocks, RequestType.UNPLUG)

    @contextmanager
    def guest(self, zone: str, *, blocks_a_second: float = 1e4) -> Iterator[None]:
        """A guest that follows the target block by block, from the region's start, as long as the context lasts."""
        stop = threading.Event()

        def follow() -> None:
            device = self.service(zone).device
            while not stop.wait(1 / blocks_a_second):
                wanted, has = device.requested_size // device.geometry.block_size, device.blocks.plugged
                if has < wanted:
                    self.plug(zone, has)
                elif has > wanted:
                    self.unplug(zone, has - 1)

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def close(self) -> None:
        self._undo.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
