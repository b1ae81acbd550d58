"""Where the log goes, and how much of it."""

from __future__ import annotations

import logging

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


def log_to_stderr(verbose: int) -> None:
    """Warnings; with 1 what was asked by whom; with 2 each message of a front end."""
    logging.basicConfig(
        level=_LEVELS[min(verbose, len(_LEVELS) - 1)],
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
