"""QEMU as the front end, with a Linux guest under TCG whose disks are our block device, in processes of their own.

The guest's writers go round and round: each fills an area of a disk that is its own with blocks that say which round
they are of, reads it back past its page cache, compares checksums, and prints the round's. The test has the last word,
by the images and by the record of what the devices executed.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from tests import counts
from tests.peers.block_device import OUT, Record, block_device
from tests.peers.guest import make_initrd
from tests.peers.processes import Peer, wait_until
from tests.peers.qemu import Qemu, qemu
from vhost_user.message import ProtocolFeature
from vhost_user.units import MIB

pytestmark = pytest.mark.needs_peers

BLOCK = 4096
BLOCKS = 64
"""Of each writer's area."""

REQUEST_BLOCKS = (1, 1, 4, 16)
"""One writer for each: the blocks that it writes with a single request."""

WRITERS = range(len(REQUEST_BLOCKS))

RING_PACKED = 1 << 34

FUNCTIONS = f"""
    # writer DISK WRITER BLOCKS: until there is /tmp/stop.
    writer() {{
        name=$1-$2 round=0 at=$(($2 * {BLOCKS} / $3)) size=$(($3 * {BLOCK})) blocks=$(({BLOCKS} / $3))
        while [ ! -e /tmp/stop ]; do
            round=$((round + 1))
            awk -v mark="$name $round" 'BEGIN {{
                for (i = 0; i < {BLOCKS}; i++) printf "%-{BLOCK - 1}s\\n", mark " " i " "
            }}' >/tmp/$name
            sum=$(md5sum </tmp/$name)
            dd if=/tmp/$name of=/dev/$1 bs=$size seek=$at oflag=direct conv=notrunc status=none || echo "FAILED: write"
            back=$(dd if=/dev/$1 bs=$size skip=$at count=$blocks iflag=direct status=none | md5sum)
            [ "$sum" = "$back" ] || echo "FAILED: $name round $round wrote $sum and read $back"
            echo "round $name $round $sum"
        done
    }}
    writers() {{
        for disk in $*; do
            {"; ".join(f"writer $disk {writer} {size} &" for writer, size in enumerate(REQUEST_BLOCKS)).replace("&;", "&")}
        done
    }}
"""


class Disk:
    """An image, the device that serves it, and the guest's name for it. `start()` takes over from one that was killed."""

    def __init__(
        self,
        stack: ExitStack,
        directory: Path,
        name: str,
        options: str = "",
        *,
        shuffle: int | None = None,
        without: ProtocolFeature = ProtocolFeature.NONE,
    ) -> None:
        self.name = name
        self.options = options
        self.image = directory / name
        self.image.write_bytes(bytes(MIB))
        self.socket = directory / f"{name}.sock"
        self.record = directory / f"{name}.record"
        self._stack = stack
        self._shuffle = shuffle
        self._without = without
        self.peer = self.start()

    def start(self) -> Peer:
        device = block_device(
            self.image.parent,
            self.socket,
            self.image,
            queues=2,
            record=self.record,
            shuffle=self._shuffle,
            without=self._without,
        )
        self.peer = self._stack.enter_context(device)
        return self.peer

    def arguments(self) -> list[str]:
        """QEMU's."""
        device = f"vhost-user-blk-pci,chardev={self.name},num-queues=2{self.options}"
        return ["-chardev", f"socket,id={self.name},path={self.socket},reconnect-ms=20", "-device", device]

    def executed(self) -> int:
        """How many requests, as yet."""
        return Record.number(self.record)

    def wait_for_requests(self, number: int) -> None:
        """Until so many more were executed."""
        aim = self.executed() + number
        wait_until(lambda: self.executed() >= aim, f"{self.name} executes {number} requests")


def completed_rounds(console: str) -> dict[tuple[str, int], dict[int, str]]:
    """By disk and writer: each round that the guest saw completed, and its checksum."""
    rounds: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
    for disk, writer, number, checksum in re.findall(r"^round (\w+)-(\d) (\d+) (\w+)", console, re.MULTILINE):
        rounds[disk, int(writer)][int(number)] = checksum
    return rounds


def check_console(console: str) -> None:
    """No writer failed, and no driver complained: of an I/O error, or of a used element that it had no request for."""
    assert "FAILED" not in console
    assert not re.search(r"(?i)error|not a head|blocked for more|call trace", console)


