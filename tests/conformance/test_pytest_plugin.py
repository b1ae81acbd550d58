"""`pytest --virtio-mem-target=...` in whole runs of pytest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ("-p", "virtio_mem.conformance.pytest_plugin", "-p", "no:cacheprovider", "-p", "no:schemathesis")

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return lambda *arguments: pytester.runpytest_subprocess(*PLUGINS, *arguments)


def test_a_test_for_each_clause(run: Run) -> None:
    result = run("--virtio-mem-target=self:anonymous", "-v", "-k", "MEM-PLUG or RING-CHAIN-1", "-rs")
    result.stdout.fnmatch_lines(["virtio-mem self:anonymous::MEM-PLUG-3 PASSED*"])
    result.stdout.fnmatch_lines(["*RING-CHAIN-1 SKIPPED*", "SKIPPED*not testable here: self can't: CHAINS"])
    assert result.parseoutcomes()["passed"] >= 8
    assert result.ret == 0


WRONG = """
import virtio_mem.conformance.pytest_items as items
import virtio_mem.conformance.targets.parse as parse
from tests.conformance.wrong import FAULTS
from virtio_mem.conformance.kit import Evidence, Verdict
from virtio_mem.conformance.trial import Trial

def explore(trial, target, run):
    assert (trial.seed, trial.database) in {(8, "here"), (9, "here")}
    lines = "wish region_size=64 block_size=1 requested_size=0 node_id=none", "begin -> agreed 0x0", "plug 0 4 -> ERROR"
    run.evidence.append(Evidence("DEP-NACK-2", "machine", Verdict.VIOLATED, "ERROR", "NACK", lines))

Trial.explore = explore
items.parse_target = lambda name: FAULTS[name].target()
parse.check_target = lambda name: None
"""


def test_a_violation_is_a_failure_in_the_kit_s_words(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makeconftest(WRONG)
    machines = "--virtio-mem-seed=8", "--virtio-mem-machines=2", "--virtio-mem-database=here"
    target = "--virtio-mem-target=error-beyond-the-target"
    result = run(target, *machines, "-k", "DEP-NACK-1 or MEM-PLUG-4 or machine")
    result.assert_outcomes(passed=1, failed=3)
    result.stdout.fnmatch_lines(
        ["*DEP-NACK-1 is violated, as * found", "*was: *ERROR*", "*should be: NACK", "*plug * -> ERROR*"]
    )
    result.stdout.fnmatch_lines(["*DEP-NACK-2 is violated, as machine found", "*plug 0 4 -> ERROR*[[]....]*"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_a_target_that_is_not_there_is_one_failure(run: Run) -> None:
    result = run("--virtio-mem-target=vhost-user:/nowhere/at/all", "-k", "MEM-PLUG", "-rs")
    result.assert_outcomes(failed=1, skipped=7)
    result.stdout.fnmatch_lines(["*not judged: *nowhere*", "SKIPPED*not judged: the target could not be opened*"])


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("slef", "target=slef: its kind is one of self, ring,"),
        ("exec:/nowhere/at/all", "exec=/nowhere/at/all: can't be run"),
        ("exec:'", "exec=': can't be split into words"),
        ("qemu,memory=paper", "memory=paper"),
        ("vhost-user:/tmp/sock,apj=/tmp/api", "target=apj=/tmp/api: the options of vhost-user are"),
        ("vhost-user:,api=x", "target=vhost-user: vhost-user alone does not say which"),
    ],
)
def test_a_mistyped_target_is_a_mistake_of_the_command_line(run: Run, target: str, error: str) -> None:
    result = run(f"--virtio-mem-target={target}")
    assert result.ret is pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --virtio-mem-target={target}: *{error}*"])


@pytest.mark.long
def test_workers_share_the_clauses(run: Run) -> None:
    result = run("--virtio-mem-target=self:anonymous", "-k", "MEM-STATE", "-n", "2")
    assert result.parseoutcomes()["passed"] >= 8
    assert result.ret == 0


def test_without_the_option_it_adds_nothing(run: Run) -> None:
    assert run().ret is pytest.ExitCode.NO_TESTS_COLLECTED


def test_it_costs_other_runs_nothing() -> None:
    program = "import sys, virtio_mem.conformance.pytest_plugin; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", program], text=True, cwd=ROOT).split()
    assert not {name for name in loaded if name.startswith(("hypothesis", "rich", "virtio_mem.device", "cffi"))}
