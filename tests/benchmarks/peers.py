"""Front ends and back ends in C that do nothing but what is measured: `peers.c`, compiled where a benchmark runs."""

from __future__ import annotations

import array
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.floor import compiled

SOURCE = Path(__file__).with_name("peers.c")


class Peers:
    """The program, compiled into `directory`. subprocess.CalledProcessError where something fails."""

    def __init__(self, directory: Path) -> None:
        self._program = compiled(SOURCE, directory)

    @contextmanager
    def back_end(self) -> Iterator[socket.socket]:
        """The front end's end of a connection to one."""
        ours, theirs = socket.socketpair()
        with theirs, ours:
            fd = theirs.fileno()
            with subprocess.Popen([self._program, "back-end", str(fd)], pass_fds=[fd]) as process:
                theirs.close()
                try:
                    yield ours
                finally:
                    process.kill()

    def front_end(self, sock: socket.socket, fd: int, others: int, slot_size: int, rounds: int) -> list[float]:
        """Seconds of each round in which a back end that is new gets the slot of the file behind `others`, which it
        keeps, and gives it back."""
        words = map(str, (sock.fileno(), fd, others, slot_size, rounds))
        command = [self._program, "front-end", *words]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, pass_fds=[sock.fileno(), fd]).stdout
        return [nanoseconds / 1e9 for nanoseconds in array.array("q", output)]
