"""A driver of virtio-fs: requests of FUSE, as Linux's <linux/fuse.h> has them."""

from __future__ import annotations

import os
import struct
from itertools import count

from tests.peers.drivers.machine import Queue
from vhost_user.units import GuestAddress

_IN = struct.Struct("<IIQQIIII")  # length, opcode, unique, node, uid, gid, pid, extension and padding
_OUT = struct.Struct("<IiQ")  # length, error, unique

LOOKUP, OPEN, READ, WRITE, INIT = 1, 14, 15, 16, 26
ROOT = 1

_VERSION = (7, 31)
_ENTRY_SIZE = 128  # struct fuse_entry_out
_INIT_SIZE = 64  # struct fuse_init_in and fuse_init_out


class FileSystem:
    """The file system behind `queue`; requests and the heads of answers lie at `scratch`."""

    def __init__(self, queue: Queue, scratch: int) -> None:
        self.queue = queue
        self._scratch = scratch
        self._unique = count(1)

    def _ask(self, opcode: int, node: int, body: bytes, size: int, buffer: int | None = None) -> bytes:
        """The answer's body of `size` bytes at most, which the device writes to `buffer`. OSError where it has one."""
        memory, unique = self.queue.memory, next(self._unique)
        request = _IN.pack(_IN.size + len(body), opcode, unique, node, 0, 0, 0, 0) + body
        head, buffer = self._scratch + 0x800, buffer or self._scratch + 0x900
        memory.write(GuestAddress(self._scratch), request)
        written = self.queue.request([(self._scratch, len(request))], [(head, _OUT.size), (buffer, size)])
        length, error, answered = _OUT.unpack(memory.read(GuestAddress(head), _OUT.size))
        assert (length, answered) == (written, unique)
        if error:
            raise OSError(-error, os.strerror(-error))
        return memory.read(GuestAddress(buffer), length - _OUT.size)

    def init(self) -> tuple[int, int]:
        """The version that the device speaks."""
        answer = self._ask(INIT, 0, struct.pack("<4I", *_VERSION, 0, 0).ljust(_INIT_SIZE, b"\0"), _INIT_SIZE)
        major, minor = struct.unpack_from("<II", answer)
        return major, minor

    def lookup(self, name: str, parent: int = ROOT) -> int:
        """The node of a name."""
        node, *_ = struct.unpack_from("<Q", self._ask(LOOKUP, parent, name.encode() + b"\0", _ENTRY_SIZE))
        return int(node)

    def open(self, node: int, flags: int = os.O_RDONLY) -> int:
        """A file handle."""
        handle, _, _ = struct.unpack("<QII", self._ask(OPEN, node, struct.pack("<II", flags, 0), 16))
        return int(handle)

    def read(self, node: int, handle: int, offset: int, size: int, buffer: int) -> bytes:
        """Bytes of a file, through the guest's buffer."""
        body = struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0)
        return self._ask(READ, node, body, size, buffer)
