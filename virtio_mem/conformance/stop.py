"""How a soak ends that nothing else ends: somebody asks for it, by a signal or in another process.

Whoever is asked looks at it between two moves, so that what was found is kept and what was started is let go.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Those that ask for an end."""

_KILLED_BY = 128
"""The exit status for a signal is this and its number, as a shell has it."""


class Stop:
    """Whether the end was asked for: of this process, or of any that shares the path, which is there from then on."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._asked = False

    def ask(self) -> None:
        """From now on it is asked for."""
        self._asked = True
        if self._path is not None:
            self._path.touch()

    def __call__(self) -> bool:
        """Whether it was."""
        if not self._asked and self._path is not None:
            self._asked = self._path.exists()
        return self._asked


@contextmanager
def asked_by_signals(ask: Callable[[], None]) -> Iterator[None]:
    """The first of SIGNALS calls `ask`, and each one after it ends the process as an exception does.

    For the main thread.
    """
    asked = False

    def take(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            ask()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(_KILLED_BY + number)

    before = {number: signal.signal(number, take) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
