"""The dirty log as the front end makes it and reads it: which pages the back end wrote to.

One bit for each page of LOG_PAGE bytes, from guest address 0 on; dirty_log.py says how a back end sets them. Bits are
taken out by an atomic exchange, and only then the pages are read: a page written later is logged once more.

The back end has the file. It is sealed, so that nobody can make it shorter under our mapping. Memory that is shared
while it logs may lie beyond the log's end: then the log is replaced by a larger one first, and what was logged is kept.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Iterator

from vhost_user import _native
from vhost_user.errors import HostError, UsageError
from vhost_user.frontend.regions import SharedRegions
from vhost_user.frontend.requests import Requests
from vhost_user.mapping import Mapping
from vhost_user.message import F_LOG_ALL, LOG_PAGE, U64, FrontendRequest, Log, Opaque
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


class DirtyLogging:
    """What a front end and its back end have of a log: nothing, until it is started."""

    def __init__(self, requests: Requests, regions: SharedRegions) -> None:
        self._requests = requests
        self._regions = regions
        self._log: SharedLog | None = None
        self._features = 0
        # Who takes from a log has it mapped: another thread may replace it, or let go of it.
        self._taking = threading.RLock()

    def start(self, highest: GuestAddress, features: int) -> None:
        """Log up to address `highest`, under the virtio `features`; see `Frontend.start_logging`."""
        with self._requests.lock, self._requests.ending.call():
            before, self._features = self._log, features
            if before is None or not before.covers(highest):
                self._replace(before, highest, switch=before is None)

    def _replace(self, before: SharedLog | None, highest: GuestAddress, *, switch: bool) -> None:
        """Log up to address `highest` in a new log, with what is in the one before."""
        log = SharedLog(highest)
        try:
            self._send(log, switch=switch)
        except BaseException:
            log.close()
            raise
        with self._taking:
            if self._log is not before:  # by what the back end's channel, or a signal, had us call meanwhile
                log.close()
                return
            self._log = log
            self._regions.prepare = lambda end: self.start(end, self._features)
            if before is not None:
                log.put_back(before.take())
                before.close()

    def _send(self, log: SharedLog, *, switch: bool) -> None:
        question = Log(log.size, HostOffset(0))
        self._requests.ask(FrontendRequest.SET_LOG_BASE, Opaque, question, [log.fileno()])
        if switch:
            self._requests.tell(FrontendRequest.SET_FEATURES, U64(self._features | F_LOG_ALL))

    def send_again(self) -> None:
        """Have another back end go on in the same log, if there is one, or in a larger one, where memory that was kept
        for it lies beyond the end."""
        if (log := self._log) is None:
            return
        highest = GuestAddress(max((region.end for region in self._regions), default=1) - 1)
        if log.covers(highest):
            self._send(log, switch=True)
        else:
            self._replace(log, highest, switch=True)

    def take(self) -> set[int]:
        """The pages that were logged since they were last taken. UsageError without a log."""
        with self._taking:
            return self._present().take()

    def _present(self) -> SharedLog:
        if self._log is None:
            raise UsageError("log", "none", "logging has to have begun", "call start_logging() first")
        return self._log

    def stop(self) -> set[int]:
        """Log no more; the pages that nobody took."""
        with self._requests.lock:  # who makes it larger meanwhile would go on with one that is closed
            self._present()
            self._requests.tell(FrontendRequest.SET_FEATURES, U64(self._features))
            pages = self.take()
            self.close()
            return pages

    def close(self) -> None:
        """Let go of the log; nothing is told to the back end."""
        self._regions.prepare = lambda _: None
        with self._taking:
            log, self._log = self._log, None
            if log is not None:
                log.close()
