"""The limits, measured in C: `floor.c`, compiled where a benchmark runs."""

from __future__ import annotations

import array
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.measure import settle
from tests.benchmarks.processors import on_processor
from vhost_user.vring import SplitLayout

SOURCE = Path(__file__).with_name("floor.c")


class Ring(NamedTuple):
    """A split ring in the file `ram`; its indices are at `start`. There are `chains` requests in turn, the first one's
    chain at descriptor `head`, each of two descriptors."""

    ram: int
    layout: SplitLayout
    start: int
    head: int = 0
    chains: int = 1


class Echo(NamedTuple):
    """A process that answers signals of the eventfd `kick` by signals of `call`."""

    pid: int
    kick: int
    call: int


def compiled(source: Path, directory: Path) -> str:
    """The program that a file is the source of, made in `directory`."""
    program = str(directory / source.stem)
    subprocess.run(["cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, str(source)], check=True)
    return program


@contextmanager
def _eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


class Floor:
    """The program, compiled into `directory`. subprocess.CalledProcessError where something fails."""

    def __init__(self, directory: Path) -> None:
        self._program = compiled(SOURCE, directory)

    @contextmanager
    def echo(self) -> Iterator[Echo]:
        """A process that answers signals, and does nothing else."""
        with (
            _eventfd() as kick,
            _eventfd() as call,
            subprocess.Popen([self._program, "echo", str(kick), str(call)], pass_fds=[kick, call]) as process,
        ):
            try:
                yield Echo(process.pid, kick, call)
            finally:
                process.kill()

    def trips(self, kick: int, call: int, times: int, ring: Ring | None = None) -> list[float]:
        """Seconds from each signal to its answer, in a process of its own; with `ring`, of a request in it."""
        words, fds = [kick, call, times], [kick, call]
        if ring is not None:
            layout = ring.layout
            words += [ring.ram, layout.avail, layout.used, layout.size, ring.start, ring.head, ring.chains]
            fds.append(ring.ram)
        found = array.array("q", self._run("trips", words, fds))
        return [nanoseconds / 1e9 for nanoseconds in found]

    def punch(self, fd: int, block_size: int, times: int) -> float:
        """Seconds to punch `times` holes, from the file's beginning on."""
        return int(self._run("punch", [fd, block_size, times, -1], [fd])) / 1e9

    def kicked(self, what: str, fd: int, block_size: int, times: int, processor: int) -> float:
        """Seconds to "punch" or to "populate" as many ranges, one call each, for a process on this processor that is
        woken up for it, as a device is by its driver: what comes after a sleep is slower."""
        with _eventfd() as kick:
            command = [self._program, what, *map(str, (fd, block_size, times, kick))]
            with on_processor(processor):
                process = subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[fd, kick])
            with process:
                try:
                    settle(time.perf_counter())
                    os.eventfd_write(kick, 1)
                    printed, _ = process.communicate()
                finally:
                    process.kill()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        return int(printed) / 1e9

    def walk(self, bits: bytes) -> tuple[float, int]:
        """Seconds to find all runs of set bits, and how many there are."""
        with tempfile.TemporaryFile() as file:
            file.write(bits)
            file.flush()
            nanoseconds, runs, count = map(int, self._run("walk", [file.fileno(), len(bits)], [file.fileno()]).split())
        assert count == int.from_bytes(bits, "little").bit_count()
        return nanoseconds / 1e9, runs

    def save(self, size: int, directory: Path) -> float:
        """Seconds to write so many bytes to a file in `directory`, and to have them on its disk."""
        with tempfile.TemporaryFile(dir=directory) as file:
            return int(self._run("save", [file.fileno(), size], [file.fileno()])) / 1e9

    def slots(self, fd: int, size: int, times: int, processor: int, look: int = 0) -> list[float]:
        """Seconds of each round in which a process on `processor` gets a file and maps so much of it, and unmaps it
        again. Who waits for the other one looks for `look` nanoseconds before it sleeps."""
        found = array.array("q", self._run("slots", [fd, size, times, processor, look], [fd]))
        return [nanoseconds / 1e9 for nanoseconds in found]

    def _run(self, what: str, words: Sequence[int], fds: Sequence[int]) -> bytes:
        command = [self._program, what, *map(str, words)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, pass_fds=fds).stdout
