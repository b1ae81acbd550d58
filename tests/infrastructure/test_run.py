"""Whole runs of pytest with this project's plugin: what they print, refuse and put back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import counts

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ("-p", "tests.conftest", "-p", "no:cacheprovider", "-p", "no:schemathesis")


@pytest.fixture(scope="module")
def forking() -> Iterator[subprocess.Popen[str]]:
    """A process that runs pytest in forks of itself: forking.py."""
    command = [sys.executable, "-m", "tests.infrastructure.forking"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        yield process


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, forking: subprocess.Popen[str]) -> Run:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("VIRTIO_MEM_TIER", raising=False)
    monkeypatch.delenv("CI", raising=False)
    return Run(pytester, forking)


@dataclass
class Run:
    pytester: pytest.Pytester
    forking: subprocess.Popen[str]

    def __call__(self, source: str, *arguments: str) -> pytest.RunResult:
        self.pytester.makepyfile(source)
        directory, output = str(self.pytester.path), str(self.pytester.path / "printed")
        arguments = (*PLUGINS, f"--basetemp={directory}/runpytest", *arguments)
        assert self.forking.stdin is not None
        assert self.forking.stdout is not None
        wish = {"arguments": arguments, "directory": directory, "environment": dict(os.environ), "output": output}
        start = time.monotonic()
        self.forking.stdin.write(json.dumps(wish) + "\n")
        self.forking.stdin.flush()
        status = int(self.forking.stdout.readline())
        printed = Path(output).read_text().splitlines()
        sys.stdout.write("\n".join(printed))  # where the test fails, pytest shows it
        return pytest.RunResult(status, printed, [], time.monotonic() - start)


def test_header_holds_tier_seed_and_counts(run: Run) -> None:
    result = run("def test_nothing(): pass")
    result.stdout.re_match_lines([r"tier: quick", r"seed: \d+ \(repeat", r"REQUESTS_PER_BACKING = [\d,]+$"])
    result.stdout.re_match_lines([r"skipped: none", r"tier: quick", r"seed: \d+"])


def test_seed_repeats_a_run(run: Run) -> None:
    source = """
        from hypothesis import given, settings, strategies as st
        seen = []
        @settings(max_examples=20, database=None)
        @given(st.integers())
        def test_property(value): seen.append(value)
        def test_numbers(rng, figure): figure("drawn", f"{rng.random()} {seen}")
    """

    def drawn(seed: int) -> str:
        return run(source, f"--hypothesis-seed={seed}").stdout.str().split("drawn: ")[1].splitlines()[0]

    assert drawn(5) == drawn(5) != drawn(6)


def test_soak_repeats_its_counts_at_the_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTIO_MEM_TIER", "soak")
    result = run("def test_figure(figure): figure('pages given back', 512)")
    result.stdout.fnmatch_lines(["*= figures =*", "REQUESTS_PER_BACKING: 100,000", "pages given back: 512"])


def test_what_takes_long_is_left_to_ci_unless_it_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import pytest\n@pytest.mark.long\ndef test_long(): pass\ndef test_short(): pass"
    name = "test_what_takes_long_is_left_to_ci_unless_it_is_named.py"
    left = run(source)
    left.assert_outcomes(passed=1, deselected=1)
    left.stdout.fnmatch_lines(["tests that are left to CI, as they take long: 1"])
    run(source, f"{name}::test_long").assert_outcomes(passed=1)
    monkeypatch.setenv("VIRTIO_MEM_TIER", "ci")
    run(source).assert_outcomes(passed=2)


def test_unexpected_skip_fails_a_run_in_ci(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    result = run("import pytest\ndef test_skipped(): pytest.skip('no reason')\ndef test_passed(): pass")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["skipped: 1", "  1 x no reason", "*the run fails*", "*::test_skipped: not expected; *"]
    )


def test_module_skipped_whole_counts_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    result = run(
        "import pytest\npytest.skip('not here', allow_module_level=True)\ndef test_unreached(): pass",
        "--continue-on-collection-errors",
    )
    assert result.ret != pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["skipped: 1", "  1 x not here", "*the run fails*"])


def test_expected_failure_is_no_skip(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    result = run("import pytest\n@pytest.mark.xfail\ndef test_known(): assert 0")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["skipped: none"])


def test_missing_feature_is_skipped_with_its_reason(run: Run) -> None:
    result = run("""
        import pytest
        from tests import host
        host.PROBES["needs_ksm"] = lambda: "not built in"
        @pytest.mark.needs_ksm
        def test_merging(): assert 0, "reached"
    """)
    result.stdout.fnmatch_lines(["skipped: 1", "  1 x needs_ksm: not built in"])
    assert (result.ret != pytest.ExitCode.OK) == (os.geteuid() == 0)


@pytest.mark.parametrize("ci", ["true", "false"])
def test_peers_may_be_missing_but_not_in_ci(run: Run, monkeypatch: pytest.MonkeyPatch, ci: str) -> None:
    monkeypatch.setenv("CI", ci)
    result = run("""
        import pytest
        from tests import host
        host.PROBES["needs_peers"] = lambda: "run scripts/peers"
        @pytest.mark.needs_peers
        def test_daemon(): assert 0, "reached"
        def test_passed(): pass
    """)
    result.stdout.fnmatch_lines(["skipped: 1", "  1 x needs_peers: run scripts/peers"])
    assert (result.ret != pytest.ExitCode.OK) == (ci == "true")


LEAKS = {
    "fd": ("kept.append(os.dup(0))", "1 more open: "),
    "memfd": ("kept.append(os.memfd_create('zone'))", "1 more open: /memfd:zone"),
    "mapping": (
        "fd = os.memfd_create('zone'); os.ftruncate(fd, 8192); kept.append(mmap.mmap(fd, 8192)); os.close(fd)",
        "8192",
    ),
    "anonymous": ("kept.append(mmap.mmap(-1, 4096))", "4096 bytes more mapped: /dev/zero"),
}


def test_each_leak_fails_its_test(run: Run) -> None:
    tests = [f"def test_{name}(): {body}\ndef test_after_{name}(): pass" for name, (body, _) in LEAKS.items()]
    result = run("\n".join(["import mmap, os", "kept = []", *tests]))
    result.assert_outcomes(passed=2 * len(LEAKS), errors=len(LEAKS))
    for name, (_, leak) in LEAKS.items():
        result.stdout.fnmatch_lines([f"*ERROR at teardown of test_{name} *", "*the test leaks:", f"*{leak}*"])


def test_garbage_is_no_leak(run: Run) -> None:
    result = run("""
        import socket
        class Loop: pass
        def test_cycle():
            loop = Loop()
            loop.me, loop.fd = loop, open("/dev/null")
            loop.fd.close()
            pair = Loop()
            pair.me, pair.mapping = pair, __import__("mmap").mmap(-1, 4096)
    """)
    result.assert_outcomes(passed=1)


WATCHING = """
    from pathlib import Path
    import os, signal
    from tests import host
    setting = Path(__file__).with_name("setting")
    setting.write_text("5")
    host.WATCHED = (str(setting),)
    host.settings_lock = host.SettingsLock(setting.parent)  # other runs have the machine's
"""


def test_forgotten_setting_is_put_back_and_fails_the_run(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makeconftest(WATCHING)
    result = run("from conftest import *\ndef test_careless(): setting.write_text('6')")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*setting was 5 before the run and 6 after it"])
    assert (pytester.path / "setting").read_text() == "5"


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGINT"][: counts.ENDING_SIGNALS])
def test_terminated_run_puts_settings_back(run: Run, pytester: pytest.Pytester, number: str) -> None:
    pytester.makeconftest(WATCHING)
    result = run(f"""
        from conftest import *
        def test_terminated():
            with host.changed(setting, 6):
                assert setting.read_text() == "6"
                os.kill(os.getpid(), signal.{number})
                signal.pause()
    """)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert (pytester.path / "setting").read_text() == "5"
