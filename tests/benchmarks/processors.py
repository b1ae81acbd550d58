"""Who runs on which processor: the guest on one, the device, or the C program in its place, on another.

Where the scheduler chooses, it chooses anew all the time. Two processes that wake each other take a tenth of the time
on one processor; and to give back huge pages takes a fifteenth less on the one whose process has used them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.start import tree


@contextmanager
def a_processor_each(*pids: int) -> Iterator[int]:
    """These processes and those that they started have one processor, which is told, and what this one starts has
    another."""
    before = os.sched_getaffinity(0)
    for pid in (each for root in pids for each in tree(root)):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {max(before)})
    with on_processor(min(before)):
        yield max(before)


@contextmanager
def on_processor(number: int) -> Iterator[None]:
    """This process, and what it starts meanwhile, has the processor of this number."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {number})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
