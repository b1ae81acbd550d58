"""The book of a supervisor that may be killed at any moment: another one goes on with it, and no front end notices.

What it consists of is in the service manager's store (fd_store.py): two memfds with the bytes (ledger_file.py), and all
descriptors in bundles (bundle.py). The order of writes, where "kept" means that one transaction has it:

    a front end comes     1. it is accepted  2. its connection is in the store  3. kept
    a piece of a message  1. it is looked at, and stays in the connection  2. its descriptors are in the store
                          3. kept  4. it is taken out of the connection  5. that is noted
    a worker's packet     1. it is looked at  2. new descriptors are in the store  3. what it changes is kept, with the
                          reply, and that it was the n-th packet  4. the reply is sent and that is noted, by one system
                          call  5. the packet is taken out of the socket  6. that is noted
    a worker is started   1. it is  2. the socket to it, and a handle on the process, are in the store  3. kept
                          4. it is told things
    in general            what no entry refers to leaves the store after the transaction that says so

and where the supervisor may be killed:

    an accepted front end between 1 and 3: its connection is closed. It was told nothing yet, and this is the only
        thing that is ever lost
    between 1 and 3: what was looked at is looked at again. What is in the store and not referred to is removed
    after 3: what is in a socket and kept is taken out of it. Whether it is still there the kernel says, by the offset
        of the next look (SO_PEEK_OFF, socket(7)), which goes up with a look and down as bytes are taken out. Whether
        that is the piece that is kept, or one after it at which nobody did more than look, is what is noted
    before a reply is sent: how much was sent is noted in shared memory, see outbox.py; the rest is sent
    a worker that is not kept: it was told nothing, and ends with its parent

The worker of a supervisor that is gone is killed first, and waited for. What it had sent, and nobody read, is read then
and counts, as journal.py says. After that its sessions go to a new worker, as when a worker is killed.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress

from vhost_user.backend.loop import EventLoop
from vhost_user.errors import HostError
from vhost_user.owned_fd import OwnedFd, close_all
from vhost_user.supervisor.book import SESSION, Book
from vhost_user.supervisor.bundle import StoredFd, pack, unpack
from vhost_user.supervisor.fd_store import FdStore
from vhost_user.supervisor.ledger_file import Changes, Entry, LedgerFiles, Ref, damaged
from vhost_user.supervisor.packets import Packet
from vhost_user.supervisor.process import Start, WorkerProcess
from vhost_user.supervisor.stored import StoredWire, StoredWorker
from vhost_user.supervisor.wire import Wire

log = logging.getLogger(__name__)

FILES = "vhost-user.ledger"
"""The two memfds' name in the store."""

BUNDLE = "vhost-user.fds."
"""What the name of a bundle begins with; its number follows."""


