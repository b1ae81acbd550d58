"""What a supervisor begins with: what the one before it had written down, see ledger.py."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable, Iterator

from vhost_user.owned_fd import OwnedFd, close_socket
from vhost_user.supervisor.book import BYTES, FDS, INPUT, JOURNAL, LISTENER, OUTPUT, PART, WORKER, session_key
from vhost_user.supervisor.front_end import FrontEnd
from vhost_user.supervisor.kept import Entry, Kept
from vhost_user.supervisor.ledger import Ledger
from vhost_user.supervisor.outbox import Outbox
from vhost_user.supervisor.packets import Packet
from vhost_user.supervisor.peeked import PeekedSocket
from vhost_user.supervisor.stored import StoredWire, end_worker
from vhost_user.supervisor.wire import Wire

log = logging.getLogger(__name__)


def listeners(ledger: Ledger) -> Iterator[tuple[str, socket.socket]]:
    """The sockets where front ends come, which are the caller's, by name."""
    for key in ledger.keys(LISTENER):
        _, (fd,) = ledger.claim(key)
        yield key.removeprefix(LISTENER).decode(), socket.socket(fileno=fd.take())


def kept(ledger: Ledger, into: Kept) -> None:
    """What workers had kept."""
    for key in ledger.keys(BYTES):
        into.bytes[key.removeprefix(BYTES).decode()] = ledger.peek(key)
    for key in sorted(ledger.keys(PART)):
        into.restore_part(key[len(PART) + 5 :].decode(), ledger.peek(key))
    for key in ledger.keys(FDS):
        _, (fd,) = ledger.claim(key)
        into.restore_fd(key.removeprefix(FDS).decode(), fd)


def front_end(ledger: Ledger, number: int, make: Callable[[Wire, int, str], FrontEnd]) -> FrontEnd:
    """The front end of this number, which `make` makes from its connection, number and listener."""
    key = session_key(number)
    listener, (connection, page) = ledger.claim(key)
    found = make(StoredWire(PeekedSocket.found(connection), Outbox(page)), number, listener.decode())
    prefix = key + JOURNAL
    for each in ledger.keys(prefix):
        data, fds = ledger.claim(each)
        found.journal.restore(each.removeprefix(prefix), Entry(data, tuple(fds)))
    found.restore(*_part(ledger, key + INPUT), *_part(ledger, key + OUTPUT))
    log.info("%s: found again", found.name)
    return found


def _part(ledger: Ledger, key: bytes) -> tuple[bytes | None, list[OwnedFd]]:
    return ledger.claim(key) if key in ledger else (None, [])


def old_worker(ledger: Ledger, then: Callable[[Packet], None]) -> None:
    """End the worker that was there, see `end_worker`."""
    if WORKER in ledger:
        data, fds = ledger.claim(WORKER)
        end_worker(data, fds, ledger, then)


def abandon(ledger: Ledger, sockets: Iterable[str]) -> None:
    """Go on with nothing of it, and have nobody connect to its listeners, nor to kept ones of these names. The store
    closes them a little later than we are done."""
    old_worker(ledger, lambda _: None)
    found = [sock for _, sock in listeners(ledger)]
    for key in (FDS + name.encode() for name in sockets):
        if key in ledger:
            _, (fd,) = ledger.claim(key)
            found.append(socket.socket(fileno=fd.take()))
    for sock in found:
        sock.shutdown(socket.SHUT_RDWR)
        close_socket(sock)
    ledger.clear()
