"""`virtio-mem conformance --profile soak` until it is told to end, by real signals, with nothing of it left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import counts
from tests.cli.rig import command
from tests.peers.processes import wait_until
from virtio_mem.conformance.explore import explore
from virtio_mem.conformance.targets.parse import parse_target
from virtio_mem.conformance.trial import open_database

PAGE = Path(__file__).parents[2] / "docs/conformance-targets.md"
(SHIM,) = re.findall(r"```python\n# shim.py\n(.*?)```", PAGE.read_text(), re.DOTALL)

MARK = "VIRTIO_MEM_SOAK_UNDER_TEST"
MOVES_OF_CHECKS = 2000
"""More requests than all checks together make of it."""

INT, TERM = signal.SIGINT, signal.SIGTERM


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
    """One that runs. `directory` is its TMPDIR, `moves` grows while its devices are asked."""

    process: subprocess.Popen[bytes]
    target: str
    directory: Path
    mark: str

    @property
    def moves(self) -> dict[str, int]:
        """Requests that each of its devices was asked, by the number of its process."""
        return {path.name: path.stat().st_size for path in (self.directory.parent / "moves").iterdir()}

    def wait_for_workers(self, number: int) -> None:
        """Until so many processes beside this one explore, or this one does: each has a device."""

        def busy() -> bool:
            assert self.process.poll() is None
            sizes = sorted(self.moves.values())
            return len(sizes) == number + 1 and (sizes[0] > 50 if number else sizes[0] > MOVES_OF_CHECKS)

        wait_until(busy, f"{number} workers are at work", 20)

    def ends(self) -> tuple[int, dict[str, Any]]:
        """Its status, and its report. Nothing of it is left."""
        status = self.process.wait(60)
        wait_until(lambda: not marked(self.mark), "all that it started has ended", 10)
        assert list(self.directory.iterdir()) == []
        return status, json.loads((self.directory.parent / "report.json").read_text())


Start = Callable[..., Soak]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Soak] = []
    for name in ("tmp", "moves"):
        (tmp_path / name).mkdir()

    def run(*options: str, program: str = SHIM, seed: int = 1) -> Soak:
        counted = program.replace(
            "def serve(device, do, asked):\n", f"{COUNTS}def serve(device, do, asked):\n    note(do)\n"
        )
        assert counted != program
        (tmp_path / "shim.py").write_text(f"MOVES = {str(tmp_path / 'moves')!r}\n{counted}")
        target = f"exec:{sys.executable} -S -E {tmp_path}/shim.py"
        words = command("conformance", target, "--profile", "soak", "--seed", str(seed), *options)
        mark = f"{os.getpid()}-{len(started)}-{time.monotonic_ns()}"
        environment = os.environ | {MARK: mark, "TMPDIR": str(tmp_path / "tmp")}
        process = subprocess.Popen(
            [*words, "--report", str(tmp_path / "report.json")],
            env=environment,
            process_group=0,
            stdout=subprocess.DEVNULL,
        )
        started.append(Soak(process, target, tmp_path / "tmp", mark))
        return started[-1]

    yield run
    for soak in started:
        for pid in marked(soak.mark):
            os.kill(pid, signal.SIGKILL)
        soak.process.wait()


COUNTS = """
import os
at = os.open(f"{MOVES}/{os.getpid()}", os.O_WRONLY | os.O_CREAT)
def note(do):
    os.write(at, b"." * (do == "request"))
"""


def one(soak: Soak, number: signal.Signals) -> None:
    soak.process.send_signal(number)


def all_at_once(soak: Soak, number: signal.Signals) -> None:
    """As a terminal does it, or a service manager."""
    os.killpg(soak.process.pid, number)


ENDINGS = [(0, TERM, one), (2, INT, all_at_once), (0, INT, one), (2, TERM, all_at_once), (2, TERM, one), (2, INT, one)]


@pytest.mark.parametrize(("workers", "number", "tell"), ENDINGS[: counts.SOAK_ENDINGS])
def test_a_signal_ends_it_with_what_was_found(
    start: Start, workers: int, number: signal.Signals, tell: Callable[[Soak, signal.Signals], None]
) -> None:
    soak = start(*(("--workers", str(workers)) if workers else ()))
    soak.wait_for_workers(workers)
    tell(soak, number)
    status, report = soak.ends()
    assert (status, report["counts"]["violated"], report["missing"], report["failures"]) == (0, 0, [], [])


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


finds = pytest.mark.parametrize("seed", range(counts.SOAKS_THAT_FIND))


@finds
def test_what_one_finds_ends_all(start: Start, seed: int) -> None:
    status, report = start("--workers", "2", program=SECOND_IS_WRONG, seed=seed).ends()
    assert (status, report["failures"]) == (1, [])
    assert {one["source"] for clause in report["clauses"] for one in clause["violations"]} == {"machine"}


@finds
def test_what_was_found_is_kept(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    kept = tmp_path / "failing"
    soak = start("--database", str(kept), program=WRONG, seed=seed)
    status, report = soak.ends()
    assert (status, report["failures"]) == (1, [])
    (found,) = (clause["violations"][0] for clause in report["clauses"] if clause["id"] == "DEP-BUSY-4")
    assert any(re.fullmatch(r"plug \d+ 11 -> BUSY", line) for line in found["lines"])
    monkeypatch.setattr("hypothesis.core.global_force_seed", None)
    with parse_target(soak.target) as target:
        again = explore(target, sequences=1, steps=50, rounds=1, database=open_database(str(kept)))
    assert "DEP-BUSY-4" in again.found


def test_a_second_signal_does_not_wait_for_the_device(start: Start) -> None:
    hangs = 'if do == "begin":\n'
    soak = start(program=SHIM.replace(hangs, f'{hangs}        note("request")\n        import time; time.sleep(60)\n'))
    wait_until(lambda: any(soak.moves.values()), "the device hangs", 20)
    one(soak, INT)
    one(soak, TERM)
    assert soak.process.wait(20) == 128 + TERM
    wait_until(lambda: not marked(soak.mark), "its device has ended, too", 10)
    assert list(soak.directory.iterdir()) == []


def test_a_worker_that_is_killed_is_no_judgement(start: Start) -> None:
    soak = start("--workers", "2")
    soak.wait_for_workers(2)
    os.kill(next(pid for pid, line in marked(soak.mark).items() if b"spawn_main" in line), signal.SIGKILL)
    status, report = soak.ends()
    assert status == 2
    assert [re.sub(r"\d", "N", failure) for failure in report["failures"]] == [
        "worker N was ended by SIGKILL, and did not tell what it found"
    ]


def test_workers_end_when_nobody_listens(start: Start) -> None:
    soak = start("--workers", "2")
    soak.wait_for_workers(2)
    soak.process.kill()
    wait_until(lambda: not marked(soak.mark), "they have ended", 10)
