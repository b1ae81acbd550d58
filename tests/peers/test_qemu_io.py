"""libblkio (Rust) as the front end, by qemu-io and without a VM: what it writes is in the image of our block device.

It shares its memory by ADD_MEM_REG only, in regions that are no multiple of a page, has each message acknowledged, and
keeps one ring. What qemu-io prints is compared too, but the judge is the image.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import counts
from tests.peers.block_device import OUT, SECTOR, BlockDevice, Record, block_device, served
from tests.peers.qemu import qemu_io, qemu_io_started
from vhost_user.backend import PROTOCOL_FEATURES
from vhost_user.message import ProtocolFeature
from vhost_user.units import KIB, MIB

pytestmark = pytest.mark.needs_peers

COMMANDS_AT_ONCE = 200


class Model:
    """The image as it has to be, and the commands that make it so; every few of them reads back what is known."""

    def __init__(self, size: int, rng: random.Random) -> None:
        self.image = bytearray(size)
        self._rng = rng
        self._patterns: list[tuple[int, int, int]] = []

    def commands(self, count: int) -> list[str]:
        return [self._command() for _ in range(count)] + ["aio_flush", "flush"]

    def _command(self) -> str:
        if self._patterns and self._rng.random() < 0.3:
            pattern, start, size = self._rng.choice(self._patterns)
            if self.image[start : start + size] == bytes([pattern]) * size:
                return f"read -P {pattern:#x} {start} {size}"
        pattern = self._rng.randrange(1, 256)
        size = SECTOR * self._rng.choice([1, 3, 8, 64, 2048, self._rng.randrange(1, 600)])
        start = self._rng.randrange((len(self.image) - size) // SECTOR) * SECTOR
        self.image[start : start + size] = bytes([pattern]) * size
        self._patterns.append((pattern, start, size))
        return f"write -P {pattern:#x} {start} {size}"


@pytest.mark.parametrize("shuffle", [None, 1], ids=["in order", "out of order"])
def test_what_is_written_is_read_back_and_in_the_image(
    directory: Path, image: Path, shuffle: int | None, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    model = Model(image.stat().st_size, rng)
    commands = 0
    with block_device(directory, directory / "blk.sock", image, record=directory / "record", shuffle=shuffle) as peer:
        while commands < counts.QEMU_IO_COMMANDS:
            printed = qemu_io(directory, peer.socket, *model.commands(COMMANDS_AT_ONCE))
            assert "fail" not in printed
            commands += COMMANDS_AT_ONCE
        acked = peer.wait_for_output("protocol:")
        assert peer.terminate() == 0
    assert "MQ REPLY_ACK CONFIG CONFIGURE_MEM_SLOTS\n" in acked
    assert image.read_bytes() == model.image
    requests = Record.read(directory / "record")
    assert len(requests) >= commands
    figure(f"libblkio requests, {'in order' if shuffle is None else 'out of order'}", len(requests))


def test_requests_that_are_under_way_together(directory: Path, image: Path) -> None:
    """64 at a time, each 64 KiB: qemu-io waits for all of them at the end."""
    device = BlockDevice(image, shuffle=random.Random(1))
    commands = [f"aio_write -P {number + 1} {number * 64}k 64k" for number in range(64)]
    with served(directory / "blk.sock", device):
        assert "failed" not in qemu_io(directory, directory / "blk.sock", *commands, "aio_flush")
    assert image.read_bytes()[: 4 * MIB] == b"".join(bytes([number + 1]) * 64 * KIB for number in range(64))


def test_the_next_front_end_is_served_when_one_is_killed_at_work(directory: Path, image: Path) -> None:
    with block_device(directory, directory / "blk.sock", image, record=directory / "record") as peer:
        files = peer.open_files()
        for number in range(5):
            commands = [f"write -P {number + 1} {at}M 1M" for at in range(60)] * 20
            with qemu_io_started(directory, peer.socket, *commands) as front_end:
                front_end.wait_for_output("wrote")
                front_end.kill()
        assert "read 512/512" in qemu_io(directory, peer.socket, "read 0 512")
        peer.wait_for_output("session 6")
        assert peer.terminate() == 0
    assert "anon_inode:[eventfd]" in files
    assert peer.output().count("was closed by the peer") == 6
    writes = [entry for entry in Record.read(directory / "record") if entry.type == OUT]
    assert {entry.mark[0] for entry in writes} == {1, 2, 3, 4, 5}


def test_each_session_gives_back_what_it_took(directory: Path, image: Path) -> None:
    """The fixture that looks for leaks sees the whole of it; here each session must end as it began."""
    device = BlockDevice(image)
    with served(directory / "blk.sock", device) as endpoint:
        for _ in range(3):
            qemu_io(directory, directory / "blk.sock", "write 0 64k")
    assert device.sessions == endpoint.sessions == 3
    assert not endpoint.connected


def test_without_memory_slots_it_refuses_to_connect(directory: Path, image: Path) -> None:
    device = BlockDevice(image)
    without_slots = PROTOCOL_FEATURES & ~ProtocolFeature.CONFIGURE_MEM_SLOTS
    with served(directory / "blk.sock", device, without_slots):
        with qemu_io_started(directory, directory / "blk.sock", "read 0 512") as front_end:
            assert front_end.wait() != 0
        assert "doesn't support required protocol features" in front_end.output()
    assert device.executed == 0
