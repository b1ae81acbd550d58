"""Mutants of the rules in C: a score, and those that nobody noticed. The other half of `scripts/mutate`.

    python -m tests.device.rules_mutants DIRECTORY [PROCESSES]

DIRECTORY has the mutants, as universalmutator makes them of virtio_mem/csrc/rules.c: whole files. Each is compiled; one
that doesn't compile, or whose object code is that of the original or of another one, is none. tests/device is collected
once. Each mutant is met by a fork of that process, in which `virtio_mem._native` calls the mutant, up to the first test
that fails; the next one meets that test first. Exit status 1 as for mutants.py.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import io
import mmap
import os
import resource
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from itertools import zip_longest
from pathlib import Path

import pytest

from tests.device.mutants import LEAST_SCORE, Change, explained, say

SOURCE = Path("virtio_mem/csrc/rules.c")

FIRST = ("test_rules.py", "test_decide.py")
"""The files whose tests notice most, and are quick."""

LONGEST = 10
"""Seconds of processor time for a test, ten times what the slowest takes. One that takes longer runs in a circle."""

MEMORY = 5 << 29
"""Bytes of address space: one that collects what it finds in a circle is ended before the machine is out of memory."""

OPTIONS = [
    "-s",
    "-n",
    "0",
    "-p",
    "no:faulthandler",
    "--hypothesis-seed=0",
    "-o",
    "cache_dir=.cache/pytest-mutants",
    "tests/device",
]

OUTCOMES = ("killed with its process", "survived", "killed", "timeout", "crash")


class Workshop:
    """Compiles mutants. `directory` is for what comes of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._include = [f"-I{SOURCE.parent}", f"-I{sysconfig.get_paths()['include']}"]
        emit = f"from virtio_mem._build import ffibuilder; ffibuilder.emit_c_code({str(directory / 'seam.c')!r})"
        subprocess.run([sys.executable, "-c", emit], check=True, stdout=subprocess.DEVNULL)
        others = [path for path in sorted(SOURCE.parent.glob("*.c")) if path != SOURCE]
        self._unchanged = [self._object(path) for path in (directory / "seam.c", *others)]

    def _gcc(self, *arguments: object) -> list[str]:
        return ["gcc", "-std=gnu11", "-O2", "-fPIC", "-w", *self._include, *map(str, arguments)]

    def _object(self, source: Path) -> Path:
        made = self.directory / f"{source.stem}.o"
        subprocess.run(self._gcc("-c", source, "-o", made), check=True)
        return made

    def compile(self, text: bytes) -> Path | None:
        """An object file, known by what is in it; None for what is no C."""
        made = self.directory / f"{hashlib.sha256(text).hexdigest()}.tmp"
        # By standard input, so that no object has the name of its source.
        command = self._gcc("-xc", "-c", "-", "-o", made)
        if subprocess.run(command, input=text, stderr=subprocess.DEVNULL, check=False).returncode:
            return None
        return made.rename(self.directory / f"{hashlib.sha256(made.read_bytes()).hexdigest()}.o")

    def link(self, rules: Path) -> Path:
        """The extension module."""
        module = rules.with_suffix(".so")
        subprocess.run(self._gcc("-shared", *self._unchanged, rules, "-o", module), check=True)
        return module


def mutants(directory: Path, workshop: Workshop, processes: int) -> Iterator[tuple[Change, Path]]:
    """Those that differ from each other and from the original, and their objects."""
    original = SOURCE.read_text()
    paths = sorted(directory.glob("*.c"), key=lambda path: int(path.name.split(".")[-2]))
    texts = [path.read_text() for path in paths]
    with ThreadPoolExecutor(processes) as pool:
        objects = pool.map(workshop.compile, (text.encode() for text in texts))
    seen = {None, workshop.compile(original.encode())}
    for text, made in zip(texts, objects, strict=True):
        if made is not None and made not in seen:
            seen.add(made)
            yield change_of(original, text), made


def change_of(original: str, mutant: str) -> Change:
    """The lines that are others; with what is only put in, the line before it and the one behind."""
    lines = list(difflib.ndiff(original.splitlines(), mutant.splitlines()))
    was, now = ([line[2:].strip() for line in lines if line.startswith(f"{sign} ")] for sign in "-+")
    if not was:
        at = next(at for at, line in enumerate(lines) if line.startswith("+ "))
        before, after = lines[at - 1][2:].strip(), lines[at + len(now)][2:].strip()
        was, now = [before, after], [before, *now, after]
    return Change(str(SOURCE), " ".join(was), " ".join(now))


