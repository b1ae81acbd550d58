"""A virtio-blk device of ours on an image file, for front ends that we did not write: just what the tests need of one.

    python -m tests.peers.block_device SOCKET IMAGE [--queues N] [--record FILE] [--shuffle SEED] [--without FEATURE]
                                        [--supervised]

It is killed in the middle of its work by the tests, so it can tell what it had done. With `record` it appends an entry
to that file for each request that it executed, after the request's effect and before the driver can see the used
element: an entry says which request was executed, and by which process. What is in the page cache outlives a process,
however that ends.

With `shuffle` it is like a disk with a queue of its own: it takes all that is available before it executes the first
request, executes in a random order, and takes its time, before an effect and after it, so that whoever kills it mostly
finds something half done. Without, it executes each request as it takes it.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.peers.processes import Peer, running
from vhost_user.backend import PROTOCOL_FEATURES, Device, Endpoint, Server, Vring
from vhost_user.chain import Chain
from vhost_user.errors import PeerError
from vhost_user.message import ProtocolFeature
from vhost_user.supervisor import Supervisor, Worker
from vhost_user.supervisor.packets import ENVIRONMENT
from vhost_user.units import MIB
from vhost_user.unix_socket import listen

ROOT = Path(__file__).parents[2]

# Virtio 1.2, 5.2.3, 5.2.4 and 5.2.6.
SEG_MAX, BLK_SIZE, FLUSH, MQ = 1 << 2, 1 << 6, 1 << 9, 1 << 12
SECTOR = 512
REQUEST = struct.Struct("<II Q")  # type, reserved, sector
IN, OUT, FLUSH_REQUEST, GET_ID = 0, 1, 4, 8
OK, IOERR, UNSUPPORTED = b"\0", b"\1", b"\2"
ID_SIZE = 20
CONFIG = struct.Struct("<Q I I 4x I 8x x x H 60x")  # capacity, size_max, seg_max, blk_size, num_queues

PIECE = MIB
"""Bytes that are copied at a time: a driver chooses how long a request is, and 4 GiB would be allowed."""

PAUSE = 0.002
"""Seconds at most that a device with `shuffle` waits before a request's effect, and again before its used element."""

MARK_SIZE = 32
RECORD = struct.Struct(f"=IIIQI{MARK_SIZE}s")


class Record(NamedTuple):
    """A request that was executed. `mark` is what its data begins with, by which writes can be told apart."""

    process: int
    queue: int
    type: int
    sector: int
    size: int
    mark: bytes

    @classmethod
    def number(cls, path: Path) -> int:
        """How many were appended to the file, as yet."""
        return path.stat().st_size // RECORD.size

    @classmethod
    def read(cls, path: Path) -> list[Record]:
        """All that were appended to the file, in order."""
        return [cls(*fields) for fields in RECORD.iter_unpack(path.read_bytes())]


