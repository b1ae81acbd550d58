"""Staying awake for what is about to come.

To be woken takes tens of microseconds, on another processor than the waker's, many times what a small request or a
message does. So who has answered looks for the next one for a while before it sleeps, and who has asked for the answer.
"""

from __future__ import annotations

import os
import threading

LONGEST_LOOK = 100_000
"""Nanoseconds for which anything is looked for."""

looking = threading.Semaphore(len(os.sched_getaffinity(0)) - 1)
"""To be held by an event loop that looks. Of a process's loops so many may as it had processors when it began, but
one."""
