"""A second process truncates the memory all the time, while requests go through a ring in it: nothing ends the first.

Driver and device are both here, on the same memory: what a truncation takes away is missing to either. Whoever finds
his ring gone, or a region dead, maps the memory anew and goes on with a new ring.
"""

from __future__ import annotations

import os
import random
import select
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests import counts
from tests.rings.rig import FORMATS, Rig, make_rig
from tests.rings.two_processes import Other
from tests.shared_memory.helpers import Pages, region
from vhost_user.errors import PeerError
from vhost_user.mapping import PAGE_SIZE
from vhost_user.owned_fd import OwnedFd
from vhost_user.shared_memory import SharedMemory
from vhost_user.units import GuestAddress

QUESTION = GuestAddress(0x1000)
ANSWER = GuestAddress(0x2000)
LENGTH = 600

LONGEST_PAUSE = 0.002
"""Seconds that the file has its size for, at most: time for some dozens of requests."""


@contextmanager
def truncated_all_the_time(fd: OwnedFd, size: int, rng: random.Random) -> Iterator[None]:
    """Another process shortens the file and lets it grow again, until this block ends, or this process does."""
    stop, stopper = map(OwnedFd, os.pipe())
    other = Other(os.fork())
    if other.pid == 0:
        stopper.close()
        while not select.select([stop], [], [], rng.uniform(0, LONGEST_PAUSE))[0]:
            os.ftruncate(fd.fileno(), 0)
            os.sched_yield()
            os.ftruncate(fd.fileno(), size)
        os._exit(0)
    stop.close()
    try:
        yield
        other.rest()  # it has not failed so far
        stopper.close()
        other.finish()
    finally:
        stopper.close()
        if other.pid:
            os.kill(other.pid, signal.SIGKILL)
            os.waitpid(other.pid, 0)


class Requests:
    """Requests to a device in memory that comes and goes.

    `met` counts how it was found missing: by a "call" or a "view"; or the file has grown again before anything touched
    it, and there is a "lost ring" in it, all zeros.
    """

    def __init__(self, form: str, shared: SharedMemory, fd: OwnedFd, size: int) -> None:
        self._form, self._shared, self._fd = form, shared, fd
        self._region = region(0, size)
        self.done = 0
        self.met: Counter[str] = Counter()
        self._rig: Rig | None = None

    def go_on(self) -> None:
        """One more request, or an attempt to have memory for it again."""
        try:
            if self._rig is None:
                self._shared.replace([(self._region, self._fd.duplicate())])
        except PeerError:
            os.sched_yield()  # the other process is at it
            return
        try:
            self._rig = self._rig or make_rig(self._form, 8, memory=self._shared.guest_memory)
            how = self._request(self._rig)
        except PeerError:
            how = "call"
        if self._shared.dead_region() is not None:
            how = how or "view"
        elif how == "call":
            how = "lost ring"
        if how:
            self.met[how] += 1
            self._rig = None
        else:
            self.done += 1

    def _request(self, rig: Rig) -> str | None:
        """None, or "lost ring"."""
        rig.memory.write(QUESTION, b"q" * LENGTH)
        rig.driver.add([(QUESTION, LENGTH)], [(ANSWER, LENGTH)])
        chain = rig.queue.pop()
        if chain is None:
            return "lost ring"
        (question,), (answer,) = chain.readable_views(), chain.writable_views()
        assert {*bytes(question), *chain.read()} <= {0, ord("q")}
        answer[: LENGTH // 2] = b"v" * (LENGTH // 2)
        chain.write(b"w" * (LENGTH // 2), LENGTH // 2)
        rig.queue.push(chain, LENGTH)
        if rig.driver.get_used() is None:
            return "lost ring"
        assert {*bytes(answer), *rig.memory.read(ANSWER, LENGTH)} <= {0, ord("v"), ord("w")}
        return None


@pytest.mark.parametrize("form", FORMATS)
def test_requests_while_the_memory_is_truncated(
    form: str, pages: Pages, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    number = max(2, 32 * PAGE_SIZE // pages.size)
    size = number * pages.size
    with pages.file(number) as fd, SharedMemory() as shared:
        requests = Requests(form, shared, fd, size)
        with truncated_all_the_time(fd, size, rng):
            while requests.done < counts.REQUESTS_UNDER_TRUNCATION or not {"call", "view"} <= requests.met.keys():
                requests.go_on()
        assert shared.lingering == 0
        found = ", ".join(f"{times:,} by {how}" for how, times in sorted(requests.met.items()))
        figure(f"memory found missing, {form} ring, pages of {pages.size >> 10}K", found)