class Ledger(Book):
    """The book in `store`. A store with something else in it, or of another version, is emptied.

    OSError where the manager is not there or the store too small.
    """

    lasting = True

    def __init__(self, store: FdStore) -> None:
        self._store = store
        self._entries: dict[bytes, Entry] = {}
        self._changes: dict[bytes, Entry | None] = {}
        self._uses: Counter[int] = Counter()
        self._fresh: set[int] = set()
        """Bundles that no transaction refers to yet."""
        self._opened: dict[int, list[StoredFd]] = {}
        """Of the process before this one."""
        self._numbers = 1
        self._size = 0
        self._closed = False
        files = store.found.pop(FILES, [])
        self._files = LedgerFiles(files)
        try:
            if len(files) == 2:
                self._load()
                return
        except (HostError, OSError) as error:
            log.error("what the service manager stored is of no use: %s", str(error))
        self.clear()

    def _load(self) -> None:
        entries = self._files.load()
        numbers = {int(name.removeprefix(BUNDLE)): name for name in self._store.found if name.startswith(BUNDLE)}
        self._numbers = max(numbers, default=0) + 1
        self._apply(entries)
        for number, name in numbers.items():
            with self._store.found.pop(name)[0] as bundle:
                if self._uses[number]:
                    self._opened[number] = unpack(bundle, number)
                else:
                    self._store.remove(name)
        for key, entry in entries.items():
            for ref in entry.refs:
                if ref.which >= len(self._opened.get(ref.bundle, ())):
                    raise damaged("descriptors", key)

    def clear(self) -> None:
        """Begin with nothing."""
        for name in [*(BUNDLE + str(number) for number in self._uses), *self._store.found]:
            if name.startswith(BUNDLE):
                self._store.remove(name)
        self.settle()
        for state in (self._entries, self._changes, self._uses, self._fresh):
            state.clear()
        self._files.close()
        self._store.remove(FILES)
        self._files = LedgerFiles.create()
        self._store.put(FILES, self._files.fds)
        self._size = 0

    # What a supervisor before this one left.

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    @property
    def blank(self) -> bool:
        """Whether nothing was written yet."""
        return not self._entries

    def keys(self, prefix: bytes) -> list[bytes]:
        """Those that begin so."""
        return [key for key in self._entries if key.startswith(prefix)]

    @property
    def sessions(self) -> list[int]:
        """The front ends that are connected."""
        return [int(key[len(SESSION) : -1]) for key in self.keys(SESSION) if key.count(b"/") == 2 and key[-1:] == b"/"]

    def claim(self, key: bytes) -> tuple[bytes, list[OwnedFd]]:
        """An entry of the supervisor before this one: its bytes, and its descriptors, which the caller gets once."""
        entry = self._entries[key]
        fds = [self._opened[ref.bundle][ref.which] for ref in entry.refs]
        return entry.data, [StoredFd(fd.take(), fd.bundle, fd.index) for fd in fds]

    def peek(self, key: bytes) -> bytes:
        """The bytes of an entry."""
        return self._entries[key].data

    def settle(self) -> None:
        """Let go of what nobody claimed."""
        for fds in self._opened.values():
            close_all(fds)
        self._opened.clear()

    # What this one writes.

    @property
    def most_fds(self) -> int:  # type: ignore[override]
        """How many descriptors the store has room for."""
        return self._store.room

    def keep(self, fds: Sequence[OwnedFd]) -> list[OwnedFd]:
        """See `Book`. They are stored from here on, and as long as an entry of the next transaction has one of them."""
        if not fds or self._closed:
            return list(fds)
        number = self._numbers
        with pack(fds) as bundle:
            self._store.put(BUNDLE + str(number), [bundle])
        self._numbers += 1
        self._fresh.add(number)
        return [StoredFd(fd.take(), number, index) for index, fd in enumerate(fds)]

    def put(self, key: bytes, data: bytes, fds: Sequence[OwnedFd] = ()) -> None:
        """See `Book`. The descriptors are such as `keep` or `claim` gave."""
        if not self._closed:
            self._changes[key] = Entry(data, tuple(_ref(fd) for fd in fds))

    def drop(self, key: bytes) -> None:
        """See `Book`."""
        if key in self._entries:
            self._changes[key] = None
        else:
            self._changes.pop(key, None)

    def drop_all(self, prefix: bytes) -> None:
        """See `Book`."""
        for key in [key for key in (*self._entries, *self._changes) if key.startswith(prefix)]:
            self.drop(key)

    def commit(self) -> None:
        """See `Book`. Where the host refuses, the book is given up: there is none for the next supervisor."""
        if not self._changes or self._closed:
            return
        changes, self._changes = self._changes, {}
        loose = self._fresh | self._apply(changes)
        self._fresh = set()
        try:
            self._files.append(changes, self._entries, self._size)
            for number in loose:
                if not self._uses[number]:
                    del self._uses[number]
                    self._store.remove(BUNDLE + str(number))
        except OSError as error:
            log.error("what is kept for a supervisor after this one is given up: %s", error)
            with suppress(OSError):
                self._store.remove(FILES)
            self._closed = True
            self.lasting = False

    def _apply(self, changes: Changes) -> set[int]:
        """Have the entries as after these changes; the bundles that are referred to less."""
        less: set[int] = set()
        for key, entry in changes.items():
            before = self._entries.pop(key, None)
            if before is not None:
                self._size -= before.size
                self._uses.subtract(ref.bundle for ref in before.refs)
                less.update(ref.bundle for ref in before.refs)
            if entry is not None:
                self._entries[key] = entry
                self._size += entry.size
                self._uses.update(ref.bundle for ref in entry.refs)
        return less

    # What a supervisor has.

    def wire(self, key: bytes, listener: str, sock: socket.socket) -> Wire:
        """See `Book`."""
        return StoredWire.begin(self, key, listener, sock)

    def worker(
        self, loop: EventLoop, start: Start, on_packet: Callable[[Packet], None], on_exit: Callable[[int], None]
    ) -> WorkerProcess:
        """See `Book`."""
        return StoredWorker(self, loop, start, on_packet=on_packet, on_exit=on_exit)

    def close(self) -> None:
        """See `Book`. What is stored stays for the next supervisor."""
        self._closed = True
        self.settle()
        self._files.close()
        self._store.close()


def _ref(fd: OwnedFd) -> Ref:
    assert isinstance(fd, StoredFd), "what is kept was given to `keep`"
    return Ref(fd.bundle, fd.index)
