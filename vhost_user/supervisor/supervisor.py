"""The supervisor: it starts the worker, and starts another when that one dies."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from vhost_user.backend.loop import EventLoop

if TYPE_CHECKING:
    from subprocess import Popen

Start = Callable[[socket.socket], int]
"""Starts a worker whose end of the control socket this is, and returns the process's id; see `spawn()`."""


class Supervisor:
    """Keeps a worker running for the front ends that come to `listeners`.

    `command` starts a worker; or it is a function that does, for workers that are forked. `listeners` are unix stream
    sockets that listen already, by the names under which the worker attaches devices; they are taken over, and their
    files are removed in the end. `kept_bytes` and `kept_fds` are what the first worker finds in `Worker.bytes` and
    `Worker.fds`; the descriptors are duplicated. `on_ready` is called once, when the first worker says `ready()`.
    """

    def __init__(
        self,
        command: Sequence[str] | Start,
        listeners: Mapping[str, socket.socket],
        kept_bytes: Mapping[str, bytes] | None = None,
        kept_fds: Mapping[str, int] | None = None,
        *,
        on_ready: Callable[[], object] = lambda: None,
    ) -> None:
        self.loop = EventLoop()
        raise NotImplementedError

    def add_child(self, child: Popen[bytes], on_exit: Callable[[int], object]) -> None:
        """Have `on_exit` called with the status that `child` ended with, negative for a signal. It isn't ended by us."""
        raise NotImplementedError

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or `stop()`. SIGHUP replaces the worker. For the main thread."""
        raise NotImplementedError

    def upgrade(self) -> None:
        """Have a new worker take the old one's place, between two messages: no front end notices."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the worker, then `run()`."""
        raise NotImplementedError