class BlockDevice(Device):
    """The image at `path` as a disk whose serial number is the file's name. One at a time appends to `record`."""

    name = "block"
    max_queue_size = 256
    features = SEG_MAX | BLK_SIZE | FLUSH | MQ

    def __init__(
        self, path: Path, *, queues: int = 1, record: Path | None = None, shuffle: random.Random | None = None
    ) -> None:
        self.identifier = path.name.encode()
        self.queue_count = queues
        self.executed = 0
        self.sessions = 0
        self.resets = 0
        self.acked = 0
        self._shuffle = shuffle
        self._kept: list[Chain] = []
        self._image = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._size = os.fstat(self._image).st_size
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._record = None if record is None else os.open(record, flags, 0o600)

    def close(self) -> None:
        for fd in (self._image, self._record):
            if fd is not None:
                os.close(fd)

    @property
    def config(self) -> bytes:
        return CONFIG.pack(self._size // SECTOR, 0, self.max_queue_size - 2, SECTOR, self.queue_count)

    def connected(self) -> None:
        self.sessions += 1

    def negotiated(self, features: int) -> None:
        self.acked = features

    def reset(self) -> None:
        self.resets += 1

    def set_status(self, status: int) -> None:
        self.resets += status == 0

    def on_kick(self, vring: Vring) -> bool:
        if self._shuffle is None:
            return vring.serve(partial(self._execute, vring.index))
        more = vring.serve(self._kept.append)
        self._shuffle.shuffle(self._kept)
        while self._kept:
            time.sleep(self._shuffle.uniform(0, PAUSE))
            written = self._execute(vring.index, self._kept[-1])
            time.sleep(self._shuffle.uniform(0, PAUSE))
            vring.push(self._kept.pop(), written)
            vring.notify()
        return more

    def stopped(self, vring: Vring) -> None:
        self._kept.clear()  # a ring that broke takes nothing back

    def _execute(self, queue: int, chain: Chain) -> int:
        if chain.readable < REQUEST.size or not chain.writable:
            raise PeerError("request", chain, f"{REQUEST.size} bytes of header and 1 of status")
        kind, _, sector = REQUEST.unpack(chain.read(0, REQUEST.size))
        room: int = chain.writable - 1
        data_size = chain.readable - REQUEST.size
        status, size, mark = OK, 0, b""
        try:
            if kind == IN:
                size, mark = room, self._read(chain, sector * SECTOR, room)
            elif kind == OUT:
                size, mark = data_size, self._write(chain, sector * SECTOR, data_size)
            elif kind == FLUSH_REQUEST:
                os.fdatasync(self._image)
            elif kind == GET_ID:
                size = min(room, ID_SIZE)
                chain.write(self.identifier.ljust(ID_SIZE, b"\0")[:size])
            else:
                status = UNSUPPORTED
        except OSError:
            status = IOERR
        self._note(Record(os.getpid(), queue, kind, sector, size, mark))
        chain.write(status, room)
        return room + 1

    def _read(self, chain: Chain, start: int, size: int) -> bytes:
        self._check(start, size)
        for offset in range(0, size, PIECE):
            chain.write(os.pread(self._image, min(PIECE, size - offset), start + offset), offset)
        return os.pread(self._image, MARK_SIZE, start)

    def _write(self, chain: Chain, start: int, size: int) -> bytes:
        self._check(start, size)
        for offset in range(0, size, PIECE):
            piece = chain.read(REQUEST.size + offset, min(PIECE, size - offset))
            assert os.pwrite(self._image, piece, start + offset) == len(piece)
        return chain.read(REQUEST.size, min(MARK_SIZE, size))

    def _check(self, start: int, size: int) -> None:
        if size % SECTOR or start + size > self._size:
            raise OSError(errno.EINVAL, "not whole sectors of the disk")

    def _note(self, record: Record) -> None:
        self.executed += 1
        if self._record is not None:
            os.write(self._record, RECORD.pack(*record))


@contextmanager
def block_device(
    directory: Path,
    socket: Path,
    image: Path,
    *,
    queues: int = 1,
    record: Path | None = None,
    shuffle: int | None = None,
    without: ProtocolFeature = ProtocolFeature.NONE,
    supervised: bool = False,
) -> Iterator[Peer]:
    """The device in a process of its own, which listens at `socket`; see the module's docstring.

    Where it is `supervised`, that process is the supervisor, and the device is in the process of the last record.

    For each front end that starts to use it, it prints what was acked: `acked: 0x... protocol: MQ CONFIG ...`.
    """
    command = [sys.executable, "-m", "tests.peers.block_device", str(socket), str(image), f"--queues={queues}"]
    command += [] if record is None else [f"--record={record}"]
    command += [] if shuffle is None else [f"--shuffle={shuffle}"]
    command += [f"--without={int(without)}"]
    command += ["--supervised"] if supervised else []
    with running("block-device", "ours", command, directory, socket, environment={"PYTHONPATH": str(ROOT)}) as peer:
        yield peer


@contextmanager
def served(
    socket: Path, device: BlockDevice, protocol_features: ProtocolFeature = PROTOCOL_FEATURES
) -> Iterator[Endpoint]:
    """A device in a thread of this process, which listens at `socket`; it is closed at the end."""
    with Server(protocol_features=protocol_features) as server:
        endpoint = server.listen(socket, device)
        with server.in_thread():
            yield endpoint
    device.close()


class _Reporting(BlockDevice):
    """Prints what the front end acked: when it kicks, and it is not what it acked before."""

    server: Server
    reported = ""

    def on_kick(self, vring: Vring) -> bool:
        link = self.server.endpoints[0].link
        assert link is not None
        names = " ".join(feature.name or "?" for feature in link.session.negotiated.protocol_features)
        report = f"session {self.sessions}: acked: {self.acked:#x} protocol: {names}\n"
        if report != self.reported:
            self.reported = report
            sys.stdout.write(report)
            sys.stdout.flush()
        return super().on_kick(vring)


def _main() -> None:
    parser = argparse.ArgumentParser(description="A virtio-blk device for tests.")
    parser.add_argument("socket", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--queues", type=int, default=1)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--shuffle", type=int, help="execute in a random order; the seed")
    parser.add_argument("--without", type=int, default=0, help="bits of protocol features not to offer")
    parser.add_argument("--supervised", action="store_true", help="serve it by a worker, which may be killed")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    if options.supervised and ENVIRONMENT not in os.environ:
        command = [sys.executable, "-m", "tests.peers.block_device", *sys.argv[1:]]
        sys.exit(Supervisor(command, {"disk": listen(options.socket)}).run())
    shuffle = None if options.shuffle is None else random.Random(options.shuffle)
    device = _Reporting(options.image, queues=options.queues, record=options.record, shuffle=shuffle)
    with Server(protocol_features=PROTOCOL_FEATURES & ~ProtocolFeature(options.without)) as server:
        device.server = server
        if options.supervised:
            worker = Worker.from_environment()
            worker.attach(server, "disk", device)
            worker.ready()
        else:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: server.stop())
            server.listen(options.socket, device)
        server.run()
    device.close()


if __name__ == "__main__":
    _main()
