"""Back ends in processes of their own, killed by SIGKILL wherever they are, while the guest goes on sending.

The guest sees every request come back exactly once. A back end tells when it sees a request whose answer the guest has.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests import counts
from tests.inflight.world import (
    Guest,
    SharedBuffer,
    answer,
    layout_of,
    make_driver,
    make_queue,
    number_of,
    shared_buffer,
)
from tests.rings.rig import BORDER, END, FORMATS
from tests.rings.two_processes import map_memory
from vhost_user.chain import Chain
from vhost_user.memory import GuestMemory
from vhost_user.units import GuestAddress
from vhost_user.vring import PackedLayout, SplitLayout

SIZE = 32

MOST_KEPT = 8
"""Chains that a back end never gives back: fewer than the ring has room for, at three descriptors each."""

# What the processes tell each other, in the upper region.
STARTED = GuestAddress(BORDER)
RETAKEN = GuestAddress(BORDER + 4)
ANSWERED = BORDER + 0x1000
ANSWERED_SIZE = 0x80000
"""A byte for each number of a request, modulo this: 1 where the guest has its answer."""


def answered(memory: GuestMemory, number: int) -> bool:
    return memory.read(GuestAddress(ANSWERED + number % ANSWERED_SIZE), 1) == b"\1"


def tell_answered(memory: GuestMemory, number: int, done: bool) -> None:
    memory.write(GuestAddress(ANSWERED + number % ANSWERED_SIZE), bytes([done]))


def serve(
    memory: GuestMemory, layout: SplitLayout | PackedLayout, shared: SharedBuffer, rng: random.Random, keep: int
) -> None:
    """Take chains, give them back in any order but for the last `keep`, and never end."""
    area = shared.open().queue(0)
    queue = make_queue(memory, layout, area)
    memory.store32(RETAKEN, len(area.retakes))
    memory.store32(STARTED, 1)
    held: list[Chain] = []
    last = -1
    while True:
        while len(held) < rng.randrange(SIZE) and (chain := queue.pop()) is not None:
            number = number_of(chain)
            assert number > last, f"{number} after {last}"
            assert not answered(memory, number), f"{number} again"
            last = number
            held.append(chain)
        if len(held) > keep:
            answer(queue, held.pop(rng.randrange(len(held))))


@contextmanager
def process(work: Callable[[], None]) -> Iterator[int]:
    """A process that is killed in the end, and had not ended before."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the back end failed; its traceback is above"


def alive(pid: int) -> bool:
    os.sched_yield()
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def use(guest: Guest, pid: int, answers: int) -> None:
    """Send and receive until so many came back, and a little longer."""
    left = guest.rng.randrange(20)
    while (answers > 0 or left > 0) and alive(pid):
        # Before it is seen by anybody.
        tell_answered(guest.memory, guest.number, False)
        while guest.rng.random() < 0.8 and guest.send():
            tell_answered(guest.memory, guest.number, False)
        answers -= receive(guest)
        left -= 1


def receive(guest: Guest) -> int:
    """How many came back."""
    before = len(guest.answered)
    while (number := guest.receive()) is not None:
        tell_answered(guest.memory, number, True)
    return len(guest.answered) - before


@pytest.mark.parametrize("form", FORMATS)
def test_no_request_is_lost_and_none_comes_back_twice(
    form: str, rng: random.Random, figure: Callable[[str, object], None]
) -> None:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, END)
    memory, layout = map_memory(fd), layout_of(form, SIZE)
    os.close(fd)
    guest = Guest(memory, make_driver(memory, layout), rng)
    retaken = 0
    with shared_buffer(form, SIZE) as shared:
        for _ in range(counts.INFLIGHT_KILLS):
            memory.store32(STARTED, 0)
            with process(lambda: serve(memory, layout, shared, rng, rng.randrange(MOST_KEPT))) as pid:
                # Some are killed when they have just begun to take over, or before.
                while not memory.load32(STARTED) and alive(pid) and rng.random() > 0.0005:
                    pass
                if memory.load32(STARTED):
                    use(guest, pid, rng.randrange(100))
            retaken += memory.load32(RETAKEN)
            receive(guest)
        memory.store32(STARTED, 0)
        with process(lambda: serve(memory, layout, shared, rng, 0)) as pid:
            while guest.flying and alive(pid):
                receive(guest)
    assert not guest.flying
    assert sorted(guest.answered) == list(range(guest.number))
    assert retaken
    figure(f"requests to {form} rings whose back ends were killed", guest.number)
    figure(f"of these, taken over by the next back end from the {form} area", retaken)
    memory.replace([])
