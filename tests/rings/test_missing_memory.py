"""Guest memory that the host can't provide: the call that meets it fails, and the process lives.

A huge page that the pool doesn't have, and a file that another process has cut off, are both a SIGBUS when touched.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.host import HugePagePool
from tests.rings.rig import FORMATS, make_rig, pop
from vhost_user.errors import PeerError
from vhost_user.mapping import MAP_NORESERVE, Mapping
from vhost_user.memory import GuestMemory, Region
from vhost_user.units import MIB, ByteCount, GuestAddress
from vhost_user.vring import PackedLayout, PackedQueue, RingBroken, SplitLayout, SplitQueue

GOOD_SIZE = 1 * MIB
BAD = GuestAddress(16 * MIB)
BAD_SIZE = 2 * MIB


@contextmanager
def memory_with(bad: Mapping) -> Iterator[GuestMemory]:
    with bad, Mapping(ByteCount(GOOD_SIZE), mmap.MAP_SHARED) as good:
        regions = [Region(GuestAddress(0), ByteCount(GOOD_SIZE), good), Region(BAD, ByteCount(BAD_SIZE), bad)]
        memory = GuestMemory(regions)
        try:
            yield memory
        finally:
            memory.replace(())


@pytest.fixture
def truncated() -> Iterator[GuestMemory]:
    """Memory whose upper part belongs to a file that was cut off after it was mapped."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, BAD_SIZE)
    with memory_with(Mapping(ByteCount(BAD_SIZE), mmap.MAP_SHARED, fd)) as memory:
        os.ftruncate(fd, 0)
        os.close(fd)
        yield memory


def test_reads_writes_loads_and_stores_fail(truncated: GuestMemory) -> None:
    for attempt in (
        lambda: truncated.read(BAD, 8),
        lambda: truncated.write(BAD, b"x" * 8),
        lambda: truncated.load16(BAD),
        lambda: truncated.load32(BAD),
        lambda: truncated.store16(BAD, 1),
        lambda: truncated.store32(BAD, 1),
    ):
        for _ in range(3):
            with pytest.raises(PeerError):
                attempt()
    truncated.write(GuestAddress(0), b"good")
    assert truncated.read(GuestAddress(0), 4) == b"good"


@pytest.mark.parametrize("form", FORMATS)
def test_a_buffer_without_memory_costs_its_chain_only(form: str, truncated: GuestMemory) -> None:
    rig = make_rig(form, 8, memory=truncated)
    rig.driver.add([(BAD, 8)], [(BAD + 4096, 8)])
    chain = pop(rig.queue)
    with pytest.raises(PeerError):
        chain.read()
    with pytest.raises(PeerError):
        chain.write(b"answer")
    rig.queue.reject(chain, "memory_gone")
    rig.driver.add([(0, 8)], [(64, 8)])
    chain = pop(rig.queue)
    chain.write(b"answer")
    rig.queue.push(chain, 6)
    assert rig.memory.read(GuestAddress(64), 6) == b"answer"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("call", ["pop", "should_notify", "disable_notifications", "enable_notifications"])
def test_a_ring_without_memory_is_broken(form: str, call: str, truncated: GuestMemory) -> None:
    queue = (
        SplitQueue(truncated, **vars(SplitLayout.place(8, BAD)))
        if form == "split"
        else PackedQueue(truncated, **vars(PackedLayout.place(8, BAD)))
    )
    if call == "should_notify":
        assert queue.should_notify() is False, "nothing was used, so nothing is looked at"
        call = "pop"
    for _ in range(2):
        with pytest.raises(RingBroken, match="memory that the host can provide"):
            getattr(queue, call)()


@pytest.mark.needs_hugetlb
def test_a_huge_page_that_the_pool_does_not_have(hugepages: Callable[[int, int], HugePagePool]) -> None:
    hugepages(2 * MIB, 0)
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    os.ftruncate(fd, BAD_SIZE)
    bad = Mapping(ByteCount(BAD_SIZE), mmap.MAP_SHARED | MAP_NORESERVE, fd, alignment=2 * MIB)
    os.close(fd)
    with memory_with(bad) as memory:
        with pytest.raises(PeerError):
            memory.read(BAD, 1)
        with pytest.raises(PeerError):
            memory.write(BAD, b"x")


PROGRAM = """
import mmap, os, signal, sys
from vhost_user.mapping import Mapping
from vhost_user.memory import GuestMemory
{before}
GuestMemory()
fd = os.memfd_create("test")
os.ftruncate(fd, 4096)
mapping = Mapping(4096, mmap.MAP_SHARED, fd)
os.ftruncate(fd, 0)
mapping.view()[0]
"""


FAULTHANDLER = "import faulthandler; faulthandler.enable()"


@pytest.mark.parametrize("before", ["", FAULTHANDLER, f"GuestMemory(); {FAULTHANDLER}"])
def test_a_fault_elsewhere_is_not_ours_to_hide(before: str) -> None:
    program = [sys.executable, "-c", PROGRAM.format(before=before)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGBUS
    assert done.stderr.count("Fatal Python error: Bus error") == bool(before)


def test_a_fault_of_ours_is_survived_below_another_handler() -> None:
    lines = PROGRAM.format(before=f"GuestMemory(); {FAULTHANDLER}").splitlines()[:-1]
    lines += ["from vhost_user.memory import Region", "memory = GuestMemory([Region(0, 4096, mapping)])"]
    lines += ["try:", "    memory.read(0, 1)", "except Exception as error:", "    print(type(error).__name__)"]
    program = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "PeerError\n")


def test_a_signal_that_somebody_sends_is_no_fault() -> None:
    lines = PROGRAM.format(before="").splitlines()[:-1]
    lines += ["os.kill(os.getpid(), signal.SIGBUS)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], check=False, timeout=60)
    assert done.returncode == -signal.SIGBUS
