"""How one process wakes another whom it doesn't trust: a kick or an interrupt, without KVM.

An eventfd would do between friends. But both ends of an eventfd are one open file description, and its flags are
shared: the other process could make it blocking, and read what was meant for us between our look at it and our call,
and hold us for ever. The two ends of a pipe are two descriptions, each with flags of its own.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress

_RING = b"\1"
_MOST = 4096
"""Bytes taken at once: rings that were missed are one ring."""


def ring(writer: int) -> None:
    """Wake whoever waits at the other end. A full pipe, or nobody there, needs no further ring."""
    with suppress(BlockingIOError, BrokenPipeError):
        os.write(writer, _RING)


def answer(reader: int) -> bool:
    """Take the rings that have come; False if there were none. The pipe must not be a blocking one."""
    try:
        return bool(os.read(reader, _MOST))
    except BlockingIOError:
        return False


class Doorbell:
    """A pipe, of which the other process gets one end, as `reader` or `writer`. Rings after `close()` do nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def ring(self) -> None:
        """Wake whoever waits for `reader`."""
        with self._lock:
            if self.writer >= 0:
                ring(self.writer)

    def answer(self) -> bool:
        """Take the rings that have come; False if there were none."""
        return answer(self.reader)

    def close(self) -> None:
        """Close both of our ends. No other thread may be waiting for `reader`."""
        with self._lock:
            for fd in (self.reader, self.writer):
                if fd >= 0:
                    os.close(fd)
            self.reader = self.writer = -1
