"""The full barriers between a store and the look that follows it, raced against on real processors."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import counts

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "vhost_user" / "csrc"


def test_nobody_sleeps_while_the_other_waits(tmp_path: Path, figure: Callable[[str, object], None]) -> None:
    """Without ring.c's barriers x86-64 loses some of a thousand kicks, and some of a hundred thousand interrupts."""
    compiler = shutil.which("cc")
    if compiler is None or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs a C compiler and two processors")
    program = tmp_path / "notification_race"
    sources = [
        HERE / "notification_race.c",
        *(CSRC / name for name in ("guard.c", "memory.c", "ring.c", "split.c", "packed.c")),
    ]
    subprocess.run([compiler, "-std=gnu11", "-O2", "-I", CSRC, "-o", program, *sources, "-pthread"], check=True)
    ran = subprocess.run([program, str(counts.NOTIFICATION_RACES)], capture_output=True, text=True, check=True)
    no_kick, both_kick, no_interrupt, both_interrupt = map(int, ran.stdout.split())
    assert (no_kick, no_interrupt) == (0, 0)
    figure("races of two sides going to sleep in which both noticed", both_kick + both_interrupt)
