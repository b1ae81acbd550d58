"""Mutants of the rules in C: a score, and those that nobody noticed. The other half of `scripts/mutate`.

    python -m tests.device.rules_mutants DIRECTORY [PROCESSES]

DIRECTORY has the mutants, as universalmutator makes them of virtio_mem/csrc/rules.c: whole files. Each is compiled; one
that doesn't compile, or whose object code is that of the original or of another one, is none. The tests run in a fork
of this process, in which the mutant is `virtio_mem._core`, and stop at the first that fails. Exit status 1 as for
mutants.py.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import resource
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.device.mutants import LEAST_SCORE, Change, explained, say

SOURCE = Path("virtio_mem/csrc/rules.c")

TESTS = ("tests/device/test_rules.py", "tests/device/test_decide.py", "tests/device")
"""What is quick and notices most comes first; the last one is all there is, and repeats the others for what is left."""

LONGEST = 120
"""Seconds for each of them. One that takes longer runs in a circle."""

MEMORY = 5 << 29
"""Bytes of address space: one that collects what it finds in a circle is ended before the machine is out of memory."""

OPTIONS = ["-x", "-q", "-n", "0", "--hypothesis-seed=0"]


class Unshrunk:
    """For pytest: what fails need not be made smaller."""

    def pytest_sessionstart(self) -> None:
        from hypothesis import Phase, settings  # noqa: PLC0415 - pytest is to see that it is imported

        settings.register_profile("unshrunk", settings(), phases=[Phase.explicit, Phase.generate])
        settings.load_profile("unshrunk")


class Workshop:
    """Compiles mutants. `directory` is for what comes of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._include = [f"-I{SOURCE.parent}", f"-I{sysconfig.get_paths()['include']}"]
        # Elsewhere, as the package is to be imported with a mutant in it.
        emit = f"from virtio_mem._build import ffibuilder; ffibuilder.emit_c_code({str(directory / 'seam.c')!r})"
        subprocess.run([sys.executable, "-c", emit], check=True, stdout=subprocess.DEVNULL)
        self._seam = directory / "seam.o"
        subprocess.run(self._gcc("-c", directory / "seam.c", "-o", self._seam), check=True)

    def _gcc(self, *arguments: object) -> list[str]:
        return ["gcc", "-std=gnu11", "-O2", "-fPIC", "-w", *self._include, *map(str, arguments)]

    def compile(self, text: bytes) -> Path | None:
        """An object file, known by what is in it; None for what is no C."""
        made = self.directory / "rules.o"
        # By standard input, so that no object has the name of its source.
        done = subprocess.run(
            self._gcc("-xc", "-c", "-", "-o", made), input=text, stderr=subprocess.DEVNULL, check=False
        )
        if done.returncode:
            return None
        return made.rename(self.directory / f"{hashlib.sha256(made.read_bytes()).hexdigest()}.o")

    def link(self, rules: Path) -> Path:
        """The extension module."""
        module = rules.with_suffix(".so")
        subprocess.run(self._gcc("-shared", self._seam, rules, "-o", module), check=True)
        return module


def mutants(directory: Path, workshop: Workshop) -> Iterator[tuple[Change, Path]]:
    """Those that differ from each other and from the original, and their objects."""
    original = SOURCE.read_text()
    seen = {workshop.compile(original.encode())}
    for path in sorted(directory.glob("*.c"), key=lambda path: int(path.name.split(".")[-2])):
        made = workshop.compile(path.read_bytes())
        if made is not None and made not in seen:
            seen.add(made)
            yield change_of(original, path.read_text()), made


def change_of(original: str, mutant: str) -> Change:
    """The lines that are others."""
    lines = list(difflib.ndiff(original.splitlines(), mutant.splitlines()))
    was, now = (" ".join(line[2:].strip() for line in lines if line.startswith(f"{sign} ")) for sign in "-+")
    return Change(str(SOURCE), was, now)


def test(module: Path, tests: str) -> int:
    """Run tests against a mutant, in a process of their own; its wait status, -1 where it had to be ended."""
    assert "virtio_mem" not in sys.modules
    pid = os.fork()
    if pid == 0:
        _run(module, tests)
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


def _run(module: Path, tests: str) -> None:
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        spec = importlib.util.spec_from_file_location("virtio_mem._core", module)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["virtio_mem._core"] = core = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(core)
        cache = f"cache_dir={module.parent}/cache.{os.getpid()}"
        status = pytest.main([*OPTIONS, "-o", cache, tests], plugins=[Unshrunk()])
    finally:
        os._exit(min(status, 1))


def outcome_of(module: Path) -> str:
    """What became of a mutant."""
    for tests in TESTS:
        if status := test(module, tests):
            return "timeout" if status < 0 else "killed" if os.WIFEXITED(status) else "crash"
    return "survived"


def report(directory: Path, processes: int) -> list[str]:
    """Say all there is to say; what is not as it should be is returned, in words."""
    with tempfile.TemporaryDirectory() as name:
        workshop = Workshop(Path(name))
        found = list(mutants(directory, workshop))
        original = workshop.compile(SOURCE.read_bytes())
        assert original is not None
        if outcome_of(workshop.link(original)) != "survived":
            return ["the tests fail without a change"]
        outcomes = list(_shared(found, workshop, processes))
    counted = Counter(outcomes)
    survivors = {change for (change, _), outcome in zip(found, outcomes, strict=True) if outcome == "survived"}
    score = 100 * (1 - counted["survived"] / len(found))
    say(f"{len(found)} mutants of the rules: {', '.join(f'{n} {outcome}' for outcome, n in counted.most_common())}")
    say(f"score: {score:.1f} percent")
    reasons = explained("rules_survivor")
    wrong = [] if score >= LEAST_SCORE else [f"the score of the rules is below {LEAST_SCORE:g} percent"]
    for change in sorted(survivors):
        reason = reasons.get(change)
        say(f"\nsurvived: {SOURCE.name}\n- {change.was}\n+ {change.now}\n  {reason or 'NOT EXPLAINED'}")
        wrong += [] if reason else [f"not explained: {change.now}"]
    return wrong + [f"explained for nothing: {change.now}" for change in reasons if change not in survivors]


def _shared(found: list[tuple[Change, Path]], workshop: Workshop, processes: int) -> Iterator[str]:
    """What became of each, by this many processes of which each takes every so-manieth."""
    pipes = []
    for part in range(processes):
        reader, writer = os.pipe()
        if os.fork() == 0:
            with os.fdopen(writer, "w", buffering=1) as lines:
                for _, rules in found[part::processes]:
                    lines.write(f"{outcome_of(workshop.link(rules))}\n")
            os._exit(0)
        os.close(writer)
        pipes.append(os.fdopen(reader))
    for at in range(len(found)):
        yield pipes[at % processes].readline().strip() or "killed with its process"
    for pipe in pipes:
        pipe.close()
        os.wait()


if __name__ == "__main__":
    problems = report(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else os.cpu_count() or 1)
    say("\n".join(["", *problems]))
    sys.exit(bool(problems))
