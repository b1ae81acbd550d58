"""Descriptors in the queue of a socket that nobody reads: what the store is given in their place.

A service manager looks at what it stores. It compares each new descriptor with those that it has, and drops one that it
has already, whatever its name; a front end may well send the same memory twice. It calls fstat(2), which a file of a
front end's own file system answers when it likes. So it gets none of these, but a socket of ours with all of them in
its queue: never the same one twice, one name for what came together, and a message of ours in its place at any time,
since it is only looked at (MSG_PEEK) and stays in the queue.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

from vhost_user.owned_fd import OwnedFd, ReceivedFd, close_all, received_fds

MOST = 32
"""Descriptors of a bundle. A message of a front end has 8, a packet of a worker 16; the kernel would take 253."""

_ROOM = socket.CMSG_SPACE(MOST * 4)


class StoredFd(ReceivedFd):
    """A descriptor of which bundle number `bundle` has a duplicate, as its `index`-th."""

    __slots__ = ("bundle", "index")

    def __init__(self, fd: int, bundle: int, index: int) -> None:
        super().__init__(fd)
        self.bundle = bundle
        self.index = index


def pack(fds: Sequence[OwnedFd]) -> OwnedFd:
    """A socket with duplicates of `fds`. OSError where the kernel refuses: too many are in queues, or sockets in the
    queues of sockets in too many layers, unix(7)."""
    assert len(fds) <= MOST
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        socket.send_fds(theirs, [bytes([len(fds)])], [fd.fileno() for fd in fds])
        return ReceivedFd(ours.detach())  # whoever closes it closes those in it


def unpack(bundle: OwnedFd, number: int) -> list[StoredFd]:
    """The descriptors of bundle number `number`. OSError for a socket that is none."""
    with socket.socket(fileno=bundle.duplicate().take()) as sock:
        flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        data, ancillary, _, _ = sock.recvmsg(1, _ROOM, flags)
    fds = received_fds(ancillary)
    if data != bytes([len(fds)]):
        close_all(fds)
        raise OSError(errno.EMFILE, f"{len(fds)} of {data!r} descriptors came back")
    return [StoredFd(fd.take(), number, index) for index, fd in enumerate(fds)]
