"""systemd's file descriptor store: descriptors that the service manager holds while the service is started again.

A service sends descriptors with sd_notify's FDSTORE=1, under a name; they come back by LISTEN_FDS and LISTEN_FDNAMES
when it is started the next time: sd_notify(3), sd_listen_fds(3), FileDescriptorStoreMax= in systemd.service(5). The
environment variable FDSTORE, which systemd sets since version 254, says how many there is room for.

What is sent is queued in the manager's socket at once, in order, and outlives the sender. Nothing is answered: what the
store has no room for it drops, so it is counted here. A descriptor that it has already, under whatever name, it drops
too; see bundle.py.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence
from typing import Protocol, Self

from vhost_user.owned_fd import OwnedFd

_PATIENCE = struct.pack("@ll", 10, 0)
"""A struct timeval: seconds that a service manager which reads nothing may hold us up."""


class HasFileno(Protocol):
    """Anything with a descriptor."""

    def fileno(self) -> int:
        """The descriptor."""


class FdStore:
    """The store at the notification socket `address`, which has room for `room` descriptors.

    `found` is what it gave this process, by name; whoever wants one of these removes it from there.
    """

    def __init__(self, address: str, room: int, found: dict[str, list[OwnedFd]]) -> None:
        self.room = room
        self.found = found
        self._names = {name: len(fds) for name, fds in found.items()}
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _PATIENCE)
        self._address = "\0" + address[1:] if address.startswith("@") else address

    @classmethod
    def from_environment(cls) -> Self | None:
        """The store of this service, if it has one."""
        address, room = os.environ.get("NOTIFY_SOCKET", ""), os.environ.get("FDSTORE", "")
        if not address or not room.isdigit() or not int(room):
            return None
        return cls(address, int(room), passed_fds())

    @property
    def free(self) -> int:
        """For how many more there is room."""
        return self.room - sum(self._names.values())

    def put(self, name: str, fds: Sequence[HasFileno]) -> None:
        """Store descriptors under a name, all or none. OSError where there is no room, or nobody there."""
        if len(fds) > self.free:
            raise OSError(errno.ENOSPC, f"the service manager's store has room for {self.room}: FileDescriptorStoreMax")
        # It would drop a socket whose other end is closed, were it not told not to look.
        state = f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0".encode()
        numbers = [fd.fileno() for fd in fds]
        self._send(state, numbers)
        self._names[name] = self._names.get(name, 0) + len(fds)

    def remove(self, name: str) -> None:
        """Store nothing under a name. OSError where nobody is there."""
        if self._names.pop(name, None):
            self._send(f"FDSTOREREMOVE=1\nFDNAME={name}".encode(), [])

    def _send(self, state: bytes, numbers: Sequence[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(numbers)}i", *numbers))]
        self._sock.sendmsg([state], ancillary if numbers else [], socket.MSG_NOSIGNAL, self._address)

    def close(self) -> None:
        """Send no more; what is stored stays. Closes what was found and not taken."""
        self._sock.close()
        for fds in self.found.values():
            for fd in fds:
                fd.close()


def passed_fds() -> dict[str, list[OwnedFd]]:
    """The descriptors that the service manager gave this process, by name, once; they are closed at exec."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    found: dict[str, list[OwnedFd]] = {}
    if pid != str(os.getpid()) or not count.isdigit():
        return found
    for index in range(int(count)):
        number = _FIRST + index
        os.set_inheritable(number, False)
        found.setdefault(names[index] if index < len(names) else "unknown", []).append(OwnedFd(number))
    return found


_FIRST = 3
"""The number of the first descriptor that is passed: SD_LISTEN_FDS_START."""
