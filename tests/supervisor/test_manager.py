"""The tests' own service manager."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.peers.processes import wait_until
from tests.supervisor.manager import managed
from tests.supervisor.rig import Board

_LIVES, _READY = 40, 41
"""Words of the board: how many main processes there were, and whether one waits to be told."""


def test_a_main_process_that_is_told_to_end_as_soon_as_it_is_forked_ends(tmp_path: Path) -> None:
    """The one before it died of being told: the manager tells the next one before that can have done anything."""
    board = Board()

    def service() -> None:
        board[_LIVES] += 1
        if board[_LIVES] == 1:
            signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        board[_READY] = 1
        while True:
            time.sleep(0.1)  # Python misses a signal that comes just before

    with managed(tmp_path, service):
        wait_until(lambda: board[_READY], "a main process waits to be told")
    board.close()
