"""What every test gets: the run's tier and seed, kernel settings that are put back, and a look for leaks.

Fixtures
    rng         random numbers that the run's seed repeats
    figure      figure(name, value): a line of the run's closing report
    hugepages   hugepages(page_size, count): exactly `count` huge pages are free
    ksm         KSM runs, fast; its counters
    shmem_thp   shmem_thp(mode): transparent huge pages of shared memory as `mode` says
    no_leaks    for every test, asked or not: nothing more is open or mapped after it than before
"""

from __future__ import annotations

import gc
import os
import random
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import counts, host
from tests.leaks import Holdings
from tests.skips import ledger_for_this_run
from vhost_user.event import Event

pytest_plugins = ["pytester"]

FIGURES = pytest.StashKey[dict[str, object]]()
GUARD = pytest.StashKey[host.SettingsGuard]()
CHANGED_SETTINGS = pytest.StashKey[list[str]]()
FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Before Hypothesis and pytest-timeout read their options.
    if config.option.hypothesis_seed in (None, "random"):
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))
    if config.option.timeout is None:
        config.option.timeout = counts.TEST_TIMEOUT_SECONDS
    settings.register_profile(
        counts.TIER,
        max_examples=counts.HYPOTHESIS_EXAMPLES,
        stateful_step_count=counts.HYPOTHESIS_STATEFUL_STEPS,
        deadline=None,  # other processes share the machine: time is pytest-timeout's business
        suppress_health_check=[HealthCheck.too_slow],  # for the same reason
        derandomize=False,  # a new seed per run, printed, finds what a fixed one never would
        print_blob=True,
    )
    settings.load_profile(counts.TIER)
    config.stash[FIGURES] = {}
    if not _is_worker(config):
        config.stash[GUARD] = host.SettingsGuard()
        config.pluginmanager.register(ledger_for_this_run(), "skip-ledger")
    # It keeps a pipe open for good once a process is spawned: opened now, that is no test's leak.
    resource_tracker.ensure_running()
    # So does the C core at its first signal.
    with Event.create() as event:
        event.signal()
    _interrupt_on_termination()
    _heed_the_keyboard()


def _is_worker(config: pytest.Config) -> bool:
    """Whether this process runs its share of the tests for another one, which reports them: pytest-xdist."""
    return hasattr(config, "workerinput")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker is done: its figures are the run's. One that died has none."""
    node.config.stash[FIGURES].update(getattr(node, "workeroutput", {}).get("figures", {}))


TOGETHER = {
    "memory": ("tests/zones/", "tests/device/", "tests/machine/", "tests/snapshot/", "tests/coredump/"),
    "machines": ("tests/peers/", "tests/boot/", "tests/linux/"),
    "signals": ("tests/connection/test_event.py",),
}
"""What runs in one process, one test after the other: what counts the host's pages to the byte, as one test may switch
how large they are; what starts machines of other people's, each of which keeps a processor busy; and what takes all of
the host's asynchronous I/O, or needs some."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling  # noqa: PLC0415

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return next((name for name, folders in TOGETHER.items() if nodeid.startswith(folders)), nodeid)

    return Scheduling(config, log)


def _interrupt_on_termination() -> None:
    """SIGTERM and SIGHUP end a run as Ctrl-C does, so that what it changed is put back. Forked children just die."""
    runner = os.getpid()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def stop(number: int, _frame: FrameType | None) -> None:
        if os.getpid() == runner:
            raise KeyboardInterrupt
        signal.signal(number, before[signal.Signals(number)])
        os.kill(os.getpid(), number)

    for number in before:
        signal.signal(number, stop)


def _heed_the_keyboard() -> None:
    """What a shell runs in the background ignores these, and so would all that the tests start."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_report_header(config: pytest.Config) -> list[str]:
    if _is_worker(config):
        return []
    watches = config.stash[GUARD].watches
    return [
        f"tier: {counts.TIER}",
        f"seed: {config.option.hypothesis_seed} (repeat with --hypothesis-seed={config.option.hypothesis_seed})",
        f"kernel settings: {'watched' if watches else 'not watched, since another run is changing them'}",
        *(f"{name} = {value:,}" for name, value in counts.all_counts().items()),
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if counts.TIER != "quick" or any("::" in argument for argument in config.args):
        return
    left = [item for item in items if item.get_closest_marker("long")]
    if left:
        config.stash[FIGURES]["tests that are left to CI, as they take long"] = len(left)
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("long")]


def pytest_collection_finish() -> None:
    # Thousands of tests are objects that stay to the end: the garbage collector, which the look for leaks calls, need
    # not go through them each time.
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    for need in host.PROBES:
        if item.get_closest_marker(need) and (reason := host.missing(need)):
            pytest.skip(f"{need}: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


# Last, that is, after the fixtures that outlive a test have put back what they changed.
@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _is_worker(session.config):
        session.config.workeroutput["figures"] = session.config.stash[FIGURES]  # type: ignore[attr-defined]
        return
    found = session.config.stash[CHANGED_SETTINGS] = session.config.stash[GUARD].restore()
    if found and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if found := config.stash.get(CHANGED_SETTINGS, []):
        terminalreporter.write_sep("=", "a test left kernel settings changed; they are put back", red=True)
        for line in found:
            terminalreporter.write_line(line, red=True)
    recorded = config.stash[FIGURES]
    figures: dict[str, object] = {"tier": counts.TIER, "seed": config.option.hypothesis_seed}
    if counts.TIER == "soak":
        figures |= counts.all_counts()
    figures |= recorded
    terminalreporter.section("figures")
    for name, value in figures.items():
        terminalreporter.write_line(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    before = Holdings()
    yield
    # The traceback of a failed test holds on to all that its frames held.
    if not request.node.stash.get(FAILED, False) and (leaks := before.leaks()):
        pytest.fail("the test leaks:\n" + "\n".join(leaks), pytrace=False)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(f"{request.config.option.hypothesis_seed} {request.node.nodeid}")


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    return request.config.stash[FIGURES].__setitem__


@pytest.fixture
def hugepages() -> Iterator[Callable[[int, int], host.HugePagePool]]:
    with ExitStack() as restore:

        def reserve(page_size: int, count: int) -> host.HugePagePool:
            pool = host.HugePagePool(page_size)
            if reason := host.unwritable(pool.directory / "nr_hugepages"):
                pytest.skip(f"needs_hugetlb: {reason}")
            try:
                restore.enter_context(pool.with_free(count))
            except LookupError as shortage:
                pytest.skip(str(shortage))
            return pool

        yield reserve


@pytest.fixture
def ksm() -> Iterator[host.Ksm]:
    if reason := host.missing("needs_ksm"):
        pytest.skip(f"needs_ksm: {reason}")
    with host.Ksm().running() as running:
        yield running


@pytest.fixture
def shmem_thp() -> Iterator[Callable[[str], None]]:
    if reason := host.missing("needs_thp"):
        pytest.skip(f"needs_thp: {reason}")
    with ExitStack() as restore:
        yield lambda mode: restore.enter_context(host.changed(host.SHMEM_THP, mode))