class Judge:
    """For pytest: what it collected is run against each of `objects`; then `outcomes` has what became of them."""

    def __init__(self, objects: list[Path], workshop: Workshop, processes: int) -> None:
        self._objects = objects
        self._workshop = workshop
        self._processes = processes
        # Shared with the processes that are forked: what became of each mutant, and which test a process is at.
        self._codes = mmap.mmap(-1, len(objects))
        self._at = mmap.mmap(-1, 4 * processes)
        self.outcomes: list[str] = []

    def pytest_sessionstart(self) -> None:
        from hypothesis import Phase, settings  # noqa: PLC0415 - pytest is to see that it is imported

        # What fails need not be made smaller.
        settings.register_profile("unshrunk", settings(), phases=[Phase.explicit, Phase.generate])
        settings.load_profile("unshrunk")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        # Here first, with the rules as they are: what is only made once is made then, and no leak of a mutant's.
        run(session, session.items)
        if session.testsfailed:
            return True
        todo, fill = os.pipe()
        os.write(fill, b"".join(at.to_bytes(2, "big") for at in range(len(self._objects))))
        os.close(fill)
        for number in range(self._processes):
            if os.fork() == 0:
                try:
                    self._work(session, number, todo)
                finally:
                    os._exit(0)
        for _ in range(self._processes):
            os.wait()
        os.close(todo)
        self.outcomes = [OUTCOMES[code] for code in self._codes[:]]
        return True

    def _work(self, session: pytest.Session, number: int, todo: int) -> None:
        """What one of the processes does: the next mutant, until there is none."""
        order = sorted(session.items, key=lambda item: item.path.name not in FIRST)
        while word := os.read(todo, 2):
            mutant = int.from_bytes(word, "big")
            module = self._workshop.link(self._objects[mutant])
            pid = os.fork()
            if pid == 0:
                self._meet(session, module, order, number)
            _, status = os.waitpid(pid, 0)
            outcome = "crash"
            if os.WIFEXITED(status):
                outcome = "killed" if os.WEXITSTATUS(status) else "survived"
            elif os.WTERMSIG(status) == signal.SIGPROF:
                outcome = "timeout"
            self._codes[mutant] = OUTCOMES.index(outcome)
            if outcome != "survived":
                order.insert(0, order.pop(int.from_bytes(self._at[4 * number : 4 * number + 4], "big")))
            module.unlink()

    def _meet(self, session: pytest.Session, module: Path, order: list[pytest.Item], number: int) -> None:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            null = os.open(os.devnull, os.O_RDWR)
            for fd in range(3):
                os.dup2(null, fd)
            call_instead(module)
            run(session, order, lambda at: self._begin(number, at))
            status = bool(session.testsfailed)
        finally:
            os._exit(status)

    def _begin(self, number: int, at: int) -> None:
        self._at[4 * number : 4 * number + 4] = at.to_bytes(4, "big")
        signal.setitimer(signal.ITIMER_PROF, LONGEST)


def run(session: pytest.Session, items: list[pytest.Item], begin: Callable[[int], None] = lambda _: None) -> None:
    """Run tests up to the first that fails; `begin` is called before each, with its place among them."""
    for at, (item, following) in enumerate(zip_longest(items, items[1:])):
        begin(at)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return


def call_instead(module: Path) -> None:
    """Have `virtio_mem._native` call the rules in `module`."""
    spec = importlib.util.spec_from_file_location("virtio_mem._core", module)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["virtio_mem._core"] = core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    importlib.reload(sys.modules["virtio_mem._native"])


def report(directory: Path, processes: int) -> list[str]:
    """Say all there is to say; what is not as it should be is returned, in words."""
    with tempfile.TemporaryDirectory() as name:
        workshop = Workshop(Path(name))
        found = list(mutants(directory, workshop, processes))
        judge = Judge([rules for _, rules in found], workshop, processes)
        output = io.StringIO()
        with redirect_stdout(output):
            # A test whose process a mutant killed may have left kernel settings changed. They are put back.
            pytest.main(OPTIONS, plugins=[judge])
    if not judge.outcomes:
        return [output.getvalue(), "the tests fail without a change"]
    changes, outcomes = [change for change, _ in found], judge.outcomes
    counted = Counter(outcomes)
    survivors = {change for change, outcome in zip(changes, outcomes, strict=True) if outcome == "survived"}
    score = 100 * (1 - counted["survived"] / len(outcomes))
    say(f"{len(outcomes)} mutants of the rules: {', '.join(f'{n} {outcome}' for outcome, n in counted.most_common())}")
    say(f"score: {score:.1f} percent")
    reasons = explained("rules_survivor")
    wrong = [] if score >= LEAST_SCORE else [f"the score of the rules is below {LEAST_SCORE:g} percent"]
    for change in sorted(survivors):
        reason = reasons.get(change)
        say(f"\nsurvived: {SOURCE.name}\n- {change.was}\n+ {change.now}\n  {reason or 'NOT EXPLAINED'}")
        wrong += [] if reason else [f"not explained: {change.now}"]
    return wrong + [f"explained for nothing: {change.now}" for change in reasons if change not in survivors]


if __name__ == "__main__":
    problems = report(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else os.cpu_count() or 1)
    say("\n".join(["", *problems]))
    sys.exit(bool(problems))
