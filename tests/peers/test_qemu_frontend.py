"""QEMU as the front end, with a Linux guest under TCG whose disks are our block device.

The guest's writers go round and round: each fills an area of a disk that is its own with blocks that say which round
they are of, reads it back past its page cache, compares checksums, and prints the round's. The test has the last word,
by the image and by the record of what the device executed.

What a kill can do. The driver hears of each request once: of one that it has not asked for it complains, and one that
it does not hear of it waits for, so that its writer never ends. A device that is killed between a request's effect and
its used element leaves the request in flight, and the next device executes it again. Ours does one request at a time,
whatever it has taken: that is one request in a death at most, and never twice in one life. To write the same block
again changes nothing, since no other request for it can be on its way before this one was answered.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import counts
from tests.peers.block_device import OUT, BlockDevice, Record, block_device, served
from tests.peers.guest import make_initrd
from tests.peers.processes import Peer, unused, wait_until
from tests.peers.qemu import Qemu, qemu, qemu_io
from vhost_user.message import ProtocolFeature
from vhost_user.units import KIB, MIB

pytestmark = pytest.mark.needs_peers

QUEUES = 2
BLOCK = 4 * KIB
BLOCKS = 32
"""Of each writer's area."""

REQUEST_BLOCKS = (1, 1, 1, 1, 2, 4, 8, 16)
"""One writer for each: the blocks that it writes with a single request."""

EVENT_IDX, RING_PACKED = 1 << 29, 1 << 34

# On a serial port of its own, as QEMU's messages go to the first one's log, in the middle of lines too.
WRITERS = f"""
    # writer DISK NUMBER BLOCKS: until there is /tmp/stop.
    writer() {{
        name=$1-$2 round=0 at=$(($2 * {BLOCKS} / $3)) size=$(($3 * {BLOCK})) requests=$(({BLOCKS} / $3))
        while [ ! -e /tmp/stop ]; do
            round=$((round + 1))
            awk -v mark="$name $round" 'BEGIN {{
                for (i = 0; i < {BLOCKS}; i++) printf "%-{BLOCK - 1}s\\n", mark " " i " "
            }}' >/tmp/$name
            sum=$(md5sum </tmp/$name)
            dd if=/tmp/$name of=/dev/$1 bs=$size seek=$at oflag=direct conv=notrunc status=none || echo "FAILED: write"
            back=$(dd if=/dev/$1 bs=$size skip=$at count=$requests iflag=direct status=none | md5sum)
            [ "$sum" = "$back" ] || echo "FAILED: $name round $round wrote $sum and read $back"
            echo "round $name $round $sum"
        done
    }}
    exec >/dev/ttyS1 2>&1
    echo booted
    for path in /sys/block/vd?; do
        [ "$(cat $path/serial)" = ${{path##*/}} ] || echo "FAILED: $path is $(cat $path/serial)"
        number=0
        for blocks in {" ".join(map(str, REQUEST_BLOCKS))}; do
            writer ${{path##*/}} $number $blocks &
            number=$((number + 1))
        done
    done
    read line </dev/console
    touch /tmp/stop
    wait
    echo ended
"""