def check_disk(disk: Disk, console: str, deaths: int) -> int:
    """Each write that the guest saw completed is in the image and was executed; how many were executed twice.

    The driver hears of a request once: of one that it has not asked for it complains, one that it does not hear of it
    waits for, and its writer never ends. A device that is killed between a request's effect and its used element leaves
    it in flight, and the next one executes it again. It does one request at a time, so that is one a death at most,
    and not twice in one life.
    """
    image = disk.image.read_bytes()
    writes = [entry for entry in Record.read(disk.record) if entry.type == OUT]
    executions = Counter(entry.mark for entry in writes)
    rounds = completed_rounds(console)
    for writer in WRITERS:
        completed = rounds[disk.name, writer]
        assert list(completed) == list(range(1, len(completed) + 1)) != []
        area = image[writer * BLOCKS * BLOCK :][: BLOCKS * BLOCK]
        assert hashlib.md5(area).hexdigest() == completed[len(completed)]
        for number in completed:
            for block in range(0, BLOCKS, REQUEST_BLOCKS[writer]):
                assert executions[f"{disk.name}-{writer} {number} {block} ".ljust(32).encode()] >= 1
    assert len({(entry.process, entry.mark) for entry in writes}) == len(writes)
    twice = executions.total() - len(executions)
    assert twice <= deaths
    return twice


def boot(stack: ExitStack, directory: Path, script: str, disks: list[Disk], *arguments: str) -> Qemu:
    initrd = make_initrd(directory, FUNCTIONS + script, ["virtio_blk"])
    devices = [argument for disk in disks for argument in disk.arguments()]
    return stack.enter_context(qemu(directory, *devices, *arguments, initrd=initrd))


def end(vm: Qemu) -> str:
    """Have the guest's writers finish their rounds, and the guest power off; all that it printed."""
    vm.send("")
    assert vm.qmp.wait_for_event("SHUTDOWN")["data"]["guest"]
    assert vm.wait() == 0
    return vm.output()


def acked(peer: Peer) -> tuple[int, ProtocolFeature]:
    """Virtio features and protocol features, as acked last: the firmware's driver comes before the guest's."""
    lines = re.findall(r"acked: (\w+) protocol: (.*)\n", peer.wait_for_output("protocol:"))
    features, names = lines[-1]
    return int(features, 16), ProtocolFeature(sum(ProtocolFeature[name] for name in names.split()))


def test_no_request_is_lost_or_done_twice_when_the_device_is_killed(
    directory: Path, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    """One disk with split rings whose addresses are the guest's own, and one with packed rings and QEMU's addresses.

    Both execute out of order, so after a kill the rings' indices alone would not tell what is in flight.
    """
    script = "writers vda vdb\nread line\ntouch /tmp/stop\nwait\n"
    with ExitStack() as stack:
        split = Disk(stack, directory, "vda", shuffle=rng.randrange(1 << 32))
        packed = Disk(
            stack,
            directory,
            "vdb",
            ",packed=on",
            shuffle=rng.randrange(1 << 32),
            without=ProtocolFeature.GPA_ADDRESSES,
        )
        vm = boot(stack, directory, script, [split, packed])
        for disk in (split, packed):
            vm.wait_for_output(f"round {disk.name}")
            features, protocol_features = acked(disk.peer)
            assert bool(features & RING_PACKED) == (disk is packed)
            assert bool(protocol_features & ProtocolFeature.GPA_ADDRESSES) == (disk is split)
            assert protocol_features & ProtocolFeature.INFLIGHT_SHMFD
            figure(f"QEMU acked, {disk.name}", f"{features:#x} {protocol_features!r}")
        for _ in range(counts.BLOCK_DEVICE_KILLS):
            for disk in (split, packed):
                disk.wait_for_requests(rng.randrange(1, 300))
                disk.peer.kill()
                disk.start()
        for disk in (split, packed):
            disk.wait_for_requests(100)
        console = end(vm)
    check_console(console)
    for disk in (split, packed):
        twice = check_disk(disk, console, counts.BLOCK_DEVICE_KILLS)
        figure(f"QEMU requests, {disk.name}", disk.executed())
        figure(f"QEMU requests executed twice, {disk.name}", f"{twice} in {counts.BLOCK_DEVICE_KILLS} kills")
