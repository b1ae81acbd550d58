"""How a process ends that has something to put in order, such as a service that has not begun yet."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

KILLED_BY = 128
"""The exit status for a signal is this and its number, as a shell has it."""


@contextmanager
def in_order(*more: signal.Signals) -> Iterator[None]:
    """SIGTERM and SIGHUP, and `more`, end the process as an exception does, so that what it has made is removed. One
    that is ignored, as by nohup(1), stays so.

    For the main thread. A supervisor takes the two for itself while it runs.
    """
    wanted = [each for each in (signal.SIGTERM, signal.SIGHUP, *more) if signal.getsignal(each) != signal.SIG_IGN]
    before = {number: signal.signal(number, _end) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(KILLED_BY + number)
