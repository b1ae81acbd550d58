"""A standard stream that nobody takes any more from: its reader has gone, or the disk is full."""

from __future__ import annotations

import os
from typing import TextIO


def give_up(stream: TextIO) -> None:
    """What is still buffered has nowhere to go; the interpreter would try again at its end, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
