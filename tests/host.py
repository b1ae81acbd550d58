"""What the tests ask of the host: kernel settings that they change for a while, and probes for what may be missing.

A setting is changed through `changed`, which puts it back. `SettingsGuard` is the second line: it compares every
setting that a test may touch, at the run's end, with what it was at its start, so that no way out of a test leaves
the machine changed, and no test leaves it changed unseen. The settings are the whole machine's, so `settings_lock`
lets one run at a time change them.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import mmap
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import ClassVar

from vhost_user import _native
from vhost_user.mapping import PAGE_SIZE, Mapping
from vhost_user.units import ByteCount, format_size

KERNEL_MM = Path("/sys/kernel/mm")
HUGEPAGES = KERNEL_MM / "hugepages"
KSM = KERNEL_MM / "ksm"
THP = KERNEL_MM / "transparent_hugepage"
SHMEM_THP = THP / "shmem_enabled"
COMPACT_MEMORY = Path("/proc/sys/vm/compact_memory")

PEERS_SCRIPT = Path(__file__).resolve().parents[1] / "scripts/peers"
PEERS_TREE = PEERS_SCRIPT.parents[1] / ".cache/peers/root"

WATCHED = (
    "/sys/kernel/mm/hugepages/*/nr_hugepages",
    "/sys/kernel/mm/hugepages/*/nr_overcommit_hugepages",
    "/sys/kernel/mm/ksm/advisor_mode",
    "/sys/kernel/mm/ksm/merge_across_nodes",
    "/sys/kernel/mm/ksm/pages_to_scan",
    "/sys/kernel/mm/ksm/run",
    "/sys/kernel/mm/ksm/sleep_millisecs",
    "/sys/kernel/mm/ksm/smart_scan",
    "/sys/kernel/mm/ksm/use_zero_pages",
    "/sys/kernel/mm/transparent_hugepage/defrag",
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
    "/proc/sys/vm/max_map_count",
    "/proc/sys/vm/overcommit_memory",
    "/proc/sys/vm/overcommit_ratio",
    "/proc/sys/vm/unprivileged_userfaultfd",
)


def setting(path: Path) -> str:
    """A setting's value; of a choice such as `always [madvise] never`, the chosen word."""
    text = path.read_text()
    chosen = re.search(r"\[(\S+)\]", text)
    return chosen[1] if chosen else text.strip()


class SettingsLock:
    """Held by one process of the machine at a time, and as often as it likes by that one."""

    def __init__(self, directory: Path = KERNEL_MM) -> None:
        self._directory = directory
        self._fd = -1
        self._depth = 0

    def acquire(self, *, wait: bool = True) -> bool:
        """Whether it is held now; it is, or this call waits until it is, unless told not to."""
        if self._depth == 0:
            fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BaseException as error:
                os.close(fd)
                if isinstance(error, BlockingIOError):
                    return False
                raise
            self._fd = fd
        self._depth += 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            # Closing alone would leave the lock with a forked child.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


settings_lock = SettingsLock()


@contextmanager
def changed(path: Path, value: object) -> Iterator[None]:
    """A setting has `value` for the length of a `with`. OSError where the kernel refuses it, and nothing changed."""
    with settings_lock:
        before = setting(path)
        try:
            path.write_text(str(value))
            yield
        finally:
            if setting(path) != before:
                path.write_text(before)


class SettingsGuard:
    """Remembers all WATCHED settings when made; `restore` puts back what differs and says what it was.

    Where another run is changing settings just then, what they were can't be known: `watches` is false.
    """

    def __init__(self) -> None:
        self._before: dict[Path, str] = {}
        self.watches = settings_lock.acquire(wait=False)
        if self.watches:
            paths = (path for pattern in WATCHED for path in Path("/").glob(pattern.removeprefix("/")))
            self._before = {path: setting(path) for path in paths}
            settings_lock.release()

    def restore(self) -> list[str]:
        # Without the lock first: to wait for another run, only to see that all is well, would cost minutes.
        if not self._differing():
            return []
        with settings_lock:
            found = []
            for path, now in self._differing():
                found.append(f"{path} was {self._before[path]} before the run and {now} after it")
                path.write_text(self._before[path])
            return found

    def _differing(self) -> list[tuple[Path, str]]:
        now = ((path, setting(path)) for path in self._before)
        return [(path, value) for path, value in now if value != self._before[path]]


