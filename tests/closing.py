"""What is closed while another thread is in a call of it: how that call ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vhost_user.errors import Disconnected, PeerError


@contextmanager
def meanwhile(call: Callable[[], object]) -> Iterator[list[object]]:
    """Another thread, deep in `call` most likely when the block begins; how that ended, once the block has."""
    ended: list[object] = []

    def run() -> None:
        try:
            ended.append(call())
        except PeerError as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.05)
    try:
        yield ended
    finally:
        thread.join()


def require_closed_here(ended: list[object], name: str) -> None:
    """It ended because what errors call `name` was closed on this side."""
    (error,) = ended
    assert isinstance(error, Disconnected), error
    assert (error.field, error.limit) == (name, "was closed")
