"""The dirty log as the front end makes it and reads it: which pages the back end wrote to.

One bit for each page of LOG_PAGE bytes, from guest address 0 on; dirty_log.py says how a back end sets them. Bits are
taken out by an atomic exchange, and only then the pages are read: a page written later is logged once more.

The back end has the file. It is sealed, so that nobody can make it shorter under our mapping.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator

from vhost_user import _native
from vhost_user.errors import HostError
from vhost_user.mapping import Mapping
from vhost_user.message import LOG_PAGE
from vhost_user.owned_fd import OwnedFd
from vhost_user.units import ByteCount, GuestAddress, HostOffset, align_up

_WORD = 8
"""Bytes that are exchanged at once."""


class SharedLog:
    """A log with no bit set, up to guest address `highest` inclusive. HostError where the host has no room for it."""

    def __init__(self, highest: GuestAddress) -> None:
        self.size = ByteCount(align_up(highest // LOG_PAGE // 8 + 1, mmap.PAGESIZE))
        try:
            self._fd = OwnedFd(os.memfd_create("dirty-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        except OSError as error:
            raise HostError.from_os_error("log", self.size, "memfd_create", error) from error
        try:
            os.ftruncate(self._fd.fileno(), self.size)
            fcntl.fcntl(self._fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._mapping = Mapping(self.size, mmap.MAP_SHARED, self._fd.fileno(), HostOffset(0))
        except OSError as error:
            self._fd.close()
            raise HostError.from_os_error("log", self.size, "ftruncate", error) from error
        except HostError:
            self._fd.close()
            raise
        self._put_back: set[int] = set()

    def fileno(self) -> int:
        """The file, which stays this object's: for the back end, which is to log from its offset 0 on."""
        return self._fd.fileno()

    def covers(self, highest: GuestAddress) -> bool:
        """Whether there is a bit for the page of this address."""
        return highest // LOG_PAGE < 8 * self.size

    def take(self) -> set[int]:
        """The numbers of the pages that were logged since they were last taken; their bits are clear from now on."""
        raw = _native.log_take(self._mapping.address, self.size // _WORD)
        pages, self._put_back = self._put_back, set()
        pages.update(_pages(raw))
        return pages

    def put_back(self, pages: set[int]) -> None:
        """Have the next `take()` give these pages too. They are noted here alone: the back end does not see them."""
        self._put_back |= pages

    def close(self) -> None:
        """Unmap and close; the back end has the file as long as it likes."""
        self._mapping.close()
        self._fd.close()


def _pages(raw: bytes) -> Iterator[int]:
    """The numbers of the bits that are set."""
    for at in range(0, len(raw), _WORD):
        word = int.from_bytes(raw[at : at + _WORD], "little")
        while word:
            low = word & -word
            yield 8 * at + low.bit_length() - 1
            word ^= low
