"""How a service ends that has not begun yet."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

KILLED_BY = 128
"""The exit status for a signal is this and its number, as a shell has it."""


@contextmanager
def in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process as an exception does, so that what it has made is removed.

    For the main thread. A supervisor takes both for itself while it runs.
    """
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(KILLED_BY + number)
