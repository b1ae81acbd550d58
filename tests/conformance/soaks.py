"""Soaks as processes, by the command or by pytest: devices of programs that count, signals, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.peers.processes import LATE, wait_until

SHIM = (Path(__file__).parent / "targets/shim.py").read_text()

WRONG = SHIM.replace(
    "    def answer(",
    """    def answer(self, type_, addr, nb_blocks):
        return (BUSY, 0) if nb_blocks == 11 and type_ == PLUG else self.right(type_, addr, nb_blocks)

    def right(""",
)
"""No check plugs eleven blocks at once."""

SECOND_IS_WRONG = WRONG.replace(
    "    def answer(",
    """    import os
    for place in "first", "second", "later":
        try:
            os.mkdir(f"{MOVES}/../{place}")
            break
        except FileExistsError:
            pass

    def answer(""",
).replace("nb_blocks == 11", "self.place == 'second' and nb_blocks == 11")
"""One worker's device is; before it there is that of the checks."""

SERVE = "def serve(device: Device, do: str, asked: dict[str, Any]) -> dict[str, Any]:\n"
COUNTS = """
import os
at = os.open(f"{MOVES}/{os.getpid()}", os.O_WRONLY | os.O_CREAT)
def note(do):
    os.write(at, b"." * (do == "request"))
"""

MARK = "VIRTIO_MEM_SOAK_UNDER_TEST"
MOVES_OF_CHECKS = 3000
"""More requests than all checks together make of a device."""


_LONGEST = 4 * LATE
"""Seconds. To shrink a sequence takes three on an idle machine."""


def marked(mark: str) -> dict[int, bytes]:
    """The processes that were started with this mark, by whomever, and their command lines; zombies left out."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and f"{MARK}={mark}\0".encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_bytes()
        except OSError:
            continue
    return found


@dataclass
class Soak:
    """One that runs: `target` is what is judged, `temporary` its TMPDIR, `output` what it said."""

    process: subprocess.Popen[bytes]
    target: str
    directory: Path
    mark: str

    @property
    def temporary(self) -> Path:
        return self.directory / "tmp"

    @property
    def output(self) -> str:
        return (self.directory / "output").read_text()

    @property
    def moves(self) -> list[int]:
        """Requests that each of its devices was asked so far, least first."""
        return sorted(path.stat().st_size for path in (self.directory / "moves").iterdir())

    def wait_for(self, moves: Callable[[list[int]], bool]) -> None:
        """Until `moves` are so."""

        def come() -> bool:
            assert self.process.poll() is None, self.output
            return moves(self.moves)

        wait_until(come, "its devices are asked")

    def ends(self) -> int:
        """Its status, once it has ended. Nothing of it is left."""
        status = self.process.wait(_LONGEST)
        wait_until(lambda: not marked(self.mark), "all that it started has ended")
        assert list(self.temporary.glob("virtio-mem*")) == []
        return status


@contextmanager
def soak(
    directory: Path,
    command: Callable[[str], Sequence[str]],
    program: str = SHIM,
    environment: dict[str, str] | None = None,
) -> Iterator[Soak]:
    """What `command` makes of a target, which is `program`, counting. It is in a group of processes of its own."""
    for name in ("tmp", "moves"):
        (directory / name).mkdir(parents=True)
    counted = program.replace(SERVE, f"{COUNTS}{SERVE}    note(do)\n")
    assert counted != program
    (directory / "shim.py").write_text(f"MOVES = {str(directory / 'moves')!r}\n{counted}")
    target = f"exec:{sys.executable} -S -E {directory}/shim.py"
    # Where coverage is measured, shrinking takes ten times as long, and shows nothing that the others do not.
    unwanted = () if program == SHIM else ("COVERAGE_PROCESS_CONFIG",)
    inherited = {key: value for key, value in os.environ.items() if key not in unwanted}
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen(
            command(target),
            cwd=directory,
            env=inherited | {MARK: mark, "TMPDIR": str(directory / "tmp")} | (environment or {}),
            process_group=0,
            stdout=output,
            stderr=output,
        )
    try:
        yield Soak(process, target, directory, mark)
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def one(running: Soak, number: signal.Signals) -> None:
    """The process that was started."""
    running.process.send_signal(number)


def all_at_once(running: Soak, number: signal.Signals) -> None:
    """As a terminal does it, or a service manager."""
    os.killpg(running.process.pid, number)