class HugePagePool:
    """The kernel's pool of huge pages of one size, in bytes."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.directory = HUGEPAGES / f"hugepages-{page_size >> 10}kB"

    def counter(self, name: str) -> int:
        return int((self.directory / name).read_text())

    @property
    def free(self) -> int:
        """Pages that nobody holds and nobody has reserved."""
        return self.counter("free_hugepages") - self.counter("resv_hugepages")

    @contextmanager
    def with_free(self, count: int) -> Iterator[None]:
        """Exactly `count` pages are free. LookupError, and the pool as it was, where memory is too fragmented."""
        with settings_lock:
            target = self.counter("nr_hugepages") - self.free + count
            with changed(self.directory / "nr_hugepages", target):
                if self.free < count:
                    COMPACT_MEMORY.write_text("1")
                    (self.directory / "nr_hugepages").write_text(str(target))
                for _ in range(100):
                    if self.free <= count:
                        break
                    # Memory of a process that has ended may come back late, by descriptors that were on their way.
                    target = self.counter("nr_hugepages") - self.free + count
                    (self.directory / "nr_hugepages").write_text(str(target))
                    time.sleep(0.01)
                if self.free != count:
                    size = format_size(self.page_size)
                    raise LookupError(f"the host could not gather {count} huge pages of {size}: it found {self.free}")
                yield


class Ksm:
    """The kernel's merging of same pages, running fast for the length of a `with`, and its counters."""

    # Enough to go over the memory of a test in one pass of a few milliseconds; no adviser or heuristic in the way.
    SETTINGS: ClassVar[dict[str, object]] = {
        "advisor_mode": "none",
        "smart_scan": 0,
        "pages_to_scan": 20_000,
        "sleep_millisecs": 2,
        "run": 1,
    }

    @contextmanager
    def running(self) -> Iterator[Ksm]:
        with ExitStack() as restore:
            restore.enter_context(settings_lock)
            if self.counter("run") == 0:
                # A stopped KSM still counts the pages of processes that have ended since: 2 makes it forget them.
                (KSM / "run").write_text("2")
                (KSM / "run").write_text("0")
            for name, value in self.SETTINGS.items():
                if (KSM / name).exists():
                    restore.enter_context(changed(KSM / name, value))
            yield self

    def counter(self, name: str) -> int:
        return int((KSM / name).read_text())

    def wait_for_full_scans(self, passes: int = 2, seconds: float = 30) -> None:
        """Until the kernel has been over all mergeable memory; two passes find all pairs of pages that don't change."""
        target, deadline = self.counter("full_scans") + passes, time.monotonic() + seconds
        while self.counter("full_scans") < target:
            if time.monotonic() > deadline:
                raise TimeoutError(f"KSM made fewer than {passes} full scans in {seconds} s")
            time.sleep(0.01)


def unwritable(path: Path) -> str | None:
    """Why a setting can't be changed, or None."""
    if not path.exists():
        return f"the kernel has no {path}"
    return None if os.access(path, os.W_OK) else f"{path} can't be written"


def _no_mbind() -> str | None:
    mpol_default = 0
    with Mapping(ByteCount(PAGE_SIZE), mmap.MAP_PRIVATE) as page:
        try:
            _native.mbind(page.address, page.size, mpol_default, [])
        except OSError as error:
            return f"mbind: {error.strerror}"
    return None


def _no_userfaultfd() -> str | None:
    number = {"x86_64": 323, "aarch64": 282, "riscv64": 282}.get(platform.machine())
    if number is None:
        return f"the number of the system call userfaultfd on {platform.machine()} is not known here"
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(ctypes.c_long(number), ctypes.c_int(os.O_CLOEXEC))
    if fd < 0:
        return f"userfaultfd: {os.strerror(ctypes.get_errno())}"
    os.close(fd)
    return None


def _no_peers() -> str | None:
    made_by = PEERS_TREE / "made-by"
    if not made_by.exists():
        return "run scripts/peers"
    print_of_script = hashlib.sha256(PEERS_SCRIPT.read_bytes()).hexdigest()
    return None if made_by.read_text().strip() == print_of_script else "run scripts/peers: it has changed since"


PROBES: dict[str, Callable[[], str | None]] = {
    "needs_hugetlb": lambda: unwritable(HUGEPAGES / "hugepages-2048kB/nr_hugepages"),
    "needs_ksm": lambda: unwritable(KSM / "run"),
    "needs_mbind": _no_mbind,
    "needs_peers": _no_peers,
    "needs_thp": lambda: unwritable(SHMEM_THP),
    "needs_userfaultfd": _no_userfaultfd,
}
"""By marker: None, or why a test with this marker can't run on this machine."""


@cache
def missing(need: str) -> str | None:
    """Why what the marker `need` stands for can't be had here, or None."""
    return PROBES[need]()
