"""Memory of the attacker, every byte of which is known: what a daemon writes where it should not is seen.

A canary is a memfd. In the middle lies the window, which is shared with the daemon; before and behind it are pages that
are of no concern to it, and that an offset taken wrongly, or added twice, lands in. All is filled with a pattern, and a
copy of it is kept. Within the window only what a ring lets the device write may change: those parts are `allow`ed.
"""

from __future__ import annotations

import os
from itertools import count

from vhost_user.message import MemoryRegion
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import KIB, ByteCount, GuestAddress, HostOffset, UserAddress

NAME = "vhost-user-attack"
"""In /proc a memfd of ours is `/memfd:vhost-user-attack`: one that a daemon still has when we are gone is a leak."""

MARGIN = 64 * KIB
"""Bytes before and behind the window."""

WINDOW = 512 * KIB
"""Bytes that are shared. Not so many that comparing them after each attack would take long."""

GUEST = 0x4000_0000
USER = 0x7F12_0000_0000
"""Where the first window lies. The two addresses and the offset differ: what is taken for another is not found."""

_PATTERN = b"\xa7"


class Canary:
    """`window` bytes to share at `guest`, and known memory around them. Closed by the attacker that made it."""

    def __init__(self, *, guest: int = GUEST, user: int | None = None, window: int = WINDOW) -> None:
        self.guest = guest
        self.user = USER + guest - GUEST if user is None else user
        self.window = window
        self.size = MARGIN + window + MARGIN
        self._fd = OwnedFd(os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        self._known = bytearray(_PATTERN * self.size)
        self._allowed: list[slice] = []
        self._given_away = False
        os.pwrite(self.fd, self._known, 0)

    @property
    def fd(self) -> int:
        """The memfd, which stays the canary's."""
        return self._fd.fileno()

    @property
    def end(self) -> int:
        """The guest address behind the window."""
        return self.guest + self.window

    def region(
        self, *, guest: int | None = None, size: int | None = None, user: int | None = None, offset: int | None = None
    ) -> MemoryRegion:
        """The window as messages have it, with whichever fields are given instead."""
        return MemoryRegion(
            GuestAddress(self.guest if guest is None else guest),
            ByteCount(self.window if size is None else size),
            UserAddress(self.user if user is None else user),
            HostOffset(MARGIN if offset is None else offset),
        )

    def write(self, at: int, data: bytes) -> None:
        """Put `data` at `at` bytes into the window."""
        start = MARGIN + at
        self._known[start : start + len(data)] = data
        os.pwrite(self.fd, data, start)

    def read(self, at: int, size: int) -> bytes:
        """`size` bytes of the window, as they are now."""
        return os.pread(self.fd, size, MARGIN + at)

    def allow(self, at: int, size: int) -> None:
        """`size` bytes from `at` on in the window are the daemon's to write."""
        self._allowed.append(slice(MARGIN + at, MARGIN + at + size))

    def give_away(self) -> None:
        """All of it is the daemon's to write, or can't be told from what is: it isn't compared any more."""
        self._given_away = True

    def truncate(self) -> None:
        """Cut the file to nothing."""
        self.give_away()
        os.ftruncate(self.fd, 0)

    def spoiled(self) -> str | None:
        """Where a byte changed that nobody had allowed to be changed, or that the file was cut; None for neither."""
        if self._given_away:
            return None
        now = bytearray(os.pread(self.fd, self.size, 0))
        if len(now) < self.size:
            return f"the file was cut to {len(now)} bytes"
        for part in self._allowed:
            now[part] = self._known[part]
        if now == self._known:
            return None
        first = next(at for at in count() if now[at] != self._known[at])
        changed = sum(a != b for a, b in zip(now, self._known, strict=True))
        where = "outside what was shared" if not MARGIN <= first < MARGIN + self.window else "in shared memory"
        return f"{changed} bytes changed, the first {where}, at {first - MARGIN:+#x} from its start"

    def close(self) -> None:
        """Close the memfd."""
        self._fd.close()
