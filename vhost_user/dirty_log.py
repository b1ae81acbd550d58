"""The dirty log of a migration: a bitmap, shared with the front end, of the guest's pages that this process changed.

The front end copies guest memory while the guest runs, and then again what changed since. Of the back end's writes it
only learns here. The document's section "Migration": the page of a guest address is the address divided by LOG_PAGE;
its bit is bit `page % 8` of byte `page / 8`.

Order. The front end takes bits out by an atomic exchange and then reads the pages. So a bit is set after the data is
written, with release order: whoever sees the bit sees the data. Set before the write, it could be taken out, and the
page be copied, before the data is there. It is set by an atomic OR, since other queues, other back ends and the front
end change the same byte; and it is set whatever it was, since the front end may be about to take it out.

What is marked. A queue that has a log (`DeviceQueue.log`) marks what goes through it: the data that `Chain.write()`
writes, all of the writable part at `push()` where `writable_views()` was called, and, where `log_used` says at which
guest address, what it writes to the ring itself. The address is the front end's word and may lie outside of guest
memory: nothing here looks it up.

The log is the front end's file: it may be too short for what is marked, which is counted and otherwise ignored, and it
may be truncated, which makes it `dead`. Neither is a reason to lose the guest's request.
"""

from __future__ import annotations

import threading

from vhost_user import _native
from vhost_user.message import LOG_PAGE
from vhost_user.owned_fd import OwnedFd
from vhost_user.window import Window


class DirtyLog:
    """The log of `size` bytes at `offset` in the file `fd`, as SET_LOG_BASE tells it. Any thread may mark at any time.

    The descriptor stays the caller's, and may be closed at once. Raises PeerError for a size of 0, a part that is not
    within the file, and a file that can't be mapped; HostError where the host has no room for the mapping.
    """

    def __init__(self, fd: int | OwnedFd, size: int, offset: int = 0) -> None:
        self._window = Window("log", fd, size, offset)
        self._pages = 8 * size
        self._lock = threading.Lock()
        self.out_of_range = 0
        """How many ranges were marked that lie, or end, behind what the log covers."""

    def mark(self, guest_address: int, size: int) -> None:
        """Set the bits of all pages that `size` bytes from `guest_address` on touch; they were written before."""
        if size <= 0:
            return
        first, last = guest_address // LOG_PAGE, (guest_address + size - 1) // LOG_PAGE
        # The lock keeps the mapping in place for as long as the C core is in it.
        with self._lock:
            if last >= self._pages:
                self.out_of_range += 1
                last = self._pages - 1
            if first <= last:
                try:
                    _native.log_mark(self._window.address, first, last - first + 1)
                except OSError:
                    assert self._window.dead

    @property
    def dead(self) -> bool:
        """Whether the front end truncated the log: its migration can't be right, and nothing is marked any more."""
        return self._window.dead

    def close(self) -> None:
        """Unmap the log. What is marked afterwards lies out of range; closing twice is allowed."""
        with self._lock:
            self._pages = 0
            self._window.close()
