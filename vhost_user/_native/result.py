"""What each call into the C core has in common: its result, in which an error is a negated errno."""

from __future__ import annotations

import os


def error(result: int) -> OSError:
    """The error that a result says."""
    return OSError(-result, os.strerror(-result))


def checked(result: int) -> int:
    """The result, or the error that it says."""
    if result < 0:
        raise error(result)
    return result
