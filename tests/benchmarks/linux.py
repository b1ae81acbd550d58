"""A Linux guest that is given 8 GiB and gives them back: our device as a daemon, and QEMU's own virtio-mem-pci.

Both guests run the whole time, on QEMU without KVM; same QEMU, same kernel, same sizes. What is timed is from the
host's wish until the device has all of it plugged or unplugged, by the device's own account: our API's operation says
when it was reached, and QEMU's event MEMORY_DEVICE_SIZE_CHANGE, which comes up to a second late, when its cause was. So
nobody asks in the first second, in which plugging is over: that takes processor time of the guest's, and what is asked
again and again is late by half of what lies between two questions. Each resize begins a while after the one before:
what QEMU's guest and the host had left to do behind that, they did while its event was late, and ours would have had to
begin beside it.

Two guests that do the same differ by some percent from the moment they are booted, and stay so: QEMU's against QEMU's
as much as against ours. So each pair has guests of its own. They are given the memory once before anything is timed:
the first time TCG has to translate what they do, and the host to find memory for what the guest keeps of each page.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks.measure import Row, in_turn, ratio_row
from tests.linux.console import Console
from tests.linux.served import BOOT_SIZE, MEMORY_BLOCK, linux, serving
from tests.peers.guest import make_initrd
from tests.peers.processes import wait_until
from tests.peers.qemu import qemu
from vhost_user.errors import HostError
from vhost_user.units import GIB, MIB, ByteCount, format_size
from virtio_mem.boot.console import OBEY

SIZE = ByteCount(8 * GIB)
BLOCK_SIZES = (2 * MIB, MEMORY_BLOCK)
"""The default of both, and what Linux adds and takes away in one piece."""

_PATIENCE = 300.0
_SETTLED = 1.5
"""Seconds between two resizes, more than the event can be late."""

_UNASKED = 1.0
"""Seconds that a resize has before anybody asks whether it is over."""

_DEVICE = "/machine/peripheral/vm0"


def rows(*, quick: bool) -> Iterator[Row]:
    """The table's lines. The quick ones are of less memory and of a single pair, and say so."""
    size = ByteCount(GIB) if quick else SIZE
    for block_size in BLOCK_SIZES[: 1 if quick else None]:
        try:
            found = measure(size, block_size, pairs=1 if quick else 5)
        except (HostError, FileNotFoundError) as error:
            sys.stderr.write(f"a Linux guest: left out: {error}\n")
            return
        for number, (start, end) in enumerate((("0", format_size(size)), (format_size(size), "0"))):
            what = f"a Linux guest under TCG from {start} to {end}, blocks of {format_size(block_size)}"
            values = [(ours[number], theirs[number]) for ours, theirs in found]
            yield ratio_row(what, "QEMU's virtio-mem-pci", "s", values, 1.0)


@dataclass(frozen=True)
class Resized:
    """A guest whose device can be told a target in bytes; `resize` waits until it is reached, and returns since when,
    in Unix seconds."""

    console: Console
    resize: Callable[[int], float]

    def seconds(self, size: int) -> float:
        """What a resize takes."""
        time.sleep(_SETTLED)
        start = time.time()
        reached = self.resize(size)
        wait_until(lambda: self.console.hotplugged() == size, f"the guest has {size} bytes")
        return reached - start

    def back_and_there(self, size: int) -> tuple[float, float]:
        """Seconds to plug so much, and to unplug it, which comes first, as it is there."""
        down = self.seconds(0)
        return self.seconds(size), down


def measure(size: ByteCount, block_size: int, pairs: int) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """For each pair, seconds to plug and to unplug: ours, and QEMU's."""
    found = []
    for number in range(pairs):
        with _guests(size, block_size) as (ours, theirs):
            sides = (partial(guest.back_and_there, size) for guest in (ours, theirs))
            found += in_turn(1, *sides, first=number)
    return found


@contextmanager
def _guests(size: ByteCount, block_size: int) -> Iterator[tuple[Resized, Resized]]:
    """Ours and QEMU's, which have all of the memory. Both boot at the same time, and get it for the first time so."""

    def given(guest: Resized) -> None:
        for target in (MEMORY_BLOCK, 0, size):
            guest.seconds(target)

    with ExitStack() as stack:
        stack.enter_context(_quiet())
        directories = [Path(stack.enter_context(TemporaryDirectory())) for _ in range(2)]
        theirs = stack.enter_context(qemus_guest(directories[1], size, block_size))  # is not waited for
        ours = stack.enter_context(our_guest(directories[0], size, block_size))
        theirs.console.wait_for_boot()
        with ThreadPoolExecutor() as pool:
            list(pool.map(given, (ours, theirs)))
        yield ours, theirs


@contextmanager
def _quiet() -> Iterator[None]:
    """The rigs tell what their programs printed: that is of interest where something fails."""
    with StringIO() as said:
        try:
            with redirect_stdout(said):
                yield
        except BaseException:
            sys.stderr.write(said.getvalue())
            raise


@contextmanager
def our_guest(directory: Path, size: ByteCount, block_size: int) -> Iterator[Resized]:
    """A guest with a zone of `virtio-mem serve`."""
    options = f"block_size={block_size},prefault=off"
    with serving(directory, options, size=size) as service, linux(directory, service, size=size) as machine:

        def resize(target: int) -> float:
            number = service.client.resize_zone("mem0", target)
            time.sleep(_UNASKED)
            operation = service.client.operation(number, wait=_PATIENCE)
            assert operation["state"] == "reached", operation
            return float(operation["created"] + operation["seconds"])

        yield Resized(machine.console, resize)


@contextmanager
def qemus_guest(directory: Path, size: ByteCount, block_size: int) -> Iterator[Resized]:
    """A guest with QEMU's own device; both parts of its memory are shared memfds, as the other guest's memory is. It is
    started, and has not booted yet."""
    with qemu(
        directory,
        *(
            "-machine",
            "q35,accel=tcg,memory-backend=ram0",
            "-m",
            f"{BOOT_SIZE >> 20}M,maxmem={2 * (BOOT_SIZE + size) >> 20}M",
        ),
        *("-object", f"memory-backend-memfd,id=ram0,size={BOOT_SIZE >> 20}M,share=on"),
        *("-object", f"memory-backend-memfd,id=vmem0,size={size >> 20}M,share=on,reserve=off"),
        *("-device", f"virtio-mem-pci,id=vm0,memdev=vmem0,block-size={block_size},requested-size=0"),
        initrd=make_initrd(directory, OBEY, ["virtio_mem"]),
        append="memhp_default_state=online_movable",
        memory=None,
    ) as vm:

        def resize(target: int) -> float:
            vm.qmp("qom-set", {"path": _DEVICE, "property": "requested-size", "value": target})
            while (event := vm.qmp.wait_for_event("MEMORY_DEVICE_SIZE_CHANGE"))["data"]["size"] != target:
                pass
            since = event["timestamp"]
            return float(since["seconds"] + since["microseconds"] / 1e6)

        yield Resized(Console(vm), resize)
