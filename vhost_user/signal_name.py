"""What ended a process, for people."""

from __future__ import annotations

import signal


def signal_name(number: int) -> str:
    """SIGSEGV and its like; of the real-time signals Python knows the first and the last by name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
