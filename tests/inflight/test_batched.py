"""A back end that serves batches, and is killed after each store that the C core makes meanwhile.

The process is stepped instruction by instruction (ptrace(2)). What the area, the ring and the answers were, each time
that one of them had changed, is what a kill there leaves behind; a back end takes each of these over, and serves to the
end. For the guest every request comes back exactly once, and the device sees none whose used entry the guest could see.
"""

from __future__ import annotations

import copy
import ctypes
import os
import random
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest

from tests import counts
from tests.inflight.world import (
    BUFFERS,
    PLACE,
    Guest,
    SharedBuffer,
    answer,
    answer_to,
    make_queue,
    new_guest,
    number_of,
    shared_buffer,
)
from tests.rings.rig import FORMATS, RING
from vhost_user.units import ByteCount, HostOffset
from vhost_user.vring import Batch, PackedLayout, SplitLayout

SIZE = 8
START = 65_530

_TRACEME, _CONT, _SINGLESTEP = 0, 7, 9
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int) -> None:
    if _libc.ptrace(request, pid, None, None):
        raise OSError(ctypes.get_errno(), "ptrace")


class Left(NamedTuple):
    """What outlives a back end: its area, the ring, and the guest's buffers."""

    area: bytes
    ring: bytes
    buffers: bytes


class World:
    """A guest with a ring, and the file that its front end keeps for it."""

    def __init__(self, form: str, rng: random.Random, shared: SharedBuffer) -> None:
        self.rng, self.shared = rng, shared
        self.guest, self.layout = new_guest(form, SIZE, rng, START)
        lowest = self.guest.memory.regions[0].mapping
        ring_size = max(area.address + area.size for area in self.layout.areas.values()) - RING
        self._buffer = shared.open()
        self._views = (
            self._buffer._window.view(),
            lowest.view(HostOffset(RING), ByteCount(ring_size)),
            lowest.view(HostOffset(BUFFERS), ByteCount(PLACE * (2 * SIZE + 2))),
        )

    def close(self) -> None:
        for view in self._views:
            view.release()
        self._buffer.close()
        self.guest.memory.replace([])

    def left(self) -> Left:
        area, ring, buffers = self._views
        return Left(bytes(area), bytes(ring), bytes(buffers))

    def goes_on(self, left: Left) -> None:
        """A back end takes this over, and serves to the end; the guest is as it was again afterwards."""
        for view, data in zip(self._views, left, strict=True):
            view[:] = data
        guest = copy.deepcopy(self.guest, {id(self.guest.memory): self.guest.memory})
        guest.receive_all()
        serve(guest, self.layout, self.shared)
        assert not guest.flying

    def stores(self) -> list[Left]:
        """What is left after each store of a back end that serves all that there is."""
        numbers = sorted(number for number, _, _ in self.guest.flying.values())
        found = [self.left()]
        pid = os.fork()
        if pid == 0:
            try:
                self._serve_batch(len(numbers), b"".join(map(answer_to, numbers)))
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSTOPPED(status)
        while True:
            _ptrace(_SINGLESTEP, pid)
            _, status = os.waitpid(pid, 0)
            assert os.WIFSTOPPED(status)
            if (left := self.left()) != found[-1]:
                found.append(left)
            if os.WSTOPSIG(status) == signal.SIGSTOP:  # once more, at the end
                break
        _ptrace(_CONT, pid)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        return found

    def _serve_batch(self, count: int, answers: bytes) -> None:
        queue = make_queue(self.guest.memory, self.layout, self.shared.open().queue(0), START)
        batch = Batch(SIZE, SIZE, 8, 8)
        batch.answers[: len(answers)] = answers
        # What the queue calls, so that few instructions are Python's.
        raw, ring, table, told = batch.raw, queue._ring, self.guest.memory.table, queue._told
        calls = (
            partial(raw.take, ring, table, SIZE, told),
            *(partial(raw.give, ring, table, end, told) for end in (1, count)),
        )
        sys.settrace(None)  # of coverage each instruction would be stepped, too
        _ptrace(_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        for call in calls:
            call()
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(raw.given != count)


def serve(guest: Guest, layout: SplitLayout | PackedLayout, shared: SharedBuffer) -> None:
    """A back end of this process takes over, and gives everything back."""
    buffer = shared.open()
    try:
        queue, last, more = make_queue(guest.memory, layout, buffer.queue(0), START), -1, True
        while more:
            while (chain := queue.pop()) is not None:
                number = number_of(chain)
                assert number > last, "in order, and none twice"
                assert not guest.answered[number], "the guest has its answer already"
                last = number
                answer(queue, chain)
            more = queue.enable_notifications()
        guest.receive_all()
    finally:
        buffer.close()


@pytest.mark.parametrize("form", FORMATS)
def test_killed_after_each_store_of_the_core(
    form: str, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    kills = 0
    with shared_buffer(form, SIZE) as shared:
        world = World(form, rng, shared)
        try:
            for _ in range(counts.STEPPED_RINGFULS):
                for _ in range(rng.randrange(12)):  # anywhere in the ring, with the free entries in any order
                    world.guest.send()
                serve(world.guest, world.layout, shared)
                while world.guest.send():
                    pass
                found = world.stores()
                assert len(found) > 5 * len(world.guest.flying)  # less those that change nothing
                for left in found:
                    world.goes_on(left)
                kills += len(found)
                world.guest.receive_all()
        finally:
            world.close()
    figure(f"stores of the C core after which a back end was killed, {form} ring", kills)