class Guest:
    """A VM whose guest writes to all its disks from its boot to `end()`. `disks` are sockets, by the guest's name."""

    def __init__(
        self, stack: ExitStack, directory: Path, disks: dict[str, Path], options: dict[str, str] | None = None
    ) -> None:
        self.written = unused(directory, "written", ".log")
        arguments = ["-serial", f"file:{self.written}", "-action", "reboot=reset"]
        for name, socket in disks.items():
            arguments += ["-chardev", f"socket,id={name},path={socket},reconnect-ms=20"]
            arguments += [
                "-device",
                f"vhost-user-blk-pci,chardev={name},num-queues={QUEUES}{(options or {}).get(name, '')}",
            ]
        self.vm: Qemu = stack.enter_context(
            qemu(directory, *arguments, initrd=make_initrd(directory, WRITERS, ["virtio_blk"]))
        )

    def output(self) -> str:
        """What the writers printed."""
        return self.written.read_text() if self.written.exists() else ""

    def wait_for(self, text: str, times: int = 1) -> None:
        wait_until(lambda: self.output().count(text) >= times, f"the guest prints {text!r}")

    def wait_for_round(self, disk: str) -> None:
        """Until each writer has completed one more."""
        for number in range(len(REQUEST_BLOCKS)):
            text = f"round {disk}-{number} "
            self.wait_for(text, self.output().count(text) + 1)

    def end(self) -> None:
        """Have the writers finish their rounds, and the guest power off."""
        self.vm.send("")
        assert self.vm.qmp.wait_for_event("SHUTDOWN")["data"]["guest"]
        assert self.vm.wait() == 0
        assert "ended" in self.output()
        self.check()

    def check(self) -> None:
        """No writer failed, and no driver complained, of an I/O error or of a used element that it knows not."""
        assert "FAILED" not in self.output()
        kernel = "\n".join(re.findall(r"\[ *\d+\.\d{6}\].*", self.vm.output()))
        assert not re.search(r"(?i)error|not a head|blocked for more|call trace", kernel)

    def completed(self, disk: str) -> list[dict[int, str]]:
        """By writer: each round that was completed since the last boot, and its checksum."""
        rounds: dict[int, dict[int, str]] = defaultdict(dict)
        since_boot = self.output().rpartition("booted")[2]
        for writer, number, checksum in re.findall(rf"round {disk}-(\d) (\d+) (\w+)", since_boot):
            rounds[int(writer)][int(number)] = checksum
        for each in rounds.values():
            assert list(each) == list(range(1, len(each) + 1))
        return [rounds[number] for number in range(len(REQUEST_BLOCKS))]

    def check_image(self, disk: str, image: Path) -> None:
        """Each area is of the last round that its writer completed."""
        areas = memoryview(image.read_bytes())
        for number, completed in enumerate(self.completed(disk)):
            area = areas[number * BLOCKS * BLOCK :][: BLOCKS * BLOCK]
            assert hashlib.md5(area).hexdigest() == completed[len(completed)]


def new_image(directory: Path, name: str) -> Path:
    """The device's serial number is the file's name, and the guest compares it."""
    path = directory / name
    path.write_bytes(bytes(MIB))
    return path


class Mortal:
    """A device in a process of its own, and the image and the record that outlive it."""

    def __init__(
        self,
        stack: ExitStack,
        directory: Path,
        name: str,
        rng: random.Random,
        without: ProtocolFeature,
        *,
        supervised: bool = False,
    ) -> None:
        self.name = name
        self.supervised = supervised
        self.image = new_image(directory, name)
        self.socket = directory / f"{name}.sock"
        self.record = directory / f"{name}.record"
        self.deaths = 0
        self._stack, self._rng, self._without = stack, rng, without
        self.peer = self._start()

    def _start(self) -> Peer:
        device = block_device(
            self.image.parent,
            self.socket,
            self.image,
            queues=QUEUES,
            record=self.record,
            shuffle=self._rng.randrange(1 << 32),
            without=self._without,
            supervised=self.supervised,
        )
        return self._stack.enter_context(device)

    def wait_for_requests(self, number: int) -> None:
        """Until so many more were executed."""
        aim = self.executed() + number
        wait_until(lambda: self.executed() >= aim, f"{self.name} executes {number} more requests")

    def executed(self) -> int:
        return Record.number(self.record)

    def die(self) -> None:
        """By SIGKILL; another process takes over."""
        self.deaths += 1
        if self.supervised:
            os.kill(Record.read(self.record)[-1].process, signal.SIGKILL)
            return
        self.peer.kill()
        self.peer = self._start()

    def acked(self) -> tuple[int, ProtocolFeature]:
        """Virtio features and protocol features, as acked last: the firmware's driver comes before the guest's."""
        features, names = re.findall(r"acked: (\w+) protocol: (.*)\n", self.peer.output())[-1]
        return int(features, 16), ProtocolFeature(sum(ProtocolFeature[name] for name in names.split()))

    def check(self, guest: Guest) -> int:
        """Each write that the guest saw completed was executed; how many were executed twice."""
        guest.check_image(self.name, self.image)
        writes = [entry for entry in Record.read(self.record) if entry.type == OUT]
        executions = Counter(entry.mark for entry in writes)
        for number, completed in enumerate(guest.completed(self.name)):
            for each in completed:
                for block in range(0, BLOCKS, REQUEST_BLOCKS[number]):
                    assert executions[f"{self.name}-{number} {each} {block} ".ljust(32).encode()] >= 1
        assert len({(entry.process, entry.mark) for entry in writes}) == len(writes)
        twice = executions.total() - len(executions)
        assert twice <= self.deaths
        return twice


