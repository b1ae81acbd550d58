"""A second process that shares a guest's memory by its file, and maps it for itself."""

from __future__ import annotations

import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tests.rings.rig import BORDER, END
from vhost_user.mapping import Mapping
from vhost_user.memory import GuestMemory, Region
from vhost_user.units import ByteCount, GuestAddress, HostOffset


def map_memory(fd: int) -> GuestMemory:
    """Two neighbouring regions, each a mapping of its part of the file."""
    return GuestMemory(
        Region(start, size, Mapping(size, mmap.MAP_SHARED, fd, HostOffset(start)))
        for start, size in ((GuestAddress(0), ByteCount(BORDER)), (BORDER, ByteCount(END - BORDER)))
    )


class Other:
    """The other process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def rest(self) -> None:
        """Let the other one run; it has not failed so far."""
        os.sched_yield()
        done, status = os.waitpid(self.pid, os.WNOHANG)
        if done:
            self.pid = 0
            assert status == 0, "the other process failed; its traceback is above"

    def finish(self) -> None:
        """Wait for its end; it did not fail."""
        if self.pid:
            _, status = os.waitpid(self.pid, 0)
            self.pid = 0
            assert status == 0, "the other process failed; its traceback is above"


@contextmanager
def other_process(work: Callable[[GuestMemory], None]) -> Iterator[tuple[GuestMemory, Other]]:
    """Has `work` done in a forked process on memory that both share. Whatever happens here, that process ends."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, END)
    other = Other(os.fork())
    if other.pid == 0:
        status = 1
        try:
            work(map_memory(fd))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    try:
        yield map_memory(fd), other
        other.finish()
    finally:
        os.close(fd)
        if other.pid:
            with suppress(ProcessLookupError):
                os.kill(other.pid, signal.SIGKILL)
            os.waitpid(other.pid, 0)
