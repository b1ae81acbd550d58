"""Counts the skipped tests aloud, and fails the run for those that nobody expected.

`expected_skips.toml` lists what may be skipped and why. Where nobody would notice a skip (CI) or nothing justifies it
(root), one that is not in the list, or not allowed there, fails the run. A skipped test of a kernel feature that root
can always arrange fails a run by root whatever the list says, and one that needs what CI installs fails a run in CI: it
would pass for years without having run.
"""

from __future__ import annotations

import os
import tomllib
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.host import PROBES

EXPECTED_SKIPS = Path(__file__).parent / "expected_skips.toml"
CI_INSTALLS = frozenset({"needs_peers"})
ROOT_CAN_ARRANGE = frozenset(PROBES) - CI_INSTALLS


@dataclass(frozen=True)
class Skip:
    """One skipped test, or one module skipped whole."""

    test: str
    reason: str
    needs: frozenset[str] = frozenset()

    @property
    def lacked(self) -> frozenset[str]:
        """What it was skipped for: the need that the reason names, as conftest.py words it, or any of its needs."""
        return self.needs & {self.reason.partition(":")[0]} or self.needs


@dataclass(frozen=True)
class Expected:
    """An entry of the list. `test` and `reason` are shell patterns; `allowed_in_ci` also holds for root elsewhere."""

    why: str
    test: str = "*"
    reason: str = "*"
    allowed_in_ci: bool = False
    allowed_as_root: bool = False

    def __post_init__(self) -> None:
        if self.test == self.reason == "*":
            raise ValueError(f"an expected skip ({self.why}) needs a pattern in test or in reason")

    def covers(self, skip: Skip) -> bool:
        return fnmatchcase(skip.test, self.test) and fnmatchcase(skip.reason, self.reason)


def load_expected(path: Path = EXPECTED_SKIPS) -> list[Expected]:
    return [Expected(**entry) for entry in tomllib.loads(path.read_text()).get("skip", [])]


@dataclass(frozen=True)
class Judge:
    """Decides which skips fail a run."""

    expected: list[Expected]
    ci: bool
    root: bool

    def objection(self, skip: Skip) -> str | None:
        """Why this skip fails the run, or None."""
        if self.root and skip.lacked & ROOT_CAN_ARRANGE:
            return f"root may not skip what {', '.join(sorted(skip.lacked & ROOT_CAN_ARRANGE))}"
        if self.ci and skip.lacked & CI_INSTALLS:
            return f"CI may not skip what {', '.join(sorted(skip.lacked & CI_INSTALLS))}"
        if not (self.ci or self.root):
            return None
        entries = [entry for entry in self.expected if entry.covers(skip)]
        where = "in CI" if self.ci else "as root"
        if not entries:
            return f"not expected; if it is right {where}, list it in tests/expected_skips.toml"
        if not any(entry.allowed_in_ci or (entry.allowed_as_root and not self.ci) for entry in entries):
            return f"expected, but not {where}: {entries[0].why}"
        return None


class SkipLedger:
    """The pytest plugin: lists the skips at the end, and fails the run for those that the judge objects to."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.skips: list[Skip] = []

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report, frozenset(report.keywords) & frozenset(PROBES))

    @pytest.hookimpl
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report, frozenset())

    def _note(self, report: pytest.TestReport | pytest.CollectReport, needs: frozenset[str]) -> None:
        if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            self.skips.append(Skip(report.nodeid, reason, needs))

    def objections(self) -> dict[str, str]:
        """By node id."""
        found = ((skip.test, self._judge.objection(skip)) for skip in self.skips)
        return {test: objection for test, objection in found if objection}

    @pytest.hookimpl
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.objections() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.write_line
        write(f"skipped: {len(self.skips) or 'none'}")
        for reason, times in Counter(skip.reason for skip in self.skips).most_common():
            write(f"  {times} x {reason}")
        if objections := self.objections():
            terminalreporter.write_sep("=", "the run fails for these skips", red=True)
            for test, objection in objections.items():
                write(f"{test}: {objection}", red=True)


def ledger_for_this_run() -> SkipLedger:
    ci = os.environ.get("CI", "").lower() in {"1", "true", "yes"}
    return SkipLedger(Judge(load_expected(), ci=ci, root=os.geteuid() == 0))
