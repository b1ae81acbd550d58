"""Which skips fail a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.skips import Expected, Judge, Skip, load_expected

ANYWHERE = Expected(why="rare hardware", reason="*1G*", allowed_in_ci=True)
NOT_IN_CI = Expected(why="only root may", test="tests/zones/*")
AS_ROOT = Expected(why="a large download", reason="needs_peers: *", allowed_as_root=True)
LIST = [ANYWHERE, NOT_IN_CI, AS_ROOT]

PLAIN = {"ci": False, "root": False}
CI = {"ci": True, "root": False}
ROOT = {"ci": False, "root": True}
ROOT_IN_CI = {"ci": True, "root": True}

RARE = Skip("tests/a.py::test_b", "no 1G pages")
ZONE = Skip("tests/zones/test_a.py::test_b", "may not")
UNKNOWN = Skip("tests/a.py::test_b", "felt like it")
KSM = Skip("tests/zones/test_a.py::test_b", "no 1G pages", frozenset({"needs_ksm"}))
PEERS = Skip("tests/peers/test_a.py::test_b", "needs_peers: run scripts/peers", frozenset({"needs_peers"}))
BOTH = frozenset({"needs_peers", "needs_hugetlb"})
FOR_PEERS = Skip("tests/boot/test_a.py::test_b", "needs_peers: run scripts/peers", BOTH)
FOR_HUGE_PAGES = Skip("tests/boot/test_a.py::test_b", "needs_hugetlb: no pool", BOTH)
FOR_EITHER = Skip("tests/boot/test_a.py::test_b", "the host could not gather 4 huge pages", BOTH)
IN_A_FIXTURE = Skip("tests/peers/test_a.py::test_b", "needs_peers: run scripts/peers")


@pytest.mark.parametrize(
    ("skip", "where", "objection"),
    [
        (RARE, PLAIN, None),
        (RARE, CI, None),
        (RARE, ROOT, None),
        (ZONE, PLAIN, None),
        (ZONE, CI, "expected, but not in CI: only root may"),
        (ZONE, ROOT, "expected, but not as root: only root may"),
        (UNKNOWN, PLAIN, None),
        (UNKNOWN, CI, "not expected; if it is right in CI, list it in tests/expected_skips.toml"),
        (UNKNOWN, ROOT, "not expected; if it is right as root, list it in tests/expected_skips.toml"),
        (KSM, PLAIN, None),
        (KSM, CI, None),
        (KSM, ROOT, "root may not skip what needs_ksm"),
        (PEERS, PLAIN, None),
        (PEERS, ROOT, None),
        (PEERS, CI, "CI may not skip what needs_peers"),
        (PEERS, ROOT_IN_CI, "CI may not skip what needs_peers"),
        (FOR_PEERS, ROOT, None),
        (FOR_PEERS, CI, "CI may not skip what needs_peers"),
        (FOR_PEERS, ROOT_IN_CI, "CI may not skip what needs_peers"),
        (FOR_HUGE_PAGES, ROOT, "root may not skip what needs_hugetlb"),
        (FOR_HUGE_PAGES, ROOT_IN_CI, "root may not skip what needs_hugetlb"),
        (FOR_EITHER, ROOT, "root may not skip what needs_hugetlb"),
        (IN_A_FIXTURE, ROOT, None),
        (IN_A_FIXTURE, ROOT_IN_CI, "expected, but not in CI: a large download"),
    ],
)
def test_judgement(skip: Skip, where: dict[str, bool], objection: str | None) -> None:
    assert Judge(LIST, **where).objection(skip) == objection


def test_an_entry_without_a_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a pattern"):
        Expected(why="everything")


def test_the_committed_list_loads_and_says_why() -> None:
    assert all(entry.why for entry in load_expected())


@pytest.mark.parametrize(
    ("reason", "in_ci"),
    [
        ("needs_hugetlb: the kernel has no /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", True),
        ("the host could not gather 2 huge pages of 1G: it found 1", True),
        ("the host could not gather 2 huge pages of 2M: it found 1", False),
        ("needs_ksm: /sys/kernel/mm/ksm/run can't be written", False),
        ("needs_peers: run scripts/peers", False),
    ],
)
def test_what_the_committed_list_lets_pass_in_ci(reason: str, in_ci: bool) -> None:
    judge = Judge(load_expected(), ci=True, root=False)
    assert (judge.objection(Skip("tests/a.py::test_b", reason)) is None) == in_ci


def test_a_misspelt_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.toml").write_text('[[skip]]\nreason = "x"\nwhy = "y"\nallowed_in_cli = true\n')
    with pytest.raises(TypeError, match="allowed_in_cli"):
        load_expected(tmp_path / "list.toml")
