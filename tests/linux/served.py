"""A Linux guest on QEMU with a zone that `virtio-mem serve` serves, at 4 GiB; the guest's memory is a memfd of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.linux.console import Console
from tests.peers.guest import make_initrd
from tests.peers.processes import doings, kill_worker_of, telling, wait_until, worker_of
from tests.peers.qemu import Qemu, qemu
from vhost_user.errors import Disconnected, HostError
from vhost_user.units import GIB, MIB, ByteCount, HostOffset
from virtio_mem.boot.console import OBEY
from virtio_mem.client import Client
from virtio_mem.hostmem.files import data_size

ROOT = Path(__file__).parents[2]
BOOT_SIZE = 2 * GIB
ZONE_SIZE = ByteCount(2 * GIB)
MEMORY_BLOCK = 128 * MIB
"""What Linux adds and takes away in one piece."""

SECONDS_FOR_RESIZE = 60.0


@dataclass
class Service:
    """`virtio-mem serve` with one zone, mem0."""

    process: subprocess.Popen[str]
    socket: Path
    client: Client

    def worker(self) -> int | None:
        return worker_of(self.process.pid)

    def doings(self) -> str:
        """What the threads of the supervisor and of the worker do."""
        return "\n".join(map(doings, filter(None, (self.process.pid, self.worker()))))

    def kill_worker(self) -> None:
        kill_worker_of(self.process.pid)

    def zone(self) -> dict[str, Any]:
        (zone,) = self._patiently(lambda: self.client.info()["zones"])
        return dict(zone)

    def resize(self, size: int) -> None:
        self._patiently(lambda: self.client.resize_zone("mem0", size))

    def wait_for(self, size: int) -> None:
        """Until so much is plugged."""
        wait_until(lambda: self.zone()["plugged_size"] == size, f"{size} bytes are plugged", SECONDS_FOR_RESIZE)

    @staticmethod
    def _patiently(ask: Any) -> Any:
        """Ask again where the worker is killed meanwhile."""
        for _ in range(100):
            with suppress(Disconnected, HostError):
                return ask()
            time.sleep(0.1)
        return ask()


@contextmanager
def serving(
    directory: Path, options: str = "prefault=on", *arguments: str, size: ByteCount = ZONE_SIZE
) -> Iterator[Service]:
    socket, api = directory / "mem0.sock", directory / "api.sock"
    zone = f"id=mem0,socket={socket},addr=4G,hotplug_size={size},{options}"
    command = [sys.executable, "-m", "virtio_mem", "serve", "--zone", zone, "--api-socket", str(api), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (
        (directory / "serve.log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
    ):
        service = Service(process, socket, Client(str(api)))
        try:
            with telling("serve", lambda: [service.doings()]):
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n", (directory / "serve.log").read_text()
                yield service
        finally:
            process.terminate()
            try:
                status = process.wait(20)
            except subprocess.TimeoutExpired:
                sys.stdout.write(f"--- serve when it did not end:\n{service.doings()}\n")
                process.kill()
                raise
            sys.stdout.write(f"--- serve:\n{(directory / 'serve.log').read_text()[-20_000:]}\n")
        assert status == 0


@dataclass
class Machine:
    """A guest that is up. `memory` is the memfd that all of its memory is."""

    vm: Qemu
    console: Console
    service: Service
    memory: int
    zone_size: ByteCount
    total_at_boot: int = 0

    def held(self) -> int:
        """Bytes that the host holds for the zone."""
        return data_size(self.memory, HostOffset(BOOT_SIZE), self.zone_size)

    def settle(self, size: int) -> None:
        """Until so much is plugged, and stays. Before the guest has heard of the size, it is on its way to another, and
        only passes: an UNPLUG that was in the ring as a worker was killed is served by the next."""
        wait_until(lambda: self.console.kernel_log()["requested size"] == size, f"the guest is told of {size} bytes")
        self.service.wait_for(size)
        # A worker that has just come knows the state before it has the memory.
        wait_until(lambda: self.service.zone()["held"] is not None, "the session is rebuilt")

    def check(self, size: int) -> None:
        """Guest, device and host agree that so much is plugged, to the byte."""
        self.settle(size)
        zone, console = self.service.zone(), self.console
        assert zone["plugged_size"] == zone["requested_size"] == size
        assert self.held() == size == zone["held"]
        wait_until(lambda: console.has_online(size), f"the guest has {size} bytes online")
        assert console.memory_total() - self.total_at_boot == size
        assert console.complaints() == ""


@contextmanager
def linux(directory: Path, service: Service, *, size: ByteCount = ZONE_SIZE) -> Iterator[Machine]:
    """Boots, and loads virtio_mem; `size` is the zone's."""
    memory = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(memory, BOOT_SIZE + size)
    megabytes = (BOOT_SIZE + size) >> 20
    backend = f"memory-backend-file,id=ram0,size={megabytes}M,share=on,mem-path=/proc/self/fd/{memory}"
    device = "vhost-user-test-device-pci,chardev=c0,virtio-id=24,num_vqs=1,vq_size=128,config_size=56"
    try:
        with qemu(
            directory,
            *("-machine", "q35,accel=tcg,memory-backend=ram0", "-m", f"{megabytes}M", "-object", backend),
            *("-chardev", f"socket,id=c0,path={service.socket}", "-device", device),
            initrd=make_initrd(directory, OBEY, ["virtio_mem"]),
            append=f"mem={BOOT_SIZE >> 20}M memhp_default_state=online_movable",
            memory=None,
            pass_fds=(memory,),
        ) as vm:
            machine = Machine(vm, Console(vm), service, memory, size)
            machine.console.wait_for_boot()
            yield machine
    finally:
        os.close(memory)
