"""Each tier has its count, and no CI run does less than a tenth of a soak."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import counts

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("tier", "expected"), [("quick", 1), ("ci", 20), ("soak", 200)])
def test_tier_chooses_the_count(monkeypatch: pytest.MonkeyPatch, tier: str, expected: int) -> None:
    monkeypatch.setattr(counts, "TIER", tier)
    assert counts.count(quick=1, ci=20, soak=200) == expected


@pytest.mark.parametrize(
    ("quick", "ci", "soak"),
    [(2, 1, 10), (1, 3, 2), (1, 1, 11)],
    ids=["quick above ci", "ci above soak", "ci below a tenth of soak"],
)
def test_tiers_that_do_not_rise_are_refused(quick: int, ci: int, soak: int) -> None:
    with pytest.raises(ValueError, match=f"quick={quick}, ci={ci}, soak={soak}: need"):
        counts.count(quick=quick, ci=ci, soak=soak)


def test_every_constant_is_listed() -> None:
    listed = counts.all_counts()
    assert listed["REQUESTS_PER_BACKING"] == counts.REQUESTS_PER_BACKING
    assert {"TIER", "TIERS"} & set(listed) == set()


def test_full_count_of_random_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTIO_MEM_TIER", "soak")
    program = "from tests.counts import REQUESTS_PER_BACKING; print(REQUESTS_PER_BACKING)"
    assert subprocess.check_output([sys.executable, "-c", program], cwd=ROOT) == b"100000\n"


def test_unknown_tier_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTIO_MEM_TIER", "slow")
    run = subprocess.run(
        [sys.executable, "-c", "import tests.counts"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr == "VIRTIO_MEM_TIER=slow: no such tier; choose one of quick, ci, soak\n"
