"""What a supervisor writes down, for the one that may come after it; and what it does where nobody keeps the book.

`Book` is the latter: it keeps nothing, and a supervisor that is killed takes its front ends with it. ledger.py has the
book that lasts, and the order of writes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence

from vhost_user.backend.loop import EventLoop
from vhost_user.owned_fd import OwnedFd, close_all
from vhost_user.supervisor.packets import Packet
from vhost_user.supervisor.process import Start, WorkerProcess
from vhost_user.supervisor.wire import Wire

BYTES, FDS, LISTENER, SESSION, WORKER, WORKED = b"bytes/", b"fd/", b"listener/", b"session/", b"worker", b"worked"
"""Keys, or what they begin with."""

PART = b"part/"
"""Of bytes of which a worker has not told all yet; the part's number in four digits, a slash, and the name follow."""

INPUT, OUTPUT, JOURNAL = b"in", b"out", b"journal/"
"""Of a session, behind `session_key()`: the message that is being read or in hand, the reply, an entry."""


def session_key(number: int) -> bytes:
    """What all keys of a front end begin with."""
    return SESSION + b"%d/" % number


class Book:
    """Entries by key, of bytes and descriptors. What `put` and `drop` say is true from `commit` on, all at once."""

    lasting = False
    """Whether another supervisor can go on with it."""

    most_fds: int | None = None
    """How many descriptors there is room for, if that is known."""

    def keep(self, fds: Sequence[OwnedFd]) -> list[OwnedFd]:
        """Take descriptors over, and give them back as what `put` takes. OSError where they can't be kept, and stay
        the caller's."""
        return list(fds)

    def put(self, key: bytes, data: bytes, fds: Sequence[OwnedFd] = ()) -> None:
        """Have an entry, in place of the one before. The descriptors stay the caller's, and may be closed."""

    def drop(self, key: bytes) -> None:
        """Have no such entry."""

    def drop_all(self, prefix: bytes) -> None:
        """Have no entry whose key begins so."""

    def commit(self) -> None:
        """From here on."""

    def wire(self, key: bytes, listener: str, sock: socket.socket) -> Wire:
        """The connection of a front end that just came, which is taken over; `key` is the session's. OSError where it
        can't be kept, and is closed."""
        del key, listener
        return Wire(sock)

    def worker(
        self, loop: EventLoop, start: Start, on_packet: Callable[[Packet], None], on_exit: Callable[[int], None]
    ) -> WorkerProcess:
        """Start a worker, see `WorkerProcess`."""
        return WorkerProcess(loop, start, on_packet=on_packet, on_exit=on_exit)

    def close(self) -> None:
        """Write no more, and let go of what is open."""


def keep_open(book: Book, key: bytes, *files: socket.socket | OwnedFd, data: bytes = b"") -> list[OwnedFd]:
    """Put duplicates of open files into a book under `key`; what `put` takes for them. OSError as `keep`."""
    fds: list[OwnedFd] = []
    try:
        fds += (OwnedFd(os.dup(file.fileno())) for file in files)
        kept = book.keep(fds)
    finally:
        close_all(fds)
    close_all(kept)  # what the book has is enough
    book.put(key, data, kept)
    return kept