def two_disks(
    stack: ExitStack,
    directory: Path,
    rng: random.Random,
    without: dict[str, ProtocolFeature],
    *,
    supervised: bool = False,
) -> tuple[Mortal, Mortal, Guest]:
    """A guest that writes to vda, with split rings, and vdb, with packed ones; each is `without` a feature."""
    split, packed = (
        Mortal(stack, directory, name, rng, feature, supervised=supervised) for name, feature in without.items()
    )
    guest = Guest(stack, directory, {"vda": split.socket, "vdb": packed.socket}, {"vdb": ",packed=on"})
    for disk in (split, packed):
        guest.wait_for(f"round {disk.name}-")
        assert bool(disk.acked()[0] & RING_PACKED) == (disk is packed)
    return split, packed, guest


def kill(guest: Guest, disks: tuple[Mortal, ...], rng: random.Random) -> None:
    """The devices die in turn, at random moments; then the guest ends its work."""
    for _ in range(counts.BLOCK_DEVICE_KILLS):
        for disk in disks:
            disk.wait_for_requests(rng.randrange(1, 100))
            disk.die()
    for disk in disks:
        disk.wait_for_requests(100)
    guest.end()


def test_no_request_is_lost_or_done_twice_when_the_device_is_killed(
    directory: Path, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    """One disk has split rings whose addresses are the guest's own, one has packed rings and QEMU's addresses.

    Both execute out of order, so that the rings' indices alone don't tell what is in flight.
    """
    without = {"vda": ProtocolFeature.NONE, "vdb": ProtocolFeature.GPA_ADDRESSES}
    with ExitStack() as stack:
        split, packed, guest = two_disks(stack, directory, rng, without)
        for disk in (split, packed):
            features, protocol_features = disk.acked()
            assert bool(protocol_features & ProtocolFeature.GPA_ADDRESSES) == (disk is split)
            assert protocol_features & ProtocolFeature.INFLIGHT_SHMFD
            figure(f"QEMU acked, {disk.name}", f"{features:#x} {protocol_features!r}")
        kill(guest, (split, packed), rng)
        for disk in (split, packed):
            twice = disk.check(guest)
            figure(f"QEMU requests, {disk.name}", f"{disk.executed():,}, {twice} of them twice in {disk.deaths} kills")
            assert "read 4096/4096" in qemu_io(directory, disk.socket, "read 0 4k")


def test_a_supervised_device_is_killed_and_the_vmm_never_knows(
    directory: Path, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    """Nothing that QEMU could do about it is offered: no inflight buffer, and it sees no connection end."""
    without = dict.fromkeys(("vda", "vdb"), ProtocolFeature.INFLIGHT_SHMFD)
    with ExitStack() as stack:
        split, packed, guest = two_disks(stack, directory, rng, without, supervised=True)
        for disk in (split, packed):
            _, protocol_features = disk.acked()
            assert not protocol_features & ProtocolFeature.INFLIGHT_SHMFD
        kill(guest, (split, packed), rng)
        for disk in (split, packed):
            twice = disk.check(guest)
            text = f"{disk.executed():,}, {twice} of them twice in {disk.deaths} kills"
            figure(f"QEMU requests to a supervised device, {disk.name}", text)
            assert "front end 2" not in disk.peer.output()


def test_a_guest_is_stopped_and_reset_and_its_vmm_killed(directory: Path) -> None:
    image = new_image(directory, "vda")
    device = BlockDevice(image, queues=QUEUES)
    socket = directory / "vda.sock"
    with ExitStack() as stack:
        endpoint = stack.enter_context(served(socket, device))
        guest = Guest(stack, directory, {"vda": socket})
        guest.wait_for("round vda-")

        guest.vm.qmp("stop")
        executed = device.executed
        assert endpoint.link is not None
        assert not endpoint.link.session.rings.any_started
        assert guest.vm.qmp("query-status")["status"] == "paused"
        assert device.executed == executed
        guest.vm.qmp("cont")
        wait_until(lambda: device.executed > executed + 100, "the guest goes on")

        for boot in range(counts.BOOTS_AFTER_RESET):
            reset(guest, device)
            guest.wait_for("booted", boot + 2)
            guest.wait_for_round("vda")
        guest.check()
        reset(guest, device)
        assert device.sessions == 1

        guest.vm.kill()
        wait_until(lambda: not endpoint.connected, "the back end sees QEMU gone")
        assert "read 4096/4096" in qemu_io(directory, socket, "read 0 4k")
        assert device.sessions == 2


def reset(guest: Guest, device: BlockDevice) -> None:
    """In the middle of the guest's work, until the firmware's driver, which acks no event index, reads the disk."""
    assert device.acked & EVENT_IDX
    resets = device.resets
    guest.vm.qmp("system_reset")
    wait_until(lambda: device.resets > resets and not device.acked & EVENT_IDX, "the firmware's driver comes")
    executed = device.executed
    wait_until(lambda: device.executed > executed, "the firmware reads")
